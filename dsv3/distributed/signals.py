"""SIGTERM and Ctrl-C: finish the step, save, exit with 75; a second signal exits at once with 130.

Before the first step there is nothing to save, and the first signal exits at once.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dsv3.errors import KILLED, STOPPED


class Stopped(SystemExit):
    """The run was asked to stop, has saved and can be resumed; ends a sweep too."""

    def __init__(self, message: str) -> None:
        super().__init__(STOPPED)
        self.message = message

    def __reduce__(self) -> tuple[type["Stopped"], tuple[str]]:
        """Pickle by the message: a sweep's job may stop in another process."""
        return type(self), (self.message,)


NOTHING_SAVED = "stopped before the first step; nothing was saved"


class Leave:
    """A signal handler that ends this process at once, with `message`."""

    def __init__(self, message: Callable[[], str], until: Callable[[], bool]) -> None:
        self.message = message
        self.until = until

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; raise KeyboardInterrupt once `until` is true."""
        if self.until():
            raise KeyboardInterrupt
        if message := self.message():
            # Not print(): the signal may have come in the middle of one. A bar has hidden the cursor.
            clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
            os.write(2, f"{clear}{message}\n".encode())
        os._exit(KILLED)


@contextmanager
def leave_on_signal(message: Callable[[], str] = str, until: Callable[[], bool] = bool) -> Iterator[None]:
    """Let a signal end the process at once while the body runs, such as an import.

    A KeyboardInterrupt in the middle of an import surfaces anywhere: as a traceback, as a module that is half
    there, or not at all. Signals that are ignored stay so. `until` ends this before the body does.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    leave = Leave(message, until)
    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """A signal handler that asks this process to stop after the current step."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: note the first, exit at the second."""
        if self.requested:
            os._exit(KILLED)
        self.requested = True


@contextmanager
def stop_on_signal(alone: bool) -> Iterator[StopRequest]:
    """Turn signals into a stop request while the body runs.

    A worker of several (`alone` false) listens to SIGTERM only. Ctrl-C reaches the launcher as well, which
    passes it on as SIGTERM, and the two must not count as two.
    """
    request = StopRequest()
    interrupt = request if alone else signal.SIG_IGN
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, request),
        signal.SIGINT: signal.signal(signal.SIGINT, interrupt),
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
