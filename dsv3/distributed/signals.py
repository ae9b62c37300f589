"""Signals: before the first step a stop ends the process at once, later it saves and exits with 75.

SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGQUIT mean the same; a second one exits at once with 130. A rank that
has a launcher may hear one stop twice, and takes what comes within ONE_STOP for the first. SIGUSR1 saves a
checkpoint and the run goes on. A signal that was ignored when the command began, as nohup ignores SIGHUP,
stays ignored. A thread hears the signals, so that a process that waits in one call of C++ (a collective, a
compilation, a read) hears them too.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from dsv3.errors import KILLED, STOPPED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

SAVE_SIGNAL = signal.SIGUSR1
"""start.py blocks it from the first line on: the kernel keeps it until training hears it."""

_GROUP_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, SAVE_SIGNAL)
"""Signals that a terminal, or `kill -- -GROUP`, sends to the children of a command as well."""

_PR_SET_PDEATHSIG = 1

ONE_STOP = 5.0
"""Seconds in which further stops mean the first to a rank that has a launcher.

What is sent to a process group, as by `timeout` or systemd, reaches a rank directly and once more through its
launcher. A second stop to a launcher of dsv3 ends its ranks by SIGKILL.
"""


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

NOTHING_TO_SAVE = "SIGUSR1: there is nothing to save, only training saves checkpoints"

before_leaving: list[Callable[[], None]] = []
"""What a process does before it ends at once, such as removing a directory that it has made for nothing."""


def say(message: str) -> None:
    """Print a line on stderr from a signal's handler or thread, unless it is empty."""
    if message:
        # Not print(): the signal may have come in the middle of one. A bar has hidden the cursor.
        clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
        with contextlib.suppress(OSError):  # the terminal may be gone: that is what SIGHUP says
            os.write(2, f"{clear}{message}\n".encode())


def leave(message: str) -> None:
    """End this process at once; print `message` unless it is empty."""
    for act in before_leaving:
        with contextlib.suppress(Exception):
            act()
    say(message)
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


def obey_launcher_alone() -> None:
    """Let SIGTERM alone stop this worker: its launcher hears the other signals and passes them on."""
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


def heeded(numbers: Collection[int]) -> list[int]:
    """Return those of `numbers` that this process does not ignore, and that Python may handle."""
    return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _nothing(number: int, frame: FrameType | None) -> None:
    """Let what is left of a process go on: it is about to end by itself."""


