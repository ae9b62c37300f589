"""The reading of a scan: a row per document on the disk, by unit, and from these the digest of every file."""

import hashlib
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.data.held_out_split import DOCUMENT, Table
from dsv3.documents.byte_blocks import UnreadFile, file_form
from dsv3.documents.document_files import ReadOptions, read_documents
from dsv3.documents.input_files import FileKind, InputFile, Unit
from dsv3.documents.skip_limit import BadDocument, Skipped
from dsv3.documents.unit_pool import WorkPlace
from dsv3.tokens.data_record import Piece
from dsv3.tokens.file_digests import digest
from dsv3.untrusted_files import open_file, parse_json

_ROW = struct.Struct("<32sq")
"""A document of a unit: its sha256 and its characters, -1 for what turned out to be none."""


@dataclass(frozen=True)
class ScanUnit:
    """The work on a unit: a row of _ROW per document in a file of the unit's own."""

    options: ReadOptions

    def __call__(self, unit: Unit, place: WorkPlace) -> dict[str, Any]:
        """Return the documents of each part, the largest one and what was skipped."""
        skipped, counts, json_lines = Skipped(), [], []
        marked: dict[str, tuple[int, str]] = {}
        largest = ("", -1)
        file = _rows_of(unit, place.directory)
        with file.open("wb") as rows:
            for part in unit.parts:
                count, is_whole = 0, self.options.separator is None and part.file.kind is FileKind.text
                with suppress(OSError, UnreadFile):  # reading it will tell
                    form = file_form(part.file.path) if part.start == 0 else ""
                    if form.startswith("utf"):
                        before, first = marked.get(form, (0, part.file.name))
                        marked[form] = before + 1, first
                for document in read_documents(
                    Unit(unit.number, (part,)), self.options, skipped, place.report
                ):
                    state, characters = hashlib.sha256(), 0
                    if is_whole and looks_like_json_lines(document.text):
                        json_lines.append(part.file.name)
                    try:
                        for piece in document.pieces():
                            state.update(piece.encode())
                            characters += len(piece)
                    except BadDocument:
                        characters = -1
                    rows.write(_ROW.pack(state.digest(), characters))
                    largest = max(largest, (document.name, characters), key=lambda each: each[1])
                    count += 1
                counts.append(count)
        found = {"documents": counts, "largest": largest, "skipped": skipped.to_json()}
        named = {"json_lines": json_lines, "marked": marked, "rows": file.name}
        return found | named | {"digest": digest(file)}


def looks_like_json_lines(text: str) -> bool:
    """Return True for a text whose first line is a JSON object and whose second one begins as one does."""
    if not text.startswith("{"):
        return False
    first, _, rest = text.partition("\n")
    try:
        return rest.startswith("{") and isinstance(parse_json(first, "the first line"), dict)
    except ValueError:
        return False


def _rows_of(unit: Unit, folder: Path) -> Path:
    return folder / f"unit-{unit.number:05d}"


def is_intact(result: dict[str, Any], folder: Path) -> bool:
    """Return whether the rows of a unit, which a kill before this one has left, are as they were written."""
    file = folder / result["rows"]
    size = _ROW.size * sum(result["documents"])
    return file.is_file() and file.stat().st_size == size and digest(file) == result.get("digest")


def join_rows(units: Sequence[Unit], folder: Path, work_folder: Path) -> Table:
    """Return the rows of all units as one table on the disk."""
    with (folder / "table").open("wb") as table:
        for unit in units:
            with open_file(_rows_of(unit, work_folder)) as rows:
                shutil.copyfileobj(rows, table)
    return np.memmap(folder / "table", DOCUMENT, "r")


def file_pieces(
    units: Sequence[Unit], results: Sequence[dict[str, Any]], table: Table, options: ReadOptions
) -> Iterator[Piece]:
    """Yield every file that holds a document, with a digest of its documents."""
    parts = (
        (part.file, count)
        for unit, result in zip(units, results, strict=True)
        for part, count in zip(unit.parts, result["documents"], strict=True)
    )
    place, open_file, state, documents = 0, None, hashlib.sha256(), 0

    def piece(file: InputFile) -> Iterator[Piece]:
        if documents:
            yield Piece(file.name, file.size, known or state.hexdigest(), documents)

    known = ""
    for file, count in parts:
        if file is not open_file:
            if open_file is not None:
                yield from piece(open_file)
            open_file, state, documents, known = file, hashlib.sha256(), 0, ""
        for first in range(place, place + count, 1 << 16):
            rows = table[first : min(first + (1 << 16), place + count)]
            rows = rows[rows["characters"] >= 0]
            documents += len(rows)
            state.update(rows["digest"].tobytes())
            if file.kind is FileKind.text and options.separator is None and len(rows):
                known = rows["digest"][0].tobytes().hex()  # that of the file's text
        place += count
    if open_file is not None:
        yield from piece(open_file)
