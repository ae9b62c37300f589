"""accidents.jsonl: what went wrong in a run and what was done about it, one line of JSON each.

Every line has `kind` and `step`. Lines about data have `samples`: [first, end) of the sequences concerned.
Sequences are never taken twice in one history of a run, also where it rewinds and steps repeat, so a resume
cuts the journal back by them.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3.metrics.jsonl import append_line, read_whole_lines, replace_lines

ACCIDENTS_FILE = "accidents.jsonl"
"""In a run directory; it is not there where nothing has happened."""

RESTART, OVER = "restart", "over"
"""Kinds of lines without data: the run was started again; it ended, and a restart would end alike."""


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Append an entry, and wait until it is on the disk; what is not finite becomes "nan", "inf" or "-inf".

    A torn line that a kill has left is removed first.
    """
    read_whole_lines(path)
    append_line(path, plain(entry))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the entries in their order without touching the file; damaged lines are passed over."""
    return _entries(path, repair=False)


def cut_back(path: Path, samples: int) -> None:
    """Remove the entries on sequences behind the first `samples`, which the run is about to take again."""
    entries = _entries(path, repair=True)
    kept = [entry for entry in entries if "samples" not in entry or entry["samples"][1] <= samples]
    if len(kept) < len(entries):
        replace_lines(path, map(json.dumps, kept))


def _entries(path: Path, repair: bool) -> list[dict[str, Any]]:
    return [line for line in read_whole_lines(path, repair) if line is not None and _is_entry(line)]


def _is_entry(line: Mapping[str, Any]) -> bool:
    """Return whether a line has what its readers need, each of its type."""
    samples = line.get("samples", [0, 0])
    pair = isinstance(samples, list) and len(samples) == 2 and all(type(each) is int for each in samples)
    return pair and isinstance(line.get("kind"), str) and type(line.get("step")) is int


def plain(value: Any) -> Any:
    """Return a value as JSON can have it."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
