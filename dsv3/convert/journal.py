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
        lines = _whole_lines(self.path)
        if lines and lines[0] != json.loads(json.dumps(conversion)):
            different = [key for key, value in conversion.items() if lines[0].get(key) != value]
            raise UserError(
                f"{directory} is an unfinished conversion with another {', '.join(different) or 'plan'}: "
                "repeat its command to go on with it, or remove it"
            )
        for line in lines[1:]:
            entry = FileEntry(line["size"], line["digest"])
            self.found[line["name"]] = Finished(line["name"], entry, line["records"])
        if not lines:
            self.path.write_text("")
            self._append(conversion)

    def add(self, finished: Finished) -> None:
        """Remember a file whose bytes are on the disk."""
        entry = finished.entry
        self._append(
            {"name": finished.name, "size": entry.size, "digest": entry.digest, "records": finished.records}
        )

    def intact(self, name: str, report: Callable[[int], None]) -> Finished | None:
        """What is known of a finished file, read again and found unchanged; None where it must be written."""
        finished = self.found.get(name)
        if finished is None:
            return None
        path = self.path.parent / name
        size = path.stat().st_size if path.is_file() else -1
        if size != finished.entry.size or digest(path, report) != finished.entry.digest:
            return None
        return finished

    def remove(self) -> None:
        """The conversion is complete: nothing will have to be gone on with."""
        self.path.unlink()

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock, self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[Any]:
    """The lines that were written whole; a kill may have cut the last one short."""
    if not path.is_file():
        return []
    lines = []
    text = path.read_text()
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            # What is appended next must begin a line of its own.
            path.write_text(text[: -len(line)])
            break
        lines.append(json.loads(line))
    return lines
