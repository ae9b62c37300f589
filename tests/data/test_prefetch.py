"""Prefetching: the same batches ahead of their steps, never more than asked for, and an end in every case."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from dsv3.data.loader import DataLoader
from dsv3.data.packing import PackedDataset, PackedRow
from dsv3.data.prefetch import Prefetcher
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.tokens.shuffle import Ids
from dsv3.tokens.token_store import TokenStore

CPU = torch.device("cpu")
RAMP = BatchSchedule(8, 4, 2, 400, 15)
SOON = 20.0
"""Seconds after which a test stops to wait for what must come."""


class Damaged(Exception):
    """What a dataset raises."""


class Rows:
    """Rows that note when they are read, and one of which is damaged."""

    sequence_length = 3

    def __init__(self, damaged: int = -1) -> None:
        self.damaged = damaged
        self.read: list[int] = []
        self.threads: set[str] = set()
        self.came = threading.Condition()

    def __len__(self) -> int:
        return 1000

    def row(self, index: int) -> PackedRow:
        """Return four times the number."""
        with self.came:
            self.read.append(index)
            self.threads.add(threading.current_thread().name)
            self.came.notify_all()
        if index == self.damaged:
            raise Damaged(f"row {index}")
        return PackedRow(np.full(4, index), np.zeros(4, np.int32))

    def wait_for(self, count: int) -> None:
        """Wait until so many rows have been read."""
        assert self.come(count, SOON)

    def come(self, count: int, within: float) -> bool:
        """Return True once so many rows have been read, False after so many seconds."""
        with self.came:
            return self.came.wait_for(lambda: len(self.read) >= count, within)


@contextmanager
def prefetching(rows: Rows, depth: int, steps: int, first: int = 0, size: int = 2) -> Iterator[Prefetcher]:
    before = set(threading.enumerate())
    prefetcher = Prefetcher(DataLoader(rows, BatchSchedule(size), 1), depth, CPU)
    prefetcher.start(first, steps)
    try:
        yield prefetcher
    finally:
        prefetcher.close()
        prefetcher.close()
        assert set(threading.enumerate()) == before, "the thread must end"


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_batches_are_bit_for_bit_those_without_across_epochs_and_a_ramp(
    documents: tuple[Ids, Ids], depth: int
) -> None:
    def loader(rank: int) -> DataLoader:
        return DataLoader(PackedDataset(TokenStore.of(*documents), 15, seed=7), RAMP, 1, rank, 2)

    steps = 12
    for rank in (0, 1):
        plain, first = loader(rank), RAMP.samples_after(0, 3)
        prefetcher = Prefetcher(loader(rank), depth, CPU)
        prefetcher.start(first, steps)
        for number in range(steps):
            samples = RAMP.samples_after(first, number)
            made, expected = prefetcher.microbatches(samples), plain.microbatches(samples)
            assert len(made) == RAMP.size(samples) // 2
            for one, other in zip(made, expected, strict=True):
                for part in ("tokens", "targets", "documents"):
                    assert torch.equal(getattr(one, part), getattr(other, part))
        prefetcher.close()


def test_at_most_as_many_steps_are_made_ahead_as_asked_for_and_each_once() -> None:
    rows = Rows()
    with prefetching(rows, depth=3, steps=10) as prefetcher:
        rows.wait_for(3 * 2)
        assert not rows.come(3 * 2 + 1, within=0.2)
        for number in range(10):
            prefetcher.microbatches(2 * number)
            # One more is made for the one that was taken, in the thread; whether it is there already is open.
            assert len(rows.read) <= 2 * (number + 1 + 3)
            rows.wait_for(2 * min(10, number + 1 + 3))
        assert rows.read == list(range(20))
        assert rows.threads == {"prefetch"}


def test_the_thread_ends_with_the_last_step() -> None:
    with prefetching(Rows(), depth=2, steps=2) as prefetcher:
        prefetcher.microbatches(0)
        prefetcher.microbatches(2)
        assert prefetcher._thread is not None
        prefetcher._thread.join(SOON)
        assert not prefetcher._thread.is_alive()


def test_a_run_that_stops_leaves_no_thread_whatever_it_waits_for() -> None:
    with prefetching(Rows(), depth=2, steps=1000):
        pass
    rows = Rows()
    with prefetching(rows, depth=1, steps=1000) as prefetcher:
        rows.wait_for(2)
        prefetcher.microbatches(0)
    with pytest.raises(KeyboardInterrupt), prefetching(Rows(), depth=1, steps=1000):
        raise KeyboardInterrupt


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_reaches_the_step_whose_batch_it_is_as_itself(depth: int) -> None:
    rows = Rows(damaged=5)
    with prefetching(rows, depth, steps=10) as prefetcher:
        for first in (0, 2):  # also where the error was there before
            prefetcher.microbatches(first)
        for _ in range(2):
            with pytest.raises(Damaged, match="row 5") as caught:
                prefetcher.microbatches(4)
            assert any(entry.name == "row" for entry in caught.traceback), "where it was raised"
    assert set(rows.read) == {0, 1, 2, 3, 4, 5}


def test_without_prefetching_there_is_no_thread() -> None:
    rows = Rows()
    with prefetching(rows, depth=0, steps=10) as prefetcher:
        assert rows.read == []
        prefetcher.microbatches(6)
        assert rows.read == [6, 7]
        assert rows.threads == {threading.current_thread().name}


def test_on_a_gpu_batches_are_made_in_pinned_memory_of_the_ranks_own_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread starts on the first GPU: there pinned memory would make a context for every rank of a node."""
    seen: list[tuple[str, object]] = []
    empty = torch.empty

    def allocate(shape: tuple[int, int], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        seen.append((threading.current_thread().name, pin_memory))
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", allocate)
    chosen = lambda device: seen.append((threading.current_thread().name, device))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    gpu = torch.device("cuda", 3)
    prefetcher = Prefetcher(DataLoader(Rows(), BatchSchedule(1), 1, pinned=True), 1, gpu)
    prefetcher.start(0, 1)
    prefetcher.microbatches(0)
    prefetcher.close()
    assert seen == [("prefetch", gpu)] + [("prefetch", True)] * 3


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("gone_back_at", [2, 4])
def test_a_run_that_goes_back_takes_more_steps_and_the_data_goes_on(depth: int, gone_back_at: int) -> None:
    rows = Rows()
    with prefetching(rows, depth, 4) as prefetcher:
        for number in range(6):
            if number == gone_back_at:
                prefetcher.go_on(2)  # the thread may have made all of its batches by now
            (one, two) = prefetcher.microbatches(2 * number)
            assert [int(each.tokens[0, 0]) for each in (one, two)] == [2 * number, 2 * number + 1]
    assert rows.read[:12] == list(range(12))
