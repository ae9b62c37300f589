"""Megatron-LM's indexed datasets: ids in PREFIX.bin, and where sequences and documents begin in PREFIX.idx.

Two layouts of the index exist; all numbers are little-endian.

    MMIDIDX   9 bytes of magic, version 1 (u64), dtype code (u8), sequences n (u64), entries d (u64) of the
              document index, sizes i32 [n] in ids, pointers i64 [n] in bytes, document index i64 [d], and
              perhaps modes i8 [n] of multimodal data
    TNTIDX    the older one: 8 bytes of magic, version 1 (u64), dtype code, bytes per id, sequences n, sizes
              n, entries d (5 u64), dimensions i64 [n + 1], data offsets i64 [n + 1] in ids, sizes i64 [n],
              document index i64 [d]

The document index names the sequence that each document begins with, and n at its end. Source:
megatron/core/datasets/indexed_dataset.py, and megatron/data/indexed_dataset.py for the older one.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.errors import UserError
from dsv3.tokens.file_array import FileArray, read_head
from dsv3.tokens.shuffle import Ids
from dsv3.tokens.token_store import Segment

MAGIC, OLD_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"

DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Dtypes by code. 6 and 7 are floats, which of them is which differs between versions."""

_LONG, _INT = np.dtype("<i8"), np.dtype("<i4")

_SPAN = 1 << 20
"""Sequences at most whose bounds are read at once."""


@dataclass(frozen=True)
class DocumentOffsets:
    """The offsets of documents [documents + 1], in ids: those of the sequences that they begin with.

    Attributes:
        path: the .idx file, as messages name it.
        documents: [documents + 1], the sequence that each begins with.
        starts: where sequences begin, in units of `unit` bytes.
        sizes: [sequences] in ids; None where `starts` has the end of the last one too.
        itemsize: units per id.
        total: ids in the .bin file.
    """

    path: str
    documents: FileArray
    starts: FileArray
    sizes: FileArray | None
    itemsize: int
    total: int

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, part: slice) -> Ids:
        """Return the offsets of a slice; UserError, with the place, where the index contradicts itself."""
        first, _, _ = part.indices(len(self))
        numbers = self.documents[part].astype(np.int64)
        if not len(numbers):
            return numbers
        wrong = (numbers < 0) | (numbers > self.num_sequences)
        wrong[1:] |= numbers[1:] < numbers[:-1]
        if wrong.any():
            place = int(np.argmax(wrong))
            raise UserError(
                f"{self.path} is damaged: document {first + place} begins with sequence {numbers[place]}, "
                f"there are {self.num_sequences:,} and documents ascend"
            )
        low, high = int(numbers[0]), int(numbers[-1])
        if high - low <= _SPAN:
            return self._bounds(low, high)[numbers - low]
        return np.concatenate([self._bounds(number, number) for number in numbers.tolist()])

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences."""
        return len(self.starts) - (self.sizes is None)

    @property
    def end(self) -> int:
        """Return where the last sequence ends, as the index says, in ids."""
        last = len(self.starts) - 1
        end = int(self.starts[last:][0]) // self.itemsize
        return end if self.sizes is None else end + int(self.sizes[last:][0])

    def _bounds(self, first: int, end: int) -> Ids:
        """Return where sequences first .. end begin, in ids; the end of the last one is `total`."""
        begins = self.starts[first : end + 1].astype(np.int64)
        aligned = begins % self.itemsize == 0
        places = begins // self.itemsize
        if len(places) < end + 1 - first:
            places = np.append(places, self.total)
        if self.sizes is not None:
            sizes = self.sizes[first:end]
            aligned[: len(sizes)] &= (sizes >= 0) & (places[:-1] + sizes == places[1:])
        else:
            aligned[:-1] &= places[:-1] <= places[1:]
        if not aligned.all():
            place = int(np.argmin(aligned))
            size = (
                ""
                if self.sizes is None
                else f" and has {self.sizes[first + place : first + place + 1][0]} ids"
            )
            raise UserError(
                f"{self.path}: sequence {first + place} begins at {begins[place]}{size}, and the next one "
                "not where it ends: sequences must follow one another as in the .bin file"
            )
        return places


def open_megatron(index: Path) -> Segment:
    """Return the documents of an .idx file and of the .bin file beside it.

    Raises:
        UserError: one of the files is missing, cut off or damaged, or holds other than whole numbers.
    """
    content = index.with_suffix(".bin")
    head, size = read_head(index, 64)
    _, num_bytes = read_head(content, 0)
    if head.startswith(MAGIC):
        dtype, offsets = _current(index, head, size, num_bytes)
    elif head.startswith(OLD_MAGIC):
        dtype, offsets = _old(index, head, size, num_bytes)
    else:
        found = "is empty" if not size else f"begins with {head[:9]!r}"
        raise UserError(f"{index} {found}: an index of Megatron's begins with {MAGIC!r} or {OLD_MAGIC!r}")
    known, sequences = len(offsets), offsets.num_sequences
    told = [int(offsets.documents[at : at + 1][0]) for at in (0, known - 1)]
    if told != [0, sequences]:
        raise UserError(
            f"{index} is damaged: its documents span the sequences {told[0]} to {told[1]}, of {sequences}"
        )
    end = offsets.end
    if num_bytes % dtype.itemsize or end != offsets.total:
        raise UserError(
            f"{content} has {num_bytes:,} bytes, and {index} speaks of {end * dtype.itemsize:,}: "
            "one of them is cut off or of another dataset"
        )
    tokens = FileArray(str(content), dtype, 0, offsets.total)
    bounds = (int(offsets[:1][0]), offsets.total)
    return Segment(tokens, offsets, 0, known - 1, str(content), bounds=bounds)


def _current(index: Path, head: bytes, size: int, num_bytes: int) -> tuple[np.dtype[Any], DocumentOffsets]:
    """Return dtype and offsets of an index of today's layout."""
    begin = len(MAGIC) + struct.calcsize("<QBQQ")
    if size < begin:
        raise UserError(f"{index} is cut off: its header has {begin} bytes, it has {size}")
    version, code, sequences, documents = struct.unpack_from("<QBQQ", head, len(MAGIC))
    dtype = _dtype(index, version, code)
    places = _places(begin, (sequences, 4), (sequences, 8), (documents, 8), (sequences, 1))
    _check_size(index, size, sequences, documents, places[-2:])
    sizes = FileArray(str(index), _INT, places[0], sequences)
    starts = FileArray(str(index), _LONG, places[1], sequences)
    starts_of = FileArray(str(index), _LONG, places[2], documents)
    total = num_bytes // dtype.itemsize
    return dtype, DocumentOffsets(str(index), starts_of, starts, sizes, dtype.itemsize, total)


