"""Whole runs with bad numbers: what is skipped, told and stored, when they end and when they go back."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dsv3.checkpoint.directory import Progress, complete_steps
from dsv3.metrics import accident_journal
from dsv3.metrics.accident_journal import ACCIDENTS_FILE
from tests.harness.accidents import injected
from tests.harness.checkpoints import last_tensors, seal
from tests.harness.commands import TrainCommand
from tests.harness.outcome import Outcome
from tests.harness.runs import rows

STEPS = 12
BATCH = 4
EXPERT = "layers.1.ffn.experts.gate_up_proj"
NAN, SPIKE = 3 * BATCH, 8 * BATCH
"""The first sequences of steps 4 and 9."""
FAULTS: dict[int, dict[str, Any]] = {
    NAN: {"kind": "nan", "parameter": EXPERT, "expert": 2},
    SPIKE: {"kind": "spike", "factor": 300},
}
SETTINGS = [f"train.steps={STEPS}", "train.checkpoint_every=5", "train.accidents.spike_window=3"]


def entries(run: Path) -> list[dict[str, Any]]:
    return accident_journal.read(run / ACCIDENTS_FILE)


@pytest.fixture(scope="module")
def met(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return the folder of a run that met both faults, and the settings."""
    return tmp_path_factory.mktemp("accidents"), [*SETTINGS, *injected(FAULTS)]


def trained_once(commands: TrainCommand, met: tuple[Path, list[str]]) -> Path:
    run = met[0] / "run"
    if not run.exists():
        commands.train(run, *met[1])
    return run


