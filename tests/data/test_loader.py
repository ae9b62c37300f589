"""The same global batch on every layout, before and after a resume, and every held-out row once."""

import numpy as np
import pytest
import torch

from dsv3.data.batch import Batch
from dsv3.data.loader import DataLoader, evaluation_batches
from dsv3.data.packing import PackedDataset, PackedEvaluationDataset, PackedRow
from dsv3.errors import UserError
from dsv3.model.head import IGNORE_INDEX
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.tokens.shuffle import Ids
from dsv3.tokens.token_store import TokenStore

Documents = tuple[Ids, Ids]


@pytest.fixture
def dataset(documents: Documents) -> PackedDataset:
    return PackedDataset(TokenStore.of(*documents), 15, seed=7)


def joined(batches: list[Batch]) -> list[torch.Tensor]:
    parts = ("tokens", "targets", "documents")
    return [torch.cat([getattr(batch, part) for batch in batches]) for part in parts]


def step(
    dataset: PackedDataset, first: int, world: int, microbatch: int, size: int = 8
) -> list[torch.Tensor]:
    loaders = [DataLoader(dataset, BatchSchedule(size), microbatch, rank, world) for rank in range(world)]
    return joined([batch for loader in loaders for batch in loader.microbatches(first)])


@pytest.mark.parametrize(("world", "microbatch"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2), (8, 1)])
def test_the_global_batch_is_the_same_on_every_layout(
    dataset: PackedDataset, world: int, microbatch: int
) -> None:
    loader = DataLoader(dataset, BatchSchedule(8), microbatch, 0, world)
    assert len(loader.microbatches(0)) == 8 // world // microbatch
    for first in (0, 8, 24, 800):
        expected = step(dataset, first, 1, 4)
        for one, other in zip(expected, step(dataset, first, world, microbatch), strict=True):
            assert torch.equal(one, other)


def test_going_on_equals_going_straight_through(documents: Documents, dataset: PackedDataset) -> None:
    straight = [step(dataset, first, 1, 4) for first in range(0, 80, 8)]
    assert 2 * len(dataset) < 80  # epochs end within
    resumed = PackedDataset(TokenStore.of(*documents), 15, seed=7)
    for first in range(40, 80, 8):
        for one, other in zip(straight[first // 8], step(resumed, first, 2, 2), strict=True):
            assert torch.equal(one, other)


def test_the_batch_size_may_change_on_the_way(dataset: PackedDataset) -> None:
    small = [step(dataset, first, 1, 2, size=4) for first in range(0, 16, 4)]
    large = [step(dataset, first, 1, 2, size=8) for first in range(0, 16, 8)]
    for part in range(3):
        assert torch.equal(torch.cat([b[part] for b in small]), torch.cat([b[part] for b in large]))


def test_steps_follow_the_rows_without_gap_or_repetition(dataset: PackedDataset) -> None:
    seen = torch.cat([step(dataset, first, 2, 2)[0] for first in range(0, 24, 8)])
    for index, tokens in enumerate(seen):
        assert tokens.tolist() == dataset.row(index).tokens[:-1].tolist()


@pytest.mark.parametrize(
    ("size", "microbatch", "world", "works"),
    [(10, 2, 4, "8 or 16"), (4, 8, 1, "8"), (6, 4, 1, "4 or 8"), (0, 1, 2, "2")],
)
def test_a_batch_that_cannot_be_split_is_told_with_what_can(
    dataset: PackedDataset, size: int, microbatch: int, world: int, works: str
) -> None:
    with pytest.raises(UserError) as caught:
        DataLoader(dataset, BatchSchedule(size), microbatch, 0, world)
    assert f"train.global_batch_size={size} " in str(caught.value)
    assert f"train.microbatch_size={microbatch} x {world} " in str(caught.value)
    assert str(caught.value).endswith(f"use train.global_batch_size={works}")


class NumberedRows:
    """Rows whose tokens are their number."""

    sequence_length = 3

    def __len__(self) -> int:
        return 40

    def row(self, index: int) -> PackedRow:
        """Return four times the number."""
        return PackedRow(np.full(4, index), np.zeros(4, np.int32))


RAMP = BatchSchedule(48, 16, 16, 500, 3)
"""Over 167 rows: 6 steps of 16, 3 of 32, then 48."""


@pytest.mark.parametrize("microbatch", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_across_a_ramp_every_layout_takes_the_rows_one_after_another(world: int, microbatch: int) -> None:
    """The layout changes at every step, as after a resume at each: all it needs is the count of samples."""
    ranks = [DataLoader(NumberedRows(), RAMP, microbatch, rank, world) for rank in range(world)]
    whole, samples = DataLoader(NumberedRows(), RAMP, 16), 0
    seen: list[int] = []
    sizes: list[int] = []
    for number in range(15):
        loaders = ranks if number % 2 == 0 else [whole]
        batches = [batch for loader in loaders for batch in loader.microbatches(samples)]
        rows = [int(row[0]) for batch in batches for row in batch.tokens]
        seen, samples, sizes = seen + rows, samples + len(rows), [*sizes, len(rows)]
    assert seen == list(range(samples))
    assert sizes == [16] * 6 + [32] * 3 + [48] * 6


def test_a_ramp_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch of 16 sequences, no multiple of 12 .*4 x 3 data-parallel"):
        DataLoader(NumberedRows(), RAMP, 4, 0, 3)


@pytest.mark.parametrize(
    ("world", "microbatch", "multiple"), [(1, 1, 1), (1, 4, 1), (3, 2, 1), (4, 5, 1), (2, 2, 4)]
)
def test_evaluation_scores_each_target_once_on_every_layout(
    documents: Documents, world: int, microbatch: int, multiple: int
) -> None:
    rows = PackedEvaluationDataset(TokenStore.of(*documents), 13)
    ranks = [list(evaluation_batches(rows, microbatch, rank, world, multiple)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) % multiple == 0
    assert (len(ranks[0]) - multiple) * microbatch * world < len(rows)
    assert {batch.tokens.shape for batches in ranks for batch in batches} == {(microbatch, 13)}
    targets = torch.cat([batch.targets.flatten() for batches in ranks for batch in batches])
    starts = set(documents[1][:-1] + 1000)
    scored = sorted(targets[targets != IGNORE_INDEX].tolist())
    assert scored == [token for token in documents[0] if token not in starts]


def test_there_are_enough_documents_for_these_tests(documents: Documents) -> None:
    assert len(documents[0]) > 300
    assert np.diff(documents[1]).min() == 1
