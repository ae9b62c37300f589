"""Signals of a launcher: pass them on to its workers, and end what has no workers yet.

The launcher never leaves the agent's loop while workers run: a worker that has finished waits until the agent
has read its result, and an agent that waits for the worker's end instead reads none.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Iterator
from types import FrameType
from typing import Any

from dsv3.distributed.signals import SAVE_SIGNAL, heard_by, kill_children, leave

_LOOK_EVERY = 0.1

_GRACE = 3.0
"""Seconds that the launcher has to end by itself before any worker has begun."""


class WorkerSignals:
    """Hears what is sent to a launcher.

    A stop becomes SIGTERM for every worker, which saves or leaves; as long as some worker has not begun, it
    ends all at once. A second stop does so in any case. SIGUSR1 goes to the first worker, which tells the
    other ranks.

    Args:
        workers: the workers of this node.
        others: processes below this one that are none of them.
        words: what is said where the launcher has to end itself.
    """

    def __init__(self, workers: int, others: Collection[int] = (), words: str = "") -> None:
        self.pids: Any = multiprocessing.get_context("spawn").Array("i", workers, lock=False)
        """Process ids by local rank, each 0 until the worker has begun and listens to SIGTERM alone."""
        self.others = others
        self.words = words
        self.asked = False
        self.done = threading.Event()
        self._heard = 0
        self._lock = threading.Lock()
        self._had_begun: bool | None = None

    @property
    def first_has_begun(self) -> bool:
        """Return True once the first worker of this node speaks for itself."""
        return bool(self.pids[0])

    def had_begun(self) -> bool:
        """Return whether all workers had begun when the first stop came, the same for all who ask."""
        with self._lock:
            if self._had_begun is None:
                self._had_begun = all(self.pids)
            return self._had_begun

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread: before there are workers, leave the agent."""
        if number != SAVE_SIGNAL and not self.had_begun():
            raise KeyboardInterrupt

    def hear(self, number: int) -> None:
        """Pass a signal on, in a thread."""
        if number == SAVE_SIGNAL:
            threading.Thread(target=self._ask_to_save, name="save request", daemon=True).start()
            return
        self._heard += 1
        if self._heard > 1:
            self._kill()
            leave("")
        self.asked = True
        if self.had_begun():
            for pid in self.pids:
                _send(pid, signal.SIGTERM)
            return
        self._kill()
        # The main thread may wait in C++, where no handler runs.
        threading.Thread(target=self._leave_late, name="leaving", daemon=True).start()

    def _kill(self) -> None:
        with contextlib.suppress(Exception):
            kill_children(self.others)

    def _leave_late(self) -> None:
        if not self.done.wait(_GRACE):
            leave(self.words)

    def _ask_to_save(self) -> None:
        """Send SIGUSR1 to the first worker once there is one; it keeps it until it can save."""
        while not self.first_has_begun:
            if self.done.wait(_LOOK_EVERY):
                return
        _send(self.pids[0], SAVE_SIGNAL)


def _send(pid: int, number: int) -> None:
    """Send a signal to a worker, unless it has ended and its number is another process's."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if psutil.Process(pid).ppid() == os.getpid():
            os.kill(pid, number)


@contextlib.contextmanager
def pass_signals_on(workers: int, others: Collection[int] = (), words: str = "") -> Iterator[WorkerSignals]:
    """Let the signals of this launcher go to its workers while the body runs; see WorkerSignals."""
    signals = WorkerSignals(workers, others, words)
    try:
        with heard_by(signals):
            yield signals
    finally:
        signals.done.set()
