"""Say what a command is doing while it works: phases, shown as a bar on a terminal and as lines elsewhere.

Whatever may last longer than a second stands in a `phase`. All goes to stderr. A command that is quick says
nothing: a phase is shown once nothing has been said for QUIET seconds, and in a pipe again every REPEAT
seconds. A thread speaks, so that a phase that waits in one call of C (a collective, an import, a BPE
training) speaks too. One process of a job speaks. DSV3_PROGRESS=off silences all phases,
DSV3_PROGRESS=lines shows lines on a terminal too.

`Phase.advance` is the one place through which all progress outside of training steps passes: it is a beat of
this process's heart too, which the watchdog of a run of several ranks listens to (distributed/watchdog.py).
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from dsv3.distributed.heartbeat import HEARTBEAT
from dsv3.distributed.signals import StopEarly, must_stop_early

if TYPE_CHECKING:
    from dsv3.metrics.terminal import Terminal

T = TypeVar("T")

SETTING = "DSV3_PROGRESS"
"""Environment variable: `off`, or `lines` where several processes share a terminal."""

QUIET = 1.0
"""Seconds of silence before a phase is shown ..."""

BRIEF = 0.5
"""... which must have lasted so long by then: nobody needs a line about a phase that is over."""

REPEAT = 10.0
"""Seconds of silence before a phase is shown again, in a pipe."""

GAP = 0.5
"""Phases no further apart make up one silence."""

DRAW_EVERY = 0.1


class Phase:
    """Something that a command does: a title, and how much of a total is done."""

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str,
        until: Callable[[], bool] | None = None,
        together: bool = False,
    ) -> None:
        self.title = title
        self.total = total
        """In units; None where it is not known. May be set later."""
        self.unit = unit
        self.until = until
        self.together = together
        """All ranks advance as often, and end early at the same count where the run is to stop."""
        self.done = 0
        self.started = time.monotonic()
        self.told = False
        """A line about this phase has been printed."""
        self._lock = threading.Lock()

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done; any thread may call it, as often as it likes.

        Raises:
            StopEarly: the run is to stop, and the ranks advance together; on all of them.
        """
        with self._lock:
            self.done += count
        HEARTBEAT.beat()
        if self.together and must_stop_early():
            raise StopEarly

    def is_over(self) -> bool:
        """Return True once `until` has been: the phase then has nothing more to say."""
        return self.until is not None and self.until()

    def status(self, now: float, again: bool) -> str:
        """Return how far it is: `34 % of 1.3 TB`, and with `again` the seconds gone and left."""
        words = []
        if self.total:
            words.append(f"{min(100 * self.done // self.total, 100)} % of {amount(self.total, self.unit)}")
        elif self.done:
            words.append(amount(self.done, self.unit))
        if again:
            gone = now - self.started
            words.append(duration(gone))
            if self.total and 0 < self.done < self.total:
                words.append(f"{duration(gone * (self.total / self.done - 1))} left")
        return ", ".join(words)

    def line(self, now: float) -> str:
        """Return the line about this phase: `loading weights: 34 % of 1.3 TB, 20 s, 40 s left`."""
        status = self.status(now, self.told)
        if self.told and not self.total and not self.done:
            return f"still {self.title}, {status}"
        return f"{self.title}: {status}" if status else self.title


