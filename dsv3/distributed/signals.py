"""SIGTERM and Ctrl-C: finish the step, save, exit with 75; a second signal exits at once with 130."""

import os
import signal
from collections.abc import Iterator
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
