"""Packing: documents joined into one stream and cut into rows of a fixed length, with shuffling.

Every row is a pure function of its index: nothing has to be saved for a resume.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dsv3.data.shuffle import Ids, Permutation, permutation
from dsv3.errors import UserError

PADDING = -1  # the document id of a position that holds no token


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


BLOCK_DOCUMENTS = 1024
"""Documents at most that are shuffled among one another."""

_KNOWN_BLOCKS = 64
"""Arrangements of blocks that a stream keeps: 1 MB."""


class _Block(NamedTuple):
    """Consecutive documents in the order in which the stream has them."""

    begins: Ids
    """[documents], the position in `tokens` at which each begins."""
    starts: Ids
    """[documents + 1], the position at which each begins where blocks follow one another as in the files; the
    last one is the end of the block."""


class DocumentStream:
    """Documents joined in an order of their own in every epoch, readable from any position.

    Up to BLOCK_DOCUMENTS consecutive documents are a block. The documents of a block are shuffled, and the
    stream begins with another block in every epoch. Blocks keep their order, so that any position is found by
    two searches, in `offsets` as they are on the disk and in the block: nothing is held that grows with the
    data. Whoever draws rows from all over the stream mixes the blocks as well.

    Args:
        tokens: [total], the ids of all documents.
        offsets: [documents + 1], the position in `tokens` at which each document begins; memory-mapped ones
            stay on the disk.
        seed: orders the documents; None keeps the order of the files in every epoch.
    """

    def __init__(self, tokens: npt.NDArray[Any], offsets: Ids, seed: int | None = None) -> None:
        self._tokens = tokens
        self._offsets = np.asarray(offsets)  # of a memory map the plain array: its operators are slower
        self._seed = seed
        self._num_documents = len(offsets) - 1
        self._num_blocks = -(-self._num_documents // BLOCK_DOCUMENTS)
        self._block = lru_cache(_KNOWN_BLOCKS)(self._arrange)

    def read(self, start: int, length: int, epoch: int = 0) -> PackedRow:
        """Return `length` tokens from stream position `start` on, padded where the stream ends."""
        tokens = np.zeros(length, np.int64)
        documents = np.full(length, PADDING, np.int32)
        filled = number = 0
        end = min(length, len(self._tokens) - start)
        for begin, available in self._pieces(start, epoch) if end > 0 else ():
            count = min(end - filled, available)
            tokens[filled : filled + count] = self._tokens[begin : begin + count]
            documents[filled : filled + count] = number
            filled, number = filled + count, number + 1
            if filled == end:
                break
        return PackedRow(tokens, documents)

    def _pieces(self, start: int, epoch: int) -> Iterator[tuple[int, int]]:
        """Yield the place in `tokens` and the length of each document from `start` on, without end.

        The first one is the rest of the document that `start` lies in.
        """
        position = (self._first_position(epoch) + start) % len(self._tokens)
        document = int(np.searchsorted(self._offsets, position, side="right")) - 1
        number = ((document + 1) * self._num_blocks - 1) // self._num_documents
        while True:
            block = self._block(epoch, number)
            for place in range(
                int(np.searchsorted(block.starts, position, side="right")) - 1, len(block.begins)
            ):
                end = int(block.starts[place + 1])
                yield int(block.begins[place]) + position - int(block.starts[place]), end - position
                position = end
            number = (number + 1) % self._num_blocks
            position %= len(self._tokens)

    def _first_position(self, epoch: int) -> int:
        """Return where the block that the stream begins with begins.

        What is left out behind the last whole row lies elsewhere in every epoch.
        """
        if self._seed is None:
            return 0
        block = Permutation(self._num_blocks, self._seed, epoch, 2)[0]
        return int(self._offsets[self._bounds(block)[0]])

    def _bounds(self, block: int) -> tuple[int, int]:
        """Return the first document of a block and the first behind it."""
        documents, blocks = self._num_documents, self._num_blocks
        return block * documents // blocks, (block + 1) * documents // blocks

    def _arrange(self, epoch: int, number: int) -> _Block:
        first, end = self._bounds(number)
        offsets = self._offsets[first : end + 1].astype(np.int64)
        if self._seed is None:
            return _Block(offsets[:-1], offsets)
        order = permutation(end - first, self._seed, epoch, 0, number)
        lengths = np.diff(offsets)[order]
        return _Block(offsets[:-1][order], offsets[0] + np.concatenate([[0], np.cumsum(lengths)]))


class PackedDataset:
    """Training rows: documents are shuffled, joined and cut into rows, and the rows are shuffled too.

    Both orders are new in every epoch. Rows advance by `sequence_length` and are one token longer, so
    every token but the first is a target once per epoch; a remainder too short for a row is left out, and
    it holds other documents in every epoch. `row(i)` is the same in every process and after a resume, and
    takes the same time and memory for any number of documents and rows.

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
        self._seed = seed if shuffle else None
        self._stream = DocumentStream(tokens, offsets, self._seed)
        self._num_rows = (len(tokens) - 1) // sequence_length
        if self._num_rows < 1:
            largest = f" or at most train.sequence_length={len(tokens) - 1}" if len(tokens) > 1 else ""
            raise UserError(
                f"train.sequence_length={sequence_length} needs {sequence_length + 1} tokens, the training "
                f"data has {len(tokens)}: give more text{largest}"
            )

    def __len__(self) -> int:
        return self._num_rows

    def row(self, index: int) -> PackedRow:
        """Return the row at `index` >= 0, which is row `index % len` of epoch `index // len`."""
        epoch, number = divmod(index, self._num_rows)
        if self._seed is not None:
            number = Permutation(self._num_rows, self._seed, epoch, 1)[number]
        return self._stream.read(number * self.sequence_length, self.sequence_length + 1, epoch)


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
