"""The two places where the console's text goes: a stream that may break, and log.txt.

What a run shows its user: a bar on a terminal, plain lines elsewhere, the same text in log.txt.
"""

import os
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from dsv3.metrics.row import MetricsRow


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


if TYPE_CHECKING:
    from rich.progress import Progress


# The time left follows the pace between this many moments, so that a slow first step is soon forgotten.
PACE_WINDOW = 50

# Seconds between two drawings of the bar.
DRAW_EVERY = 0.1


class Console:
    """Progress, messages and the final summary of a run, for people; machines read metrics.jsonl.

    It goes to stdout or, with `stderr`, to stderr, where it leaves stdout to the result of the command.
    Without a terminal there is a line every `log_every` steps. `log_path` gets the same text, appended.
    With `quiet` nothing is shown or written, which is what the ranks other than 0 want. Nothing here
    raises for a reader or a disk that went away, and all text is shown literally, never as markup.
    """

    def __init__(
        self,
        log_every: int = 10,
        stderr: bool = False,
        log_path: Path | None = None,
        quiet: bool = False,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:

        stream = file or (sys.stderr if stderr else sys.stdout)
        self._terminal = Terminal(stream, quiet)
        self._log = LogFile(None if quiet else log_path)
        self._log_every = log_every
        self._clock = clock
        self._bar: Progress | None = None
        self._total = 0
        self._first = 0
        self._started = clock()
        self._drawn = 0.0
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_WINDOW)

    def start(self, total: int, done: int = 0) -> None:
        """Begin the progress towards step `total`, with `done` steps already behind (on resume)."""
        self._total, self._first = total, done + 1
        self._started = self._clock()
        self._pace.clear()
        self._pace.append((self._started, done))
        self._bar = self._terminal.bar(total, done)

    def step(self, row: MetricsRow) -> None:
        """Show a row: moves the bar, and prints a line where one is due.

        Due are the first and the last step, every `log_every` steps and the steps with a held-out loss.
        A bar replaces the lines, except those with a held-out loss, and log.txt gets them all.
        """
        now = self._clock()
        self._note_pace(now, row.step)
        eta = f"eta {_duration(self._seconds_left())}"
        held_out = row.evaluation_loss is not None
        if held_out or row.step in (self._first, self._total) or row.step % self._log_every == 0:
            line = "  ".join([f"step {row.step}/{self._total}", *_figures(row), eta])
            self._log.write(line)
            if held_out or self._bar is None:
                self._terminal.print(line)
        if self._bar is not None and (now - self._drawn >= DRAW_EVERY or row.step >= self._total):
            self._drawn = now
            status = [*_status(row), _duration(now - self._started), eta]
            self._terminal.draw(self._bar, row.step, "  ".join(status))

    def message(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._say(text)

    def sample(self, prompt: str, text: str) -> None:
        """Print generated text under the prompt that it continues."""
        self._say(f"sample for {visible(prompt)!r}:", "bold")
        for line in visible(text).splitlines() or [""]:
            self._say(f"  | {line}")

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """End the bar and print names and values in two columns."""
        self._end_bar()
        width = max((len(name) for name, _ in rows), default=0)
        self._say("")
        self._say(title, "bold")
        for name, value in rows:
            self._say(f"  {name:<{width}}  {value}")

    def next_command(self, text: str) -> None:
        """Print the command that the user will want next, on a line of its own to be copied."""
        self._say("")
        self._say("next:", "bold")
        self._say(f"  {text}", "cyan")

    def close(self) -> None:
        """End the bar and close log.txt; a second call does nothing."""
        self._end_bar()
        self._log.close()

    def _say(self, text: str, style: str = "") -> None:
        text = visible(text)
        self._log.write(text)
        self._terminal.print(text, style)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._terminal.end(self._bar)
            self._bar = None

    def _note_pace(self, now: float, step: int) -> None:
        # Rows read from a GPU come many at once: the window must span several such bursts.
        if len(self._pace) > 1 and now - self._pace[-2][0] < DRAW_EVERY:
            self._pace.pop()
        self._pace.append((now, step))

    def _seconds_left(self) -> float | None:
        (then, first), (now, last) = self._pace[0], self._pace[-1]
        if last <= first:
            return None
        return (now - then) / (last - first) * max(self._total - last, 0)


def visible(text: str) -> str:
    """The text with control characters, which could steer the terminal, shown as U+FFFD."""
    harmless = "\n\t"
    return "".join(
        char if char in harmless or unicodedata.category(char) not in ("Cc", "Cs") else "\ufffd"
        for char in text
    )


def _figures(row: MetricsRow) -> list[str]:
    figures = [
        ("loss {:.4f}", row.loss),
        ("held-out {:.4f}", row.evaluation_loss),
        ("lr {:.1e}", row.lr),
        ("grad {:.2f}", row.grad_norm),
        ("{:,.0f} tok/s", row.tokens_per_second),
    ]
    return [form.format(value) for form, value in figures if value is not None]


def _status(row: MetricsRow) -> list[str]:
    figures = [("loss {:.4f}", row.loss), ("{:,.0f} tok/s", row.tokens_per_second)]
    return [form.format(value) for form, value in figures if value is not None]


def _duration(seconds: float | None) -> str:
    """Seconds as 1:23, 1:02:03 or 3d 04:05."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
