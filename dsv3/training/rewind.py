"""Take a run back to its last good checkpoint, on all ranks, and go on with the data behind the bad stretch.

Steps repeat, sequences do not: the data that the loss went wrong on is passed over. Checkpoints of the bad
stretch are removed, and its rows cut from metrics.jsonl; accidents.jsonl keeps what happened.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3.checkpoint.agreement import on_main
from dsv3.checkpoint.directory import complete_steps, remove, step_number
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.checkpoint.manifest import verify_together
from dsv3.checkpoint.restore import restore_training
from dsv3.checkpoint.retention import last_good, update_pointers
from dsv3.metrics.progress import phase
from dsv3.training.accidents import AccidentWatch
from dsv3.training.callbacks import Callback, TrainingRun


@dataclass
class Rewinder:
    """Takes the run back where its watch wants that; all ranks call it together."""

    watch: AccidentWatch
    manager: CheckpointManager

    @property
    def is_due(self) -> bool:
        """Return whether the watch wants it; the same on all ranks."""
        return self.watch.wants_rewind

    def rewind(self, run: TrainingRun, callbacks: Sequence[Callback]) -> int:
        """Go back; return by how many steps, 0 where no good checkpoint is there.

        UserError for a checkpoint that is damaged.
        """
        self.manager.wait()
        since = self.watch.statistics.above_since or run.step
        good = on_main(run.ranks, lambda: last_good(complete_steps(run.directory), before=since))
        if good is None:
            self.watch.wants_rewind = False
            run.console.message("there is no good checkpoint to go back to: the run goes on as it is")
            return 0
        with phase(f"going back to {good.name}"):
            verify_together(good, run.ranks)
            progress, _ = restore_training(good, run.forward_backward.model_parts, run.optimizer, run.ranks)
            on_main(run.ranks, lambda: self._forget(run.directory, good))
        self.manager.newest = good
        steps = run.step - progress.step
        passed = [progress.samples, run.progress.samples]
        run.progress.step, run.progress.evaluation_loss = progress.step, None
        self.watch.go_back(progress)
        self.watch.note("rewind", run.step, from_step=run.step + steps, samples=passed)
        for callback in callbacks:
            callback.on_rewind(run)
        run.console.message(
            f"went back {steps} steps to {good.name}; goes on behind sequence {passed[1] - 1:,}, past "
            f"{passed[1] - passed[0]:,} sequences (rewind {self.watch.statistics.rewinds})"
        )
        return steps

    def _forget(self, run_dir: Path, good: Path) -> None:
        """Remove the checkpoints behind the good one, which a resume would go on from."""
        for step in complete_steps(run_dir):
            if step_number(step) > step_number(good):
                remove(step)
        update_pointers(run_dir, self.manager.config)
