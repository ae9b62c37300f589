"""A run that goes back: everything but the data is as it was, and nothing later is left to resume from."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv3.checkpoint.directory import Progress, complete_steps, step_number
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.checkpoint.run_statistics import RunStatistics
from dsv3.config.accidents import AccidentsConfig
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.training import TrainConfig
from dsv3.metrics import accident_journal
from dsv3.metrics.accident_journal import ACCIDENTS_FILE
from dsv3.training.accidents import AccidentWatch
from dsv3.training.callbacks import Callback, TrainingRun
from dsv3.training.rewind import Rewinder
from dsv3.training.step_guard import StepGuard
from tests.harness.trained import ALONE, Trained


class Told(Callback):
    """Notes the steps that the run has gone back to."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_rewind(self, run: TrainingRun) -> None:
        """Note it."""
        self.steps.append(run.step)


def begin(folder: Path, trained: Trained, since: int | None) -> tuple[TrainingRun, Rewinder, list[str]]:
    """Return a run at the state of `trained` whose loss has been above its past `since` then."""
    told: list[str] = []
    console: Any = SimpleNamespace(message=told.append)
    guard = StepGuard(AccidentsConfig(), RunStatistics(), ALONE.device, trained.optimizer)
    progress = replace(trained.progress, statistics=RunStatistics(above_since=since, alarm=True, skipped=3))
    train: Any = TrainConfig(sequence_length=8)
    parts = [trained.model]
    watch = AccidentWatch(train, trained.model.config, folder, ALONE, parts, guard, progress, console)
    watch.wants_rewind = True
    manager = CheckpointManager(folder, CheckpointConfig(keep_last=9), ALONE)
    forward: Any = SimpleNamespace(model_parts=parts)
    config: Any = None
    run = TrainingRun(config, folder, ALONE, forward, trained.optimizer, progress, console)
    return run, Rewinder(watch, manager), told


def saved(folder: Path, doubtful: int) -> tuple[Trained, dict[int, dict[str, bytes]]]:
    """Save six steps, those from `doubtful` on marked; return what was trained and the state of each."""
    trained, states = Trained(0), {}
    for _ in range(6):
        step = trained.progress.step
        trained.progress.statistics = RunStatistics(
            norms=[float(step)], above_since=doubtful if step >= doubtful else None, skipped=step
        )
        trained.save(folder, keep_last=9)
        states[step] = trained.state()
        trained.step()
    return trained, states


@pytest.mark.parametrize(("doubtful", "since", "to"), [(5, 5, 4), (4, 6, 3), (7, 4, 3)])
def test_it_goes_to_the_last_good_checkpoint_from_before_the_rise(
    tmp_path: Path, doubtful: int, since: int, to: int
) -> None:
    trained, states = saved(tmp_path, doubtful)
    run, rewinder, told = begin(tmp_path, trained, since)
    callback = Told()
    assert rewinder.is_due
    assert rewinder.rewind(run, [callback]) == 7 - to
    assert trained.state() == states[to]
    assert (run.step, run.progress.samples, run.progress.tokens) == (to, 28, 224)
    assert callback.steps == [to]
    assert [step_number(step) for step in complete_steps(tmp_path)] == list(range(1, to + 1))
    assert (tmp_path / "checkpoints" / "latest").readlink() == Path(f"step-{to}")
    statistics = rewinder.watch.statistics
    assert (statistics.rewinds, statistics.skipped, statistics.in_doubt) == (1, to, False)
    assert rewinder.watch.guard.good_norms() == [float(to)]
    assert not rewinder.watch.wants_rewind
    (entry,) = accident_journal.read(tmp_path / ACCIDENTS_FILE)
    assert entry == {"kind": "rewind", "step": to, "from_step": 7, "samples": [4 * to, 28]}
    assert "goes on behind sequence 27" in told[-1]
    # And the next save is written, though a checkpoint of this step was there.
    trained.progress = Progress(step=to + 1, samples=32)
    trained.save(tmp_path, keep_last=9)
    assert step_number(complete_steps(tmp_path)[-1]) == to + 1


def test_without_a_good_checkpoint_it_goes_on(tmp_path: Path) -> None:
    trained, _ = saved(tmp_path, doubtful=1)
    run, rewinder, told = begin(tmp_path, trained, since=None)
    before = trained.state()
    assert rewinder.rewind(run, []) == 0
    assert trained.state() == before
    assert (run.step, len(complete_steps(tmp_path)), rewinder.is_due) == (7, 6, False)
    assert told == ["there is no good checkpoint to go back to: the run goes on as it is"]
    assert torch.is_grad_enabled()
