"""Packing: documents joined into one stream and cut into rows of a fixed length, with shuffling.

Every row is a pure function of its index: nothing has to be saved for a resume. best_fit.py packs whole
documents instead.
"""

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dsv3.data.fill_in_middle import ADDED_TOKENS, FillInMiddle
from dsv3.errors import UserError
from dsv3.tokens.shuffle import Ids, Permutation, permutation
from dsv3.tokens.token_store import TokenStore

PADDING = -1  # the document id of a position that holds no token


class PackedRow(NamedTuple):
    """One training sample of `sequence` tokens, and the token after it.

    `tokens` is int64 [sequence + 1], `documents` int32 [sequence + 1]. Documents are counted 0, 1, 2 .. per
    row; PADDING marks positions without a token.
    """

    tokens: Ids
    documents: npt.NDArray[np.int32]

    @classmethod
    def empty(cls, length: int) -> "PackedRow":
        """Return a row of `length` positions without a token, to be filled in."""
        return cls(np.zeros(length, np.int64), np.full(length, PADDING, np.int32))


class RowDataset(Protocol):
    """The dataset that the data loader reads: `len` rows per epoch, each of `sequence_length + 1` tokens."""

    sequence_length: int

    def __len__(self) -> int: ...

    def row(self, index: int) -> PackedRow:
        """Return the row at `index`; training rows go on without end, and `index // len` is the epoch."""


BLOCK_DOCUMENTS = 1024
"""Documents at most that are shuffled among one another."""

_KNOWN_BLOCKS = 64
"""Arrangements of blocks that a stream keeps: 2 MB."""


class _Block(NamedTuple):
    """Consecutive documents in the order in which the stream has them."""

    begins: Ids
    """[documents], the position in the store at which each begins."""
    starts: Ids
    """[documents + 1], the stream position at which each begins where blocks follow one another as in the
    files; the last one is the end of the block."""
    rearranged: npt.NDArray[np.bool_] | None
    """[documents], True for those in the form of fill-in-the-middle; None for none."""


