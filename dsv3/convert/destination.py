"""Where a conversion writes: beside its output, which appears by one rename when all is there."""

import fcntl
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dsv3.checkpoint.directory import MANIFEST_FILE, sync
from dsv3.checkpoint.manifest import FileEntry, write_manifest
from dsv3.convert.journal import JOURNAL, Finished, Journal
from dsv3.runtime.errors import UserError

_LOCK = ".lock"
_OURS = (_LOCK, JOURNAL)
"""What lies beside the files of an unfinished conversion."""


class Destination:
    """The output directory and `.NAME.partial` beside it, in which an unfinished conversion waits.

    A context: where it ends before a file is finished, nothing is left. UserError where the output holds
    something, cannot be made, or is being written by another process.
    """

    def __init__(self, output: Path, conversion: dict[str, Any]) -> None:
        self.output = output = Path(os.path.abspath(output))  # noqa: PTH100 (links stay as they are named)
        self._descriptor, self._began, self._parents = -1, False, list[Path]()
        try:
            check_output(output)
            self.partial = output.with_name(f".{output.name}.partial")
            self._parents = [path for path in self.partial.parents if not path.exists()]
            is_new = not self.partial.exists()
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._began = is_new  # and by nobody else
            check_output(output)  # the process that held the lock may have finished it
            self.journal = Journal(self.partial, conversion)
            self._sweep()
        except BlockingIOError:
            self._unlock()
            raise UserError(f"{self.partial} is being written by another conversion: wait for it") from None
        except OSError as error:
            self._undo()
            where = f" ({error.filename})" if error.filename else ""
            raise UserError(f"output={output} cannot be written: {error.strerror or error}{where}") from None
        except UserError:
            self._undo()
            raise

    def __enter__(self) -> "Destination":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.journal.found:
            self._began = True
            self._undo()
        self._unlock()

    @property
    def remains(self) -> str:
        """What becomes of an unfinished conversion."""
        if not self.journal.found:
            return "no file was finished, nothing is kept"
        return f"finished files are kept in {self.partial}, the same command goes on"

    def require_space(self, needed: int) -> None:
        """UserError unless `needed` bytes have room, those counted that are there already."""
        there = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.partial).free
        if needed > free + there:
            more = "" if there == 0 or not self.journal.found else f" {there / 1e9:.2f} GB of it are there,"
            raise UserError(
                f"output={self.output} needs {needed / 1e9:.2f} GB,{more} its disk has {free / 1e9:.2f} GB "
                "free: free some or take another disk"
            )

    def complete(self, finished: Iterable[Finished]) -> None:
        """Write the manifest and give the directory its name."""
        entries = {file.name: file.entry for file in finished}
        for path in sorted(self.partial.rglob("*")):
            name = str(path.relative_to(self.partial))
            if path.is_file() and name not in (*_OURS, MANIFEST_FILE, *entries):
                entries[name] = FileEntry.of(path)  # of the small ones alone: it reads all of a file
                sync(path)
        write_manifest(self.partial, entries)
        for path in [path for path in self.partial.rglob("*") if path.is_dir()]:
            sync(path)
        sync(self.partial)
        with suppress(FileNotFoundError):
            self.output.rmdir()
        self.partial.rename(self.output)
        # Only now: a kill before the rename loses nothing, and nobody takes what is not locked any more.
        for name in reversed(_OURS):
            (self.output / name).unlink()
        sync(self.output.parent)

    def _lock(self) -> None:
        self._descriptor = os.open(self.partial / _LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _sweep(self) -> None:
        """Remove what a kill has left half written."""
        for path in self.partial.rglob("*"):
            name = str(path.relative_to(self.partial))
            if not path.is_dir() and name not in _OURS and name not in self.journal.found:
                path.unlink()

    def _undo(self) -> None:
        """Take away the directories that were made for this conversion."""
        if self._began:
            shutil.rmtree(self.partial, ignore_errors=True)
        for path in self._parents:
            with suppress(OSError):
                path.rmdir()
        self._unlock()


def check_output(output: Path) -> None:
    """UserError unless `output` is new or an empty directory."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"output={output} is not a directory: name a new one")
    if output.is_mount():
        raise UserError(f"output={output} is a disk's own directory: name a new one in it")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"output={output} is not empty: name a new directory")
