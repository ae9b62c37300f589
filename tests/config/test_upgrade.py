"""Configs that older code has stored in a run or a checkpoint are read by today's names."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from dsv3.config.accidents import AccidentsConfig, OnAlarm
from dsv3.config.convergence import learnt_values
from dsv3.config.overrides import split_override
from dsv3.config.strict import check_target
from dsv3.config.training import EVALUATE_TOKENS
from dsv3.config.upgrade import KEYS, TARGETS, upgrade_node, upgrade_override, upgrade_target
from dsv3.launch.checkpoint_defaults import read_model
from tests.harness.commands import PlannedCommand
from tests.harness.composing import compose
from tests.harness.runs import StoredRun

BEFORE_THE_ROOMS = [
    "dsv3.data.sources.StdlibData",
    "dsv3.data.sources.TextData",
    "dsv3.data.table.TokensData",
    "dsv3.data.tokenizer.LocalTokenizer",
    "dsv3.data.tokenizer.TrainedTokenizer",
    "dsv3.metrics.logger.ConsoleLogger",
    "dsv3.metrics.logger.NoLogger",
    "dsv3.metrics.tensorboard.TensorboardLogger",
    "dsv3.metrics.wandb.WandbLogger",
    "dsv3.model.transformer.Transformer",
    "dsv3.parallel.compile.Compile",
    "dsv3.parallel.context.ContextParallel",
    "dsv3.parallel.expert.ExpertParallel",
    "dsv3.parallel.fsdp.FullyShard",
    "dsv3.parallel.pipeline.Pipeline",
    "dsv3.parallel.recompute.Recompute",
    "dsv3.parallel.tensor.TensorParallel",
    "dsv3.precision.fp8.BlockFP8",
    "dsv3.tasks.compare.CompareTask",
    "dsv3.tasks.evaluate.EvaluateTask",
    "dsv3.tasks.generate.GenerateTask",
    "dsv3.tasks.plan.PlanTask",
    "dsv3.tasks.train.TrainTask",
    "dsv3.tasks.verify.VerifyTask",
    "dsv3.training.adamw.BF16MomentAdamW",
    "dsv3.training.schedule.DeepSeekV3",
    "dsv3.training.schedule.Steps",
    "dsv3.training.schedule.WarmupCosine",
    "dsv3.training.schedule.WarmupStableDecay",
    "torch.optim.AdamW",
]
"""Every `_target_` that a run could store before the modules moved into today's rooms."""


@pytest.mark.parametrize("target", [*BEFORE_THE_ROOMS, *TARGETS])
def test_every_class_of_a_stored_config_is_found_today(target: str) -> None:
    check_target(upgrade_target(target), "_target_")


def test_no_translation_leads_to_another() -> None:
    assert not set(TARGETS) & set(TARGETS.values())
    assert not set(KEYS) & set(KEYS.values())


def test_a_key_that_older_code_lacked_does_what_that_did() -> None:
    """It skipped any number of files that are no text."""
    node = {"data": {"_target_": "dsv3.data.sources.TextData", "path": "x"}}
    assert upgrade_node(node)["data"]["max_skipped"] == 1.0
    node["data"]["max_skipped"] = 0.2  # type: ignore[assignment]
    assert upgrade_node(node) == node


def test_nothing_else_is_touched() -> None:
    node = {
        "task": {"prompt": "dsv3.parallel.tensor.TensorParallel", "_target_": "os.system"},
        "smallest_world": 3,
        "list": [1, None, {"_target_": 7}],
    }
    assert upgrade_node(node) == node
    for override in ("task.prompt=dsv3.parallel.tensor.TensorParallel", "-m", "optimizer._target_=os.system"):
        assert upgrade_override(override) == override


@pytest.mark.parametrize(
    ("stored", "today"),
    [
        ("parallel.smallest_world=4", "parallel.min_world_size=4"),
        ("++parallel.smallest_world=4", "++parallel.min_world_size=4"),
        ("parallel={smallest_world:4,schedule:GPipe}", "parallel={min_world_size:4,schedule:GPipe}"),
        ("data._target_=dsv3.data.table.TokensData", "data._target_=dsv3.data.token_table.TokensData"),
        ("+data._target_='dsv3.data.table.TokensData'", "+data._target_='dsv3.data.token_table.TokensData'"),
        (
            "recompute={_target_:dsv3.parallel.recompute.Recompute}",
            "recompute={_target_:dsv3.parallel.activation_checkpoint.ActivationCheckpointing}",
        ),
        ("data._target_=dsv3.data.table.TokensDataX", "data._target_=dsv3.data.table.TokensDataX"),
        ("++train.evaluate_batches=null", "++train.evaluate_tokens=null"),
        ("train={evaluate_batches: null}", "train={evaluate_tokens: null}"),
        ("train={evaluate_batches:12,steps:3}", "train={steps:3}"),
        ("train={steps:3, evaluate_batches: 12}", "train={steps:3}"),
    ],
)
def test_an_override_is_translated_and_still_one(stored: str, today: str) -> None:
    assert upgrade_override(stored) == today
    assert split_override(today)


