"""SIGTERM and Ctrl-C: before the first step exit at once, later stop early, save and exit with 75.

A second signal exits at once with 130. A thread hears the signals, so that a process that waits in one call
of C++ (a collective, a compilation, a read) hears them too.
"""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from dsv3.errors import KILLED, STOPPED

_PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """The run was asked to stop, has saved and can be resumed; ends a sweep too."""

    def __init__(self, message: str) -> None:
        super().__init__(STOPPED)
        self.message = message

    def __reduce__(self) -> tuple[type["Stopped"], tuple[str]]:
        """Pickle by the message: a sweep's job may stop in another process."""
        return type(self), (self.message,)


class StopEarly(Exception):
    """Work between two steps (an evaluation, a sample, an export) ends early: the run stops, and saves."""


NOTHING_SAVED = "stopped before the first step; nothing was saved"


def leave(message: str) -> None:
    """End this process at once; print `message` unless it is empty."""
    if message:
        # Not print(): the signal may have come in the middle of one. A bar has hidden the cursor.
        clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{clear}{message}\n".encode())
    os._exit(KILLED)


def kill_children(others: Collection[int] = ()) -> None:
    """Kill every process below this one, except `others` and multiprocessing's own cleaner."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            own = any("resource_tracker" in argument for argument in child.cmdline())
            if not own and child.pid not in others:
                child.kill()


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Leave:
    """A signal handler that ends this process at once, with `message`."""

    def __init__(self, message: Callable[[], str], until: Callable[[], bool]) -> None:
        self.message = message
        self.until = until

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; raise KeyboardInterrupt once `until` is true."""
        if self.until():
            raise KeyboardInterrupt
        leave(self.message())


@contextmanager
def leave_on_signal(message: Callable[[], str] = str, until: Callable[[], bool] = bool) -> Iterator[None]:
    """Let a signal end the process at once while the body runs, such as an import.

    A KeyboardInterrupt in the middle of an import surfaces anywhere: as a traceback, as a module that is half
    there, or not at all. Signals that are ignored stay so. `until` ends this before the body does.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    handler = Leave(message, until)
    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


class StopRequest:
    """Keeps in mind that a signal has asked this process to stop; ends it at once where that is due.

    Args:
        leaves: there is nothing to save, and the first signal ends the process at once.
        message: what it says then.
    """

    def __init__(self, leaves: bool = False, message: str = "") -> None:
        self.leaves = leaves
        self.message = message
        self.requested = False
        self._heard = 0

    def hear(self) -> None:
        """Take note of the first signal, in a thread; end this process and its children at a second one."""
        self._heard += 1
        if self.leaves or self._heard > 1:
            with contextlib.suppress(Exception):
                kill_children()
            leave(self.message if self.leaves else "")
        self.requested = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread: ask to stop at once, and leave the rest to `hear`."""
        if not self.leaves:
            self.requested = True


@contextmanager
def stop_on_signal(alone: bool, leaves: bool = False, message: str = "") -> Iterator[StopRequest]:
    """Turn signals into a stop request while the body runs; see StopRequest for the other arguments.

    A worker of several (`alone` false) listens to SIGTERM only. Ctrl-C reaches the launcher as well, which
    passes it on as SIGTERM, and the two must not count as two.
    """
    request = StopRequest(leaves, message)
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield request
        return
    numbers = [signal.SIGTERM, signal.SIGINT] if alone else [signal.SIGTERM]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # The interpreter writes a signal's number there as it comes, whatever the main thread is doing.
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {number: signal.signal(number, request) for number in numbers}
    if not alone:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def listen() -> None:
        while numbers_heard := os.read(reading, 64):
            for number in numbers_heard:
                if number in numbers:
                    request.hear()
                elif number == 0:
                    return

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.write(writing, b"\0")
        listener.join()
        os.close(reading)
        os.close(writing)


class Exchange(Protocol):
    """Rounds of one flag between all ranks (meeting.py)."""

    round: int

    def arrive(self, flag: bool) -> None:
        """Begin the next round."""

    def outcome(self) -> bool:
        """Return the outcome of this round."""


class StopSignal:
    """Lets all ranks stop at the same point once any of them has been asked to.

    Ranks exchange the flag on the CPU while they work on: a point begins an exchange and reads that of the
    point before. So a rank waits for no device, no rank is more than a point ahead of another, and a stop
    takes effect one point after it was heard. All ranks call `poll` at the same points.
    """

    def __init__(self, request: StopRequest, exchange: Exchange | None = None) -> None:
        self.request = request
        self.exchange = exchange
        """None where this process is alone."""
        self.agreed = False

    def poll(self, wanted: bool = False) -> bool:
        """Return True on all ranks alike where any was asked, or `wanted`, to stop at the point before."""
        wanted |= self.request.requested
        if self.agreed or self.exchange is None:
            self.agreed |= wanted
        else:
            self.agreed = self.exchange.round > 0 and self.exchange.outcome()
            if not self.agreed:
                self.exchange.arrive(wanted)
        return self.agreed

    def saves_from_now(self) -> None:
        """Begin to save at a stop: there is something to save on every rank."""
        self.request.leaves = False


_listeners: list[StopSignal] = []


@contextmanager
def obey(stop: StopSignal) -> Iterator[None]:
    """Let phases of this process whose ranks advance together end early at `stop`, while the body runs."""
    _listeners.append(stop)
    try:
        yield
    finally:
        _listeners.remove(stop)


def must_stop_early() -> bool:
    """Return True on all ranks alike where work between two steps must end; all ranks call it together."""
    return bool(_listeners) and _listeners[-1].poll()


def stop_requested() -> bool:
    """Return True where this process has been asked to stop, between two steps of training.

    For loops whose turns differ between ranks; they agree when they next meet.
    """
    return bool(_listeners) and _listeners[-1].request.requested
