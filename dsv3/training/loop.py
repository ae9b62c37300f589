"""The training loop: take optimizer steps, and call the callbacks between them."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass

from dsv3.data.prefetch import Prefetcher
from dsv3.distributed.heartbeat import FIRST_CALL, HEARTBEAT
from dsv3.distributed.signals import StopEarly, StopSignal, obey
from dsv3.metrics.progress import phase
from dsv3.metrics.row import MetricsRow
from dsv3.training.callbacks import Callback, TrainingRun
from dsv3.training.schedule import Schedule, StepHyperparameters
from dsv3.training.step import TrainStep
from dsv3.training.throughput import Throughput


@dataclass
class Loop:
    """One training run from its progress to the last step; tasks/train.py puts it together.

    A stop ends it after the step behind the one in which it was heard, on all ranks alike, and what callbacks
    do at once where they can (StopEarly), but not what they do after the last step.
    """

    run: TrainingRun
    step: TrainStep
    batches: Prefetcher
    schedule: Schedule
    throughput: Throughput
    callbacks: Sequence[Callback]
    stop: StopSignal

    def train(self) -> bool:
        """Train to train.steps or train.stop_after; return False when a signal ended the run early."""
        train, progress, ranks = self.run.config.train, self.run.progress, self.run.ranks
        first, last = progress.step + 1, min(train.steps, train.stop_after or train.steps)
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.push(lambda kind, *_, close=callback.close: close(kind is not None))
                callback.on_train_start(self.run)
            stack.callback(self.batches.close)
            self.batches.start(progress.samples, max(0, last - progress.step))
            with phase("waiting for the other ranks to be ready"):  # rank 0 has started the logger meanwhile
                ranks.meet()
            compiles = self.run.config.compile.enabled
            title = f"taking step {first}{' (compiling)' if compiles else ''}"
            stack.enter_context(phase(title, until=lambda: self.run.console.has_shown_steps))
            finished = True
            while finished and progress.step < last:
                may_compile = progress.step < first and (compiles or ranks.device.type == "cuda")
                with HEARTBEAT.patient(FIRST_CALL if may_compile else 0.0):
                    self._take_step()
                if progress.step == first:
                    self._begin_to_save()
                # What a stop cuts off after the last step is lost: a resume has no step left.
                with nullcontext() if self.run.is_last_step else obey(self.stop):
                    for callback in self.callbacks:
                        with suppress(StopEarly):  # poll() says so too
                            callback.on_step_end(self.run)
                wants_stop = any(callback.wants_stop for callback in self.callbacks)
                finished = not self.stop.poll(wants_stop)
            with obey(self.stop):
                for callback in self.callbacks:
                    with suppress(StopEarly):  # finished, or saved
                        callback.on_train_end(self.run, finished)
        return finished

    def _take_step(self) -> None:
        """Take one step, and begin its row of metrics."""
        run, progress = self.run, self.run.progress
        size, length = self.batches.batch.size(progress.samples), run.config.train.length
        self.throughput.start()
        asked = time.perf_counter()
        microbatches = self.batches.microbatches(progress.samples)
        waited = time.perf_counter() - asked
        step = progress.step + 1
        lr = run.config.optimizer.lr * self.schedule(step)
        now = StepHyperparameters.at(self.schedule.share(step), lr, run.config.train)
        run.metrics = self.step(microbatches, now)
        progress.step = step
        progress.samples += size
        progress.tokens += size * length
        run.row = MetricsRow(step=step, tokens=progress.tokens, lr=now.lr, data_wait=waited)
        run.fill_throughput = self.throughput.stop(run.row, size * length)
        HEARTBEAT.beat()
        if (following := self.batches.batch.size(progress.samples)) != size:
            run.console.message(f"from step {step + 1} on the batch has {following:,} sequences")

    def _begin_to_save(self) -> None:
        """Save at a stop from now on: every rank has taken a step. What compiles has compiled."""
        self.run.ranks.meet()
        self.stop.saves_from_now()
        self.run.ranks.limit_collectives(first_calls=False)
