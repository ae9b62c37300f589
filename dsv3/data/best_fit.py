"""Best-fit packing: rows of whole documents (Ding et al., "Fewer Truncations Improve Language Modeling").

A document longer than a row is cut into rows first. The last part of it, and every other document, goes into
the row that it fits best, longest first. Documents are packed in blocks of BLOCK_DOCUMENTS consecutive ones,
so that memory is bounded. The rows are laid out once and kept in the cache, memory-mapped:

    pieces.npy    [pieces] of PIECE, those of a row one after the other
    ends.npy      [rows + 1] int64, the piece that each row begins with, and the end
    best_fit.json counts, and the sizes of the two files
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsv3.data.fill_in_middle import ADDED_TOKENS, FillInMiddle
from dsv3.data.packing import PackedRow
from dsv3.errors import UserError
from dsv3.metrics.progress import phase
from dsv3.tokens.cache import CacheEntryError, cache_root, load_or_build
from dsv3.tokens.file_array import map_array
from dsv3.tokens.shuffle import Ids, Permutation, mix_array
from dsv3.tokens.token_store import TokenStore
from dsv3.untrusted_files import read_json

FORMAT = 1
"""Part of the cache key: raise it when the same documents are to be packed differently."""

BLOCK_DOCUMENTS = 1 << 17
"""Documents that are packed together, in 20 MB; rows of 128 K tokens have less than 0.1 % of padding."""

_WRITTEN_TOGETHER = 1 << 18
"""Pieces of long documents that are written at once."""

PIECE = np.dtype([("document", "<i8"), ("part", "<i4"), ("count", "<i4")])
"""A document, the number of its part (0: the first), and its tokens; negative: of fill-in-the-middle."""


class Layout(NamedTuple):
    """The rows of a store as they lie in the cache."""

    pieces: npt.NDArray[Any]
    ends: Ids
    padding: int
    """Tokens of padding in all rows."""
    documents_cut: int
    """Documents longer than a row."""


class BestFitDataset:
    """Training rows of whole documents, padded at the end; the rows are shuffled anew in every epoch.

    Parts of a cut document share one token, so that every token but a document's first is a target once per
    epoch. In every epoch the same documents share a row.

    Args:
        store: the documents.
        seed: shuffles the rows; None keeps them as they were laid out.
        fim: rearranges some documents, the same ones in every epoch, with other cuts.
        cache_dir: as in the data's config.
        fingerprint: changes with the documents of the store.

    Raises:
        UserError: there is no token, or the cache cannot be written.
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        seed: int | None,
        fim: FillInMiddle | None,
        cache_dir: str | None,
        fingerprint: str,
    ) -> None:
        if not store.num_tokens:
            raise UserError("data: the training side has no token; give more text")
        self.sequence_length = sequence_length
        self._store, self._seed, self._fim = store, seed, fim
        parts = (FORMAT, BLOCK_DOCUMENTS, fingerprint, store.num_documents, store.num_tokens, sequence_length)
        key = hashlib.sha256(repr((*parts, fim and fim.identity)).encode()).hexdigest()[:16]
        told = f"{store.num_documents:,} documents packed into rows of {sequence_length:,} tokens"

        def build(directory: Path) -> None:
            write_layout(directory, store, sequence_length, fim)

        layout = load_or_build(cache_root(cache_dir) / f"best-fit-{key}", read_layout, build, told)
        self._pieces, self._ends = layout.pieces, layout.ends
        self.padding, self.documents_cut = layout.padding, layout.documents_cut

    def __len__(self) -> int:
        return len(self._ends) - 1

    def row(self, index: int) -> PackedRow:
        """Return the row at `index` >= 0, which is row `index % len` of epoch `index // len`."""
        epoch, number = divmod(index, len(self))
        if self._seed is not None:
            number = Permutation(len(self), self._seed, epoch, 1)[number]
        row, filled = PackedRow.empty(self.sequence_length + 1), 0
        first, end = self._ends[number : number + 2].tolist()
        for place, (document, part, count) in enumerate(self._pieces[first:end].tolist()):
            begin, stop = self._store.offsets(document, document + 1).tolist()
            skip = part * self.sequence_length
            if count < 0:
                assert self._fim is not None
                count = -count
                ids = self._fim.read(self._store, begin, stop - begin, epoch, skip, count)
            else:
                ids = self._store.read(begin + skip, count)
            row.tokens[filled : filled + count] = ids
            row.documents[filled : filled + count] = place
            filled += count
        return row


