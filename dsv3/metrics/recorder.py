"""The recorder: passes the metrics of every step to metrics.jsonl, the console and the logger."""

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3.distributed.process_group import RankContext
from dsv3.errors import RunFailed
from dsv3.metrics.console import NOTABLE_WAIT, Console
from dsv3.metrics.jsonl import JsonlWriter
from dsv3.metrics.loggers import Logger
from dsv3.metrics.row import MetricsRow

FIRST_NONFINITE_ROUTER = "first_nonfinite_router"
"""A tensor of a step without a column: the first MoE layer whose router logits were not finite, else -1."""


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
        layers: the names of the MoE layers, as FIRST_NONFINITE_ROUTER counts them.
    """

    def __init__(
        self,
        path: Path,
        ranks: RankContext,
        every: int,
        console: Console | None,
        logger: Logger | None,
        layers: Sequence[str] = (),
    ) -> None:
        self.layers = layers
        self.ranks = ranks
        self.every = every if ranks.device.type != "cpu" else 1
        self.console = console
        self.logger = logger
        self.pending: list[Pending] = []
        self.latest: MetricsRow | None = None
        self.memory, _ = largest_over_ranks(ranks, 0.0)
        self.waited, self.flushed_at = 0.0, time.monotonic()
        self.writer = JsonlWriter(path) if ranks.is_main else None

    def add(
        self, row: MetricsRow, figures: dict[str, Tensor], fill_throughput: Callable[[], None] = lambda: None
    ) -> None:
        """Add the row of a step; `figures` are its other metrics by name, scalar tensors on the device."""
        self.waited += row.data_wait or 0.0
        self.pending.append(Pending(row, figures, fill_throughput))
        if len(self.pending) >= self.every:
            self.read()

    def read(self) -> None:
        """Complete the buffered rows and write them to metrics.jsonl, console and logger.

        Raises:
            RunFailed: a loss or gradient norm is not finite; the message names the first one.
        """
        for pending in self.pending:
            row = pending.row
            router = pending.figures.pop(FIRST_NONFINITE_ROUTER, None)
            for name, value in pending.figures.items():
                setattr(row, name, value.item())
            pending.fill_throughput()
            row.memory_gib = self.memory
            self.latest = row
            if self.writer is not None:
                self.writer.append(row)
            if self.console is not None:
                self.console.step(row)
            if self.logger is not None:
                self.logger.log(row)
            values = {name: getattr(row, name) for name in ("loss", "grad_norm", "evaluation_loss")}
            watched = {name: value for name, value in values.items() if value is not None}
            if not all(map(math.isfinite, watched.values())):
                self.close()
                causes = [f"{name} {value}" for name, value in watched.items()]
                if router is not None and int(router) >= 0:
                    causes.append(f"first at the router of {self.layers[int(router)]}")
                if (row.fp8_broken_tiles or 0.0) > 0:  # NaN is unknown
                    causes.append(f"{row.fp8_broken_tiles:.0f} nonfinite FP8 tiles")
                raise RunFailed(
                    f"step {row.step} is not finite: {', '.join(causes)}. Checkpoints are from before; "
                    "a lower optimizer.lr or longer warm-up may help."
                )
        self.pending.clear()

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
