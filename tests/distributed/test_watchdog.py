"""When a run counts as hung; the stacks that its ranks then write, and the report over all of them."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3.distributed.heartbeat import Heartbeat
from dsv3.distributed.watchdog import Watchdog, enable_flight_recorder, format_stacks, summarize_stacks

TIMEOUT = 60.0


class Numbers:
    """A store of numbers, as a process group has one; `gone` once its process has ended."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.gone = False

    def add(self, key: str, amount: int) -> int:
        """Add to a number."""
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        self.numbers[key] = self.numbers.get(key, 0) + amount
        return self.numbers[key]


class Ranks:
    """The watchdogs of four ranks, which look once a second of a clock that is moved by hand."""

    def __init__(self) -> None:
        self.store = Numbers()
        self.hearts = [Heartbeat() for _ in range(4)]
        self.dogs = [Watchdog(rank, 4, TIMEOUT, self.store, heart) for rank, heart in enumerate(self.hearts)]
        self.now = 0.0
        for dog in self.dogs:
            dog._last = 0.0

    def hung_after(self, seconds: int, work: Callable[[int], None] = lambda second: None) -> list[int | None]:
        """Let so many seconds pass, `work` in each; return by rank after how many it found the run hung."""
        found: list[int | None] = [None] * 4
        for second in range(1, seconds + 1):
            self.now += 1.0
            work(second)
            for rank, dog in enumerate(self.dogs):
                if found[rank] is None and dog.is_hung(self.now):
                    found[rank] = second
        return found


def test_ranks_wait_for_slow_work_as_long_as_it_moves_and_not_much_longer() -> None:
    ranks = Ranks()

    def one_slow_rank(second: int) -> None:
        if second % 50 == 0 and second <= 5000:  # a tensor, or a file, each 50 s
            ranks.hearts[2].beat()

    found = ranks.hung_after(5200, one_slow_rank)
    assert all(second in (5061, 5062) for second in found)  # each at the same look or the next
    assert None not in found


def test_a_rank_that_moves_not_at_all_is_found_whatever_the_others_wait_for() -> None:
    found = Ranks().hung_after(70)
    assert None not in found
    assert all(second in (62, 63) for second in found)


def test_one_call_that_says_nothing_has_a_bound_of_its_own() -> None:
    ranks = Ranks()
    with ranks.hearts[1].patient(300.0):  # a compilation
        assert ranks.hung_after(350) == [None] * 4
        ranks.hearts[1].beat()  # it goes on with another
        found = ranks.hung_after(400)
    assert None not in found
    assert all(second in (361, 362) for second in found)


def test_phases_within_one_another_have_the_longest_bound() -> None:
    heart = Heartbeat()
    with heart.patient(10.0), heart.patient(0.0):
        assert heart.patience == 10.0
    assert heart.patience == 0.0


def test_a_rank_whose_store_is_gone_looks_after_itself() -> None:
    ranks = Ranks()
    assert ranks.hung_after(30, lambda _: ranks.hearts[0].beat()) == [None] * 4
    ranks.store.gone = True
    found = ranks.hung_after(100, lambda _: ranks.hearts[0].beat())
    assert found[0] is None
    assert None not in found[1:]


def test_looks_are_many_per_timeout_and_rare_enough_for_thousands_of_ranks() -> None:
    assert Watchdog(0, 2048, 600.0).every == 10.0
    assert Watchdog(0, 2048, 86400.0).every == 10.0
    assert Watchdog(0, 2, 6.0).every == 0.1


@pytest.mark.slow  # it looks at the clock
def test_stacks_begin_with_the_place_of_the_main_thread_and_show_the_others() -> None:
    release = threading.Event()

    def waits_elsewhere() -> None:
        release.wait()

    thread = threading.Thread(target=waits_elsewhere, name="loader")
    thread.start()
    try:
        text = format_stacks()
    finally:
        release.set()
        thread.join()
    assert text.splitlines()[0].endswith("in format_stacks")
    assert text.index("thread MainThread") < text.index("thread loader")
    assert "waits_elsewhere" in text.partition("thread loader")[2]


def test_ranks_at_one_place_are_told_together_and_one_without_a_stack_is_named(tmp_path: Path) -> None:
    files = [tmp_path / f"rank-{rank}.txt" for rank in range(12)]
    for rank, path in enumerate(files[:11]):
        path.write_text(f"{'data.py:7 in read' if rank == 4 else 'c10d.py:9 in wait'}\n\nthread MainThread\n")
    assert summarize_stacks(files).splitlines() == [
        "ranks 0, 1, 2, 3, 5, 6, 7, 8 and 2 more at c10d.py:9 in wait",
        "rank 4 at data.py:7 in read",
        "rank 11 at an unknown place: it wrote no stack",
        f"stacks of all threads: {tmp_path}/rank-N.txt",
    ]


def test_what_the_user_has_set_of_the_flight_recorder_stands() -> None:
    environment = {"TORCH_FR_BUFFER_SIZE": "7"}
    enable_flight_recorder(environment)
    assert environment == {"TORCH_FR_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
