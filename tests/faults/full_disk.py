"""Let the disk be full from the Nth thing on that a process makes below a folder.

Files that are opened to be written, directories, renames and truncations count. Python's audit events tell of
each of them before it happens, whoever does it, and what the hook raises takes its place.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_EVENTS = {"open", "os.mkdir", "os.rename", "os.truncate", "os.link", "os.symlink"}


class FullDisk:
    """Counts what is made below `folder`, and refuses it from number `full_from` on; None refuses nothing."""

    active: "FullDisk | None" = None
    """Audit hooks cannot be removed: there is one, and it asks the one that is active."""

    def __init__(self, folder: Path, full_from: int | None, code: int) -> None:
        self.folder, self.full_from, self.code = str(folder), full_from, code
        self.made: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note an event of the interpreter; OSError where the disk is full by now."""
        if event not in _EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        if not path.startswith(self.folder) or (event == "open" and not (arguments[2] or 0) & _WRITING):
            return
        self.made.append(path)
        if self.full_from is not None and len(self.made) > self.full_from:
            raise OSError(self.code, os.strerror(self.code), path)


def _ask_active(event: str, arguments: tuple[Any, ...]) -> None:
    if FullDisk.active is not None:
        FullDisk.active(event, arguments)


@contextlib.contextmanager
def full_disk(folder: Path, full_from: int | None, code: int = errno.ENOSPC) -> Iterator[FullDisk]:
    """Let the disk below `folder` be full from thing number `full_from` on; `code` is for other troubles."""
    if not hasattr(sys, "_full_disk_hook"):
        sys._full_disk_hook = True  # type: ignore[attr-defined]
        sys.addaudithook(_ask_active)
    FullDisk.active = FullDisk(folder, full_from, code)
    try:
        yield FullDisk.active
    finally:
        FullDisk.active = None
