"""Write checkpoints: by all ranks together, at once or in a thread while training goes on.

A save in a thread writes copies of the tensors on the host. An error names what the disk complained of.
"""

import shutil
import threading
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

from dsv3.checkpoint.agreement import on_main, together
from dsv3.checkpoint.directory import (
    ASSETS_DIR,
    HF_DIR,
    MODEL_FILE,
    TOKENIZER_DIR,
    Progress,
    commit,
    complete_steps,
    partial_directory,
    prepare_partial,
    step_directory,
    write_text,
)
from dsv3.checkpoint.manifest import write_manifest
from dsv3.checkpoint.retention import prune
from dsv3.checkpoint.training_record import TrainingRecord
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.model import ModelConfig
from dsv3.config.strict import to_yaml
from dsv3.distributed.process_group import RankContext
from dsv3.errors import RunFailed, first_of_copy
from dsv3.metrics.progress import Phase, phase
from dsv3.tokens.file_digests import FileEntry


class SavePlanner(DefaultSavePlanner):
    """Plans with the tensors themselves, which know the layout; `work` gets the bytes that are written.

    Where there are `host_copies`, those are written.
    """

    def __init__(self, host_copies: dict[str, Tensor] | None, work: Phase) -> None:
        super().__init__()
        self.host_copies = host_copies
        self.work = work

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return this rank's shard of a tensor, or its copy; a rank never holds more than one."""
        return super().lookup_object(index) if self.host_copies is None else self.host_copies[index.fqn]

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the plan, and add up what this rank is going to write."""
        stored = [item.tensor_data for item in new_plan.items if item.tensor_data is not None]
        self.work.total = sum(data.chunk.sizes.numel() * data.properties.dtype.itemsize for data in stored)
        return super().finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return the tensor of an item, which is written next."""
        found = super().resolve_data(write_item)
        self.work.advance(found.nbytes if isinstance(found, Tensor) else 0)
        return found


@dataclass
class Snapshot:
    """The content of a checkpoint. If there are `host_copies`, those are written and `tensors` may change."""

    tensors: dict[str, Tensor]
    host_copies: dict[str, Tensor] | None
    model: ModelConfig
    progress: Progress


class _Writer(FileSystemWriter):
    """FileSystemWriter that raises the disk's own OSError, where torch.save raises one without the reason."""

    def write_data(self, *arguments: Any) -> Any:
        """Write this rank's files."""
        try:
            return super().write_data(*arguments)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None


def save_tensors(partial: Path, snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
    """Write this rank's share of the tensors and, on rank 0, the `.metadata`; synced to the disk."""
    with phase(f"saving step {snapshot.progress.step}") as work:
        planner = SavePlanner(snapshot.host_copies, work)
        # Copies are on the host already; copying ahead would wait for the training step's stream, and would
        # open a CUDA context for tensors that are not on a GPU at all (hardware=cpu).
        on_gpu = snapshot.host_copies is None and any(each.is_cuda for each in snapshot.tensors.values())
        writer = _Writer(partial) if on_gpu else _Writer(partial, per_thread_copy_ahead=0)
        save(snapshot.tensors, storage_writer=writer, planner=planner, process_group=group)


def reason(error: BaseException, partial: Path) -> str:
    """Return one line on the cause of an error, the disk's own words if it was the disk."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    error = first_of_copy(error) if isinstance(error, OSError) else error
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename or partial})"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Saver:
    """Writes the checkpoints of one run, at most one at a time; every method is called by all ranks."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        ranks: RankContext,
        record: TrainingRecord | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        self.record = record
        self.ranks = ranks.in_background()
        # DCP warns that one process has no process group. For good, as catch_warnings is not for threads.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Return whether the save in the background has failed, as far as this rank knows by now."""
        return self._error is not None

    def start(self, snapshot: Snapshot) -> None:
        """Begin to write in the background; there must be `host_copies`, and no other save in flight."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is in flight; raise the error of the save in the background."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; it has its name only when every rank has written and synced its files.

        RunFailed on all ranks where one cannot write.
        """
        directory = step_directory(self.run_dir, snapshot.progress.step)
        partial = partial_directory(directory)
        try:
            on_main(self.ranks, lambda: prepare_partial(directory))
            save_tensors(partial, snapshot, self.ranks.group)
            written = together(self.ranks, lambda: _entries(_own_files(partial, self.ranks.rank), partial))
            on_main(self.ranks, lambda: self._complete(directory, snapshot, written))
        except (OSError, CheckpointException) as error:
            if self.ranks.is_main:  # on a full disk half a checkpoint would be in the way
                shutil.rmtree(partial, ignore_errors=True)
            last = "the last complete one" if complete_steps(self.run_dir) else "step 0, nothing is saved yet"
            raise RunFailed(
                f"the checkpoint of step {snapshot.progress.step} cannot be saved: {reason(error, partial)}. "
                f"Mend that and go on from {last}: resume={self.run_dir}"
            ) from None

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self.write(snapshot)
        except BaseException as error:
            self._error = error

    def _complete(self, directory: Path, snapshot: Snapshot, written: list[dict[str, FileEntry]]) -> None:
        """Add the description and the manifest, give the checkpoint its name, and remove old ones."""
        partial = partial_directory(directory)
        write_text(partial / MODEL_FILE, yaml.safe_dump(to_yaml(snapshot.model), sort_keys=False))
        snapshot.progress.write(partial)
        if self.record is not None:
            self.record.write(partial, snapshot.progress.step)
        for kept, name in ((TOKENIZER_DIR, TOKENIZER_DIR), (ASSETS_DIR, HF_DIR)):
            if (self.run_dir / kept).exists():
                shutil.copytree(self.run_dir / kept, partial / name)
        entries = {name: entry for rank in written for name, entry in rank.items()}
        described = {path for path in partial.rglob("*") if path.is_file()}
        described -= {partial / name for name in entries}
        write_manifest(partial, entries | _entries(described, partial))
        commit(partial, directory, synced=entries)  # DCP has synced what it wrote
        prune(self.run_dir, self.config)


def _own_files(folder: Path, rank: int) -> list[Path]:
    """Return the files of tensors that a rank has written.

    DCP numbers them from 0, so that no rank has to list the files of all ranks.
    """
    numbered = (folder / f"__{rank}_{number}.distcp" for number in count())
    return list(takewhile(Path.is_file, numbered))


def _entries(paths: Collection[Path], folder: Path) -> dict[str, FileEntry]:
    """Return the entries of files below `folder`, by relative path."""
    total = sum(path.stat().st_size for path in paths)
    with phase(f"computing digests of {folder}", total) as work:
        return {str(path.relative_to(folder)): FileEntry.of(path, work.advance) for path in sorted(paths)}
