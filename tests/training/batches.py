"""Batches of random tokens in documents."""

import numpy as np

from dsv3.data.batch import Batch, collate
from dsv3.data.packing import PADDING, PackedRow
from tests.reference import MODEL


def row(*lengths: int, padding: int = 0, seed: int = 0) -> PackedRow:
    """Documents of these lengths one behind the other, then padding."""
    total = sum(lengths)
    ids = np.random.default_rng(seed).integers(0, MODEL.vocab_size, total)
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    return PackedRow(
        np.concatenate([ids, np.zeros(padding, np.int64)]),
        np.concatenate([numbers, np.full(padding, PADDING)]).astype(np.int32),
    )


# Rows of 10 tokens + 1 with 10, 9, 7, 1, 4 and 10 valid targets.
ROWS = [
    row(11, seed=1),
    row(4, 7, seed=2),
    row(3, 5, 2, 1, seed=3),
    row(2, padding=9, seed=4),
    row(1, 5, padding=5, seed=5),
    row(11, seed=6),
]


def batch(*rows: int) -> Batch:
    """The batch of these rows of ROWS."""
    return collate([ROWS[n] for n in rows])