class DocumentStream:
    """Documents joined in an order of their own in every epoch, readable from any position.

    Up to BLOCK_DOCUMENTS consecutive documents are a block. The documents of a block are shuffled, and the
    stream begins with another block in every epoch. Blocks keep their order, so that any position is found by
    two searches, in the store's offsets and in the block: nothing is held that grows with the data. Whoever
    draws rows from all over the stream mixes the blocks as well.

    Args:
        store: the documents.
        seed: orders the documents; None keeps the order of the files in every epoch.
        fim: rearranges some documents, which makes the stream longer than the store.
    """

    def __init__(self, store: TokenStore, seed: int | None = None, fim: FillInMiddle | None = None) -> None:
        self._store = store
        self._seed = seed
        self._fim = fim
        self._num_documents = store.num_documents
        self._num_blocks = -(-self._num_documents // BLOCK_DOCUMENTS)
        self._block = lru_cache(_KNOWN_BLOCKS)(self._arrange)
        self._first_position = lru_cache(2)(self._find_first_position)
        self.num_tokens = store.num_tokens + self._added_before(self._num_documents)
        """Tokens of an epoch, those of fill-in-the-middle included."""

    def read(self, start: int, length: int, epoch: int = 0) -> PackedRow:
        """Return `length` tokens from stream position `start` on, padded where the stream ends."""
        row = PackedRow.empty(length)
        filled = number = 0
        end = min(length, self.num_tokens - start)
        for ids in self._documents_from(start, end, epoch) if end > 0 else ():
            row.tokens[filled : filled + len(ids)] = ids
            row.documents[filled : filled + len(ids)] = number
            filled, number = filled + len(ids), number + 1
        return row

    def _documents_from(self, start: int, count: int, epoch: int) -> Iterator[Ids]:
        """Yield `count` ids from `start` on, by document: of the first and the last one a part."""
        position = (self._first_position(epoch) + start) % self.num_tokens
        number = self._block_at(position)
        while count > 0:
            block = self._block(epoch, number)
            place = int(np.searchsorted(block.starts, position, side="right")) - 1
            while count > 0 and place < len(block.begins):
                first, end = int(block.starts[place]), int(block.starts[place + 1])
                part = min(count, end - position)
                if part > 0:
                    begin, skip = int(block.begins[place]), position - first
                    if block.rearranged is not None and block.rearranged[place]:
                        assert self._fim is not None
                        size = end - first - ADDED_TOKENS
                        yield self._fim.read(self._store, begin, size, epoch, skip, part)
                    else:
                        yield self._store.read(begin + skip, part)
                position, count, place = position + part, count - part, place + 1
            number = (number + 1) % self._num_blocks
            position %= self.num_tokens

    def _find_first_position(self, epoch: int) -> int:
        """Return where the block that the stream begins with begins.

        What is left out behind the last whole row lies elsewhere in every epoch.
        """
        if self._seed is None:
            return 0
        return self._block_start(Permutation(self._num_blocks, self._seed, epoch, 2)[0])

    def _block_at(self, position: int) -> int:
        """Return the block that holds a stream position."""
        if self._fim is not None:
            return bisect_right(range(self._num_blocks), position, key=self._block_start) - 1
        document = self._store.find(position)
        return ((document + 1) * self._num_blocks - 1) // self._num_documents

    def _block_start(self, block: int) -> int:
        """Return the stream position at which a block begins, where blocks follow one another as in files."""
        first = self._bounds(block)[0]
        return int(self._store.offsets(first, first)[0]) + self._added_before(first)

    def _added_before(self, document: int) -> int:
        """Return the tokens that fill-in-the-middle adds to the documents below `document`."""
        return 0 if self._fim is None else ADDED_TOKENS * self._fim.rearranged_before(document)

    def _bounds(self, block: int) -> tuple[int, int]:
        """Return the first document of a block and the first behind it."""
        documents, blocks = self._num_documents, self._num_blocks
        return block * documents // blocks, (block + 1) * documents // blocks

    def _arrange(self, epoch: int, number: int) -> _Block:
        first, end = self._bounds(number)
        offsets = self._store.offsets(first, end)
        begins, lengths = offsets[:-1], np.diff(offsets)
        rearranged = None
        if self._fim is not None:
            rearranged = self._fim.choose(first, end, epoch)
            lengths = lengths + ADDED_TOKENS * rearranged
        if self._seed is not None:
            order = permutation(end - first, self._seed, epoch, 0, number)
            begins, lengths = begins[order], lengths[order]
            rearranged = None if rearranged is None else rearranged[order]
        starts = offsets[0] + self._added_before(first) + np.concatenate([[0], np.cumsum(lengths)])
        return _Block(begins, starts, rearranged)


class PackedDataset:
    """Training rows: documents are shuffled, joined and cut into rows, and the rows are shuffled too.

    Both orders are new in every epoch. Rows advance by `sequence_length` and are one token longer, so
    every token but the first is a target once per epoch; a remainder too short for a row is left out, and
    it holds other documents in every epoch. `row(i)` is the same in every process and after a resume, and
    takes the same time and memory for any number of documents and rows.

    Args:
        store: the documents.
        shuffle: False keeps the order of the files in every epoch.
        fim: rearranges some documents, others in every epoch; None for none.

    Raises:
        UserError: there are too few tokens for one row.
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        seed: int,
        shuffle: bool = True,
        fim: FillInMiddle | None = None,
    ) -> None:
        self.sequence_length = sequence_length
        self._seed = seed if shuffle else None
        self._stream = DocumentStream(store, self._seed, fim)
        total = self.num_tokens = self._stream.num_tokens
        """Tokens of an epoch, with those that fill-in-the-middle adds and those that are left out."""
        self._num_rows = (total - 1) // sequence_length
        if self._num_rows < 1:
            largest = f" or at most train.sequence_length={total - 1}" if total > 1 else ""
            raise UserError(
                f"train.sequence_length={sequence_length} needs {sequence_length + 1} tokens, the training "
                f"data has {total}: give more text{largest}"
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
        store: as for PackedDataset; any number of tokens will do.
    """

    def __init__(self, store: TokenStore, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self._num_rows = max(1, -(-(store.num_tokens - 1) // sequence_length))
        self._stream = DocumentStream(store)

    def __len__(self) -> int:
        return self._num_rows

    def row(self, index: int) -> PackedRow:
        """Return the row at `index`, 0 <= index < len."""
        return self._stream.read(index * self.sequence_length, self.sequence_length + 1)
