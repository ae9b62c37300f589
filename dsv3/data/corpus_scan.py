"""The scan of a corpus: one reading of all texts, which tells the documents apart and chooses their sides.

What it finds is kept in the cache under the stamp of the files, so that a later start reads no text at all.
It is done in parallel and goes on after a kill; the hashes of the documents stand on the disk while it lasts,
and a byte per document, its side, stays.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.data.corpus import Corpus, Stamp
from dsv3.data.document_scan import ScanUnit, file_pieces, is_intact, join_rows
from dsv3.data.held_out_split import (
    HeldOutSplit,
    cut_pieces,
    find_tail,
    split_documents,
)
from dsv3.documents.byte_blocks import Report
from dsv3.documents.document_files import ReadOptions, read_documents
from dsv3.documents.input_files import FileKind, Unit
from dsv3.documents.skip_limit import REASONS_NAMED, Reason, Skipped, skipped_lines
from dsv3.documents.unit_pool import run_units
from dsv3.errors import UserError, quoted
from dsv3.metrics.progress import amount, phase
from dsv3.tokens.cache import CacheEntryError
from dsv3.tokens.data_record import DataRecord, Piece
from dsv3.tokens.file_array import map_array
from dsv3.tokens.shard_index import HELD_OUT, TRAIN
from dsv3.untrusted_files import read_json

SCAN_FORMAT = 2
"""Part of the key of a scan: raise it when the same files are to be read otherwise."""

SCAN_FILE, SIDES_FILE, RECORD_FILE = "scan.json", "sides.npy", "record.json"

_SIDES = (TRAIN, HELD_OUT, None)
"""The splits of the values in SIDES_FILE."""

_NAMED = 3
"""Names of what was left out that are kept."""


@dataclass(frozen=True)
class CorpusScan:
    """The findings of a scan; all of them are small, whatever the corpus.

    Attributes:
        folder: the entry of the cache.
        fingerprint: 16 hex characters over all names and contents.
        files: how many there are, and how many of each kind.
        size: their bytes.
        split: the counts of the two sides.
        cut: the character at which the only document is cut; None where there are several.
        largest: name and characters of the largest document.
        skipped: the counts of what is no document.
        left_out: files left out because of their names, and the first of them.
        json_lines: files of text that look like JSON lines, and the first of them.
        as_text: a line where .json files are read as text.
        marked: by encoding the files that a byte order mark tells to be in it, and the first of them.
        first_documents: the number of each unit's first document.
        unlisted: files and folders that could not be looked at; they are in `skipped`, and not in `files`.
    """

    folder: Path
    fingerprint: str
    files: dict[str, int]
    size: int
    split: HeldOutSplit
    cut: int | None
    largest: tuple[str, int]
    skipped: Skipped
    left_out: tuple[int, list[str]]
    json_lines: tuple[int, list[str]]
    as_text: list[str]
    marked: dict[str, tuple[int, str]]
    first_documents: list[int]
    unlisted: int = 0

    @classmethod
    def read(cls, folder: Path) -> "CorpusScan":
        """Return the scan that an entry of the cache holds; CacheEntryError where it is not whole."""
        try:
            found = read_json(folder / SCAN_FILE, "listing")
            number = found["first_documents"][-1]
            if (folder / SIDES_FILE).stat().st_size < number:
                raise CacheEntryError(f"{folder / SIDES_FILE} is cut off")
            split, skipped = HeldOutSplit(**found.pop("split")), Skipped.from_json(found.pop("skipped"))
            found |= {name: tuple(found[name]) for name in ("largest", "left_out", "json_lines")}
            return cls(folder, split=split, skipped=skipped, **found)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise CacheEntryError(f"{type(error).__name__}: {error}") from error

    def write(self) -> None:
        """Write what `read` reads."""
        content = {name: value for name, value in vars(self).items() if name != "folder"}
        content |= {"split": asdict(self.split), "skipped": self.skipped.to_json()}
        (self.folder / SCAN_FILE).write_text(json.dumps(content), "utf-8")

    @property
    def record(self) -> DataRecord | None:
        """Return the names, sizes and digests of the files, without the layout of their tokens."""
        return DataRecord.read(self.folder / RECORD_FILE)

    def summary(self) -> dict[str, int]:
        """Return the counts to record."""
        return {
            "files_read": sum(self.files.values()),
            "documents_read": self.split.documents,
            "duplicates_dropped": self.split.duplicates,
            "documents_skipped": self.skipped.num_skipped,
            "files_skipped": sum(self.skipped.files.values()),
            "documents_empty": self.skipped.empty,
            "characters_train": self.split.characters_train,
            "largest_document_characters": self.largest[1],
        }

    def told(self, options: ReadOptions) -> list[str]:
        """Return lines for the user: what was read, then what was skipped by reason, and left out."""
        kinds = [
            f"{amount(count, 'files')} of {kind}{_documents_are(FileKind(kind), options)}"
            for kind, count in self.files.items()
        ]
        split, (name, characters) = self.split, self.largest
        line = f"{amount(split.documents, 'documents')} of {' and '.join(kinds)}"
        counts = [
            (split.duplicates, f"{amount(split.duplicates, 'duplicates')} dropped"),
            (self.skipped.empty, f"{self.skipped.empty:,} empty"),
            (
                split.documents - 1,
                f"the largest, {name}, has {characters / split.characters:.1%} of the text",
            ),
        ]
        lines = [", ".join([line, *(text for count, text in counts if count)]), *skipped_lines(self.skipped)]
        for encoding, (count, first) in self.marked.items():
            read = "which is left out" if encoding == "utf-8" else "and are read as that"
            read = read if count > 1 else read.replace("are", "is")
            mark = f"{'begins' if count == 1 else 'begin'} with a byte order mark of {encoding.upper()}"
            lines.append(f"{amount(count, 'files')} {mark}, {read}, first {first}")
        count, names = self.json_lines
        if count:
            look = "looks like JSON lines and is" if count == 1 else "look like JSON lines and are"
            way = f"give .jsonl as suffix to read data.field={options.field}"
            lines.append(f"{amount(count, 'files')} {look} read as text, first {names[0]}: {way}")
        lines += self.as_text
        count, names = self.left_out
        if count:
            what = "hidden, left behind by an editor or a download, or a pipe or the like"
            lines.append(f"left out {amount(count, 'files')}: {what}, first {names[0]}")
        return lines

    def documents(self, options: ReadOptions) -> "SidedDocuments":
        """Return the documents of units, with the side of each."""
        return SidedDocuments(
            options, self.folder / SIDES_FILE, tuple(self.first_documents), self.split.single, self.cut
        )


def _documents_are(kind: FileKind, options: ReadOptions) -> str:
    """Return what a document of such files is, for people."""
    if kind is not FileKind.text:
        return f" (data.field={options.field})"
    if options.separator is None:
        return " (a file is a document)"
    return f" (documents end at data.separator={quoted(options.separator)})"


@dataclass(frozen=True)
class SidedDocuments:
    """The documents of a corpus with their sides, for `prepare_shards`.

    Attributes:
        only: the split to give; documents of the other one are left out.
    """

    options: ReadOptions
    sides: Path
    first_documents: tuple[int, ...]
    single: int | None
    cut: int | None
    only: str = TRAIN

    def documents(
        self, unit: Unit, skipped: Skipped, report: Report
    ) -> Iterator[tuple[str | None, Iterable[str]]]:
        """Yield side and pieces of each document of a unit; None for one that is left out."""
        sides, first = map_array(self.sides), self.first_documents[unit.number]
        for number, document in enumerate(read_documents(unit, self.options, skipped, report), first):
            if number == self.single and self.cut is not None:
                yield self.only, cut_pieces(document.pieces(), self.cut, self.only == HELD_OUT)
            else:
                side = _SIDES[sides[number]]
                yield (side if side == self.only else None), document.pieces()


def scan_corpus(corpus: Corpus, stamp: Stamp, share: float, folder: Path) -> None:
    """Read all documents of a corpus, choose their sides, and write what CorpusScan reads into `folder`.

    Args:
        stamp: of the files, as part of what tells the work of a killed scan from another's.
        share: part of the documents to hold out.

    Raises:
        UserError: there is no text, or a file changes meanwhile.
    """
    found, units = corpus.files(), corpus.units(stamp)
    work_folder = folder / "documents"
    with phase(f"reading {corpus.root}", unit="bytes", each_node=True) as work:
        results = run_units(
            units,
            ScanUnit(corpus.options),
            work_folder,
            {"stamp": stamp.digest},
            progress=work,
            is_intact=lambda result: is_intact(result, work_folder),
        )
        skipped = Skipped()
        for result in results:
            skipped.merge(Skipped.from_json(result["skipped"]))
        json_lines = [name for result in results for name in result["json_lines"]]
        marked: dict[str, tuple[int, str]] = {}
        for encoding, (count, first) in (each for result in results for each in result["marked"].items()):
            before, earlier = marked.get(encoding, (0, first))
            marked[encoding] = before + count, earlier
        for name in found.unreadable:
            skipped.add(Reason.UNREADABLE, name)
        if not skipped.documents:
            raise UserError(_nothing(corpus, skipped))
        table = join_rows(units, folder, work_folder)
        files = file_pieces(units, results, table, corpus.options)
        total = hashlib.sha256()
        DataRecord.of(_hashed(files, total), None).write(folder / RECORD_FILE)
        split = split_documents(table, share, folder / SIDES_FILE)
        firsts = np.cumsum([0, *(sum(result["documents"]) for result in results)]).tolist()
        cut = None
        if split.single is not None:
            unit = units[int(np.searchsorted(firsts, split.single, side="right")) - 1]
            number = split.single - firsts[unit.number]
            name = next(islice(read_documents(unit, corpus.options, Skipped()), number, None)).name
            cut = find_tail(lambda: _read_document(unit, corpus.options, number), share, name)
    kinds: dict[str, int] = {}
    for file in found.files:
        kinds[file.kind.value] = kinds.get(file.kind.value, 0) + 1
    largest = max((tuple(result["largest"]) for result in results), key=lambda each: each[1])
    CorpusScan(
        folder=folder,
        fingerprint=total.hexdigest()[:16],
        files=kinds,
        size=sum(file.size for file in found.files),
        split=split,
        cut=cut,
        largest=largest,
        skipped=skipped,
        left_out=(len(found.left_out), found.left_out[:_NAMED]),
        json_lines=(len(json_lines), json_lines[:_NAMED]),
        as_text=found.told_json(corpus.options.field),
        marked=marked,
        first_documents=firsts,
        unlisted=len(found.unreadable),
    ).write()
    del table
    (folder / "table").unlink()
    shutil.rmtree(work_folder)


def _nothing(corpus: Corpus, skipped: Skipped) -> str:
    empty = [f"{skipped.empty} empty"] if skipped.empty else []
    told = "; ".join([*skipped_lines(skipped, REASONS_NAMED), *empty])
    way = "give a text file or a folder of text files"
    return f"{corpus.title} holds no text{f' ({told})' if told else ''}: {way}"


def _hashed(pieces: Iterable[Piece], total: Any) -> Iterator[Piece]:
    """Pass pieces on, and let names and digests enter a hash."""
    for piece in pieces:
        total.update(f"{piece.name}\0{piece.digest}\n".encode("utf-8", "surrogateescape"))
        yield piece


def _read_document(unit: Unit, options: ReadOptions, number: int) -> Iterator[str]:
    """Yield the pieces of one document of a unit."""
    return next(islice(read_documents(unit, options, Skipped()), number, None)).pieces()
