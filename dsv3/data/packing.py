"""Rows of a fixed length, cut from documents that stand one behind the other: pure functions of an index."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dsv3.errors import UserError

PADDING = -1  # the document number of a position that holds no token

Ids = npt.NDArray[np.int64]

Value = TypeVar("Value")


class Row(NamedTuple):
    """One sample and the token after it.

    `tokens` int64 and `documents` int32, both [sequence + 1]. Documents are numbered 0, 1, 2 .. within
    the row; PADDING marks positions without a token.
    """

    tokens: Ids
    documents: npt.NDArray[np.int32]


class Rows(Protocol):
    """What the loader reads: rows of `sequence_length + 1` tokens, `len` of them in an epoch."""

    sequence_length: int

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """The row at `index`; rows to train on go on for ever, `index // len` is the epoch."""


def permutation(count: int, *seeds: int) -> Ids:
    """A permutation of `count` that depends on the seeds alone.

    It sorts raw draws instead of calling Generator.permutation, because numpy promises the same
    stream in every version only for its bit generators (NEP 19), and a run may outlive a version.
    """
    draws = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(draws, kind="stable")


class Epochs(Generic[Value]):
    """What was computed for the last two epochs; a batch can straddle two, never three for long."""

    def __init__(self, compute: Callable[[int], Value]) -> None:
        self._compute = compute
        self._known: dict[int, Value] = {}

    def __getitem__(self, epoch: int) -> Value:
        if epoch not in self._known:
            while len(self._known) > 1:
                del self._known[min(self._known)]
            self._known[epoch] = self._compute(epoch)
        return self._known[epoch]


class Stream:
    """Documents one behind the other in some order, to be read from any position.

    Args:
        tokens: [total] ids of all documents, `offsets` [documents + 1] where each begins.
        order: [documents] which document comes first, second ..; None for the order they have.
    """

    def __init__(self, tokens: npt.NDArray[Any], offsets: Ids, order: Ids | None = None) -> None:
        self._tokens = tokens
        self._begins = offsets[:-1] if order is None else offsets[:-1][order]
        lengths = np.diff(offsets) if order is None else np.diff(offsets)[order]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])

    def read(self, start: int, length: int) -> Row:
        """`length` tokens from position `start` on, padded where the stream ends."""
        tokens = np.zeros(length, np.int64)
        documents = np.full(length, PADDING, np.int32)
        document = int(np.searchsorted(self._starts, start, side="right")) - 1
        filled, number = 0, 0
        while filled < length and document < len(self._begins):
            skip = start + filled - int(self._starts[document])
            count = min(length - filled, int(self._starts[document + 1]) - start - filled)
            begin = int(self._begins[document]) + skip
            tokens[filled : filled + count] = self._tokens[begin : begin + count]
            documents[filled : filled + count] = number
            filled, number, document = filled + count, number + 1, document + 1
        return Row(tokens, documents)


class PackedDataset:
    """Rows to train on: documents permuted, joined, cut, and the rows permuted too, anew in every epoch.

    Rows advance by `sequence_length` and are one token longer, so every token but the first is a
    target once; the remainder too short for a row, other documents in every epoch, is left out.
    There is no state beside the index: `row(i)` is the same in every process and after a resume.

    Args:
        tokens: [total] ids; `offsets` [documents + 1] where each document begins, none empty.
        shuffle: False keeps the order of the files in every epoch.

    Raises:
        UserError: there are too few tokens for one row.
    """

    def __init__(
        self, tokens: npt.NDArray[Any], offsets: Ids, sequence_length: int, seed: int, shuffle: bool = True
    ) -> None:
        self.sequence_length = sequence_length
        self._tokens, self._offsets = tokens, offsets
        self._seed, self._shuffle = seed, shuffle
        self._rows = (len(tokens) - 1) // sequence_length
        if self._rows < 1:
            raise UserError(_too_short(len(tokens), sequence_length))
        self._epochs = Epochs(self._arrange)

    def __len__(self) -> int:
        return self._rows

    def row(self, index: int) -> Row:
        """The row at `index`, which grows for ever: epoch `index // len`."""
        epoch, place = divmod(index, self._rows)
        stream, rows = self._epochs[epoch]
        number = place if rows is None else int(rows[place])
        return stream.read(number * self.sequence_length, self.sequence_length + 1)

    def _arrange(self, epoch: int) -> tuple[Stream, Ids | None]:
        if not self._shuffle:
            return Stream(self._tokens, self._offsets), None
        order = permutation(len(self._offsets) - 1, self._seed, epoch, 0)
        return Stream(self._tokens, self._offsets, order), permutation(self._rows, self._seed, epoch, 1)


class PackedEvaluation:
    """Rows to judge by: the documents in their order, the last row padded, so each target comes once.

    Args:
        tokens, offsets: as for PackedDataset; any number of tokens will do.
    """

    def __init__(self, tokens: npt.NDArray[Any], offsets: Ids, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self._rows = max(1, -(-(len(tokens) - 1) // sequence_length))
        self._stream = Stream(tokens, offsets)

    def __len__(self) -> int:
        return self._rows

    def row(self, index: int) -> Row:
        """The row at `index`, 0 <= index < len."""
        return self._stream.read(index * self.sequence_length, self.sequence_length + 1)


def _too_short(tokens: int, sequence_length: int) -> str:
    needs = f"train.sequence_length={sequence_length} needs {sequence_length + 1} tokens"
    largest = f" or at most train.sequence_length={tokens - 1}" if tokens > 1 else ""
    return f"{needs}, the training data has {tokens}: give more text{largest}"
