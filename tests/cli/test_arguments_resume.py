"""`resume=DIR`: the run's stored overrides, the new ones after them."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from dsv3.launch.run_dir import OVERRIDES_FILE
from tests.harness.commands import PlannedCommand
from tests.harness.outcome import refused
from tests.harness.runs import StoredRun

pytestmark = pytest.mark.slow


def test_stored_overrides_come_back_and_new_ones_win(planned: PlannedCommand, stored: StoredRun) -> None:
    directory = stored.store("train.steps=50", "optimizer.lr=1e-2", "++train.log_every=4")
    config = planned.run(f"resume={directory}", "optimizer.lr=5e-3", "train.log_every=5").job.config
    assert (config.train.steps, config.optimizer.lr, config.train.log_every) == (50, 5e-3, 5)
    assert config.run.resume


def test_a_group_chosen_anew_replaces_the_stored_choice(planned: PlannedCommand, stored: StoredRun) -> None:
    directory = stored.store("schedule=wsd", "recompute=full", "logger=none")
    job = planned.run(f"resume={directory}", "schedule=steps", "recompute=none").job
    assert type(job.config.schedule).__name__ == "StepsConfig"
    assert job.config.recompute.mode.name == "none"
    assert type(job.config.logger).__name__ == "NoLoggerConfig"
    assert sum(override.startswith("schedule=") for override in job.overrides) == 1


def test_what_counted_for_one_start_only_is_dropped(planned: PlannedCommand, stored: StoredRun) -> None:
    once = ("train.stop_after=3", "run.allow_targets=[os]", "run.dir=/gone")
    job = planned.run(f"resume={stored.store(*once)}").job
    config = job.config
    assert config.train.stop_after is None
    assert config.run.allow_targets == []
    assert not {"run.allow_targets=[os]", "run.dir=/gone"} & set(job.overrides)
    assert job.run_dir == stored.directory


def test_the_schedules_end_is_kept_when_the_run_is_made_longer(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored.store("train.steps=50", total_steps=50)
    config = planned.run(f"resume={directory}", "train.steps=80").job.config
    assert (config.train.steps, config.schedule.total_steps) == (80, 50)
    typed = planned.run(f"resume={directory}", "schedule.total_steps=90").job.config
    assert typed.schedule.total_steps == 90


def test_a_resumed_run_can_be_resumed_again(planned: PlannedCommand, stored: StoredRun) -> None:
    first = planned.run(f"resume={stored.store('train.steps=50')}", "optimizer.lr=7e-3").job
    again = planned.run(f"resume={stored.store(*first.overrides)}").job
    assert again.config == first.config
    assert again.overrides == first.overrides


@pytest.mark.parametrize("form", ["{}", "'{}'"])
def test_a_directory_named_from_elsewhere_is_found(
    planned: PlannedCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    run = StoredRun(tmp_path / "x, y=$z (1)" / "run")
    run.store("train.steps=50")
    monkeypatch.chdir(run.directory.parent)
    job = planned.run("resume=" + form.format("run")).job
    assert job.run_dir == run.directory
    assert job.config.train.steps == 50


@pytest.mark.parametrize("name", ["overrides.yaml", "config.yaml"])
@pytest.mark.parametrize("text", ["{", "3", "- [1]", "schedule: {total_steps: many}"])
def test_damaged_files_are_named(planned: PlannedCommand, stored: StoredRun, name: str, text: str) -> None:
    directory = stored.store("train.steps=50")
    (directory / name).write_text(text)
    outcome = planned.run(f"resume={directory}")
    assert outcome.code == 2
    assert name in outcome.err
    assert "Traceback" not in outcome.err


def test_a_run_begun_from_a_checkpoint_that_is_gone_keeps_its_model(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    """The model came from the checkpoint then: no override names it."""
    directory = stored.store("model.dim=64")
    stored.change(checkpoint__load="/gone")
    (directory / OVERRIDES_FILE).write_text(yaml.safe_dump(["checkpoint.load=/gone"]))
    config = planned.run(f"resume={directory}").job.config
    assert config.model.dim == 64
    assert config.checkpoint.load == "/gone"


CHANGES: dict[str, list[str]] = {
    "model.dim=96": ["model.dim=128", "not 96"],
    "model=16b": ["model.", "a run keeps its model"],
    "train.sequence_length=128": ["train.sequence_length=64", "not 128"],
    "train.seed=5": ["train.seed=4", "not 5"],
    "data.held_out=0.1": ["data.held_out=0.03", "not 0.1"],
    "data.shuffle=false": ["data.shuffle=True", "not False"],
    "data=text data.path=/tmp": ["data._target_", "TextData"],
    "tokenizer.vocab_size=300": ["tokenizer.vocab_size=4096", "not 300"],
    "train.steps=8": ["train.steps=8", "use 9 or more"],
    "checkpoint.load=/nope": ["resume=", "checkpoint.load=", "give one"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_make_it_another_run_is_refused(
    planned: PlannedCommand, stored: StoredRun, change: str
) -> None:
    directory = stored.store("train.steps=50", "train.seed=4", "train.sequence_length=64")
    (directory / "checkpoints" / "step-9").mkdir(parents=True)
    (directory / "checkpoints" / "step-9" / ".metadata").touch()
    outcome = planned.run(f"resume={directory}", *change.split())
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    for words in CHANGES[change]:
        assert words in outcome.err
    assert planned.run(f"resume={directory}", "train.steps=9").code == 0


def test_a_step_that_never_was_one_is_in_nobodys_way_and_is_told(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored.store("train.steps=50")
    (directory / "checkpoints").mkdir()
    os.mkfifo(directory / "checkpoints" / "step-99")
    outcome = planned.run(f"resume={directory}", "train.steps=60")
    assert outcome.code == 0, outcome.err
    (told,) = [note for note in outcome.job.notes if "step-99" in note]
    subprocess.run(shlex.split(told.partition("; to remove: ")[2]), check=True)
    assert not list((directory / "checkpoints").iterdir())


def test_a_quoted_directory_is_read_as_hydra_reads_quotes(planned: PlannedCommand, tmp_path: Path) -> None:
    run = StoredRun(tmp_path / "it's")
    run.store()
    escaped = str(run.directory).replace("'", "\\'")
    assert planned.run(f"resume='{escaped}'").job.run_dir == run.directory


def test_a_home_directory_is_found(
    planned: PlannedCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = StoredRun(tmp_path / "runs" / "first").store()
    assert planned.run("resume=~/runs/first").job.run_dir == directory
    assert planned.run("run.dir=~/runs/next").job.run_dir == directory.parent / "next"
    assert vars(planned.run("task=generate", "task.prompt=~/x").job.config.task)["prompt"] == "~/x"


def test_what_is_no_run_is_told_apart_with_what_to_type(planned: PlannedCommand, tmp_path: Path) -> None:
    run = StoredRun(tmp_path / "a sweep" / "0").store()
    StoredRun(tmp_path / "a sweep" / "1").store()
    step = run / "checkpoints" / "step-40"
    released = tmp_path / "released"
    for directory, file in ((step, ".metadata"), (released, "config.json")):
        directory.mkdir(parents=True)
        (directory / file).write_text("{}")
    goes_on = f"'resume={run}'"
    told = {
        tmp_path / "nowhere": ["does not exist"],
        run.parent: ["holds runs", goes_on, "there are 0, 1"],
        step: ["lies in a run", goes_on, f"'checkpoint.load={step}' begins a new run"],
        step.parent: ["lies in a run", goes_on],
        released: ["HuggingFace checkpoint", f"checkpoint.load=hf:{released} begins a new run"],
    }
    for directory, words in told.items():
        refused(planned.run(f"resume={directory}"), f"resume={directory} ", *words)
    assert planned.run(f"resume={run}").code == 0
