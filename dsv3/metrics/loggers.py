"""Loggers: the interface, the loggers that record nothing, and TensorBoard; wandb.py has Weights & Biases."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dsv3.metrics.row import MetricsRow

Notify = Callable[[str], None]
"""Shows the user one line."""


def print_to_stderr(line: str) -> None:
    """Print one line for the user."""
    print(line, file=sys.stderr)


class Logger(Protocol):
    """A place to which rank 0 sends the metrics besides metrics.jsonl.

    A logger never ends a run: it reports a failure through `notify`, in one line, and goes on without.
    """

    def open(
        self,
        run_dir: Path,
        config: Mapping[str, object],
        files: Sequence[Path] = (),
        notify: Notify = print_to_stderr,
    ) -> None:
        """Start or continue the record of a run; `config` is plain data, `files` are kept beside it."""

    def log(self, row: MetricsRow) -> None:
        """Record the metrics of one step."""

    def text(self, key: str, text: str, step: int) -> None:
        """Record a sample of text."""

    def finish(self, exit_code: int = 0) -> None:
        """Write what is buffered and close; belongs in a `finally`."""


class NoLogger:
    """Record nothing."""

    def open(
        self,
        run_dir: Path,
        config: Mapping[str, object],
        files: Sequence[Path] = (),
        notify: Notify = print_to_stderr,
    ) -> None:
        """Do nothing."""

    def log(self, row: MetricsRow) -> None:
        """Do nothing."""

    def text(self, key: str, text: str, step: int) -> None:
        """Do nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing."""


class ConsoleLogger(NoLogger):
    """Record nothing beyond the console and metrics.jsonl."""


class TensorboardLogger:
    """Write the scalars of each row to `run_dir/tensorboard`; errors become one warning."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._writer: Any = None
        self._notify: Notify = print_to_stderr

    def open(
        self,
        run_dir: Path,
        config: Mapping[str, object],
        files: Sequence[Path] = (),
        notify: Notify = print_to_stderr,
    ) -> None:
        """Remember the folder; `config` and `files` are in the run directory already."""
        self._folder = run_dir / "tensorboard"
        self._notify = notify

    def log(self, row: MetricsRow) -> None:
        """Write the known values of a row."""
        for name, value in row.scalars().items():
            self._write("add_scalar", name, value, row.step)

    def text(self, key: str, text: str, step: int) -> None:
        """Write a sample, as a code block so that TensorBoard does not read it as markdown."""
        indented = "\n".join("    " + line for line in text.splitlines())
        self._write("add_text", key, indented, step)

    def finish(self, exit_code: int = 0) -> None:
        """Write what is buffered and close; a second call does nothing."""
        writer, self._writer, self._folder = self._writer, None, None
        if writer is not None:
            writer.close()

    def _write(self, method: str, key: str, value: object, step: int) -> None:
        if self._folder is None:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                # Opened by the first value: a resume purges what the killed run wrote from this step on.
                self._writer = SummaryWriter(str(self._folder), purge_step=step)
            getattr(self._writer, method)(key, value, step)
        except (OSError, ImportError) as error:
            self._folder = None
            self._notify(f"warning: tensorboard is off for this run: {error}")
