"""The output of a conversion: written beside its place, it appears by one rename when everything is there.

A journal notes each finished file, so that the same command goes on after a kill.
"""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from dsv3.checkpoint.directory import MANIFEST_FILE, sync
from dsv3.checkpoint.manifest import write_manifest
from dsv3.distributed.directory_lock import LOCK_FILE, NOTE_FILE, DirectoryLock
from dsv3.errors import UserError
from dsv3.metrics.jsonl import append_line, read_whole_lines
from dsv3.metrics.progress import phase
from dsv3.tokens.file_digests import FileEntry, digest

JOURNAL = ".journal.jsonl"


@dataclass(frozen=True)
class Finished:
    """A file that is on the disk: its size and digest, and the records of its slices."""

    name: str
    entry: FileEntry
    records: list[Any]


class Journal:
    """A file in `directory` with a line per finished file; its first line says which conversion it is.

    UserError where the directory holds another conversion, or one of other inputs.
    """

    def __init__(self, directory: Path, conversion: dict[str, Any]) -> None:
        self.path = directory / JOURNAL
        self.found: dict[str, Finished] = {}
        self._lock = Lock()
        conversion = json.loads(json.dumps(conversion))  # as it is read back: lists for tuples
        first, *lines = read_whole_lines(self.path) or [None]
        if first is None:  # new, or damaged in the line that names the conversion: nothing is known then
            self.path.write_bytes(b"")
            self._append(conversion)
            return
        if first != conversion:
            remove = f"remove it, {shlex.join(['rm', '-r', str(directory)])}"
            # Files written from other contents cannot be gone on with, whatever is typed.
            way = remove if _rewritten(first, conversion) else f"repeat its command, or {remove}"
            raise UserError(
                f"{directory} holds an unfinished conversion with {_differences(first, conversion)}: {way}"
            )
        for finished in map(_finished, lines):
            if finished is not None:
                self.found[finished.name] = finished

    def add(self, finished: Finished) -> None:
        """Note a file whose bytes are on the disk."""
        entry = finished.entry
        self._append(
            {"name": finished.name, "size": entry.size, "digest": entry.digest, "records": finished.records}
        )
        self.found[finished.name] = finished

    def intact(self, name: str, report: Callable[[int], None]) -> Finished | None:
        """Return a finished file that is still unchanged, None for one to be written.

        `report` gets the bytes that are read to see it.
        """
        finished = self.found.get(name)
        if finished is None:
            return None
        path = self.path.parent / name
        try:
            unchanged = path.stat().st_size == finished.entry.size
            return finished if unchanged and digest(path, report) == finished.entry.digest else None
        except OSError:  # it is gone, or the disk cannot read it any more
            return None

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock:
            append_line(self.path, line)


def _finished(line: dict[str, Any] | None) -> Finished | None:
    """Return the finished file that a line of the journal describes; None for a damaged line."""
    try:
        assert line is not None
        entry = FileEntry(int(line["size"]), str(line["digest"]))
        return Finished(str(line["name"]), entry, list(line["records"]))
    except (AssertionError, KeyError, TypeError, ValueError):
        return None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return, for a message, in what an unfinished conversion differs from this one."""
    told = [_difference(key, before.get(key), now[key]) for key in now if before.get(key) != now[key]]
    return " and ".join(told) or "another plan"


def _rewritten(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether a conversion differs in nothing but the contents of the files that it reads."""
    paths = [[path for path, *_ in each.get("input", ())] for each in (before, now)]
    return before | {"input": None} == now | {"input": None} and paths[0] == paths[1]


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, str) or before is None:
        return f"{key}={'null' if before is None else before} instead of {'null' if now is None else now}"
    if key == "input" and isinstance(before, list):
        changed = [file for file in now if file not in before] or [file for file in before if file not in now]
        return f"another {changed[0][0]}" if changed else "its input in another order"
    return f"another {key}"


_OWN_FILES = (LOCK_FILE, NOTE_FILE, JOURNAL)
"""Files in the directory of an unfinished conversion that are no part of its output."""


class Destination:
    """The output directory and `.NAME.partial` beside it, in which an unfinished conversion waits.

    A context manager: where it ends before a file is finished, nothing is left. UserError where the output
    is not empty, cannot be made, or is being written by another process. The lock is one of the operating
    system on an open file, so that a killed process holds it no longer.
    """

    def __init__(self, output: Path, conversion: dict[str, Any]) -> None:
        self.output = output = Path(os.path.abspath(output))  # noqa: PTH100 (links stay as they are named)
        self._lock: DirectoryLock | None = None
        self._began, self._parents = False, list[Path]()
        try:
            require_new_output(output)
            self.partial = output.with_name(f".{output.name}.partial")
            self._parents = [path for path in self.partial.parents if not path.exists()]
            is_new = not self.partial.exists()
            self.partial.mkdir(parents=True, exist_ok=True)
            lock = DirectoryLock(self.partial, f"output={output}", "being written")
            with phase("waiting for the output directory"):
                lock.take()
            self._lock = lock
            self._began = is_new  # and by nobody else
            require_new_output(output)  # the process that held the lock may have finished it
            self.journal = Journal(self.partial, conversion)
            for path in self.partial.rglob("*"):  # what a kill has left half written
                name = str(path.relative_to(self.partial))
                if not path.is_dir() and name not in _OWN_FILES and name not in self.journal.found:
                    path.unlink()
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
        """Return a sentence on what is kept of an unfinished conversion."""
        if not self.journal.found:
            return "no file was finished, nothing is kept"
        return f"finished files are kept in {self.partial}, the same command goes on"

    def require_space(self, needed: int) -> None:
        """Raise UserError unless the disk has room for `needed` bytes, written ones included."""
        written = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.partial).free
        if needed > free + written:
            more = (
                "" if written == 0 or not self.journal.found else f" {written / 1e9:.2f} GB of it are there,"
            )
            raise UserError(
                f"output={self.output} needs {needed / 1e9:.2f} GB,{more} its disk has {free / 1e9:.2f} GB "
                "free: free some or take another disk"
            )

    def complete(self, finished: Iterable[Finished]) -> None:
        """Write the manifest and give the directory its name."""
        entries = {file.name: file.entry for file in finished}
        for path in sorted(self.partial.rglob("*")):
            name = str(path.relative_to(self.partial))
            if path.is_file() and name not in (*_OWN_FILES, MANIFEST_FILE, *entries):
                entries[name] = FileEntry.of(path)  # only of small files: it reads all of a file
                sync(path)
        write_manifest(self.partial, entries)
        for path in [path for path in self.partial.rglob("*") if path.is_dir()]:
            sync(path)
        sync(self.partial)
        with suppress(FileNotFoundError):
            self.output.rmdir()
        self.partial.rename(self.output)
        # Only now: a kill before the rename loses nothing, and nobody takes a finished output for an
        # unfinished one.
        for name in reversed(_OWN_FILES):
            (self.output / name).unlink(missing_ok=True)
        sync(self.output.parent)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _undo(self) -> None:
        """Remove the directories that were made for this conversion, and unlock."""
        if self._began:
            shutil.rmtree(self.partial, ignore_errors=True)
        for path in self._parents:
            with suppress(OSError):
                path.rmdir()
        self._unlock()


def require_new_output(output: Path) -> None:
    """Raise UserError unless `output` is new or an empty directory."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"output={output} is not a directory: name a new one")
    if output.is_mount():
        raise UserError(f"output={output} is a disk's own directory: name a new one in it")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"output={output} is not empty: name a new directory")
