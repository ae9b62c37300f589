"""Collects a run's figures step by step and hands them to metrics.jsonl, the console and the logger."""

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3.distributed.process_group import RankContext
from dsv3.errors import RunFailed
from dsv3.metrics.console import Console
from dsv3.metrics.jsonl import JsonlWriter
from dsv3.metrics.loggers import Logger
from dsv3.metrics.row import MetricsRow

BROKEN = "broken_router"
"""A step's figure that is no column: the first MoE layer whose router's logits were not finite, else -1."""


@dataclass
class Pending:
    """A step whose figures still lie on the device."""

    row: MetricsRow
    figures: dict[str, Tensor]


class Recorder:
    """Rows wait until they are read together, so that a GPU is not made to wait every step.

    Every rank keeps the rows (all know the same figures); rank 0 alone has a `console` and a `logger`.
    `layers` are the names of the MoE layers, as the figure BROKEN counts them.
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
        self.memory = peak_memory_gib(ranks)
        self.writer = JsonlWriter(path) if ranks.is_main else None

    def add(self, row: MetricsRow, figures: dict[str, Tensor]) -> None:
        """Take a step's row, to be completed with its `figures`."""
        self.pending.append(Pending(row, figures))
        if len(self.pending) >= self.every:
            self.read()

    def read(self) -> None:
        """Complete the waiting rows and show them; RunFailed at the first loss that is not finite."""
        for pending in self.pending:
            row = pending.row
            broken = pending.figures.pop(BROKEN, None)
            for name, value in pending.figures.items():
                setattr(row, name, value.item())
            row.memory_gib = self.memory
            self._show(row)
            values = {name: getattr(row, name) for name in ("loss", "grad_norm", "evaluation_loss")}
            watched = {name: value for name, value in values.items() if value is not None}
            if not all(map(math.isfinite, watched.values())):
                self.close()
                raise RunFailed(
                    f"step {row.step} is not finite: {', '.join(f'{k} {v}' for k, v in watched.items())}"
                    f"{self._first(broken)}{_tiles(row)}. Checkpoints are from before; a lower optimizer.lr "
                    "or longer warm-up may help."
                )
        self.pending.clear()

    def _first(self, broken: Tensor | None) -> str:
        """The first layer whose router met numbers that are none, if any did."""
        layer = -1 if broken is None else int(broken)
        return f", first at the router of {self.layers[layer]}" if layer >= 0 else ""

    def flush(self) -> None:
        """Complete and write everything so far; before a checkpoint, so that a resume leaves no gap."""
        self.memory = peak_memory_gib(self.ranks)
        self.read()
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Write what is there and close the file."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _show(self, row: MetricsRow) -> None:
        self.latest = row
        if self.writer is not None:
            self.writer.append(row)
        if self.console is not None:
            self.console.step(row)
        if self.logger is not None:
            self.logger.log(row)


def _tiles(row: MetricsRow) -> str:
    """How many tiles of FP8 operands were broken, where any was."""
    count = row.fp8_broken_tiles or 0.0
    return f", {count:.0f} broken FP8 tiles" if count > 0 else ""


def peak_memory_gib(ranks: RankContext) -> float:
    """Peak memory of the busiest rank: allocated on its GPU, or resident in RAM."""
    if ranks.device.type == "cuda":
        peak = float(torch.cuda.max_memory_allocated())
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return ranks.max(torch.tensor(peak, device=ranks.device)).item() / 2**30
