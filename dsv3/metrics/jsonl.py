"""Lines of JSON that outlive a kill: metrics.jsonl, with one per step, and the journals of long work.

A kill loses at most the rows of metrics that are still buffered.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv3.metrics.row import MetricsRow
from dsv3.untrusted_files import BadFile, open_file, parse_json, read_bytes, read_text


class JsonlWriter:
    """Append rows to a file, which holds complete, synced lines after every flush.

    Opening creates the folder and the file. Call `truncate_after` first on resume.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        # A kill may have left half a line: the next row must begin a line of its own.
        self._buffer = ["\n"] if _ends_torn(path) else []

    def append(self, row: MetricsRow) -> None:
        """Buffer a row until the next flush."""
        self._buffer.append(row.to_json() + "\n")

    def flush(self) -> None:
        """Write the buffered rows and wait until they are on the disk."""
        if not self._buffer:
            return
        self._file.write("".join(self._buffer).encode())
        self._buffer.clear()
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the file; a second call does nothing."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()


def read_rows(path: Path) -> list[MetricsRow]:
    """Read the rows of a file by step, each step once (its latest line), and skip damaged lines.

    A file that does not exist has no rows.
    """
    return [row for row, _ in _latest(path)]


def truncate_after(path: Path, step: int) -> None:
    """Keep the rows up to and including `step`, each once, so that a run can resume from there.

    The kept lines stay as they were written.
    """
    if path.exists():
        replace_lines(path, (line for row, line in _latest(path) if row.step <= step))


def replace_lines(path: Path, lines: Iterable[str]) -> None:
    """Give a file other lines; one rename replaces it, so that a kill leaves the old file or the new one."""
    replacement = path.with_name(path.name + ".tmp")
    with replacement.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)


def _latest(path: Path) -> list[tuple[MetricsRow, str]]:
    """Return rows with their lines in the order of their steps; of a step written twice, the later line."""
    found: dict[int, tuple[MetricsRow, str]] = {}
    text = read_text(path, "rows", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        try:
            row = MetricsRow.from_json(line)
        except ValueError:
            continue
        found[row.step] = (row, line)
    return [found[step] for step in sorted(found)]


def _ends_torn(path: Path) -> bool:
    data_size = path.stat().st_size
    if data_size == 0:
        return False
    with open_file(path) as file:
        file.seek(data_size - 1)
        return file.read(1) != b"\n"


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line to a journal, and wait until it is on the disk."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_whole_lines(path: Path, repair: bool = True) -> list[dict[str, Any] | None]:
    """Return the lines of a journal that were written whole, None for a damaged one.

    A kill may have cut the last one short. With `repair` it is removed, for the next one must not follow half
    a line.
    """
    if not path.is_file():
        return []
    raw = read_bytes(path, "rows")
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw) and repair:
        os.truncate(path, whole)
    lines: list[dict[str, Any] | None] = []
    for text in raw[:whole].splitlines():
        try:
            line = parse_json(text, path)
        except BadFile:
            line = None
        lines.append(line if isinstance(line, dict) else None)
    return lines
