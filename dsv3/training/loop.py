"""The training loop: take optimizer steps, and call the callbacks between them."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from dsv3.data.loader import DataLoader
from dsv3.distributed.signals import StopRequest
from dsv3.metrics.progress import phase
from dsv3.metrics.row import MetricsRow
from dsv3.training.callbacks import Callback, TrainingRun
from dsv3.training.schedule import Schedule, StepHyperparameters
from dsv3.training.step import TrainStep


@dataclass
class Throughput:
    """Turns a step's seconds into tokens per second and MFU."""

    sequences_per_step: int
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None
    """FLOP/s of all devices together; None where it is unknown (CPU)."""

    def fill(self, row: MetricsRow, seconds: float) -> None:
        """Set the row's tokens_per_second and mfu."""
        row.tokens_per_second = self.tokens_per_step / seconds
        if self.peak_flops:
            row.mfu = row.tokens_per_second * self.flops_per_token / self.peak_flops


@dataclass
class Loop:
    """One training run from its progress to the last step; tasks/train.py puts it together."""

    run: TrainingRun
    step: TrainStep
    loader: DataLoader
    schedule: Schedule
    throughput: Throughput
    callbacks: Sequence[Callback]
    stop: StopRequest

    def train(self) -> bool:
        """Train to train.steps or train.stop_after; return False when a signal ended the run early."""
        train, progress = self.run.config.train, self.run.progress
        last = min(train.steps, train.stop_after or train.steps)
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.push(lambda kind, *_, close=callback.close: close(kind is not None))
                callback.on_train_start(self.run)
            compiles = " (compiling)" if self.run.config.compile.enabled else ""
            title = f"taking step {progress.step + 1}{compiles}"
            stack.enter_context(phase(title, until=lambda: self.run.console.has_shown_steps))
            finished = True
            while finished and progress.step < last:
                self._advance()
                # All ranks agree to stop at the same step.
                wants_stop = any(callback.wants_stop for callback in self.callbacks)
                finished = not self.run.ranks.any(self.stop.requested or wants_stop)
            for callback in self.callbacks:
                callback.on_train_end(self.run, finished)
        return finished

    def _advance(self) -> None:
        """Take one step and call the callbacks."""
        started = time.perf_counter()
        run, progress = self.run, self.run.progress
        step = progress.step + 1
        lr = run.config.optimizer.lr * self.schedule(step)
        now = StepHyperparameters.at(step, self.schedule.total_steps, lr, run.config.train)
        run.metrics = self.step(self.loader.microbatches(progress.samples), now)
        progress.step = step
        progress.samples += self.throughput.sequences_per_step
        progress.tokens += self.throughput.tokens_per_step
        run.row = MetricsRow(step=step, tokens=progress.tokens, lr=now.lr)
        self.throughput.fill(run.row, time.perf_counter() - started)
        for callback in self.callbacks:
            callback.on_step_end(run)
