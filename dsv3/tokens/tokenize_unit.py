"""Tokenize a unit: read its documents, encode them, write their shards; go on within it after a kill."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from dsv3.documents.byte_blocks import Report
from dsv3.documents.input_files import Unit
from dsv3.documents.skip_limit import BadDocument, Skipped
from dsv3.documents.unit_pool import WorkPlace
from dsv3.tokens.document_encoder import DocumentEncoder, Window, document_ends
from dsv3.tokens.shard_index import DTYPES, sync_folder
from dsv3.tokens.shard_writer import SHARD_TOKENS, ShardWriter
from dsv3.tokens.tokenizer import Tokenizer
from dsv3.untrusted_files import read_json

BATCH_CHARACTERS = 1 << 20
"""Characters that are encoded at once per core."""

MOST_BATCHES = 4
"""Times BATCH_CHARACTERS at most, however many cores one process has."""

NOTE_EVERY = 30.0
"""Seconds of work on a unit that a kill loses at most, about."""


class DocumentSource(Protocol):
    """The documents of units, and the side of each; it can be pickled."""

    def documents(
        self, unit: Unit, skipped: Skipped, report: Report
    ) -> Iterator[tuple[str | None, Iterable[str]]]:
        """Yield side and pieces of each document, always the same ones in the same order.

        The side is a split of the index, None for a document that is left out. Iterating over the pieces
        raises BadDocument where those given belong to no document.
        """


@dataclass
class Counts:
    """Counts of a unit besides those of Skipped."""

    characters: int = 0
    left_out: int = 0
    """Documents that the source leaves out, or of which the tokenizer makes no token."""
    blind_cuts: int = 0
    largest: int = 0
    """Tokens of the largest document."""

    def merge(self, other: Mapping[str, int]) -> None:
        """Add the counts of another unit."""
        for name, count in other.items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, count) if name == "largest" else mine + count)


@dataclass(frozen=True)
class TokenizeUnit:
    """The work on a unit: read, encode, write shards; goes on at its last note after a kill.

    Attributes:
        tokenizer_folder: where the tokenizer lies, for a process that has none yet.
        cores: that one process may use.
    """

    source: DocumentSource
    tokenizer_folder: Path
    dtype_name: str
    cores: int = 1
    note_every: float = NOTE_EVERY
    shard_tokens: int = SHARD_TOKENS

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, loaded once per process."""
        return Tokenizer.from_file(self.tokenizer_folder)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "tokenizer"}

    def __call__(self, unit: Unit, place: WorkPlace) -> dict[str, Any]:
        """Return counts and shards of a unit, whose files are on the disk then."""
        return _UnitRun(self, unit, place).run()


class _UnitRun:
    """The run over one unit."""

    def __init__(self, work: TokenizeUnit, unit: Unit, place: WorkPlace) -> None:
        self.work, self.unit, self.place = work, unit, place
        self.dtype = DTYPES[work.dtype_name]
        self.encoder = DocumentEncoder(work.tokenizer)
        self.before, self.behind = document_ends(work.tokenizer)
        self.skipped = Skipped()
        self.counts = Counts()
        self.writers: dict[str, ShardWriter] = {}
        self.windows_done = 0
        self.open_characters = 0
        self.notes = place.directory / f"unit-{unit.number:05d}.json"

    def run(self) -> dict[str, Any]:
        """Read, encode and write everything; return the result for the journal."""
        done = self._resume()
        noted = time.monotonic()
        try:
            for batch in self._batches(done):
                self._write(batch)
                if time.monotonic() - noted >= self.work.note_every:
                    self._note()
                    noted = time.monotonic()
            shards = {side: writer.close() for side, writer in sorted(self.writers.items())}
            sync_folder(self.place.directory)
        except BaseException:
            for writer in self.writers.values():
                writer.abandon()
            raise
        self.notes.unlink(missing_ok=True)
        self.counts.blind_cuts += self.encoder.blind_cuts
        return {
            "shards": {side: [shard.to_json() for shard in found] for side, found in shards.items() if found},
            "skipped": self.skipped.to_json(),
            "counts": vars(self.counts),
        }

    def _events(self) -> Iterator[tuple[str, Window | None]]:
        """Yield (side, window) of all documents, and (side, None) where the windows so far are to be dropped.

        The side is empty for a document that is left out.
        """
        for side, pieces in self.work.source.documents(self.unit, self.skipped, self.place.report):
            if side is None:
                yield "", None
                continue
            try:
                for window in self.encoder.windows(pieces):
                    yield side, window
            except BadDocument:
                yield side, None

    def _batches(self, done: int) -> Iterator[list[tuple[str, Window | None]]]:
        """Yield the events behind the first `done` ones, in batches that fill the tokenizer's cores."""
        limit = BATCH_CHARACTERS * min(self.work.cores, MOST_BATCHES)
        batch: list[tuple[str, Window | None]] = []
        size = 0
        for number, event in enumerate(self._events()):
            if number < done:
                self.encoder.blind_cuts = 0  # the note has these
                continue
            batch.append(event)
            size += len(event[1].text) if event[1] is not None else 1
            if size >= limit:
                yield batch
                batch, size = [], 0
        yield batch

    def _write(self, batch: list[tuple[str, Window | None]]) -> None:
        windows = [window for _, window in batch if window is not None]
        encoded = iter(self.encoder.encode(windows) if windows else ())
        for side, window in batch:
            self.windows_done += 1
            if not side:
                self.counts.left_out += 1
                continue
            writer = self._writer(side)
            if window is None:
                writer.drop_document()
                self.open_characters = 0
                continue
            ids = next(encoded)
            if not writer.open_tokens and not window.context and self.before:
                writer.write(self.before)
            writer.write(ids)
            self.open_characters += len(window.text)
            if window.last:
                self.counts.characters += self.open_characters
                self.open_characters = 0
                if self.behind:
                    writer.write(self.behind)
                self.counts.largest = max(self.counts.largest, writer.open_tokens)
                if writer.open_tokens:
                    writer.end_document()
                else:
                    self.counts.left_out += 1

    def _writer(self, side: str, noted: dict[str, Any] | None = None) -> ShardWriter:
        if side not in self.writers:
            name = f"{side}-{self.unit.number:05d}"
            self.writers[side] = ShardWriter(
                self.place.directory, name, self.dtype, noted, self.work.shard_tokens
            )
        return self.writers[side]

    def _note(self) -> None:
        """Note how far the unit is, once everything up to there is on the disk."""
        self.counts.blind_cuts += self.encoder.blind_cuts
        self.encoder.blind_cuts = 0
        found = {
            "windows": self.windows_done,
            "open_characters": self.open_characters,
            "counts": vars(self.counts),
            "writers": {side: writer.note() for side, writer in self.writers.items()},
        }
        new = self.notes.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.replace(self.notes)

    def _resume(self) -> int:
        """Set up the writers as they were noted; return the windows that they have, 0 at the beginning."""
        try:
            found = read_json(self.notes)
            for side, noted in found["writers"].items():
                self._writer(side, noted)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            for writer in self.writers.values():
                writer.abandon()
            self.writers = {}
            return 0
        self.counts, self.open_characters = Counts(**found["counts"]), int(found["open_characters"])
        self.windows_done = int(found["windows"])
        return self.windows_done
