"""Cut input files into units, which processes take one by one.

A unit has about UNIT_BYTES: many small files, or a range of a large one. The cut follows from names and
sizes alone, so that neither the number of processes nor a kill changes what is written.
"""

from collections.abc import Sequence
from itertools import pairwise

from dsv3.documents.byte_blocks import UnreadFile, file_form
from dsv3.documents.document_files import ReadOptions
from dsv3.documents.input_files import COMPRESSED, FileKind, InputFile, Part, Unit
from dsv3.documents.table_files import plan_parquet, plan_table

UNIT_BYTES = 256 << 20

MOST_UNITS = 4096
"""Units at most of files that can be cut: each makes files of its own, and a reader opens them all."""

DENSITY = 4
"""Bytes of text that a byte of a compressed file or of Parquet holds, about."""


def plan_units(files: Sequence[InputFile], options: ReadOptions, unit_bytes: int | None = None) -> list[Unit]:
    """Return the units of files, in the order of the files.

    Args:
        unit_bytes: bytes of text per unit; None chooses UNIT_BYTES, and more for more than a terabyte.
    """
    if unit_bytes is None:
        unit_bytes = max(UNIT_BYTES, sum(map(_text_bytes, files)) // MOST_UNITS)
    units: list[Unit] = []
    group: list[Part] = []
    weight = 0
    for file in files:
        parts = _parts(file, options, unit_bytes)
        if len(parts) == 1 and _text_bytes(file) < unit_bytes:
            if group and weight + _text_bytes(file) > unit_bytes:
                units.append(Unit(len(units), tuple(group)))
                group, weight = [], 0
            group.append(parts[0])
            weight += _text_bytes(file)
            continue
        if group:
            units.append(Unit(len(units), tuple(group)))
            group, weight = [], 0
        for part in parts:
            units.append(Unit(len(units), (part,)))
    if group:
        units.append(Unit(len(units), tuple(group)))
    return units


def _text_bytes(file: InputFile) -> int:
    dense = file.kind is FileKind.parquet or file.path.suffix.lower() in COMPRESSED
    return file.size * (DENSITY if dense else 1)


def _parts(file: InputFile, options: ReadOptions, unit_bytes: int) -> list[Part]:
    """Return a file as one part, or cut into ranges where it is large and its kind allows it."""
    whole = [Part(file, 0, None, file.size)]
    if file.kind in (FileKind.dataset, FileKind.hub):
        return plan_table(file, unit_bytes)
    if _text_bytes(file) <= unit_bytes:
        return whole
    if file.kind is FileKind.parquet:
        return plan_parquet(file, unit_bytes // DENSITY)
    if file.kind is FileKind.json_values or (file.kind is FileKind.text and options.separator is None):
        return whole
    try:
        if file_form(file.path) != "plain":
            return whole
    except (OSError, UnreadFile):
        return whole
    count = -(-file.size // unit_bytes)
    bounds = [file.size * number // count for number in range(count + 1)]
    return [Part(file, start, end, end - start) for start, end in pairwise(bounds)]
