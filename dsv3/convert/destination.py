"""Where a conversion writes: beside its output, which appears by one rename when all is there."""

import fcntl
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsv3.checkpoint.directory import sync
from dsv3.checkpoint.manifest import FileEntry, write_manifest
from dsv3.convert.journal import JOURNAL, Finished, Journal
from dsv3.runtime.errors import UserError


class Destination:
    """The output directory and `.NAME.partial` beside it, in which an unfinished conversion waits.

    UserError where the output holds something, cannot be made, or is being written by another process.
    """

    def __init__(self, output: Path, conversion: dict[str, Any]) -> None:
        self.output = output = Path(os.path.abspath(output))  # noqa: PTH100 (links stay as they are named)
        self.partial = output.with_name(f".{output.name}.partial")
        check_output(output)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial / ".lock", os.O_CREAT | os.O_RDWR)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.journal = Journal(self.partial, conversion)
        except BlockingIOError:
            raise UserError(f"{self.partial} is being written by another conversion: wait for it") from None
        except OSError as error:
            raise UserError(f"output={output} cannot be written: {error.strerror or error}") from None

    def require_space(self, needed: int) -> None:
        """UserError unless `needed` bytes have room, those counted that are there already."""
        there = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.partial).free
        if needed > free + there:
            self.discard_if_empty()
            raise UserError(
                f"output={self.output} needs {needed / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free: "
                "free some or take another disk"
            )

    def discard_if_empty(self) -> None:
        """Leave nothing behind where nothing has been finished."""
        if not self.journal.found and not any(self.partial.glob("*.*")):
            shutil.rmtree(self.partial, ignore_errors=True)

    def complete(self, finished: Iterable[Finished]) -> None:
        """Write the manifest and give the directory its name."""
        entries = {file.name: file.entry for file in finished}
        (self.partial / ".lock").unlink()
        for path in sorted(self.partial.rglob("*")):
            name = str(path.relative_to(self.partial))
            if path.is_file() and name != JOURNAL:
                entries.setdefault(name, FileEntry.of(path))
                sync(path)
        write_manifest(self.partial, entries)
        self.journal.remove()
        for path in [path for path in self.partial.rglob("*") if path.is_dir()]:
            sync(path)
        sync(self.partial)
        with suppress(FileNotFoundError):
            self.output.rmdir()
        self.partial.rename(self.output)
        sync(self.output.parent)


def check_output(output: Path) -> None:
    """UserError unless `output` is new or an empty directory."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"output={output} is not a directory: name a new one")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"output={output} is not empty: name a new directory")
    if output.is_mount():
        raise UserError(f"output={output} is a disk's own directory: name a new one in it")
