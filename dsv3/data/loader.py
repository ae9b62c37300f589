"""Which rank sees which rows: a global batch follows from the seed and its first sample, on every layout."""

from collections.abc import Iterator

import numpy as np

from dsv3.data.batch import Batch, collate
from dsv3.data.packing import PADDING, Row, Rows
from dsv3.errors import UserError


class Loader:
    """The microbatches of one data-parallel rank.

    The step that begins at sample s trains on rows s .. s + global_batch_size - 1 of the dataset, of
    which rank r takes the r-th block. The caller counts the samples and saves that count: nothing
    else is needed to go on, on any layout and with any batch size.

    Args:
        dataset: rows for ever.
        global_batch_size: sequences of a step, over all ranks.
        microbatch_size: sequences of one forward pass of one rank.
        rank, world: of the data-parallel ranks.

    Raises:
        UserError: the global batch cannot be split evenly.
    """

    def __init__(
        self, dataset: Rows, global_batch_size: int, microbatch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        _check(global_batch_size, microbatch_size, world)
        self._dataset = dataset
        self._microbatch = microbatch_size
        self._share = global_batch_size // world
        self._rank = rank

    def microbatches(self, first_sample: int) -> list[Batch]:
        """The batches of the step that begins at global sample `first_sample`, in order."""
        start = first_sample + self._rank * self._share
        firsts = range(start, start + self._share, self._microbatch)
        return [
            collate([self._dataset.row(index) for index in range(first, first + self._microbatch)])
            for first in firsts
        ]


def evaluation_batches(
    rows: Rows, microbatch_size: int, rank: int = 0, world: int = 1, multiple: int = 1
) -> Iterator[Batch]:
    """Batches that cover each row once over all ranks; every rank gets as many, of the same shape.

    Where the rows run out, rows without any target fill up, so that all ranks make the same
    number of forward passes.

    Args:
        microbatch_size: rows of a batch.
        rank, world: of the data-parallel ranks.
        multiple: of how many batches a rank's number is to be (a pipeline takes several at a time).
    """
    wave = microbatch_size * world
    count = -(-len(rows) // (wave * multiple)) * multiple
    for batch in range(count):
        first = batch * wave + rank * microbatch_size
        indices = range(first, first + microbatch_size)
        yield collate([rows.row(i) if i < len(rows) else _blank(rows.sequence_length) for i in indices])


def _blank(sequence_length: int) -> Row:
    length = sequence_length + 1
    return Row(np.zeros(length, np.int64), np.full(length, PADDING, np.int32))


def _check(global_batch: int, microbatch: int, world: int) -> None:
    unit = microbatch * world
    if global_batch > 0 and global_batch % unit == 0:
        return
    below = global_batch // unit * unit
    works = f"{below} or {below + unit}" if below > 0 else f"{unit}"
    raise UserError(
        f"train.global_batch_size={global_batch} is no multiple of {unit}, which is train.microbatch_size="
        f"{microbatch} x {world} data-parallel ranks: use train.global_batch_size={works}"
    )
