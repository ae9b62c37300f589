"""Ranks that wait for one another and agree to stop, as threads that share a store."""

import random
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import pytest
import torch.distributed as dist

from dsv3.distributed.meeting import Meeting
from dsv3.distributed.signals import SAVE_SIGNAL, StopRequest, StopSignal

T = TypeVar("T")

WORLD = 5


def on_every_rank(work: Callable[[int, Meeting], T]) -> tuple[list[T], Any]:
    """Do `work` on every rank at once; return the results by rank, and the store."""
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=1))
    results: dict[int, T] = {}

    def run(rank: int) -> None:
        results[rank] = work(rank, Meeting(store, WORLD, "test"))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == WORLD
    return [results[rank] for rank in range(WORLD)], store


def test_nobody_leaves_a_meeting_before_all_are_there_and_all_learn_of_a_flag() -> None:
    here: set[int] = set()

    def work(rank: int, meeting: Meeting) -> list[tuple[int, bool]]:
        seen = []
        for turn in range(6):
            time.sleep(random.Random(rank * 10 + turn).uniform(0, 0.01))
            here.add(turn * WORLD + rank)
            flag = meeting.meet(turn % 2 == 1 and rank == turn)
            seen.append((sum(turn * WORLD <= each < (turn + 1) * WORLD for each in here), flag))
        return seen

    results, store = on_every_rank(work)
    assert results == [[(WORLD, turn in (1, 3)) for turn in range(6)]] * WORLD
    # At most the last round is left in the store, however many there were.
    assert store.num_keys() <= 2


@pytest.mark.parametrize("seed", range(4))
def test_all_ranks_stop_at_the_same_point_one_after_the_first_that_was_asked(seed: int) -> None:
    asked = {1: 3 + seed, 4: 5}  # by rank, the point before which it hears a signal

    def work(rank: int, meeting: Meeting) -> int:
        request = StopRequest()
        stop = StopSignal(request, meeting)
        for point in range(1, 20):
            time.sleep(random.Random(seed + rank * 100 + point).uniform(0, 0.003))
            if asked.get(rank) == point:
                request.requested = True
            if stop.poll():
                assert stop.poll()  # it stays so, with nobody to exchange it with
                return point
        return 0

    results, _ = on_every_rank(work)
    assert results == [min(asked.values()) + 1] * WORLD


def test_a_request_to_save_reaches_all_ranks_once_at_the_same_point_and_stops_nobody() -> None:
    asked = {1: [3], 3: [3, 4], 4: [11]}  # by rank; 3 hears the same signal again a little later

    def work(rank: int, meeting: Meeting) -> list[int]:
        request, saves = StopRequest(), []
        stop = StopSignal(request, meeting)
        for point in range(1, 16):
            time.sleep(random.Random(rank * 100 + point).uniform(0, 0.003))
            if point in asked.get(rank, ()):
                request.hear(SAVE_SIGNAL)
            assert not stop.poll()
            if stop.take_save():
                saves.append(point)
        return saves

    results, _ = on_every_rank(work)
    assert results == [[4, 12]] * WORLD


def test_a_stop_and_a_request_to_save_do_not_mix() -> None:
    def work(rank: int, meeting: Meeting) -> list[tuple[bool, bool]]:
        request = StopRequest()
        stop = StopSignal(request, meeting)
        request.requested, request.save_requested = rank == 2, rank == 3
        return [(stop.poll(), stop.take_save()) for _ in range(3)]

    results, _ = on_every_rank(work)
    assert results == [[(False, False), (True, True), (True, False)]] * WORLD


def test_what_a_callback_wants_counts_as_a_signal_and_alone_it_counts_at_once() -> None:
    def work(rank: int, meeting: Meeting) -> list[bool]:
        stop = StopSignal(StopRequest(), meeting)
        return [stop.poll(rank == 2 and point == 1) for point in range(4)]

    results, _ = on_every_rank(work)
    assert results == [[False, False, True, True]] * WORLD
    alone = StopSignal(StopRequest())
    assert [alone.poll(wanted) for wanted in (False, True, False)] == [False, True, True]


def test_meetings_of_the_same_ranks_are_apart() -> None:
    def work(rank: int, meeting: Meeting) -> list[bool]:
        others = [meeting.apart(), meeting.apart()]
        if rank % 2:  # in another order
            second, first = others[1].meet(rank == 1), others[0].meet()
        else:
            others[0].arrive(False)
            second = others[1].meet()
            first = bool(others[0].outcome())
        return [first, second]

    results, _ = on_every_rank(work)
    assert results == [[False, True]] * WORLD
