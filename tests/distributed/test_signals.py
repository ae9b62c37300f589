"""Signals are heard at once, whatever the main thread does, and end or stop the process."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from dsv3.distributed import signals
from dsv3.distributed.signals import (
    SAVE_SIGNAL,
    STOP_SIGNALS,
    StopEarly,
    StopRequest,
    StopSignal,
    leave_on_signal,
    obey,
    obey_launcher_alone,
    stop_on_signal,
    stop_requested,
)
from dsv3.metrics.progress import phase
from tests.harness.processes import ROOT

LIBC = ctypes.CDLL(None)
PATIENCE = 20.0
ALL = (*STOP_SIGNALS, SAVE_SIGNAL)


class BlockedInC:
    """A call of C that no signal interrupts, as a collective waits: it ends with `release`."""

    def __init__(self) -> None:
        self.mutex = ctypes.create_string_buffer(64)
        LIBC.pthread_mutex_lock(self.mutex)

    def wait(self) -> None:
        """Wait for `release`; after PATIENCE it comes by itself."""
        timer = threading.Timer(PATIENCE, self.release)
        timer.start()
        LIBC.pthread_mutex_lock(self.mutex)
        timer.cancel()

    def release(self) -> None:
        """End the wait."""
        LIBC.pthread_mutex_unlock(self.mutex)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The messages with which the process would have ended; no child is killed.

    The signals are as a shell's foreground sets them, whatever has started the tests.
    """
    messages: list[str] = []
    monkeypatch.setattr(signals, "leave", messages.append)
    monkeypatch.setattr(signals, "kill_children", lambda: messages.append("children"))
    found = {number: signal.signal(number, signal.SIG_DFL) for number in ALL}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield messages
    assert {number: signal.getsignal(number) for number in ALL} == dict.fromkeys(ALL, signal.SIG_DFL)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]
    for number, handler in found.items():
        signal.signal(number, handler)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> BlockedInC:
    """A wait in C that ends when the process has heard a signal."""
    blocked = BlockedInC()
    original = StopRequest.hear

    def hear(request: StopRequest, number: int) -> None:
        original(request, number)
        blocked.release()

    monkeypatch.setattr(StopRequest, "hear", hear)
    return blocked


@pytest.mark.parametrize("leaves", [True, False], ids=["before the first step", "while training"])
@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_stop_is_heard_while_the_main_thread_waits_in_c(
    left: list[str], heard: BlockedInC, leaves: bool, number: int
) -> None:
    with stop_on_signal(leaves, message="nothing was saved") as request:
        os.kill(os.getpid(), number)
        heard.wait()
        assert request.requested or leaves
    assert left == (["children", "nothing was saved"] if leaves else [])


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_the_second_signal_ends_the_process_and_its_children(
    left: list[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    blocked = BlockedInC()

    def leave(message: str) -> None:
        left.append(message)
        blocked.release()

    monkeypatch.setattr(signals, "leave", leave)
    with stop_on_signal() as request:
        os.kill(os.getpid(), signal.SIGTERM if number != signal.SIGTERM else signal.SIGHUP)
        os.kill(os.getpid(), number)
        blocked.wait()
        assert request.requested
    assert left == ["children", ""]


def test_a_rank_takes_its_group_s_signal_and_its_launcher_s_copy_for_one_stop(
    left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((100.0, 100.1, 104.9, 105.0))
    monkeypatch.setattr("dsv3.distributed.signals.time.monotonic", lambda: next(clock))
    monkeypatch.setenv("RANK", "0")
    rank = StopRequest()
    for _ in range(3):
        rank.hear()
    assert (rank.requested, left) == (True, [])
    rank.hear()
    assert left == ["children", ""]


@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
def test_a_signal_that_was_ignored_stays_so(left: list[str], heard: BlockedInC, number: int) -> None:
    other = signal.SIGTERM if number != signal.SIGTERM else signal.SIGINT
    signal.signal(number, signal.SIG_IGN)  # as nohup does with SIGHUP
    with leave_on_signal(), stop_on_signal() as request:
        os.kill(os.getpid(), number)
        assert not request.requested
        os.kill(os.getpid(), other)  # would be the second
        heard.wait()
        assert (request.requested, request.save_requested) == (True, False)
    assert left == []
    signal.signal(number, signal.SIG_DFL)


def test_a_worker_obeys_its_launcher_and_not_the_terminal(left: list[str], heard: BlockedInC) -> None:
    obey_launcher_alone()
    with stop_on_signal() as request:
        for number in STOP_SIGNALS[1:]:
            os.kill(os.getpid(), number)
            assert not request.requested
        os.kill(os.getpid(), signal.SIGTERM)
        heard.wait()
        assert request.requested
    assert left == []
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("leaves", [True, False], ids=["before the first step", "while training"])
def test_sigusr1_asks_to_save_and_ends_nothing(
    left: list[str], heard: BlockedInC, capfd: pytest.CaptureFixture[str], leaves: bool
) -> None:
    with stop_on_signal(leaves, save_message="later" if leaves else "") as request:
        for _ in range(2):
            os.kill(os.getpid(), SAVE_SIGNAL)
            heard.wait()
        assert (request.requested, request.save_requested) == (False, True)
        alone = StopSignal(request)
        assert [alone.poll(), alone.take_save(), alone.take_save(), alone.poll()] == [
            False,
            True,
            False,
            False,
        ]
    assert left == []
    assert capfd.readouterr().err == ("later\nlater\n" if leaves else "")


KEPT = """
import os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # start.py
os.kill(os.getpid(), signal.SIGUSR1)
from dsv3.distributed.signals import stop_on_signal
with stop_on_signal(leaves=True, save_message="heard") as request:
    while not request.save_requested:
        time.sleep(0.001)
"""


def test_sigusr1_from_before_anybody_listens_is_kept() -> None:
    # In a process of its own: these tests have threads that would take the signal.
    done = subprocess.run(
        [sys.executable, "-c", KEPT], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "heard\n")


def test_processes_that_are_started_meanwhile_leave_a_group_s_signals_to_this_one(left: list[str]) -> None:
    told = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
    with stop_on_signal():
        blocked = subprocess.run([sys.executable, "-Sc", told], capture_output=True, text=True, check=True)
    assert blocked.stdout == f"{sorted(map(int, (*STOP_SIGNALS[1:], SAVE_SIGNAL)))}\n"


def test_when_all_is_done_a_stop_changes_nothing(left: list[str]) -> None:
    with leave_on_signal(str, over=bool):
        with stop_on_signal(then_ignore=True):
            pass
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
    with leave_on_signal(over=lambda: True):
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
    assert left == []


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_where_nothing_is_to_be_saved_a_stop_ends_all_at_once(left: list[str], number: int) -> None:
    with leave_on_signal(lambda: "stopped"):
        os.kill(os.getpid(), number)
    assert left == ["children", "stopped"]
    with leave_on_signal(raises=lambda: True), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_work_whose_ranks_advance_together_ends_at_its_next_turn() -> None:
    request, turns = StopRequest(), []

    def work(together: bool) -> None:
        with phase("sampling", 5, "tokens", together=together) as done:
            for turn in range(5):
                turns.append(turn)
                done.advance()
                request.requested = turn == 2

    request.requested = True
    work(together=True)  # nobody obeys: this is no training
    turns.clear()
    request.requested = False
    with obey(StopSignal(request)):
        with pytest.raises(StopEarly):
            work(together=True)
        assert turns == [0, 1, 2, 3]
        assert stop_requested()
        work(together=False)
    assert turns[4:] == [0, 1, 2, 3, 4]
    assert not stop_requested()
