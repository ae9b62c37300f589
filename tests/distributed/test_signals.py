"""Signals are heard at once, whatever the main thread does, and end or stop the process."""

import ctypes
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from dsv3.distributed import signals
from dsv3.distributed.signals import StopEarly, StopRequest, StopSignal, obey, stop_on_signal, stop_requested
from dsv3.metrics.progress import phase

LIBC = ctypes.CDLL(None)
PATIENCE = 20.0


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
    """The messages with which the process would have ended; no child is killed."""
    messages: list[str] = []
    monkeypatch.setattr(signals, "leave", messages.append)
    monkeypatch.setattr(signals, "kill_children", lambda: messages.append("children"))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield messages
    assert {number: signal.getsignal(number) for number in before} == before
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


@pytest.mark.parametrize("leaves", [True, False], ids=["before the first step", "while training"])
def test_a_signal_is_heard_while_the_main_thread_waits_in_c(
    left: list[str], monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    blocked = BlockedInC()
    heard: list[bool] = []
    original = StopRequest.hear

    def hear(request: StopRequest) -> None:
        original(request)
        heard.append(request.requested)
        blocked.release()

    monkeypatch.setattr(StopRequest, "hear", hear)
    with stop_on_signal(alone=True, leaves=leaves, message="nothing was saved") as request:
        os.kill(os.getpid(), signal.SIGTERM)
        blocked.wait()
        assert heard == [True]  # in the thread, while this one waited
        assert request.requested or leaves
    assert left == (["children", "nothing was saved"] if leaves else [])


def test_the_second_signal_ends_the_process_and_its_children(
    left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = BlockedInC()

    def leave(message: str) -> None:
        left.append(message)
        blocked.release()

    monkeypatch.setattr(signals, "leave", leave)
    with stop_on_signal(alone=True) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        blocked.wait()
        assert request.requested
    assert left == ["children", ""]


def test_a_worker_hears_its_launcher_and_not_the_terminal(left: list[str]) -> None:
    found = []
    with stop_on_signal(alone=False) as request:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            found.append(request.requested)  # at once: the main thread need not wait for the other one
    assert (found, left) == ([False, True], [])


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
