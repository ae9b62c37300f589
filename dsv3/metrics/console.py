"""The console output of a run: a bar on a terminal, plain lines elsewhere, and the same text in log.txt."""

import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from dsv3.metrics import progress
from dsv3.metrics.row import MetricsRow
from dsv3.metrics.terminal import Terminal

# The time left follows the pace over this many steps, so that a slow first step is soon forgotten.
PACE_WINDOW = 50

NOTABLE_WAIT = 0.05
"""Share of a step's time from which the wait for its data is shown."""

# Seconds between two drawings of the bar.
DRAW_EVERY = 0.1


class LogFile:
    """Append lines to log.txt at once; stop quietly when the disk does not take them."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        if path is not None:
            with suppress(OSError):
                self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)

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


class Console:
    """The progress, messages and final summary of a run, for people; programs read metrics.jsonl.

    Output goes to stdout or, with `stderr`, to stderr, so that stdout holds the result alone, such as JSON.
    Without a terminal there is a line every `log_every` steps. `log_path` gets the same text, appended. With
    `quiet` nothing is shown or written, for the ranks other than 0. Nothing here raises when a reader or a
    disk goes away, and all text is shown literally, never as markup.
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
        self.has_shown_steps = False
        """A step has been shown, so that the run speaks for itself."""
        self._total_steps = 0
        self._first_step = 0
        self._started = clock()
        self._drawn = 0.0
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_WINDOW)
        self._total_tokens: int | None = None
        self._tokens = 0

    def start(self, total: int, done: int = 0, tokens: tuple[int, int] | None = None) -> None:
        """Start the progress towards step `total`, with `done` steps already behind (on resume).

        `tokens` are those that are done and those at the end: the time left is then reckoned in tokens, for
        steps may grow (train.batch_ramp).
        """
        self._total_steps, self._first_step = total, done + 1
        self._started = self._clock()
        self._tokens, self._total_tokens = tokens or (0, None)
        self._pace.clear()
        self._pace.append((self._started, self._tokens if tokens else done))
        progress.interrupt()
        self._bar = self._terminal.start_bar(total, done)
        if self._bar is not None:
            progress.print_above(self._terminal)

    def step(self, row: MetricsRow) -> None:
        """Show the metrics of a step: move the bar, and print a line where one is due.

        A line is due at the first and the last step, every `log_every` steps, and at steps with a held-out
        loss. A bar replaces the lines, except those with a held-out loss; log.txt gets all of them.
        """
        self.has_shown_steps = True
        now = self._clock()
        # Rows read from a GPU come many at once: the window must span several such bursts.
        if len(self._pace) > 1 and now - self._pace[-2][0] < DRAW_EVERY:
            self._pace.pop()
        self._pace.append((now, row.step if self._total_tokens is None else row.tokens))
        eta = f"eta {_duration(self._seconds_left())}"
        throughput = ("{:,.0f} tok/s", row.tokens_per_second)
        has_evaluation = row.evaluation_loss is not None
        is_end = row.step in (self._first_step, self._total_steps)
        if has_evaluation or is_end or row.step % self._log_every == 0:
            metrics = [
                ("loss {:.4f}", row.loss),
                ("held-out {:.4f}", row.evaluation_loss),
                ("lr {:.1e}", row.lr),
                ("grad {:.2f}", row.grad_norm),
                throughput,
                ("{:.1%} padding", row.padding or None),
                ("waited {:.2g} s for data", self._notable_wait(row)),
            ]
            line = "  ".join([f"step {row.step}/{self._total_steps}", *_format_known(metrics), eta])
            lines = [line, *_source_lines(row)] if has_evaluation else [line]
            for line in lines:
                self._log.write(line)
            if has_evaluation or self._bar is None:
                progress.interrupt()
                for line in lines:
                    self._terminal.print(line)
        self._tokens = row.tokens
        if self._bar is not None and (now - self._drawn >= DRAW_EVERY or row.step >= self._total_steps):
            self._drawn = now
            metrics = [("loss {:.4f}", row.loss), throughput]
            status = [*_format_known(metrics), _duration(now - self._started), eta]
            self._terminal.update_bar(self._bar, row.step, "  ".join(status))

    def message(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._print(text)

    def sample(self, prompt: str, text: str) -> None:
        """Print generated text under the prompt that it continues."""
        self._print(f"sample for {replace_control_characters(prompt)!r}:", "bold")
        for line in replace_control_characters(text).splitlines() or [""]:
            self._print(f"  | {line}")

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """End the bar and print names and values in two columns."""
        self._end_bar()
        width = max((len(name) for name, _ in rows), default=0)
        self._print("")
        self._print(title, "bold")
        for name, value in rows:
            self._print(f"  {name:<{width}}  {value}")

    def next_command(self, text: str) -> None:
        """Print the command that the user will want next, on a line of its own to be copied."""
        self._print("")
        self._print("next:", "bold")
        self._print(f"  {text}", "cyan")

    def close(self) -> None:
        """End the bar and close log.txt; a second call does nothing."""
        self._end_bar()
        self._log.close()

    def _print(self, text: str, style: str = "") -> None:
        text = replace_control_characters(text)
        self._log.write(text)
        progress.interrupt()
        self._terminal.print(text, style)

    def _end_bar(self) -> None:
        if self._bar is not None:
            progress.print_above(None)
            self._terminal.end_bar(self._bar)
            self._bar = None

    def _seconds_left(self) -> float | None:
        (then, first), (now, last) = self._pace[0], self._pace[-1]
        if last <= first:
            return None
        end = self._total_steps if self._total_tokens is None else self._total_tokens
        return (now - then) / (last - first) * max(end - last, 0)

    def _notable_wait(self, row: MetricsRow) -> float | None:
        """Return the seconds that a step waited for its data where they are a notable share of it."""
        if row.data_wait is None or not row.tokens_per_second:
            return None
        seconds = (row.tokens - self._tokens) / row.tokens_per_second
        return row.data_wait if row.data_wait >= NOTABLE_WAIT * seconds > 0 else None


def replace_control_characters(text: str) -> str:
    """Replace control characters, which could steer the terminal, by U+FFFD; keep line feeds and tabs."""
    harmless = "\n\t"
    return "".join(
        char if char in harmless or unicodedata.category(char) not in ("Cc", "Cs") else "\ufffd"
        for char in text
    )


def format_table(rows: Sequence[Sequence[str]], titles: Sequence[str], left_aligned: Sequence[str]) -> str:
    """Return rows of cells under their titles as plain text, the same on a terminal and in a pipe.

    Columns are right-aligned, as numbers are, except those named in `left_aligned`. No cell is cut or
    wrapped, so that a line can be searched.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(Text(title), justify="left" if title in left_aligned else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(replace_control_characters(cell)) for cell in row))  # Text: no markup is parsed
    # Wider than any row: rich would fit the table to the terminal, or to 80 columns in a pipe.
    console = RichConsole(file=StringIO(), color_system=None, width=10**9)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


def _source_lines(row: MetricsRow) -> list[str]:
    """Return a line per source of a mixture: its held-out loss, and what of it has been trained on."""
    width = max(map(len, row.sources or ()), default=0)
    lines = []
    for name, own in (row.sources or {}).items():
        metrics = [
            ("held-out {:.4f}", own.get("evaluation_loss")),
            ("{:,.0f} tokens", own.get("tokens")),
            ("{:.3g} epochs", own.get("epochs")),
        ]
        lines.append("  ".join([f"  {name:<{width}}", *_format_known(metrics)]))
    return lines


def _format_known(metrics: Sequence[tuple[str, float | None]]) -> list[str]:
    """Format the metrics whose value is known."""
    return [form.format(value) for form, value in metrics if value is not None]


def _duration(seconds: float | None) -> str:
    """Format seconds as 1:23, 1:02:03 or 3d 04:05."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
