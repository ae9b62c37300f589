"""Packing: documents joined into one stream and cut into rows of a fixed length, with shuffling.

Every row is a pure function of its index: nothing has to be saved for a resume.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dsv3.errors import UserError

PADDING = -1  # the document id of a position that holds no token

Ids = npt.NDArray[np.int64]

Value = TypeVar("Value")


class PackedRow(NamedTuple):
    """One training sample of `sequence` tokens, and the token after it.

    `tokens` is int64 [sequence + 1], `documents` int32 [sequence + 1]. Documents are counted 0, 1, 2 .. per
    row; PADDING marks positions without a token.
    """

    tokens: Ids
    documents: npt.NDArray[np.int32]


class RowDataset(Protocol):
    """The dataset that the data loader reads: `len` rows per epoch, each of `sequence_length + 1` tokens."""

    sequence_length: int

    def __len__(self) -> int: ...

    def row(self, index: int) -> PackedRow:
        """Return the row at `index`; training rows go on without end, and `index // len` is the epoch."""


def permutation(count: int, *seeds: int) -> Ids:
    """Return the permutation of `count` items that the seeds define; this is all shuffling there is.

    It sorts raw draws instead of calling Generator.permutation, because numpy promises the same stream in
    every version only for its bit generators (NEP 19), and a run may outlive a version.
    """
    draws = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(draws, kind="stable")


class EpochCache(Generic[Value]):
    """Values that are computed once per epoch; two are kept, since a batch can straddle two epochs."""

    def __init__(self, compute: Callable[[int], Value]) -> None:
        self._compute = compute
        self._known: dict[int, Value] = {}

    def __getitem__(self, epoch: int) -> Value:
        if epoch not in self._known:
            while len(self._known) > 1:
                del self._known[min(self._known)]
            self._known[epoch] = self._compute(epoch)
        return self._known[epoch]


class DocumentStream:
    """Documents joined in some order, readable from any position.

    Args:
        tokens: [total], the ids of all documents.
        offsets: [documents + 1], the position in `tokens` at which each document begins.
        order: [documents], the document that comes first, second ..; None keeps their order.
    """

    def __init__(self, tokens: npt.NDArray[Any], offsets: Ids, order: Ids | None = None) -> None:
        self._tokens = tokens
        self._begins = offsets[:-1] if order is None else offsets[:-1][order]
        lengths = np.diff(offsets) if order is None else np.diff(offsets)[order]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])

    def read(self, start: int, length: int) -> PackedRow:
        """Return `length` tokens from stream position `start` on, padded where the stream ends."""
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
        return PackedRow(tokens, documents)


class PackedDataset:
    """Training rows: documents are shuffled, joined and cut into rows, and the rows are shuffled too.

    Both permutations are new in every epoch. Rows advance by `sequence_length` and are one token longer, so
    every token but the first is a target once per epoch; a remainder too short for a row is left out, and
    it holds other documents in every epoch. `row(i)` is the same in every process and after a resume.

    Args:
        tokens: [total] ids.
        offsets: [documents + 1], the position at which each document begins; no document is empty.
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
        self._num_rows = (len(tokens) - 1) // sequence_length
        if self._num_rows < 1:
            largest = f" or at most train.sequence_length={len(tokens) - 1}" if len(tokens) > 1 else ""
            raise UserError(
                f"train.sequence_length={sequence_length} needs {sequence_length + 1} tokens, the training "
                f"data has {len(tokens)}: give more text{largest}"
            )
        self._epochs = EpochCache(self._arrange)

    def __len__(self) -> int:
        return self._num_rows

    def row(self, index: int) -> PackedRow:
        """Return the row at `index` >= 0, which is row `index % len` of epoch `index // len`."""
        epoch, place = divmod(index, self._num_rows)
        stream, row_order = self._epochs[epoch]
        number = place if row_order is None else int(row_order[place])
        return stream.read(number * self.sequence_length, self.sequence_length + 1)

    def _arrange(self, epoch: int) -> tuple[DocumentStream, Ids | None]:
        """Return the stream of an epoch and the order of its rows, None for their own."""
        if not self._shuffle:
            return DocumentStream(self._tokens, self._offsets), None
        order = permutation(len(self._offsets) - 1, self._seed, epoch, 0)
        stream = DocumentStream(self._tokens, self._offsets, order)
        return stream, permutation(self._num_rows, self._seed, epoch, 1)


class PackedEvaluationDataset:
    """Held-out rows: documents in their own order, the last row padded, so that each target comes once.

    Args:
        tokens: as for PackedDataset; any number of tokens will do.
        offsets: as for PackedDataset.
    """

    def __init__(self, tokens: npt.NDArray[Any], offsets: Ids, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self._num_rows = max(1, -(-(len(tokens) - 1) // sequence_length))
        self._stream = DocumentStream(tokens, offsets)

    def __len__(self) -> int:
        return self._num_rows

    def row(self, index: int) -> PackedRow:
        """Return the row at `index`, 0 <= index < len."""
        return self._stream.read(index * self.sequence_length, self.sequence_length + 1)
