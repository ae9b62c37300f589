"""What a conversion has finished, so that the same command goes on after a kill.

Where a conversion writes: beside its output, which appears by one rename when all is there.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from dsv3.checkpoint.directory import MANIFEST_FILE, sync
from dsv3.checkpoint.manifest import FileEntry, digest, write_manifest
from dsv3.errors import UserError

JOURNAL = ".journal.jsonl"


@dataclass(frozen=True)
class Finished:
    """A file that is on the disk: what it is, and what its pieces said of themselves."""

    name: str
    entry: FileEntry
    records: list[Any]


class Journal:
    """A line a finished file in `directory`, the first line says which conversion it is.

    UserError where the directory is that of another conversion, or of other inputs.
    """

    def __init__(self, directory: Path, conversion: dict[str, Any]) -> None:
        self.path = directory / JOURNAL
        self.found: dict[str, Finished] = {}
        self._lock = Lock()
        conversion = json.loads(json.dumps(conversion))  # as it is read back: lists for tuples
        first, *lines = _whole_lines(self.path) or [None]
        if first is None:  # new, or damaged where it says what it is of: nothing is known then
            self.path.write_bytes(b"")
            self._append(conversion)
            return
        if first != conversion:
            raise UserError(
                f"{directory} holds an unfinished conversion with {_differences(first, conversion)}: "
                "repeat its command to go on with it, or remove it"
            )
        for finished in map(_finished, lines):
            if finished is not None:
                self.found[finished.name] = finished

    def add(self, finished: Finished) -> None:
        """Remember a file whose bytes are on the disk."""
        entry = finished.entry
        self._append(
            {"name": finished.name, "size": entry.size, "digest": entry.digest, "records": finished.records}
        )
        self.found[finished.name] = finished

    def intact(self, name: str, report: Callable[[int], None]) -> Finished | None:
        """What is known of a finished file, read again and found unchanged; None where it must be written."""
        finished = self.found.get(name)
        if finished is None:
            return None
        path = self.path.parent / name
        try:
            unchanged = path.stat().st_size == finished.entry.size
            return finished if unchanged and digest(path, report) == finished.entry.digest else None
        except OSError:  # it is gone, or lies where the disk has gone bad
            return None

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock, self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[dict[str, Any] | None]:
    """The lines that were written whole, None for a damaged one; a kill may have cut the last one short."""
    if not path.is_file():
        return []
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        os.truncate(path, whole)  # what is appended next must begin a line of its own
    return [_line(line) for line in raw[:whole].splitlines()]


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _finished(line: dict[str, Any] | None) -> Finished | None:
    try:
        assert line is not None
        entry = FileEntry(int(line["size"]), str(line["digest"]))
        return Finished(str(line["name"]), entry, list(line["records"]))
    except (AssertionError, KeyError, TypeError, ValueError):
        return None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What an unfinished conversion has otherwise than this one."""
    told = [_difference(key, before.get(key), now[key]) for key in now if before.get(key) != now[key]]
    return " and ".join(told) or "another plan"


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, str) or before is None:
        return f"{key}={'null' if before is None else before} instead of {'null' if now is None else now}"
    if key == "input" and isinstance(before, list):
        changed = [file for file in now if file not in before] or [file for file in before if file not in now]
        return f"another {changed[0][0]}" if changed else "its input in another order"
    return f"another {key}"


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