def test_a_resumed_run_has_the_statistics_of_the_uninterrupted_one(
    commands: TrainCommand, met: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """The spike of step 9 is measured against norms of before the resume."""
    run, resumed = trained_once(commands, met), tmp_path / "resumed"
    commands.train(resumed, *met[1], "train.stop_after=8")
    later = {"kind": "nonfinite", "step": 11, "samples": [40, 44]}
    for entry in (later, {"kind": "restart", "step": 3}):
        accident_journal.append(resumed / ACCIDENTS_FILE, entry)
    commands.must(f"resume={resumed}", "train.stop_after=null", met[1][-1])
    assert rows(resumed) == rows(run)
    restart = [each for each in entries(resumed) if each["kind"] == "restart"]
    assert len(restart) == 1  # it tells of no data: it stays
    assert [each for each in entries(resumed) if each["kind"] != "restart"] == entries(run)
    state, other = (complete_steps(each)[-1] / "state.json" for each in (run, resumed))
    assert state.read_text() == other.read_text()
    assert last_tensors(resumed) == last_tensors(run)


def test_too_many_skipped_steps_end_a_run_with_a_good_checkpoint_from_which_it_may_go_on(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    faults = {BATCH * step: {"kind": "loss"} for step in (2, 4, 5)}
    limits = ["train.accidents.most=2", "train.accidents.within=5"]
    outcome = failing(commands, run, *limits, *injected(faults))
    assert outcome.code == 1
    assert "3 of the last 5 steps were skipped, more than train.accidents.most=2" in outcome.err
    assert len(outcome.err.strip().splitlines()[-1]) < 500
    saved = complete_steps(run)[-1]
    progress = Progress.read(saved)
    assert progress.statistics.recent == [3, 5, 6]
    assert not progress.statistics.in_doubt
    assert [each["kind"] for each in entries(run)][:4] == ["nonfinite"] * 3 + ["too_many"]
    commands.must(f"resume={run}", "train.accidents.most=4", injected(faults)[-1])
    assert rows(run)[-1]["step"] == 8
    assert rows(run)[-1]["loss"] is not None


def failing(commands: TrainCommand, run: Path, *arguments: str) -> Outcome:
    """Train like `commands.train`, whatever comes of it."""
    with patch.object(commands, "must", commands.run):
        return commands.train(run, *arguments)


def test_a_run_whose_steps_were_all_skipped_has_not_succeeded(commands: TrainCommand, tmp_path: Path) -> None:
    faults = {BATCH * step: {"kind": "loss"} for step in range(3)}
    outcome = failing(commands, tmp_path / "run", "train.steps=3", *injected(faults))
    assert outcome.code == 1
    assert "all 3 steps were skipped, so nothing is learnt" in outcome.err


QUICK = ["train.accidents.alarm_window=2", "train.accidents.alarm_steps=3"]


def test_a_loss_that_explodes_without_nan_is_an_alarm_and_its_checkpoints_are_no_good_ones(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kept = ["train.checkpoint_every=1", "checkpoint.keep_best=true", "checkpoint.keep_last=1"]
    window = ["train.accidents.alarm_window=4", "train.accidents.alarm_steps=3", "train.evaluate_every=1"]
    commands.train(run, "optimizer.lr=1e3", "train.steps=5", *kept, *window)
    (alarm,) = [each for each in entries(run) if each["kind"] == "alarm"]
    assert (alarm["step"], alarm["since"]) == (4, 2)
    assert alarm["loss"] > alarm["lowest"] + 1
    log = (run / "log.txt").read_text()
    assert "ALARM at step 4: the mean loss of 4 steps" in log
    assert "the loss is above its past; the last good checkpoint is step-1" in log
    assert [row["alarm"] for row in rows(run)] == [0, 0, 0, 1, 1]
    steps = {path.name: Progress.read(path).statistics.in_doubt for path in complete_steps(run)}
    assert steps == {"step-1": False, "step-5": True}
    assert (run / "checkpoints" / "best").readlink() == Path("step-1")
    data = [f"data.path={commands.text}", "data=text", "data.held_out=0.1", "train.sequence_length=32"]
    doubt = "step-5 was saved while its loss was above its past"
    for load, told in ((run, True), (run / "checkpoints" / "best", False)):
        outcome = commands.must("task=evaluate", f"checkpoint.load={load}", *data)
        assert (doubt in outcome.err) is told


KICK = {BATCH * 6: {"kind": "weights", "factor": 30.0}}
BACK = [*QUICK, "train.accidents.on_alarm=rewind", "train.steps=14", "train.checkpoint_every=3"]


def test_an_alarm_goes_back_to_the_last_good_checkpoint_and_on_with_other_data(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    commands.train(run, *BACK, *injected(KICK))
    kinds = [each["kind"] for each in entries(run)]
    assert kinds[:2] == ["alarm", "rewind"]
    alarm, rewind = entries(run)[:2]
    assert (rewind["step"], rewind["from_step"]) == (6, alarm["step"])
    assert rewind["samples"] == [6 * BATCH, alarm["step"] * BATCH]
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, 15))
    ahead = (alarm["step"] - 6) * BATCH * 32
    assert [row["tokens"] for row in found[6:8]] == [7 * BATCH * 32 + ahead, 8 * BATCH * 32 + ahead]
    assert found[-1]["alarm"] == 0
    assert found[-1]["loss"] < found[0]["loss"] + 0.5
    progress = Progress.read(complete_steps(run)[-1])
    assert (progress.step, progress.samples) == (14, 14 * BATCH + alarm["step"] * BATCH - 6 * BATCH)
    assert progress.statistics.rewinds == 1
    assert "went back" in (run / "log.txt").read_text()


def test_a_run_that_has_used_its_rewinds_ends(commands: TrainCommand, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = failing(commands, run, *BACK, "train.accidents.max_rewinds=0", *injected(KICK))
    assert outcome.code == 1
    assert "train.accidents.max_rewinds=0 allows no more" in outcome.err
    assert Progress.read(complete_steps(run)[-1]).statistics.in_doubt


def test_a_checkpoint_of_older_code_has_no_statistics_and_resumes(
    commands: TrainCommand, met: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_once(commands, met), run)
    last = complete_steps(run)[-1]
    shutil.rmtree(last)
    before = complete_steps(run)[-1]
    stored = json.loads((before / "state.json").read_text())
    assert stored.pop("statistics")["norms"]
    (before / "state.json").write_text(json.dumps(stored))
    seal(before)
    commands.must(f"resume={run}", met[1][-1])
    assert rows(run)[-1]["step"] == STEPS
