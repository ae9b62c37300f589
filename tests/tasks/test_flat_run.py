"""A run of weeks keeps nothing per step: the objects and blocks that Python holds do not grow with it."""

import gc
import logging
import sys
from pathlib import Path

import pytest

from dsv3.training import plan_check
from dsv3.training.callbacks import Callback, TrainingRun
from tests.harness.commands import TrainCommand

STEPS, SAVE_EVERY = 320, 40
EARLY, LATE = range(120, 160, 5), range(280, 320, 5)
"""Steps at which is counted: buffers and caches are full by the first. The least of each counts, because a
save in the background holds objects of its own."""

counted: dict[int, tuple[int, int]] = {}


class Count(Callback):
    """Counts the objects that the garbage collector knows, and all blocks of memory that Python holds."""

    def on_step_end(self, run: TrainingRun) -> None:
        """Count after some steps."""
        if run.step in (*EARLY, *LATE):
            gc.collect()
            counted[run.step] = len(gc.get_objects()), sys.getallocatedblocks()


@pytest.mark.slow
def test_nothing_is_kept_per_step(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_check, "RECENT", 60)
    count = "+train.callbacks.count={_target_: tests.tasks.test_flat_run.Count}"
    every = [f"train.{what}_every={SAVE_EVERY}" for what in ("log", "evaluate", "checkpoint")]
    allowed = "run.allow_targets=[tests.tasks.test_flat_run]"
    logging.disable(logging.DEBUG)  # pytest keeps what torch's savers log
    try:
        commands.train(
            tmp_path / "run", f"train.steps={STEPS}", *every, "train.generate_every=0", count, allowed
        )
    finally:
        logging.disable(logging.NOTSET)
    kept = [min(counted[step][n] for step in LATE) - min(counted[step][n] for step in EARLY) for n in (0, 1)]
    steps = LATE.start - EARLY.start
    assert kept[0] < steps / 4, "objects"
    assert kept[1] < 6 * steps, "blocks"