class Leave:
    """A signal handler that ends this process and its children at once, with `message`."""

    def __init__(
        self, message: Callable[[], str], raises: Callable[[], bool], over: Callable[[], bool]
    ) -> None:
        self.message = message
        self.raises = raises
        self.over = over

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; raise KeyboardInterrupt where `raises` is true, do nothing where `over` is."""
        if self.over():
            return
        if self.raises():
            raise KeyboardInterrupt
        with contextlib.suppress(Exception):
            kill_children()
        leave(self.message())


@contextmanager
def leave_on_signal(
    message: Callable[[], str] = str, raises: Callable[[], bool] = bool, over: Callable[[], bool] = bool
) -> Iterator[None]:
    """Let a signal end the process at once while the body runs, such as an import.

    A KeyboardInterrupt in the middle of an import surfaces anywhere: as a traceback, as a module that is half
    there, or not at all; and where threads work it waits for them. Signals that are ignored stay so.

    Args:
        message: returns what is said.
        raises: returns True where a KeyboardInterrupt is wanted, as by a sweep, which reports.
        over: returns True once nothing is left that a signal would have to end.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    handler = Leave(message, raises, over)
    before = {number: signal.signal(number, handler) for number in heeded(STOP_SIGNALS)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


class Hearer(Protocol):
    """Takes note of signals."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread, as soon as that runs Python again."""

    def hear(self, number: int) -> None:
        """Take note of a signal, in a thread, at once."""


@contextmanager
def heard_by(hearer: Hearer, then_ignore: bool = False) -> Iterator[None]:
    """Let `hearer` hear stops and SIGUSR1 while the body runs.

    All but SIGTERM are blocked in this thread, and so in the processes that it starts meanwhile: a Ctrl-C
    reaches those too, and would end them with a traceback, or before this process has asked them to save.

    Args:
        then_ignore: after the body nothing is left to stop, as the process ends by itself.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    numbers = heeded((*STOP_SIGNALS, SAVE_SIGNAL))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # The interpreter writes a signal's number there as it comes, whatever the main thread is doing.
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {number: signal.signal(number, hearer) for number in numbers}
    ready = threading.Event()

    def listen() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        ready.set()
        while numbers_heard := os.read(reading, 64):
            for number in numbers_heard:
                if number in numbers:
                    hearer.hear(number)
                elif number == 0:
                    return

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    ready.wait()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, _nothing if then_ignore and number in STOP_SIGNALS else handler)
        signal.set_wakeup_fd(wakeup)
        os.write(writing, b"\0")
        listener.join()
        os.close(reading)
        os.close(writing)


class StopRequest:
    """Keeps in mind that a signal has asked this process to stop or to save; ends it where that is due.

    Args:
        leaves: there is nothing to save, and the first signal ends the process at once.
        message: what it says then.
        save_message: what it says to SIGUSR1; training says itself, after its first step, what it saves.
    """

    def __init__(self, leaves: bool = False, message: str = "", save_message: str = "") -> None:
        self.leaves = leaves
        self.message = message
        self.save_message = save_message
        self.requested = False
        self.save_requested = False
        self.one_stop = ONE_STOP if "RANK" in os.environ else 0.0
        self._heard, self._first = 0, 0.0

    def hear(self, number: int = signal.SIGTERM) -> None:
        """Take note of a signal, in a thread; end this process and its children where that is due."""
        if number == SAVE_SIGNAL:
            self.save_requested = True
            if self.save_message:
                say(self.save_message)
            return
        self._heard += 1
        now = time.monotonic()
        self._first = now if self._heard == 1 else self._first
        if self.leaves or (self._heard > 1 and now - self._first >= self.one_stop):
            with contextlib.suppress(Exception):
                kill_children()
            leave(self.message if self.leaves else "")
        self.requested = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread: ask to stop at once, and leave the rest to `hear`."""
        if number != SAVE_SIGNAL and not self.leaves:
            self.requested = True


@contextmanager
def stop_on_signal(
    leaves: bool = False, message: str = "", save_message: str = "", then_ignore: bool = False
) -> Iterator[StopRequest]:
    """Turn signals into a request while the body runs; see StopRequest and `heard_by` for the arguments.

    Where signals of the group are ignored, as in the worker of a launcher (`obey_launcher_alone`), SIGTERM
    alone is heard: a Ctrl-C reaches the launcher as well, which passes it on, and the two must not count as
    two.
    """
    request = StopRequest(leaves, message, save_message)
    with heard_by(request, then_ignore):
        yield request


class Exchange(Protocol):
    """Rounds of flags between all ranks (meeting.py)."""

    round: int

    def arrive(self, flags: int) -> None:
        """Begin the next round."""

    def outcome(self) -> int:
        """Return the flags that any rank has raised in this round."""


_STOP, _SAVE = 1, 2


class StopSignal:
    """Lets all ranks stop, or save, at the same point once any of them has been asked to.

    Ranks exchange flags on the CPU while they work on: a point begins an exchange and reads that of the
    point before. So a rank waits for no device, no rank is more than a point ahead of another, and a stop
    takes effect one point after it was heard. All ranks call `poll` at the same points.
    """

    def __init__(self, request: StopRequest, exchange: Exchange | None = None) -> None:
        self.request = request
        self.exchange = exchange
        """None where this process is alone."""
        self.agreed = False
        self._saves = False

    def poll(self, wanted: bool = False) -> bool:
        """Return True on all ranks alike where any was asked, or `wanted`, to stop at the point before."""
        if self.agreed:
            return True
        if self.exchange is None:
            self._settle(self._flags(wanted))
        else:
            if self.exchange.round > 0:
                self._settle(self.exchange.outcome())
            if not self.agreed:
                self.exchange.arrive(self._flags(wanted))
        return self.agreed

    def take_save(self) -> bool:
        """Return True, once, on all ranks alike where any was asked to save at a point before."""
        saves, self._saves = self._saves, False
        return saves

    def saves_from_now(self) -> None:
        """Begin to save at a stop: there is something to save on every rank."""
        self.request.leaves, self.request.save_message = False, ""

    def _flags(self, wanted: bool) -> int:
        stops = wanted or self.request.requested
        return (_STOP if stops else 0) | (_SAVE if self.request.save_requested else 0)

    def _settle(self, flags: int) -> None:
        self.agreed = bool(flags & _STOP)
        if flags & _SAVE:
            # One signal to all ranks, as Slurm sends it, is heard a little later by some: it means this save.
            self._saves, self.request.save_requested = True, False


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
