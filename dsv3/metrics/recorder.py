"""The recorder: passes the metrics of every step to metrics.jsonl, the console and the logger."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from dsv3.distributed.process_group import RankContext
from dsv3.metrics.console import NOTABLE_WAIT, Console
from dsv3.metrics.jsonl import JsonlWriter, truncate_after
from dsv3.metrics.loggers import Logger
from dsv3.metrics.row import MetricsRow

COLUMNS = frozenset(field.name for field in fields(MetricsRow))

Watch = Callable[[MetricsRow, dict[str, Tensor]], None]
"""Looks at the row of a step, and may complete it; the tensors are those of the step without a column."""


@dataclass
class Pending:
    """A step whose metrics are still tensors on the device."""

    row: MetricsRow
    figures: dict[str, Tensor]
    fill_throughput: Callable[[], None]
    """Fills the row's tokens_per_second and mfu; it may wait for the device."""


class Recorder:
    """Buffer the metrics of steps and read them together, so that the host rarely waits for a GPU.

    Every rank buffers (all have the same metrics); only rank 0 has a `console` and a `logger`.

    Args:
        path: metrics.jsonl.
        every: steps to read together on a GPU; on CPU each step is read at once.
        watch: called with each row before it is written, on all ranks, in the order of the steps.
    """

    def __init__(
        self,
        path: Path,
        ranks: RankContext,
        every: int,
        console: Console | None,
        logger: Logger | None,
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch
        self.ranks = ranks
        self.every = every if ranks.device.type != "cpu" else 1
        self.console = console
        self.logger = logger
        self.pending: list[Pending] = []
        self.latest: MetricsRow | None = None
        self.memory, _ = largest_over_ranks(ranks, 0.0)
        self.waited, self.flushed_at = 0.0, time.monotonic()
        self.path = path
        self.writer = JsonlWriter(path) if ranks.is_main else None

    def add(
        self, row: MetricsRow, figures: dict[str, Tensor], fill_throughput: Callable[[], None] = lambda: None
    ) -> None:
        """Add the row of a step; `figures` are its other metrics by name, tensors on the device.

        Those with a column are scalars.
        """
        self.waited += row.data_wait or 0.0
        self.pending.append(Pending(row, figures, fill_throughput))
        if len(self.pending) >= self.every:
            self.read()

    def read(self) -> None:
        """Complete the buffered rows and write them to metrics.jsonl, console and logger.

        Where `watch` raises, the row that it has looked at is written first.
        """
        for pending in self.pending:
            row, figures = pending.row, pending.figures
            for name in figures.keys() & COLUMNS:
                setattr(row, name, figures[name].item())
            _forget_means_of_nothing(row, figures)
            pending.fill_throughput()
            row.memory_gib = self.memory
            self.latest = row
            try:
                if self.watch is not None:
                    others = figures.keys() - COLUMNS
                    self.watch(row, {name: figures[name] for name in others})
            except BaseException:
                self._write(row)
                self.close()
                raise
            self._write(row)
        self.pending.clear()

    def go_back(self, step: int) -> None:
        """Remove the rows behind `step`: the run has gone back to it."""
        self.pending.clear()
        self.close()
        if self.ranks.is_main:
            truncate_after(self.path, step)
            self.writer = JsonlWriter(self.path)

    def _write(self, row: MetricsRow) -> None:
        if self.writer is not None:
            self.writer.append(row)
        if self.console is not None:
            self.console.step(row)
        if self.logger is not None:
            self.logger.log(row)

    def flush(self) -> None:
        """Complete and write all rows so far; call it before a checkpoint, so that a resume leaves no gap."""
        now = time.monotonic()
        share = self.waited / max(now - self.flushed_at, 1e-9)
        self.memory, largest = largest_over_ranks(self.ranks, share)
        self.waited, self.flushed_at = 0.0, now
        if self.console is not None and largest >= NOTABLE_WAIT and largest > 2 * share:
            self.console.message(f"a rank waits for its data {largest:.0%} of the time, rank 0 {share:.0%}")
        self.read()
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Write the buffered lines and close the file."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _forget_means_of_nothing(row: MetricsRow, figures: dict[str, Tensor]) -> None:
    """Make unknown what a step has computed of no target, or of no token: it is 0 and means nothing."""
    if "targets" in figures and not figures["targets"].item():
        row.loss = row.mtp_loss = None
    if row.padding == 1:
        row.balance_loss = row.moe_max_violation = row.moe_entropy = None


def largest_over_ranks(ranks: RankContext, waited: float) -> tuple[float, float]:
    """Return the largest peak memory and the largest `waited` of any rank, by one collective.

    The memory is in GiB: allocated on a GPU, or resident in RAM.
    """
    if ranks.device.type == "cuda":
        peak = float(torch.cuda.max_memory_allocated())
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    memory, longest = ranks.max(torch.tensor([peak, waited], device=ranks.device)).tolist()
    return memory / 2**30, longest
