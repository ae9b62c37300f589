"""What the training loop asks of a logger, and the two that do nothing."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dsv3.metrics.row import MetricsRow

Tell = Callable[[str], None]


def tell_on_stderr(line: str) -> None:
    """Print one line for the user."""
    print(line, file=sys.stderr)


class Logger(Protocol):
    """Where rank 0 sends its numbers besides metrics.jsonl.

    A logger never ends a run: what it cannot do it says through `tell`, in one line, and goes on without.
    """

    def open(
        self,
        run_dir: Path,
        config: Mapping[str, object],
        files: Sequence[Path] = (),
        tell: Tell = tell_on_stderr,
    ) -> None:
        """Start, or go on with, the record of a run; `config` is plain data, `files` are kept beside it."""

    def log(self, row: MetricsRow) -> None:
        """Record one step."""

    def text(self, key: str, text: str, step: int) -> None:
        """Record a sample of text."""

    def finish(self, exit_code: int = 0) -> None:
        """Write out what is left and close; belongs in a `finally`."""


class NoLogger:
    """Records nothing."""

    def open(
        self,
        run_dir: Path,
        config: Mapping[str, object],
        files: Sequence[Path] = (),
        tell: Tell = tell_on_stderr,
    ) -> None:
        """Do nothing."""

    def log(self, row: MetricsRow) -> None:
        """Do nothing."""

    def text(self, key: str, text: str, step: int) -> None:
        """Do nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing."""


class ConsoleLogger(NoLogger):
    """Records nothing beyond what the console shows and metrics.jsonl holds."""