@pytest.mark.parametrize("stored", ["train.evaluate_batches=4", "train={evaluate_batches: 4}"])
def test_a_number_in_another_unit_is_no_longer_typed(stored: str) -> None:
    assert upgrade_override(stored) is None


def as_older_code_stored(node: Any) -> Any:
    """Undo the translation of a config, as if the code of before had written it."""
    targets = {new: old for old, new in TARGETS.items()}
    if isinstance(node, list):
        return [as_older_code_stored(item) for item in node]
    if not isinstance(node, dict):
        return targets.get(node, node) if isinstance(node, str) else node
    keys = {"min_world_size": "smallest_world"}
    return {keys.get(key, key): as_older_code_stored(value) for key, value in node.items()}


@pytest.mark.parametrize(
    "chosen",
    [
        (),
        ("parallel=full", "logger=tensorboard", "recompute=selective", "precision=fp8"),
        ("data=tokens", "data.path=ids.npy", "schedule=wsd", "logger=none"),
    ],
)
def test_a_config_survives_the_way_through_older_code(chosen: tuple[str, ...]) -> None:
    node = OmegaConf.to_container(compose(list(chosen)), enum_to_str=True)
    assert isinstance(node, dict)
    old = as_older_code_stored(node)
    assert old != node
    assert upgrade_node(old) == node


def test_a_run_that_older_code_stored_is_resumed(
    planned: PlannedCommand, stored: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3.launch.job.visible_gpus", list)
    directory = stored.store("parallel=fsdp", "parallel.min_world_size=4", "recompute=full", "logger=none")
    for name in ("config.yaml", "overrides.yaml"):
        file = directory / name
        text = file.read_text().replace("min_world_size", "smallest_world")
        file.write_text(yaml.safe_dump(as_older_code_stored(yaml.safe_load(text)), sort_keys=False))
    assert "dsv3.parallel.recompute.Recompute" in (directory / "config.yaml").read_text()
    assert "parallel.smallest_world=4" in (directory / "overrides.yaml").read_text()
    job = planned.run(f"resume={directory}").job
    assert job.plan.world_size == job.config.parallel.min_world_size == 4
    assert "parallel.min_world_size=4" in job.overrides


def test_a_resume_says_that_a_number_in_another_unit_became_todays_default(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored.store("logger=none")
    (directory / "overrides.yaml").write_text(
        yaml.safe_dump(["logger=none", "train.steps=300", "train.evaluate_batches=4"])
    )
    stored.change(train__evaluate_tokens=None, train__evaluate_batches=4)
    job = planned.run(f"resume={directory}").job
    assert job.config.train.evaluate_tokens == EVALUATE_TOKENS
    assert job.notes == [
        "counted otherwise in the run, only how it is computed: train.evaluate_batches=4; the default of "
        f"today, train.evaluate_tokens={EVALUATE_TOKENS}, takes its place"
    ]
    assert [each for each in job.overrides if "run." not in each] == ["logger=none", "train.steps=300"]
    job = planned.run(f"resume={directory}", "train.evaluate_tokens=5000").job
    assert job.notes == ["changes only how it is computed: train.evaluate_tokens absent -> 5000"]
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["train"]["evaluate_batches"] = None
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    job = planned.run(f"resume={directory}").job
    assert job.config.train.evaluate_tokens is None
    assert not [note for note in job.notes if note.startswith("counted otherwise")]


def test_the_tokens_of_a_run_that_older_code_stored_are_the_same_data(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored.store()
    file = directory / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["data"] |= {"_target_": "dsv3.data.table.TokensData", "path": "gone.npy"}
    file.write_text(yaml.safe_dump(config))
    outcome = planned.run(f"resume={directory}", "data=stdlib")
    assert outcome.code == 2
    assert "data._target_=dsv3.data.token_table.TokensData, not" in outcome.err


def test_the_model_of_a_checkpoint_that_older_code_stored_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "dsv3.model.old.Old", "dsv3.model.transformer.Transformer")
    model = OmegaConf.to_container(compose([]).model, enum_to_str=True)
    assert isinstance(model, dict)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({**model, "_target_": "dsv3.model.old.Old"}))
    assert read_model(tmp_path / "model.yaml")._target_ == "dsv3.model.transformer.Transformer"


def test_a_run_from_before_bad_numbers_were_skipped_behaves_and_counts_as_it_did() -> None:
    stored = {"train": {"steps": 5}}
    upgraded = upgrade_node(stored)
    accidents = AccidentsConfig(**upgraded["train"]["accidents"] | {"on_alarm": OnAlarm.tell})
    assert (accidents.skip, accidents.spike_factor, accidents.alarm_rise) == (False, math.inf, math.inf)
    assert learnt_values(upgraded) == learnt_values(stored)
    new = {"train": {"steps": 5, "accidents": {"skip": True}}}
    assert upgrade_node(new) == new
    assert learnt_values(new) == {"train.accidents.skip": True}
