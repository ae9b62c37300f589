"""The data loader: selects the rows of each data-parallel rank for every step, and for evaluation.

A global batch depends only on the seed and on the number of its first sample, so it is the same on every
layout and after a resume. The dataset does the shuffling (`permutation` in packing.py); no state is kept
here. prefetch.py makes the batches of the coming steps in a thread.
"""

from collections.abc import Iterator

import numpy as np

from dsv3.data.batch import Batch, collate
from dsv3.data.packing import PADDING, PackedRow, RowDataset
from dsv3.errors import UserError
from dsv3.planning.batch_schedule import BatchSchedule, check_ramp


class DataLoader:
    """Load the microbatches of one data-parallel rank.

    The step that begins at sample s trains on the rows s .. s + batch.size(s) - 1 of the dataset; rank r
    takes the r-th contiguous block of them. The caller counts the samples and saves that count: a resume
    needs nothing else, on any layout and with any batch size.

    Args:
        dataset: rows without end.
        batch: sequences per step, over all ranks.
        microbatch_size: sequences per forward pass of one rank. A rank's share of the global batch beyond
            one microbatch becomes gradient accumulation.
        rank: the data-parallel rank.
        world: the number of data-parallel ranks.
        pinned: make batches in pinned memory, for a GPU.

    Raises:
        UserError: a global batch cannot be split evenly.
    """

    def __init__(
        self,
        dataset: RowDataset,
        batch: BatchSchedule,
        microbatch_size: int,
        rank: int = 0,
        world: int = 1,
        pinned: bool = False,
    ) -> None:
        unit = microbatch_size * world
        factors = f"train.microbatch_size={microbatch_size} x {world} data-parallel ranks"
        if batch.final <= 0 or batch.final % unit != 0:
            below = batch.final // unit * unit
            works = f"{below} or {below + unit}" if below > 0 else f"{unit}"
            raise UserError(
                f"train.global_batch_size={batch.final} is not a multiple of {unit}, which is "
                f"{factors}: use train.global_batch_size={works}"
            )
        check_ramp(batch, unit, factors)
        self.batch = batch
        self._dataset = dataset
        self._microbatch_size = microbatch_size
        self._rank, self._world = rank, world
        self._pinned = pinned

    def microbatches(self, first_sample: int) -> list[Batch]:
        """Return this rank's microbatches, in order, of the step that begins at sample `first_sample`."""
        rows = self.batch.size(first_sample) // self._world
        start = first_sample + self._rank * rows
        return [
            collate(
                [self._dataset.row(index) for index in range(first, first + self._microbatch_size)],
                self._pinned,
            )
            for first in range(start, start + rows, self._microbatch_size)
        ]


def evaluation_batches(
    rows: RowDataset, microbatch_size: int, rank: int = 0, world: int = 1, multiple: int = 1
) -> Iterator[Batch]:
    """Yield batches that cover each row once over all ranks; every rank gets equally many of equal shape.

    Rows of padding, which have no target, fill the last batches, so that all ranks make the same number of
    forward passes.

    Args:
        microbatch_size: rows per batch.
        rank: the data-parallel rank.
        world: the number of data-parallel ranks.
        multiple: round the number of batches per rank up to a multiple of this (a pipeline takes several
            batches at a time).
    """
    length = rows.sequence_length + 1
    padding = PackedRow(np.zeros(length, np.int64), np.full(length, PADDING, np.int32))
    rows_per_round = microbatch_size * world
    count = -(-len(rows) // (rows_per_round * multiple)) * multiple
    for batch in range(count):
        first = batch * rows_per_round + rank * microbatch_size
        indices = range(first, first + microbatch_size)
        yield collate([rows.row(index) if index < len(rows) else padding for index in indices])
