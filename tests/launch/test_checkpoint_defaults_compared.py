"""Every number that a checkpoint stores is compared with the configured one, wherever its weights come in."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from dsv3.config.convergence import shown
from dsv3.config.model import ModelConfig
from dsv3.config.model_difference import model_differences, model_numbers
from dsv3.config.root import Config
from dsv3.config.strict import strict, to_yaml
from dsv3.config.task import (
    EvaluateTaskConfig,
    GenerateTaskConfig,
    PlanTaskConfig,
    TaskConfig,
    TrainTaskConfig,
    VerifyTaskConfig,
)
from dsv3.convert.request import prepare_conversion
from dsv3.errors import UserError
from dsv3.hf.config_writer import config_json
from dsv3.launch.checkpoint_defaults import Composition, described_model, stored_model_notes
from dsv3.launch.run_dir import check_same_run
from dsv3.library import compose as compose_for_library
from dsv3.programs import CONVERT
from tests.config.test_model_difference import KEYS, MODEL, NOT_COMPARED, changed
from tests.harness.commands import PlannedCommand, run_here
from tests.harness.composing import compose
from tests.harness.outcome import refused
from tests.harness.tiny import MODEL as TINY

STORED = replace(MODEL, moe=replace(MODEL.moe, top_k=1, num_groups=2, top_k_groups=1), norm_eps=2e-6)
"""The model of the checkpoints. Each of its numbers may be doubled."""

Entrance = Callable[[ModelConfig, Sequence[str]], Sequence[str]]
"""Takes the configured model and what is typed beside; returns the lines that are told."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DCP, a HuggingFace checkpoint and a run, each of which only describes itself."""
    folder = tmp_path_factory.mktemp("stored")
    for name in ("dcp", "hf", "run"):
        (folder / name).mkdir()
    (folder / "dcp" / ".metadata").write_bytes(b"")
    (folder / "dcp" / "model.yaml").write_text(yaml.safe_dump(to_yaml(STORED)))
    (folder / "hf" / "config.json").write_text(json.dumps(config_json(STORED, "bfloat16")))
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"model": to_yaml(STORED)}))
    return folder


def by_train(
    config: Config, task: TaskConfig, load: str | None, here: ModelConfig, typed: Sequence[str]
) -> Any:
    """Compare as train.py does."""
    loading = replace(config.checkpoint, load=load)
    config = replace(config, model=here, task=task, checkpoint=loading)
    return stored_model_notes(config, Composition(["model=debug", *typed]))


def by_convert(
    capsys: pytest.CaptureFixture[str], composed: DictConfig, here: ModelConfig, typed: Sequence[str]
) -> Any:
    """Compare as convert.py does."""
    composed.model = OmegaConf.structured(here)
    capsys.readouterr()
    prepare_conversion(composed, Composition(["model=debug", *typed], root="convert"))
    return capsys.readouterr().err.splitlines()


def conversion(direction: str, source: Path) -> DictConfig:
    """Return the composed config of a conversion."""
    return compose([f"direction={direction}", f"input={source}", "output=out"], "convert")


@pytest.fixture
def entrances(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Entrance]:
    """Every place where weights and a configured model meet; a resume has its own rule."""
    read = cache(described_model)  # the files stay as they are
    monkeypatch.setattr("dsv3.launch.checkpoint_defaults.described_model", read)
    monkeypatch.setattr("dsv3.convert.request.described_model", read)
    config: Config = strict(compose(["model=debug"]))
    dcp, hf = str(folder / "dcp"), f"hf:{folder / 'hf'}"
    tasks = [(TrainTaskConfig(), dcp), (PlanTaskConfig(), hf), (EvaluateTaskConfig(), dcp)]
    tasks.append((GenerateTaskConfig(), hf))
    places: dict[str, Entrance] = {
        task._target_: partial(by_train, config, task, load) for task, load in tasks
    }
    places["task=verify"] = partial(by_train, config, VerifyTaskConfig(path=str(folder / "hf")), None)
    for direction in ("hf_to_dcp", "hf_to_hf", "dcp_to_hf"):
        source = folder / ("dcp" if direction == "dcp_to_hf" else "hf")
        places[direction] = partial(by_convert, capsys, conversion(direction, source))
    return places


def test_every_number_is_compared_at_every_entrance(entrances: dict[str, Entrance]) -> None:
    assert len(entrances) == 8
    for place, compare in entrances.items():
        assert not compare(STORED, [])
        for key in KEYS:
            here = changed(STORED, key)
            if key in NOT_COMPARED:
                assert not compare(here, []), (place, key)
                continue
            (difference,) = model_differences(STORED, here)
            with pytest.raises(UserError) as error:
                compare(here, ["train.steps=3"])
            told = f"{key} is {shown(difference.a)} there, {shown(difference.b)} here"
            assert told in str(error.value), (place, key)
            typed = [f"{key}={shown(difference.b)}"]
            if key == "model.num_layers":
                typed.append("model.mtp_depths=2")
            (note,) = compare(here, typed)
            assert str(difference) in note, (place, key)


