"""The training loop: steps, and what happens between them."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.config.training import TrainConfig
from dsv3.data.loader import Loader
from dsv3.distributed.process_group import RankContext
from dsv3.distributed.signals import StopRequest
from dsv3.metrics.recorder import Recorder
from dsv3.metrics.row import MetricsRow
from dsv3.training.schedule import Schedule
from dsv3.training.step import TrainStep, Weights


@dataclass
class Rates:
    """Constants that turn a step's seconds into rates."""

    sequences_per_step: int
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None
    """Of all devices together; None where it is unknown (CPU)."""

    def fill(self, row: MetricsRow, seconds: float) -> None:
        """Set the row's tokens_per_second and mfu."""
        row.tokens_per_second = self.tokens_per_step / seconds
        if self.peak_flops:
            row.mfu = row.tokens_per_second * self.flops_per_token / self.peak_flops


@dataclass
class Hooks:
    """What the loop calls now and then; each is called by all ranks together."""

    evaluate: Callable[[], float]
    generate: Callable[[int], None]
    export: Callable[[int], None]
    profile: Callable[[], None] = field(default=lambda: None)


@dataclass
class Loop:
    """Everything one training run needs, put together by tasks/train.py."""

    config: TrainConfig
    peak_lr: float
    schedule: Schedule
    step: TrainStep
    loader: Loader
    recorder: Recorder
    manager: CheckpointManager
    rates: Rates
    hooks: Hooks
    progress: Progress
    stop: StopRequest
    ranks: RankContext

    def run(self) -> bool:
        """Train to the last step; False when a signal ended it early. Always leaves a checkpoint."""
        last = min(self.config.steps, self.config.stop_after or self.config.steps)
        # Collections at random moments make the ranks wait for one another.
        gc.disable()
        try:
            while self.progress.step < last:
                self._advance()
                # A failed save too is seen by all at once: the next one raises it on every rank.
                if self.ranks.any(self.stop.requested or self.manager.failed):
                    self._save(wait=True)
                    return False
            self._save(wait=True)
        finally:
            gc.enable()
        return True

    def _advance(self) -> None:
        started = time.perf_counter()
        progress, config = self.progress, self.config
        step = progress.step + 1
        weights = Weights.at(step, self.schedule.total_steps, self.peak_lr * self.schedule(step), config)
        figures = self.step(self.loader.microbatches(progress.samples), weights)
        progress.step = step
        progress.samples += self.rates.sequences_per_step
        progress.tokens += self.rates.tokens_per_step
        row = MetricsRow(step=step, tokens=progress.tokens, lr=weights.lr)
        self.rates.fill(row, time.perf_counter() - started)
        if _due(step, config.evaluate_every) or step == config.steps:
            row.evaluation_loss = self.hooks.evaluate()
        progress.evaluation_loss = row.evaluation_loss
        self.recorder.add(row, figures)
        self._between(step)

    def _between(self, step: int) -> None:
        config = self.config
        if _due(step, config.log_every):
            self.recorder.flush()
        if _due(step, config.generate_every) and step < config.steps:
            self.hooks.generate(step)
        if _due(step, config.export_hf_every):
            self.hooks.export(step)
        if _due(step, config.checkpoint_every) and step < config.steps:
            self._save()
        if _due(step, config.collect_garbage_every):
            gc.collect(1)
        self.hooks.profile()

    def _save(self, wait: bool = False) -> None:
        # Rows first: a checkpoint must never be ahead of metrics.jsonl.
        self.recorder.flush()
        self.manager.save(self.step.forward_backward.parts, self.step.optimizer, self.progress, wait)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
