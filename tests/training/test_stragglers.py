"""Stragglers: who is the slowest, of which share, why, and how often the user hears of it."""

import threading
from typing import Any

import pytest
import torch

from dsv3.distributed.step_waits import StepWaits, Waited
from dsv3.training.stragglers import RankTimes, Straggler, StragglerWatch, find_straggler, summary
from tests.harness.trained import ALONE

FAST = RankTimes(waited=3.0, seconds=10.0, data=0.0)
DATA = "it waits for its data"


def straggler(rank: int, share: float) -> Any:
    """Return a straggler of about this share."""
    return (rank, pytest.approx(share), "")


def test_the_slowest_rank_is_the_one_that_waits_least_by_so_much_of_a_step() -> None:
    times = [FAST, FAST._replace(waited=1.0), FAST._replace(waited=2.9), FAST]
    assert find_straggler(times) == straggler(1, 0.2)
    assert find_straggler([FAST, FAST]).share == 0.0
    assert find_straggler([FAST, FAST._replace(waited=1.0)]) == straggler(1, 0.2)


def test_its_cause_is_its_data_where_that_is_most_of_it() -> None:
    late = FAST._replace(waited=1.0)
    assert find_straggler([FAST, late._replace(data=1.5), FAST]).cause == DATA
    assert find_straggler([FAST, late._replace(data=0.5), FAST]).cause == ""
    slow_data = FAST._replace(data=1.5)  # of all ranks alike
    assert find_straggler([slow_data, late._replace(data=1.5), slow_data]).cause == ""


def test_a_rank_is_compared_with_those_of_its_own_stage_where_there_are_others() -> None:
    heavy = FAST._replace(waited=0.5)
    assert find_straggler([FAST, FAST, heavy, heavy], stages=2).share == 0.0
    late = heavy._replace(waited=0.1)
    assert find_straggler([FAST, FAST, heavy, late], stages=2) == straggler(3, 0.04)
    assert find_straggler([FAST, heavy], stages=2) == straggler(1, 0.25)


def test_a_slow_device_is_found_by_its_probe_though_all_wait_alike() -> None:
    probed = FAST._replace(probe=0.002)
    found = find_straggler([probed, probed, probed._replace(probe=0.0025), probed])
    assert (found.rank, round(found.share, 6)) == (2, 0.2)
    assert found.cause == "its device takes 1.25 times as long as most for a matmul"


def test_a_slow_rank_is_told_when_it_stays_slow_and_ever_more_rarely() -> None:
    watch = StragglerWatch(ALONE, 1, StepWaits())
    watch.hosts = ["a", "b"]
    told = [n for n in range(1, 40) if watch._judge(Straggler(1, 0.25, DATA))]
    assert told == [2, 4, 8, 16, 32]
    assert not watch._judge(Straggler(1, 0.09, ""))
    line = "the other ranks wait 25% of a step for rank 1 (b): it waits for its data"
    assert [watch._judge(Straggler(1, 0.25, DATA)) for _ in range(2)] == ["", line]
    assert [watch._judge(Straggler(rank, 0.25, "")) for rank in (0, 1, 0, 1)] == [""] * 4


def test_waits_count_within_steps_and_in_the_thread_that_takes_them() -> None:
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    waits = StepWaits(lambda: now[0])
    waits.start(torch.device("cpu"), compiled=False)
    wait = waits._timed(spend)
    try:
        wait(100.0)
        for seconds in (1.0, 2.0):
            with waits.step():
                spend(5.0)
                wait(seconds)
                thread = threading.Thread(target=wait, args=(10.0,))
                thread.start()
                thread.join()
        assert waits.take() == Waited(1.5, (2 * 15.0 + 3.0) / 2)
        assert waits.take() is None
    finally:
        waits.stop()
    with waits.step():
        wait(1.0)
    assert waits.take() is None


def test_on_a_gpu_events_in_the_stream_measure_steps_and_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, log = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = stream[0]

        def synchronize(self) -> None:
            log.append("waited")

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at) * 1000

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waits = StepWaits(lambda: 0.0)
    waits.start(torch.device("cuda"), compiled=True)
    with waits.reduction():  # between steps: of an evaluation, say
        stream[0] += 100.0
    for seconds in (1.0, 2.0):
        with waits.step():
            stream[0] += 4.0
            with waits.reduction():
                stream[0] += seconds
    assert log == []
    assert waits.take() == Waited(1.5, 5.5)
    assert log == ["waited"]


def test_the_summary_names_the_rank_that_was_slowest_most_often() -> None:
    assert summary([(None, None)]) == ""
    told = summary([(3, 0.2), (None, None), (1, 0.01), (3, 0.3)])
    assert told == "others wait 20% of a step; rank 3 in 2 of 3 times"
