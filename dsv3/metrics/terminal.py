"""A stream that people read: lines of text and live bars, silent for good once the stream is broken."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text


class _ResilientRichConsole(RichConsole):
    """A rich console that goes quiet when its pipe breaks, where rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What Python flushes at exit, and what others print, goes nowhere instead of failing again.
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)


class Terminal:
    """Print text and draw a progress bar on `stream`; go silent for good once the stream is broken.

    Bars are drawn only by the calls below, never by a thread of rich's: such a thread could not be guarded.
    """

    def __init__(self, stream: TextIO | None, quiet: bool = False) -> None:
        # Python has no sys.stdout where the parent closed it.
        self._stream = stream or StringIO()
        self._rich = _ResilientRichConsole(
            file=self._stream, quiet=quiet or stream is None, highlight=False, soft_wrap=True
        )

    @property
    def shows_bars(self) -> bool:
        """Return True for a terminal that can show a live bar."""
        with self._guarded():
            # FORCE_COLOR makes rich take a pipe for a terminal: ask the stream as well.
            return not self._rich.quiet and self._stream.isatty() and self._rich.is_interactive
        return False  # type: ignore[unreachable]  # the guard has swallowed the error of a broken stream

    def print(self, text: str, style: str = "") -> None:
        """Print one line, literally."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        printable = text.encode(encoding, "replace").decode(encoding)
        with self._guarded():
            self._rich.print(Text(printable, style))

    def start_bar(self, total: int, done: int) -> Progress | None:
        """Start the live bar of a training run; return None where the stream cannot show one."""
        if not self.shows_bars:
            return None
        single = Column(no_wrap=True)
        columns = (
            TextColumn("step {task.completed}/{task.total}", table_column=single),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.fields[status]}", markup=False, table_column=single),
        )
        # Drawn from step(): a drawing thread would take the GIL from training.
        bar = Progress(*columns, console=self._rich, auto_refresh=False, expand=True)
        bar.add_task("", total=total, completed=done, status="")
        with self._guarded():
            bar.start()
        return bar

    def start_phase_bar(self, title: str) -> Progress:
        """Start a live bar for phases, at first `title`; it leaves nothing behind, and stdout as it is."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24, complete_style="cyan", finished_style="green"),
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
        )
        bar = Progress(
            *columns, console=self._rich, auto_refresh=False, transient=True, redirect_stdout=False
        )
        bar.add_task(title, total=None, status="")
        with self._guarded():
            bar.start()
        return bar

    def update_bar(self, bar: Progress, step: int, status: str) -> None:
        """Move the bar to `step` and show `status` beside it."""
        with self._guarded():
            bar.update(bar.task_ids[0], completed=step, status=status, refresh=True)

    def update_phase_bar(self, bar: Progress, title: str, done: int, total: int | None, status: str) -> None:
        """Show a phase: `done` of `total`, or a pulse where the total is not known."""
        with self._guarded():
            task = bar.task_ids[0]
            bar.tasks[0].total = total  # update() takes None for no change
            bar.update(task, description=title, completed=done, status=status, refresh=True)

    def end_bar(self, bar: Progress) -> None:
        """End a bar and show the cursor again."""
        with self._guarded():
            bar.stop()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # a terminal that went away, a stream that somebody closed
            self._rich.on_broken_pipe()
