"""Save and restore a training run: model, optimizer, progress and random state."""

from dataclasses import replace
from pathlib import Path

import torch

from dsv3.checkpoint.agreement import on_main
from dsv3.checkpoint.directory import Progress, newest_checkpoint, step_directory, sweep_leftovers
from dsv3.checkpoint.manifest import verify_together, with_way_out
from dsv3.checkpoint.replicas import Replicas
from dsv3.checkpoint.restore import restore_training
from dsv3.checkpoint.retention import update_pointers
from dsv3.checkpoint.save import Saver, Snapshot
from dsv3.checkpoint.staging import Staging
from dsv3.checkpoint.state import (
    ModelParts,
    local_tensor,
    model_state,
    optimizer_state,
    random_state,
    unique_by_name,
)
from dsv3.checkpoint.training_record import TrainingRecord
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.distributed.process_group import RankContext
from dsv3.errors import RunFailed, UserError
from dsv3.metrics.progress import phase


class CheckpointManager:
    """The checkpoints of one run; every method is called by all ranks together."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        ranks: RankContext,
        record: TrainingRecord | None = None,
        compares_replicas: bool = True,
    ) -> None:
        """Manage the checkpoints in `run_dir`; rank 0 writes `record` beside the weights of each.

        Nothing is saved on which ranks differ, if it `compares_replicas`.
        """
        self.run_dir = run_dir
        self.config = config
        self.record = record
        self.ranks = ranks
        self.notes: list[str] = []
        """What the user should know of the last restore."""
        self.newest: Path | None = None
        """The checkpoint that this process restored, or began to save, last."""
        self.saver = Saver(run_dir, config, ranks, record)
        self.staging = Staging()
        self.replicas = Replicas(ranks, run_dir) if compares_replicas else None
        if ranks.is_main:
            with phase("removing what unfinished saves have left"):
                sweep_leftovers(run_dir)
                update_pointers(run_dir, config)  # a kill may have come between a commit and this

    @property
    def failed(self) -> bool:
        """Return whether a save in the background has failed, as far as this rank knows; `wait` raises it."""
        return self.saver.failed

    def save(
        self,
        model_parts: ModelParts,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        wait: bool = False,
    ) -> Path:
        """Write the state after `progress.step`; it appears under its name only when complete.

        With async_save and without `wait` this returns once the state is copied to the host. It first waits
        for the save before and raises that one's error, a RunFailed like that of a synchronous save.
        """
        self.wait()
        directory = step_directory(self.run_dir, progress.step)
        if directory == self.newest:
            return directory  # nothing has been trained since
        tensors = unique_by_name([*model_state(model_parts), *optimizer_state(model_parts, optimizer)])
        tensors |= random_state(self.ranks.rank)
        # A nonfinite weight shows in the loss only one step later: it must not replace a valid checkpoint.
        bad = [name for name, tensor in tensors.items() if not bool(local_tensor(tensor).isfinite().all())]
        if self.ranks.any(bool(bad)):
            where = bad[0] if bad else "a tensor of another rank"
            raise RunFailed(
                f"after step {progress.step} {where} is not finite, so it is not saved; the last checkpoint "
                "is from before. A lower optimizer.lr or longer warm-up may help."
            )
        if self.replicas is not None:
            self.replicas.compare(model_parts, optimizer, progress)
        later = self.config.async_save and not wait
        host_copies = self.staging.copy(tensors) if later else None
        snapshot = Snapshot(tensors, host_copies, model_parts[0].config, replace(progress))
        if later:
            self.saver.start(snapshot)
        else:
            self.saver.write(snapshot)
        self.newest = directory
        return directory

    def wait(self) -> None:
        """Wait until no save is in flight; raise the error of the last one."""
        with phase("waiting for the checkpoint before to be written"):
            self.saver.wait()

    def restore(self, model_parts: ModelParts, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Load the newest complete checkpoint into model and optimizer; return None where there is none.

        UserError where it is damaged, with the command that goes on from an older one.
        """
        directory = on_main(self.ranks, lambda: newest_checkpoint(self.run_dir))
        if directory is None:
            return None
        try:
            verify_together(directory, self.ranks)
        except UserError as error:
            raise with_way_out(error, directory) from None
        progress, notes = restore_training(directory, model_parts, optimizer, self.ranks)
        self.notes += notes
        self.newest = directory
        return progress