def _old(index: Path, head: bytes, size: int, num_bytes: int) -> tuple[np.dtype[Any], DocumentOffsets]:
    """Return dtype and offsets of an index of the older layout."""
    begin = len(OLD_MAGIC) + struct.calcsize("<6Q")
    if size < begin:
        raise UserError(f"{index} is cut off: its header has {begin} bytes, it has {size}")
    version, code, itemsize, sequences, sizes, documents = struct.unpack_from("<6Q", head, len(OLD_MAGIC))
    dtype = _dtype(index, version, code)
    if itemsize != dtype.itemsize or sizes != sequences:
        raise UserError(
            f"{index} is damaged, or no index of ids: {itemsize} bytes per {dtype.name}, {sizes} dimensions "
            f"of {sequences} sequences"
        )
    places = _places(begin, (sequences + 1, 8), (sequences + 1, 8), (sizes, 8), (documents, 8))
    _check_size(index, size, sequences, documents, places[-1:])
    starts = FileArray(str(index), _LONG, places[1], sequences + 1)
    starts_of = FileArray(str(index), _LONG, places[3], documents)
    return dtype, DocumentOffsets(str(index), starts_of, starts, None, 1, num_bytes // dtype.itemsize)


def _dtype(index: Path, version: int, code: int) -> np.dtype[Any]:
    if version != 1:
        raise UserError(f"{index} has the version {version}, and only 1 is known")
    if code not in DTYPES:
        kind = "floats" if code in (6, 7) else "an unknown kind"
        raise UserError(f"{index} has the dtype code {code}, {kind}: ids have one of {sorted(DTYPES)}")
    return np.dtype(DTYPES[code])


def _places(begin: int, *parts: tuple[int, int]) -> list[int]:
    """Return where arrays of (length, bytes per value) begin that follow one another, and the end."""
    places = [begin]
    for length, width in parts:
        places.append(places[-1] + length * width)
    return places


def _check_size(index: Path, size: int, sequences: int, documents: int, allowed: list[int]) -> None:
    if size not in allowed:
        raise UserError(
            f"{index} has {size:,} bytes, and with {sequences:,} sequences and {documents:,} entries of its "
            f"document index it would have {allowed[0]:,}: it is cut off or damaged"
        )
    if documents < 2 or sequences < 1:
        raise UserError(f"{index} has no document")
