"""Measure for how long this rank waits for others within its optimizer steps.

A step lasts equally long on all ranks, because they wait for one another; the slow rank is the one that waits
least. On CPU every wait for a collective is measured, whoever began it: the host stands still in it. On a GPU
the host runs ahead, and collectives overlap with computing: there events in the stream measure the reductions
over all ranks (at the begin of a step and at its end), not the collectives of FSDP, TP, EP and pipelines.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from dsv3.distributed.torch_private import wrap_waits


class Waited(NamedTuple):
    """Means over some steps of one rank, in seconds per step."""

    waited: float
    """In waits for other ranks, as far as they are seen."""
    seconds: float
    """The whole step, from the call for its data."""


class StepWaits:
    """The waits of this process; nothing is measured before `start`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._undo: Callable[[], None] | None = None
        self._on_gpu = False
        self._thread: int | None = None
        """The thread that is within a step: others, such as that of a save, wait on their own account."""
        self._steps, self._blocked, self._seconds = 0, 0.0, 0.0
        self._events: list[tuple[bool, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, device: torch.device, compiled: bool) -> None:
        """Measure from now on. Of layers that are `compiled` the waits within are not seen."""
        self._on_gpu = device.type == "cuda"
        if not self._on_gpu and self._undo is None:
            self._undo = wrap_waits(self._timed, functional=not compiled)
        self.take()

    def stop(self) -> None:
        """Measure no more; a second call does nothing."""
        if self._undo is not None:
            self._undo()
        self._undo, self._on_gpu = None, False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Take a step within it."""
        if self._undo is None and not self._on_gpu:
            yield
            return
        self._thread = threading.get_ident()
        started, begin = self.clock(), self._mark()
        try:
            yield
        finally:
            self._thread = None
        self._seconds += self.clock() - started
        self._steps += 1
        if begin is not None:
            self._events.append((False, begin, self._record()))

    @contextmanager
    def reduction(self) -> Iterator[None]:
        """Reduce over all ranks within it."""
        begin = self._mark()
        yield
        if begin is not None:
            self._events.append((True, begin, self._record()))

    def take(self) -> Waited | None:
        """Return the means since the last call; None without a step. The host waits for a GPU to end them."""
        if self._events:
            self._events[-1][2].synchronize()
            times = [(wait, begin.elapsed_time(end) / 1000) for wait, begin, end in self._events]
            self._blocked = sum(seconds for wait, seconds in times if wait)
            self._seconds = sum(seconds for wait, seconds in times if not wait)
        steps, blocked, seconds = self._steps, self._blocked, self._seconds
        self._steps, self._blocked, self._seconds = 0, 0.0, 0.0
        self._events.clear()
        return Waited(blocked / steps, seconds / steps) if steps else None

    def _mark(self) -> torch.cuda.Event | None:
        """Return an event of now where a GPU is within a step."""
        return self._record() if self._on_gpu and self._thread is not None else None

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """Return `wait`, measured where it is called within a step."""

        def measured(*arguments: Any, **keywords: Any) -> Any:
            if self._thread != threading.get_ident():
                return wait(*arguments, **keywords)
            started = self.clock()
            try:
                return wait(*arguments, **keywords)
            finally:
                self._blocked += self.clock() - started

        return measured


STEP_WAITS = StepWaits()
"""Those of this process."""
