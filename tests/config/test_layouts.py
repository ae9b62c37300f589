"""Degrees that fit the chosen model: conf/layouts adds them to a preset, and each fits its world."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dsv3.config.parallel import AXES, RecomputeMode
from dsv3.config.registry import CONF
from dsv3.errors import UserError
from dsv3.launch.job import Job, plan_job, world_size
from dsv3.planning.plan import Plan
from tests.config.test_choices import MODELS, PRESETS
from tests.harness.composing import strict_config

# What the preset of a model is made for, on GPUs of 80 GB, and the least recomputation that it needs there.
NEEDS = {
    "16b": dict.fromkeys(PRESETS, "none"),
    "moonlight_16b": dict.fromkeys(PRESETS, "none"),
    "236b": {**dict.fromkeys(PRESETS, "full"), "tp_ep": "none", "cp": "selective", "full": "selective"},
    "671b": {**dict.fromkeys(PRESETS, "full"), "tp_ep": "selective", "full": "selective"},
    "kimi_k2": {**dict.fromkeys(PRESETS, "full"), "tp_ep": "none", "full": "selective"},
}


def planned(*overrides: str) -> Job:
    return plan_job(strict_config(["task=plan", *overrides]), [])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", MODELS)
def test_a_layout_fits_the_gpus_it_is_made_for(model: str, preset: str) -> None:
    # Context parallelism of the large models is for long rows.
    length = ["train.sequence_length=32768"] if preset == "cp" and model in ("671b", "kimi_k2") else []
    chosen = ["task=plan", f"model={model}", f"parallel={preset}", "hardware=h800", "precision=bf16", *length]
    config = strict_config(chosen)

    def plan(mode: RecomputeMode) -> Plan:
        return plan_job(replace(config, recompute=replace(config.recompute, mode=mode)), []).plan

    fits = [mode.value for mode in RecomputeMode if plan(mode).fits]
    assert fits == list(RecomputeMode.__members__)[-len(fits) :]
    assert fits[0] == NEEDS[model][preset]
    # Whole nodes; and full recomputation leaves a tenth of the device for what no plan counts.
    full = plan(RecomputeMode.full)
    assert full.world_size % 8 == 0
    assert full.memory.total < 72e9


def test_layouts_are_those_of_the_known_models_and_presets() -> None:
    table = yaml.safe_load((CONF / "layouts.yaml").read_text())
    assert {model: set(presets) for model, presets in table.items()} == {
        model: set(PRESETS) for model in MODELS
    }
    for presets in table.values():
        for row in presets.values():
            # Degrees and the world they are made for: what else a run needs is not decided by its layout.
            assert row.keys() - {"world"} <= set(AXES)
            assert row["world"] >= 8


def test_the_layout_of_the_model_wins_over_the_preset_and_the_command_line_over_both() -> None:
    def tp(*overrides: str) -> object:
        return strict_config(["parallel=tp_ep", *overrides]).parallel.degrees.tp

    assert [tp(), tp("model=671b"), tp("model=671b", "parallel.degrees.tp=16")] == [2, 4, 16]
    degrees = strict_config(["parallel=pp", "model=671b", "parallel.degrees.ep=8"]).parallel.degrees
    assert (degrees.pp, degrees.ep) == (16, 8)


def test_an_experiment_that_chooses_model_and_preset_gets_their_layout(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from dsv3.config.registry import register

    register()
    for folder in CONF.iterdir():
        if folder.name != "experiments":
            (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "experiments").mkdir()
    lines = ["# @package _global_", "defaults:", "  - override /model: 671b", "  - override /parallel: pp"]
    (tmp_path / "experiments" / "big.yaml").write_text("\n".join(lines))
    lines += ["parallel:", "  degrees:", "    pp: 4"]
    (tmp_path / "experiments" / "own.yaml").write_text("\n".join(lines))
    with initialize_config_dir(str(tmp_path), version_base=None):
        for name, pp in (("big", 16), ("own", 4)):
            composed = compose("config", [f"experiments={name}"])
            assert (composed.parallel.degrees.pp, composed.parallel.degrees.ep) == (pp, 64)


@pytest.mark.parametrize(
    ("preset", "ranks"),
    [("none", 1), ("fsdp", 2), ("hsdp", 4), ("tp_ep", 4), ("pp", 2), ("cp", 2), ("full", 16)],
)
def test_the_debug_model_runs_under_every_preset_as_it_is(
    preset: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3.launch.job.visible_gpus", list)
    job = plan_job(strict_config([f"parallel={preset}"]), [])
    assert job.plan.world_size == ranks
    train = job.config.train
    assert (train.batch, train.length) == (8, 256)
    if preset == "tp_ep":
        assert (job.plan.degrees.tp, job.plan.degrees.ep) == (2, 4)


def test_every_axis_at_once_is_16_ranks_and_32_in_two_replicas() -> None:
    degrees = planned("parallel=full").plan.degrees
    assert list(degrees.to_json().values()) == [2, 1, 2, 2, 2, 4]
    twice = planned("parallel=full", "parallel.degrees.dp_replicate=2").plan.degrees
    assert (twice.world_size, twice.dp_replicate, twice.dp_shard) == (32, 2, 2)
    assert planned("parallel=full", "launch.world_size=64").plan.degrees.dp_replicate == 4


def test_auto_may_be_typed_for_any_axis() -> None:
    typed = [f"parallel.degrees.{axis}=auto" for axis in AXES]
    degrees = planned("parallel=fsdp", "launch.world_size=512", "model=671b", *typed).plan.degrees
    assert list(degrees.to_json().values()) == [2, 1, 32, 1, 8, 256]


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_batches_that_are_left_open_suit_the_schedule(schedule: str) -> None:
    chosen = ("parallel=pp", f"parallel.schedule={schedule}")
    shape = planned(*chosen).plan.shape
    assert shape.microbatch_size * shape.microbatches == 8
    large = planned(*chosen, "model=671b", "launch.world_size=2048").plan
    assert (large.shape.microbatches, large.degrees.data_parallel) == (4 * 16, 128)


def test_gpus_set_the_world_of_a_layout_that_can_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    def world(*overrides: str) -> int:
        return world_size(strict_config(list(overrides)))

    monkeypatch.setattr("dsv3.launch.job.visible_gpus", lambda: ["NVIDIA H100, 81559"] * 8)
    assert [world("parallel=fsdp"), world("parallel=none"), world("parallel=tp_ep")] == [8, 1, 8]
    assert world("parallel=fsdp", "parallel.degrees.dp_shard=4") == 4
    with pytest.raises(UserError, match=r"launch\.nproc=16, but this node has 8 GPUs"):
        world("parallel=full")


def test_rows_that_are_evaluated_are_cut_as_those_that_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.launch.job.visible_gpus", list)
    chosen = ["task=evaluate", "parallel=cp", "train.global_batch_size=3"]
    plan_job(strict_config([*chosen, "train.sequence_length=256"]), [])
    with pytest.raises(UserError, match=r"train\.sequence_length=254 is not a multiple of 4"):
        plan_job(strict_config([*chosen, "train.sequence_length=254"]), [])