class _Speaker:
    """Shows the innermost of the phases of this process, in a thread that lives as long as there is one."""

    def __init__(self) -> None:
        self._phases: list[Phase] = []
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._silent_since = self._ended = time.monotonic()
        self._terminal: Terminal | None = None
        self._stream: Any = None
        self._bar: Any = None
        self._drawn = 0.0
        self._training_bar: Terminal | None = None

    def enter(self, phase: Phase) -> None:
        """Begin a phase within those that are open."""
        with self._changed:
            now = time.monotonic()
            if not self._phases and now - self._ended > GAP:
                self._silent_since = now
            self._phases.append(phase)
            self._speak()  # at once where that is due, as beside a bar
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def leave(self, phase: Phase) -> None:
        """End a phase, and those within it."""
        with self._changed:
            if phase in self._phases:
                del self._phases[self._phases.index(phase) :]
            self._ended = time.monotonic()
            thread = None if self._phases else self._thread
            if thread is not None:
                self._thread = None
            if all(phase.is_over() for phase in self._phases):
                self._clear()  # what is printed now needs the place
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """End all phases: no thread may print while the interpreter shuts down."""
        with self._changed:
            outermost = self._phases[:1]
        for phase in outermost:
            self.leave(phase)

    def interrupt(self) -> None:
        """Make room for another line that is about to be printed; it ends a silence too."""
        with self._changed:
            self._clear()
            self._silent_since = time.monotonic()

    def tell(self, line: str) -> None:
        """Print one line for the user, above what is shown of the phases."""
        with self._changed:
            self.interrupt()
            (self._training_bar or self._choose_terminal()).print(line)

    def current_line(self) -> str:
        """Return the line about the innermost phase, nothing where there is none."""
        with self._changed:
            phase = next((phase for phase in reversed(self._phases) if not phase.is_over()), None)
            return "" if phase is None else phase.line(time.monotonic())

    def print_above(self, terminal: "Terminal | None") -> None:
        """Print lines on `terminal`, above its training bar; None once there is no such bar."""
        with self._changed:
            self._clear()
            self._training_bar = terminal

    def _run(self) -> None:
        with self._changed:
            while self._phases and self._thread is threading.current_thread():
                self._changed.wait(self._speak())

    def _speak(self) -> float | None:
        """Show the current phase if that is due; return the seconds until it is due next, if ever."""
        phase = next((phase for phase in reversed(self._phases) if not phase.is_over()), None)
        if phase is None:
            self._clear()
            return None
        now = time.monotonic()
        terminal = self._training_bar or self._choose_terminal()
        if self._training_bar is None and terminal.shows_bars and os.environ.get(SETTING) != "lines":
            due = self._silent_since + QUIET if self._bar is None else self._drawn + DRAW_EVERY
            if now >= due:
                self._draw(terminal, phase, now)
                due = now + DRAW_EVERY
            return due - now
        if phase.told:
            due = self._silent_since + REPEAT
        else:
            due = max(self._silent_since + QUIET, phase.started + BRIEF)
        if now >= due:
            rank = os.environ.get("RANK", "0")
            terminal.print(phase.line(now) if rank == "0" else f"rank {rank}: {phase.line(now)}")
            phase.told, self._silent_since = True, now
            due = now + REPEAT
        return due - now

    def _choose_terminal(self) -> "Terminal":
        """Return stderr as it is now; while a bar is drawn rich has put something of its own there."""
        if self._terminal is None or (self._bar is None and self._stream is not sys.stderr):
            from dsv3.metrics.terminal import Terminal  # imports rich: not for a command that is quick

            self._stream = sys.stderr
            self._terminal = Terminal(sys.stderr)
        return self._terminal

    def _draw(self, terminal: "Terminal", phase: Phase, now: float) -> None:
        self._drawn = now
        if self._bar is None:
            self._bar = terminal.start_phase_bar(phase.title)
        terminal.update_phase_bar(self._bar, phase.title, phase.done, phase.total, phase.status(now, True))

    def _clear(self) -> None:
        """Take the bar away, if there is one."""
        if self._bar is not None and self._terminal is not None:
            self._terminal.end_bar(self._bar)
            self._bar = None


_SPEAKER = _Speaker()
atexit.register(_SPEAKER.close)

interrupt = _SPEAKER.interrupt
tell = _SPEAKER.tell
current_line = _SPEAKER.current_line
print_above = _SPEAKER.print_above


@contextmanager
def phase(
    title: str,
    total: int | None = None,
    unit: str = "bytes",
    until: Callable[[], bool] | None = None,
    each_node: bool = False,
    together: bool = False,
    patience: float = 0.0,
) -> Iterator[Phase]:
    """Show `title` while the body lasts; the body calls `advance` where there is a `total`.

    A body that goes on for long calls `advance` in any case: without, and without `patience`, it counts as
    hung after launch.timeout.

    Args:
        title: what is done, as in `loading weights`.
        total: the amount of `unit` to be done, if it is known.
        until: ends the phase before its body does; asked only when there is something to say.
        each_node: the first process of every node speaks, not only rank 0.
        together: all ranks make the same calls of `advance`; where the run is to stop, one of them raises
            StopEarly on all ranks (between two steps of training only).
        patience: seconds that one call of the body may take which cannot tell how far it is.
    """
    current = Phase(title, total, unit, until, together)
    with HEARTBEAT.patient(patience):
        if not _speaks(each_node):
            yield current
            return
        try:
            _SPEAKER.enter(current)
            yield current
        finally:
            _SPEAKER.leave(current)


@contextmanager
def entering(title: str, manager: AbstractContextManager[T]) -> Iterator[T]:
    """Enter `manager`, with a phase while its own beginning lasts."""
    with ExitStack() as stack:
        with phase(title):
            entered = stack.enter_context(manager)
        yield entered


def _speaks(each_node: bool) -> bool:
    """Return True in the one process that speaks, and there only for the main thread.

    What a thread does in the background, such as an async save, keeps nobody waiting.
    """
    if os.environ.get(SETTING) == "off" or threading.current_thread() is not threading.main_thread():
        return False
    rank = os.environ.get("RANK", "0")
    return (os.environ.get("LOCAL_RANK", rank) if each_node else rank) == "0"


def amount(count: int, unit: str) -> str:
    """Return an amount as people read it: `1.34 TB`, `1,234 files`, `671 billion parameters`."""
    if unit != "bytes" and count < 10**6:
        return f"{count:,} {unit if count != 1 else unit.removesuffix('s')}"
    steps = [(1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")]
    if unit != "bytes":
        steps = [(1e6, f"million {unit}"), (1e9, f"billion {unit}")]
    size, name = max((step for step in steps if count >= step[0]), default=steps[0])
    value = count / size
    return f"{value:.3g} {name}" if value < 1000 else f"{value:,.0f} {name}"


def duration(seconds: float) -> str:
    """Return seconds as people say them: `20 s`, `3 min`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
