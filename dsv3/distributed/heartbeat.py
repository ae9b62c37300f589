"""The heartbeat of a process: a count that grows with all of its progress, which the watchdog reads.

Progress is whatever a phase advances by (bytes, tensors, tokens, batches), the beginning and end of a phase,
a finished exchange between ranks, and an optimizer step. The time that passes is none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

FIRST_CALL = 1800.0
"""Seconds that a call may take whose first time compiles: torch.compile, Triton, NCCL's communicators."""


class Heartbeat:
    """Counts progress. Any thread beats, as often as it likes: an addition that is lost does no harm."""

    def __init__(self) -> None:
        self.count = 0
        self._bounds: list[float] = []

    def beat(self) -> None:
        """Count one more piece of progress."""
        self.count += 1

    @property
    def patience(self) -> float:
        """Return the seconds that this process may now work without a beat and still count as moving."""
        return max(self._bounds, default=0.0)

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Count as moving for `seconds` after each beat while the body runs; launch.timeout begins then.

        For one call of C++ that takes long and says nothing, such as a compilation or a BPE training. 0
        changes nothing.
        """
        self._bounds.append(seconds)
        self.beat()
        try:
            yield
        finally:
            self._bounds.remove(seconds)
            self.beat()


HEARTBEAT = Heartbeat()
"""The heartbeat of this process: like its signal handlers there is one."""
