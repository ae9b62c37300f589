"""task=plan prints one plan, by whatever it is started, and draws it where a directory is named."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.harness.commands import TrainCommand


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_of_several_ranks_the_first_one_prints(
    commands: TrainCommand, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", str(rank))
    outcome = commands.must("task=plan", "task.format=json")
    assert outcome.err == ""
    if rank == 1:
        assert outcome.out == ""
    else:
        assert json.loads(outcome.out)["world_size"] == 1


PICTURES = ["memory.png", "timeline.html", "timeline.png"]
STAGES = ("task=plan", "model=16b", "parallel=pp", "launch.world_size=16", "train.sequence_length=4096")


def test_nothing_is_drawn_unless_a_directory_is_named(commands: TrainCommand) -> None:
    before = set(Path().rglob("*"))
    commands.must(*STAGES, "hardware=h100")
    assert set(Path().rglob("*")) == before


def test_the_pictures_of_a_plan_are_written_and_replaced_and_stdout_is_the_plan_alone(
    commands: TrainCommand,
) -> None:
    Path("a/b c").mkdir(parents=True)
    Path("a/b c/memory.png").write_text("an older one")
    outcome = commands.must(*STAGES, "hardware=h100", "task.pictures=a/b c", "task.format=json")
    assert json.loads(outcome.out)["time"]["seconds"] > 0
    assert sorted(path.name for path in Path("a/b c").iterdir()) == PICTURES
    assert Path("a/b c/memory.png").read_bytes().startswith(b"\x89PNG")
    (told,) = [line for line in outcome.err.splitlines() if line.startswith("pictures: ")]
    assert re.findall(r"[a-z]+\.(?:png|html)", told) == ["memory.png", "timeline.png", "timeline.html"]


def test_of_hardware_without_a_known_speed_the_memory_is_drawn_and_the_remedy_works(
    commands: TrainCommand,
) -> None:
    outcome = commands.must(*STAGES, "hardware=cpu", "hardware.calibration=off", "task.pictures=p")
    assert [path.name for path in Path("p").iterdir()] == ["memory.png"]
    (told,) = [line for line in outcome.err.splitlines() if line.startswith("no timeline: ")]
    remedy, calibrate = re.findall(r"\(([^)]*=[^)]*)\)", told)
    assert calibrate == "task=calibrate"
    commands.must(*STAGES, *shlex.split(remedy), "task.pictures=p")
    assert sorted(path.name for path in Path("p").iterdir()) == PICTURES


def test_pictures_without_a_directory_are_refused(commands: TrainCommand) -> None:
    outcome = commands.run(*STAGES, "hardware=h100", "task.pictures=")
    assert outcome.code == 2
    assert "task.pictures= is not possible: must be a directory; null draws none" in outcome.err


def test_a_directory_that_cannot_be_is_refused_before_anything_is_drawn(commands: TrainCommand) -> None:
    Path("file").write_text("kept")
    outcome = commands.run(*STAGES, "hardware=h100", "task.pictures=file")
    assert outcome.code == 2
    told = "cannot be written: File exists; name another directory, task.pictures=DIR"
    assert outcome.err.splitlines()[-1] == f"error: task.pictures=file {told}"
    assert (outcome.out, Path("file").read_text()) == ("", "kept")


def test_the_jobs_of_a_sweep_are_drawn_in_folders_of_their_numbers(commands: TrainCommand) -> None:
    swept = commands.must("-m", *STAGES, "hardware=h100", "recompute=none,full", "task.pictures=drawn")
    assert len(swept.out.splitlines()) == 3
    for number in "01":
        assert sorted(path.name for path in Path("drawn", number).iterdir()) == PICTURES
