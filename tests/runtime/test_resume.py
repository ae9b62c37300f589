"""`resume=DIR`: the run's stored overrides, the new ones after them."""

from pathlib import Path

import pytest

from .commands import Commands
from .conftest import StoredRun


def test_stored_overrides_come_back_and_new_ones_win(commands: Commands, stored: StoredRun) -> None:
    directory = stored.store("train.steps=50", "optimizer.lr=1e-2", "+train.seed=4")
    config = commands.run(f"resume={directory}", "optimizer.lr=5e-3", "train.seed=5").job.config
    assert (config.train.steps, config.optimizer.lr, config.train.seed) == (50, 5e-3, 5)
    assert config.run.resume


def test_a_group_chosen_anew_replaces_the_stored_choice(commands: Commands, stored: StoredRun) -> None:
    directory = stored.store("schedule=wsd", "recompute=full", "logger=none")
    job = commands.run(f"resume={directory}", "schedule=steps", "recompute=none").job
    assert type(job.config.schedule).__name__ == "StepsConfig"
    assert job.config.recompute.mode.name == "none"
    assert type(job.config.logger).__name__ == "NoLoggerConfig"
    assert sum(override.startswith("schedule=") for override in job.overrides) == 1


def test_what_counted_for_one_start_only_is_dropped(commands: Commands, stored: StoredRun) -> None:
    once = ("train.stop_after=3", "run.allow_targets=[os]", "checkpoint.load=/gone", "run.dir=/gone")
    job = commands.run(f"resume={stored.store(*once)}").job
    config = job.config
    assert config.train.stop_after is None
    assert config.run.allow_targets == []
    assert config.checkpoint.load is None
    assert job.run_dir == stored.directory


def test_the_schedules_end_is_kept_when_the_run_is_made_longer(commands: Commands, stored: StoredRun) -> None:
    directory = stored.store("train.steps=50", total_steps=50)
    config = commands.run(f"resume={directory}", "train.steps=80").job.config
    assert (config.train.steps, config.schedule.total_steps) == (80, 50)
    typed = commands.run(f"resume={directory}", "schedule.total_steps=90").job.config
    assert typed.schedule.total_steps == 90


def test_a_resumed_run_can_be_resumed_again(commands: Commands, stored: StoredRun) -> None:
    first = commands.run(f"resume={stored.store('train.steps=50')}", "train.seed=7").job
    again = commands.run(f"resume={stored.store(*first.overrides)}").job
    assert again.config == first.config
    assert again.overrides == first.overrides


@pytest.mark.parametrize("form", ["{}", "'{}'"])
def test_a_directory_named_from_elsewhere_is_found(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    run = StoredRun(tmp_path / "x, y=$z (1)" / "run")
    run.store("train.steps=50")
    monkeypatch.chdir(run.directory.parent)
    job = commands.run("resume=" + form.format("run")).job
    assert job.run_dir == run.directory
    assert job.config.train.steps == 50


@pytest.mark.parametrize("name", ["overrides.yaml", "config.yaml"])
@pytest.mark.parametrize("text", ["{", "3", "- [1]", "schedule: {total_steps: many}"])
def test_damaged_files_are_named(commands: Commands, stored: StoredRun, name: str, text: str) -> None:
    directory = stored.store("train.steps=50")
    (directory / name).write_text(text)
    outcome = commands.run(f"resume={directory}")
    assert outcome.code == 2
    assert name in outcome.err
    assert "Traceback" not in outcome.err