def test_a_resumed_run_keeps_every_number(folder: Path) -> None:
    config: Config = strict(compose(["model=debug"]))
    check_same_run(replace(config, model=STORED), folder / "run")
    for key in set(KEYS) - {"model.attention.kernel"}:
        here = changed(STORED, key)
        before, now = model_numbers(STORED)[key], model_numbers(here)[key]
        with pytest.raises(UserError, match="a run keeps its model") as error:
            check_same_run(replace(config, model=here), folder / "run")
        assert f"has {key}={before}, not {now}: " in str(error.value)


def test_init_std_of_a_preset_does_not_replace_that_of_the_input(folder: Path) -> None:
    composed = conversion("hf_to_hf", folder / "hf")
    for typed, expected in (("model=debug", STORED.init_std), ("model.init_std=0.5", 0.5)):
        composed.model = OmegaConf.structured(replace(STORED, init_std=0.5))
        model = prepare_conversion(composed, Composition([typed])).model
        assert model is not None
        assert model.init_std == expected


CHANGES = ["model.moe.top_k=1", "model.norm_eps=2e-06"]
"""The numbers on which STORED and the typed model differ, as the refusal names them."""


def named(planned: PlannedCommand, *arguments: str) -> str:
    """Run a command that has to be refused for the numbers of its model, and return the message."""
    outcome = planned.run("task=plan", *arguments)
    refused(outcome, "has other numbers than", "model.norm_eps is 2e-06 there, 1e-06 here")
    return outcome.err


def test_a_preset_over_a_checkpoint_is_refused_and_each_remedy_works(
    planned: PlannedCommand, folder: Path
) -> None:
    same = ["model.rope.scaling=yarn", "model.mtp_depths=2", "model.moe.num_groups=2"]
    same += ["model.moe.top_k_groups=1", "model.num_layers=4", f"checkpoint.load=hf:{folder / 'hf'}"]
    typed = ["model=debug", *TINY, *same]
    typed.remove("model.moe.top_k=2")
    message = named(planned, *typed)
    assert "model=debug" in message
    # Leave the preset out, or type what counts: the checkpoint's, or one's own.
    assert "leave model=debug out, or type each number that counts: " in message
    bare = [each for each in typed if each != "model=debug"]
    assert planned.run("task=plan", *bare).job.config.model.norm_eps == STORED.norm_eps
    takes = planned.run("task=plan", *typed, *CHANGES)
    assert takes.job.config.model.moe.top_k == 1
    assert not [note for note in takes.job.notes if "other numbers" in note]
    keeps = planned.run("task=plan", *typed, "model.moe.top_k=1", "model.norm_eps=1e-06").job
    assert keeps.config.model.norm_eps == 1e-6
    (note,) = [note for note in keeps.notes if "other numbers" in note]
    assert "as typed: model.norm_eps 2e-06 -> 1e-06" in note


def test_a_number_of_an_experiment_is_refused_until_it_is_typed(
    planned: PlannedCommand, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text("# @package _global_\nmodel: {norm_eps: 1e-06}\n")
    load = [f"checkpoint.load={folder / 'dcp'}", f"--config-dir={tmp_path}", "experiments=mine"]
    message = named(planned, *load)
    assert "type the number that counts: model.norm_eps=2e-06 takes the checkpoint's" in message
    assert "experiments=mine" in message
    for value in ("2e-06", "1e-06"):
        job = planned.run("task=plan", *load, f"model.norm_eps={value}").job
        assert job.config.model.norm_eps == float(value)


def test_a_checkpoint_that_does_not_say_which_model_it_is_is_told(
    planned: PlannedCommand, tmp_path: Path
) -> None:
    (tmp_path / ".metadata").write_bytes(b"")
    job = planned.run("task=plan", "model=debug", f"checkpoint.load={tmp_path}").job
    assert (
        f"checkpoint.load={tmp_path} does not say which model it is: names and shapes alone" in job.notes[0]
    )


def test_a_model_of_its_own_path_is_compared_with_the_input(
    here: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(STORED, norm_eps=1e-6)
    (tmp_path / "config.json").write_text(json.dumps(config_json(other, "bfloat16")))
    command = ["direction=hf_to_hf", f"input={folder / 'hf'}", "output=out", f"model.path={tmp_path}"]
    found = []

    def prepare(composed: Any) -> None:
        found.append(prepare_conversion(composed))

    assert run_here(CONVERT, command, prepare) == 2
    message = capsys.readouterr().err
    assert (
        f"input={folder / 'hf'} has other numbers than model.path={tmp_path}: model.norm_eps is 2e-06"
        in message
    )
    assert f"leave model.path={tmp_path} out" in message
    assert run_here(CONVERT, [*command, "model.norm_eps=1e-06"], prepare) == 0
    assert "model.norm_eps 2e-06 -> 1e-06" in capsys.readouterr().err
    assert run_here(CONVERT, [*command[:-1], "plan=true"], prepare) == 0
    assert [config.model and config.model.norm_eps for config in found] == [1e-6, 2e-6]


def test_the_library_compares_as_the_command_does(folder: Path) -> None:
    load = f"checkpoint.load={folder / 'dcp'}"
    with pytest.raises(UserError, match="has other numbers than model=debug"):
        compose_for_library(["model=debug", load])
    assert compose_for_library([load, "model.norm_eps=1e-6"]).model.norm_eps == 1e-6
