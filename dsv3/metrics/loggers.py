"""What the training loop asks of a logger, and the two that do nothing.

TensorBoard event files under the run directory.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

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


class TensorboardLogger:
    """Writes the scalars of each row to `run_dir/tensorboard`; errors become one warning."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._writer: Any = None
        self._tell: Tell = tell_on_stderr

    def open(
        self,
        run_dir: Path,
        config: Mapping[str, object],
        files: Sequence[Path] = (),
        tell: Tell = tell_on_stderr,
    ) -> None:
        """Note the folder; `config` and `files` lie in the run directory already."""
        self._folder = run_dir / "tensorboard"
        self._tell = tell

    def log(self, row: MetricsRow) -> None:
        """Write the known values of a row."""
        for name, value in row.scalars().items():
            self._write("add_scalar", name, value, row.step)

    def text(self, key: str, text: str, step: int) -> None:
        """Write a sample, as a code block so that TensorBoard does not read it as markdown."""
        indented = "\n".join("    " + line for line in text.splitlines())
        self._write("add_text", key, indented, step)

    def finish(self, exit_code: int = 0) -> None:
        """Write out what is buffered and close; a second call does nothing."""
        writer, self._writer, self._folder = self._writer, None, None
        if writer is not None:
            writer.close()

    def _write(self, method: str, key: str, value: object, step: int) -> None:
        if self._folder is None:
            return
        try:
            self._writer = self._writer or self._open_writer(self._folder, step)
            getattr(self._writer, method)(key, value, step)
        except (OSError, ImportError) as error:
            self._folder = None
            self._tell(f"warning: tensorboard is off for this run: {error}")

    def _open_writer(self, folder: Path, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # Opened by the first value: a resume purges what the killed run wrote from this step on.
        return SummaryWriter(str(folder), purge_step=step)
