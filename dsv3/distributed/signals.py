"""SIGTERM and Ctrl-C: finish the step, save, leave with 75; a second one leaves at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED, KILLED = 75, 130


class Stopped(SystemExit):
    """The run was asked to stop, has saved, and can be resumed; ends a sweep too."""

    def __init__(self, message: str) -> None:
        super().__init__(STOPPED)
        self.message = message

    def __reduce__(self) -> tuple[type["Stopped"], tuple[str]]:
        """Pickle by the message: a sweep's job may stop in another process."""
        return type(self), (self.message,)


class StopRequest:
    """Whether a signal has asked this process to stop after the step in hand."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: note the first, obey the second at once."""
        if self.requested:
            os._exit(KILLED)
        self.requested = True


@contextmanager
def stop_on_signal(alone: bool) -> Iterator[StopRequest]:
    """Turn signals into a request while the body runs.

    A worker of several (`alone` false) listens to SIGTERM only: Ctrl-C reaches the launcher as well,
    which passes it on as SIGTERM, and the two must not count as two.
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
