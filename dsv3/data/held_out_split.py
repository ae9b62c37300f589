"""The held-out split: the side of every document of a corpus, such that the two sides share no content.

The hash of a document's content decides its side. The same text under two names can therefore not be on both
sides, and neither the order nor the number of the documents moves one across. Only the first of exact
duplicates is kept. Where too few documents would leave a side empty, the document whose size is nearest to
the wanted share is held out; a single document is cut, and its last lines are held out.

Documents stand in a table on the disk, and their sides too: memory is the same for any number of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv3.errors import UserError

DOCUMENT = np.dtype([("digest", ">u8", (4,)), ("characters", "<i8")])
"""A row of the table: the sha256 of the content, and its characters; -1 for what is no document after all."""

TRAIN, HELD_OUT, LEFT_OUT = 0, 1, 2
"""Values of the sides."""

BLOCK = 1 << 20
"""Documents that are looked at together: some 100 MB."""

Table = npt.NDArray[Any]

LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
"""Characters at which str.splitlines ends a line."""


@dataclass(frozen=True)
class HeldOutSplit:
    """The counts of a split.

    Attributes:
        documents: those of the table.
        duplicates: those left out because an earlier one has the same content.
        characters: of all documents, duplicates too.
        characters_train: of the training side; of a single document that is cut, about.
        single: the number of the only content's first document, which is on both sides; None where there are
            several.
    """

    documents: int
    duplicates: int
    characters: int
    characters_train: int
    single: int | None


def split_documents(table: Table, share: float, sides: Path) -> HeldOutSplit:
    """Choose the side of every document of a table, and write them as .npy, uint8 [documents].

    Args:
        table: [documents] of DOCUMENT, of which at least one is a document.
        share: part of the documents to hold out, 0 < share < 0.5.
    """
    chosen = np.lib.format.open_memmap(sides, "w+", np.uint8, (len(table),))
    chosen[:] = LEFT_OUT
    threshold = np.uint64(math.ceil(share * 2**64))  # an integer is below the float iff it is below this
    kept = held_out = characters = documents = kept_characters = characters_train = 0
    first = -1
    for rows in _blocks(table):
        sizes = table["characters"][rows]
        documents += int(np.count_nonzero(sizes >= 0))
        characters += int(sizes[sizes >= 0].sum())
    for numbers in _first_of_equals(table):
        digests, sizes = table["digest"][numbers, 0], table["characters"][numbers]
        is_held_out = digests.astype(np.uint64) < threshold
        chosen[numbers] = np.where(is_held_out, HELD_OUT, TRAIN)
        kept, held_out = kept + len(numbers), held_out + int(np.count_nonzero(is_held_out))
        kept_characters += int(sizes.sum())
        characters_train += int(sizes[~is_held_out].sum())
        first = int(numbers[0]) if len(numbers) else first
    single = first if kept == 1 else None
    if single is not None:
        characters_train = 0
    elif not 0 < held_out < kept:
        nearest = _nearest(table, chosen, share * kept_characters)
        for rows in _blocks(table):
            part = chosen[rows]
            part[part == HELD_OUT] = TRAIN
        chosen[nearest] = HELD_OUT
        characters_train = kept_characters - int(table["characters"][nearest])
    chosen.flush()
    characters_train = characters_train or round(characters * (1 - share))
    return HeldOutSplit(documents, documents - kept, characters, characters_train, single)


def find_tail(read: Callable[[], Iterable[str]], share: float, name: str) -> int:
    """Return the character at which the last `share` of a document's lines begins.

    Of a document of one line it is that of its characters.

    Args:
        read: returns the document in pieces, from its beginning.
        name: what messages call it.

    Raises:
        UserError: the document has a single character.
    """
    total = sum(len(piece) for piece in read())
    if total < 2:
        raise UserError(f"{name} holds a single character: data.path needs text to train on")
    lines = last = 0
    for lines, last in enumerate(_line_ends(read()), 1):  # noqa: B007  # what is left of the last round
        pass
    lines += last < total
    if lines == 1:
        return total - max(1, round(total * share))
    head = lines - max(1, round(lines * share))
    return next(end for number, end in enumerate(_line_ends(read()), 1) if number == head)


def cut_pieces(pieces: Iterable[str], cut: int, tail: bool) -> Iterator[str]:
    """Yield what lies before character `cut`, or, of the `tail`, from there on."""
    position = 0
    for piece in pieces:
        at = min(max(cut - position, 0), len(piece))
        if part := piece[at:] if tail else piece[:at]:
            yield part
        position += len(piece)
        if not tail and position >= cut:
            return


def _line_ends(pieces: Iterable[str]) -> Iterator[int]:
    """Yield the places behind the lines of str.splitlines; not that of an unfinished last one."""
    position, held = 0, ""
    for piece in pieces:
        text = held + piece
        held = "\r" if text.endswith("\r") else ""  # it may be half of a \r\n
        for line in text[: len(text) - len(held)].splitlines(keepends=True):
            position += len(line)
            if line[-1] in LINE_ENDS:
                yield position
    if held:
        yield position + 1


def _blocks(table: Table) -> Iterator[slice]:
    """Yield the rows of a table in blocks."""
    for first in range(0, len(table), BLOCK):
        yield slice(first, min(first + BLOCK, len(table)))


def _first_of_equals(table: Table) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the numbers of the documents that are the first of their content, ascending in each array.

    Contents are told apart by 16 bytes of their hash. Each array has those with hashes in one range, which
    are so many as can be sorted in memory.
    """
    ranges = 1 << max(0, (len(table) // BLOCK).bit_length())
    shift = np.uint64(65 - ranges.bit_length())
    for number in range(ranges):
        found, keys = [], []
        for rows in _blocks(table):
            digests = table["digest"][rows, :2].astype(np.uint64)
            chosen = table["characters"][rows] >= 0
            if ranges > 1:
                chosen &= digests[:, 0] >> shift == number
            found.append(rows.start + np.flatnonzero(chosen))
            keys.append(digests[chosen])
        numbers, key = np.concatenate(found or [np.empty(0, np.int64)]), np.concatenate(keys)
        order = np.lexsort((key[:, 1], key[:, 0]))  # stable: equal ones stay in their order
        key = key[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (key[1:] != key[:-1]).any(axis=1)
        yield np.sort(numbers[order[is_first]])


def _nearest(table: Table, chosen: npt.NDArray[np.uint8], wanted: float) -> int:
    """Return the number of the kept document whose size is nearest to `wanted`, by hash among equals."""
    best: tuple[float, tuple[int, ...], int] | None = None
    for rows in _blocks(table):
        distance = np.abs(table["characters"][rows] - wanted)
        distance[chosen[rows] == LEFT_OUT] = np.inf
        for index in np.flatnonzero(distance == distance.min()):
            digest = tuple(int(word) for word in table["digest"][rows][index])
            found = (float(distance[index]), digest, rows.start + int(index))
            best = found if best is None else min(best, found)
    assert best is not None
    return best[2]
