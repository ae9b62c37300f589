"""The two places where the console's text goes: a stream that may break, and log.txt."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text


class Terminal:
    """Prints text and draws a bar on `stream`; goes silent, and stays so, once the stream is broken."""

    def __init__(self, stream: TextIO | None, quiet: bool = False) -> None:
        # Python has no sys.stdout where the parent closed it.
        self._stream = stream or StringIO()
        self._rich = _Rich(file=self._stream, quiet=quiet or stream is None, highlight=False, soft_wrap=True)

    def print(self, text: str, style: str = "") -> None:
        """Print one line, literally."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        printable = text.encode(encoding, "replace").decode(encoding)
        with self._guarded():
            self._rich.print(Text(printable, style))

    def bar(self, total: int, done: int) -> Progress | None:
        """A live bar, or None where the stream is no terminal that could show one."""
        # FORCE_COLOR makes rich take a pipe for a terminal: ask the stream as well.
        if self._rich.quiet or not (self._stream.isatty() and self._rich.is_interactive):
            return None
        single = Column(no_wrap=True)
        columns = (
            TextColumn("step {task.completed}/{task.total}", table_column=single),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.fields[status]}", markup=False, table_column=single),
        )
        # Drawn from step(): a drawing thread would take the GIL from training, and could not be guarded.
        bar = Progress(*columns, console=self._rich, auto_refresh=False, expand=True)
        bar.add_task("", total=total, completed=done, status="")
        with self._guarded():
            bar.start()
        return bar

    def draw(self, bar: Progress, step: int, status: str) -> None:
        """Move the bar to `step` and show `status` beside it."""
        with self._guarded():
            bar.update(bar.task_ids[0], completed=step, status=status, refresh=True)

    def end(self, bar: Progress) -> None:
        """Leave the bar as it stands and give the cursor back."""
        with self._guarded():
            bar.stop()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # a terminal that went away, a stream somebody closed
            self._rich.on_broken_pipe()


class LogFile:
    """Lines appended to log.txt as they come; stops quietly when the disk does not take them."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        if path is not None:
            with suppress(OSError):
                self._file = path.open("a", encoding="utf-8", errors="replace", buffering=1)

    def write(self, line: str) -> None:
        """Append one line."""
        try:
            if self._file is not None:
                self._file.write(line + "\n")
        except OSError:
            self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()


class _Rich(RichConsole):
    """rich ends the process when a pipe breaks; a training goes on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What Python flushes at its exit, and what others print, goes nowhere instead of failing again.
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)
