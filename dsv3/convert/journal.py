"""What a conversion has finished, so that the same command goes on after a kill."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from dsv3.checkpoint.manifest import FileEntry, digest
from dsv3.runtime.errors import UserError

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