def write_layout(directory: Path, store: TokenStore, sequence_length: int, fim: FillInMiddle | None) -> None:
    """Pack the documents of a store, block by block, into the files of a layout."""
    total, capacity = store.num_documents, sequence_length + 1
    files = {name: directory / name for name in ("pieces.npy", "ends.npy")}
    cut = filled = 0
    with (
        _Column(files["pieces.npy"], PIECE) as pieces,
        _Column(files["ends.npy"], np.dtype("<i8")) as ends,
        phase("packing documents into rows", total, "documents", each_node=True) as work,
    ):
        ends.append(np.zeros(1, np.int64))
        for first in range(0, total, BLOCK_DOCUMENTS):
            end = min(total, first + BLOCK_DOCUMENTS)
            lengths, rearranged = np.diff(store.offsets(first, end)), np.zeros(end - first, np.bool_)
            if fim is not None:
                rearranged = fim.choose(first, end, 0)
                lengths = lengths + ADDED_TOKENS * rearranged
            cut += int((lengths > capacity).sum())
            for block, sizes in _pack_block(lengths, sequence_length):
                filled += int(block["count"].sum())
                block["count"] *= np.where(rearranged[block["document"]], -1, 1).astype(np.int32)
                block["document"] += first
                ends.append(pieces.length + np.cumsum(sizes))
                pieces.append(block)
            work.advance(end - first)
        padding = (ends.length - 1) * capacity - filled
    written = {name: path.stat().st_size for name, path in files.items()}
    told = {"sizes": written, "padding": padding, "documents_cut": cut}
    (directory / "best_fit.json").write_text(json.dumps(told), "utf-8")


def read_layout(directory: Path) -> Layout:
    """Memory-map the files that `write_layout` wrote; CacheEntryError where they are missing or damaged."""
    try:
        told = read_json(directory / "best_fit.json")
        for name, size in told["sizes"].items():
            if (directory / name).stat().st_size != size:
                raise CacheEntryError(f"{directory / name} does not have the size it was written with")
        pieces, ends = (map_array(directory / name) for name in ("pieces.npy", "ends.npy"))
        return Layout(np.asarray(pieces), np.asarray(ends), told["padding"], told["documents_cut"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheEntryError(str(error)) from error


def _pack_block(lengths: Ids, sequence_length: int) -> Iterator[tuple[npt.NDArray[Any], Ids]]:
    """Yield pieces of documents of these lengths, row by row, with the number of pieces of each row."""
    parts = np.maximum(-(-(lengths - 1) // sequence_length), lengths > 0)  # n tokens have n - 1 targets
    last = lengths - (parts - 1) * sequence_length
    # All parts but the last are full rows.
    before = np.concatenate([[0], np.cumsum(np.maximum(parts - 1, 0))])
    for first in range(0, int(before[-1]), _WRITTEN_TOGETHER):
        numbers = np.arange(first, min(first + _WRITTEN_TOGETHER, int(before[-1])))
        documents = np.searchsorted(before, numbers, side="right") - 1
        yield (
            _as_pieces(documents, numbers - before[documents], np.full(len(numbers), sequence_length + 1)),
            np.ones(len(numbers), np.int64),
        )
    documents = np.flatnonzero(parts)
    rows = best_fit(last[documents], sequence_length + 1)
    # Rows would otherwise begin with their longest document and end with the shortest.
    order = np.lexsort((mix_array(documents.astype(np.uint64)), rows))
    documents = documents[order]
    yield _as_pieces(documents, parts[documents] - 1, last[documents]), np.bincount(rows)


def best_fit(lengths: Ids, capacity: int) -> Ids:
    """Return the row of each piece, packed by best-fit decreasing; no length is above `capacity` or 0.

    Pieces are taken in the order of falling length, each into the row with the least room that it fits into.
    Pieces of one length and rows with one amount of room are handled together: with `room` tokens left, a
    row takes room // length pieces in turn, because it stays the best one while it has room for one.
    """
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(-lengths[order], return_counts=True)
    rows = np.empty(len(lengths), np.int64)
    open_rows: list[list[Ids]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where a row has room for r tokens: the next one is found in a few words
    done = opened = 0
    for length, count in zip((-distinct).tolist(), counts.tolist(), strict=True):
        while count > 0:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                chosen = open_rows[room].pop()
            else:
                room = capacity
                chosen = np.arange(opened, opened - (-count // (capacity // length)))
                opened += len(chosen)
            each = room // length
            needed = -(-count // each)
            if len(chosen) > needed:
                open_rows[room].append(chosen[needed:])
                chosen = chosen[:needed]
            if not open_rows[room]:
                rooms &= ~(1 << room)
            placed = min(count, each * len(chosen))
            rows[order[done : done + placed]] = np.repeat(chosen, each)[:placed]
            full, rest = divmod(placed, each)
            for left, changed in (
                (room - each * length, chosen[:full]),
                (room - rest * length, chosen[full:]),
            ):
                if left > 0 and len(changed):
                    open_rows[left].append(changed)
                    rooms |= 1 << left
            done, count = done + placed, count - placed
    return rows


def _as_pieces(documents: Ids, parts: Ids, counts: Ids) -> npt.NDArray[Any]:
    pieces = np.empty(len(documents), PIECE)
    pieces["document"], pieces["part"], pieces["count"] = documents, parts, counts
    return pieces


class _Column:
    """Writes an .npy file of one dimension whose length is known at the end."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._dtype, self.length = dtype, 0
        self._file: IO[bytes] = path.open("wb")
        self._write_header()

    def __enter__(self) -> "_Column":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._write_header()  # numpy pads it to one size for every length of the first dimension
        self._file.close()

    def append(self, values: npt.NDArray[Any]) -> None:
        """Write values at the end."""
        self._file.write(values.astype(self._dtype).tobytes())
        self.length += len(values)

    def _write_header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
