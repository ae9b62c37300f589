"""Save and restore a training run: model, optimizer, progress and random state."""

from dataclasses import replace
from pathlib import Path

import torch

from dsv3.checkpoint.dcp_metadata import load_tensors, read_metadata
from dsv3.checkpoint.directory import Progress, newest_checkpoint, step_directory, sweep_leftovers
from dsv3.checkpoint.load import fill
from dsv3.checkpoint.manifest import verify_together, with_way_out
from dsv3.checkpoint.retention import update_pointers
from dsv3.checkpoint.save import Saver, Snapshot, Staging
from dsv3.checkpoint.state import (
    ModelParts,
    local_tensor,
    make_optimizer_state,
    model_state,
    optimizer_state,
    random_state,
    unique_by_name,
)
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.distributed.process_group import RankContext
from dsv3.errors import RunFailed, UserError


class CheckpointManager:
    """The checkpoints of one run; every method is called by all ranks together."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, ranks: RankContext) -> None:
        self.run_dir = run_dir
        self.config = config
        self.ranks = ranks
        self.newest: Path | None = None
        """The checkpoint that this process restored, or began to save, last."""
        self.saver = Saver(run_dir, config, ranks)
        self.staging = Staging()
        if ranks.is_main:
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
        self.saver.wait()

    def restore(self, model_parts: ModelParts, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Load the newest complete checkpoint into model and optimizer; return None where there is none.

        UserError where it is damaged, with the command that goes on from an older one.
        """
        directory = self.ranks.broadcast_object(newest_checkpoint(self.run_dir))
        if directory is None:
            return None
        try:
            verify_together(directory, self.ranks)
        except UserError as error:
            raise with_way_out(error, directory) from None
        make_optimizer_state(optimizer)
        # A layout with more ranks than before has no stored random state for the new ones.
        stored = read_metadata(directory).state_dict_metadata
        random = {name: state for name, state in random_state(self.ranks.rank).items() if name in stored}
        wanted = [*model_state(model_parts), *optimizer_state(model_parts, optimizer), *random.items()]
        fill(wanted, lambda tensors: load_tensors(directory, tensors))
        for state in random.values():
            torch.set_rng_state(state)
        self.newest = directory
        return Progress.read(directory)
