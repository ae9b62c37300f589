"""Writes the tensors of a checkpoint, and says in plain words why it could not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.staging import StagedPlanner
from dsv3.model.config import ModelConfig


@dataclass
class Snapshot:
    """What a checkpoint will hold. Where there are `copies`, they are written and `tensors` may change."""

    tensors: dict[str, Tensor]
    copies: dict[str, Tensor] | None
    model: ModelConfig
    progress: Progress


class _Writer(FileSystemWriter):
    """FileSystemWriter that tells of a disk's complaint as such: torch.save makes a riddle of it."""

    def write_data(self, *arguments: Any) -> Any:
        """Write this rank's files."""
        try:
            return super().write_data(*arguments)
        except Exception as error:
            raise _root(error) from None


def save_tensors(partial: Path, snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
    """Write this rank's share of the tensors and, on rank 0, the `.metadata`; synced to the disk."""
    if snapshot.copies is None:
        save(snapshot.tensors, storage_writer=_Writer(partial), process_group=group)
    else:
        # They are on the host already; copying ahead would wait for the training step's stream.
        writer, planner = _Writer(partial, per_thread_copy_ahead=0), StagedPlanner(snapshot.copies)
        save(snapshot.tensors, storage_writer=writer, planner=planner, process_group=group)


def reason(error: BaseException, partial: Path) -> str:
    """One line that says what the disk, or whatever else, complained of."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename or partial})"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _root(error: BaseException) -> BaseException:
    """The OSError from which another error came, if any."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error
