"""Writes checkpoints: by all ranks together, at once or in a thread while training goes on."""

import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import yaml
from torch.distributed.checkpoint.api import CheckpointException

from dsv3.checkpoint.config import CheckpointConfig
from dsv3.checkpoint.directory import (
    MODEL_FILE,
    TOKENIZER_DIR,
    commit,
    partial_directory,
    prepare_partial,
    step_directory,
    write_text,
)
from dsv3.checkpoint.manifest import FileEntry, write_manifest
from dsv3.checkpoint.retention import prune
from dsv3.checkpoint.writer import Snapshot, reason, save_tensors
from dsv3.config import plain
from dsv3.runtime.distributed import Worker
from dsv3.runtime.errors import RunFailed

T = TypeVar("T")
# A rank waits for the others' disks without holding up a step: launch.timeout is no measure for that.
_PATIENCE = timedelta(hours=6)


class Saver:
    """Writes the checkpoints of one run, at most one at a time; every method is called by all ranks."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, worker: Worker) -> None:
        self.run_dir = run_dir
        self.config = config
        self.worker = _background(worker) if config.async_save else worker
        # DCP remarks that one process is no process group. For good: catch_warnings is not for threads.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the save in the background has failed, as far as this rank knows by now."""
        return self._error is not None

    def start(self, snapshot: Snapshot) -> None:
        """Begin to write in the background; there must be `copies`, and no other save in flight."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is in flight; what went wrong in the background is raised here."""
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
            self._main(lambda: prepare_partial(directory))
            save_tensors(partial, snapshot, self.worker.group)
            written = self._together(lambda: _entries(partial, f"__{self.worker.rank}_*"))
            self._main(lambda: self._complete(directory, snapshot, written))
        except (OSError, CheckpointException) as error:
            if self.worker.is_main:  # on a full disk the rest of it would be in the way
                shutil.rmtree(partial, ignore_errors=True)
            raise RunFailed(
                f"the checkpoint of step {snapshot.progress.step} cannot be saved: {reason(error, partial)}. "
                f"Mend that and go on from the last complete one: resume={self.run_dir}"
            ) from None

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self.write(snapshot)
        except BaseException as error:
            self._error = error

    def _complete(self, directory: Path, snapshot: Snapshot, written: list[dict[str, FileEntry]]) -> None:
        """Describe what all ranks have written, list it, give it its name, and make room."""
        partial = partial_directory(directory)
        write_text(partial / MODEL_FILE, yaml.safe_dump(plain(snapshot.model), sort_keys=False))
        snapshot.progress.write(partial)
        tokenizer = self.run_dir / TOKENIZER_DIR
        if tokenizer.exists():
            shutil.copytree(tokenizer, partial / TOKENIZER_DIR)
        entries = {name: entry for rank in written for name, entry in rank.items()}
        write_manifest(partial, entries | _entries(partial, "*", but=entries))
        commit(partial, directory)
        prune(self.run_dir, self.config)

    def _main(self, work: Callable[[], object]) -> None:
        """`work` on rank 0; the others wait for it and learn whether it failed."""
        self._together(work if self.worker.is_main else lambda: None)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each rank; OSError on all of them where one had that."""
        result: list[T] = []
        problem = None
        try:
            result = [work()]
        except OSError as error:
            problem = OSError(error.errno, error.strerror or str(error), error.filename)
        answers = self.worker.gather((result, problem))
        for _, problem in answers:
            if problem is not None:
                raise problem
        return [value for values, _ in answers for value in values]


def _background(worker: Worker) -> Worker:
    """The same ranks by a group of their own: what a thread sends never mixes with a step's."""
    if worker.world == 1:
        return worker
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return replace(worker, group=group, device=torch.device("cpu"), watchdog=None)


def _entries(folder: Path, pattern: str, but: dict[str, FileEntry] | None = None) -> dict[str, FileEntry]:
    """The files below `folder` that match and are not listed yet, by relative path."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob(pattern) if path.is_file()}
    return {name: FileEntry.of(path) for name, path in paths.items() if name not in (but or {})}
