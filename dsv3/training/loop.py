"""The training loop: take optimizer steps, and call the callbacks between them."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass

from dsv3.distributed.heartbeat import FIRST_CALL, HEARTBEAT
from dsv3.distributed.signals import StopEarly, StopSignal, obey
from dsv3.distributed.step_waits import STEP_WAITS
from dsv3.metrics.progress import phase
from dsv3.metrics.row import MetricsRow
from dsv3.training.callbacks import Callback, TrainingRun
from dsv3.training.rewind import Rewinder
from dsv3.training.step_taker import StepTaker
from dsv3.training.throughput import Throughput


@dataclass
class Loop:
    """One training run from its progress to the last step; tasks/train.py puts it together.

    A stop ends it after the step behind the one in which it was heard, on all ranks alike, and what callbacks
    do at once where they can (StopEarly), but not what they do after the last step.
    """

    run: TrainingRun
    steps: StepTaker
    throughput: Throughput
    callbacks: Sequence[Callback]
    stop: StopSignal
    rewinder: Rewinder | None = None
    """Takes the run back where its loss has gone wrong; None: it goes on as it is."""

    def train(self) -> bool:
        """Train to train.steps or train.stop_after; return False when a signal ended the run early."""
        train, progress, ranks = self.run.config.train, self.run.progress, self.run.ranks
        first, last = progress.step + 1, min(train.steps, train.stop_after or train.steps)
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.push(lambda kind, *_, close=callback.close: close(kind is not None))
                callback.on_train_start(self.run)
            stack.callback(self.steps.batches.close)
            self.steps.batches.start(progress.samples, max(0, last - progress.step))
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
                if finished and self.rewinder is not None and self.rewinder.is_due:
                    self.steps.batches.go_on(self.rewinder.rewind(self.run, self.callbacks))
                if self.stop.take_save() and finished and progress.step < last:  # the end saves in any case
                    for callback in self.callbacks:
                        callback.on_save_request(self.run)
            with obey(self.stop):
                for callback in self.callbacks:
                    with suppress(StopEarly):  # finished, or saved
                        callback.on_train_end(self.run, finished)
        return finished

    def _take_step(self) -> None:
        """Take one step, and begin its row of metrics."""
        run, progress = self.run, self.run.progress
        size, length = self.steps.sequences(progress), run.config.train.length
        self.throughput.start()
        with STEP_WAITS.step():
            run.metrics = self.steps.take(progress)
        lr = self.steps.hyperparameters(progress.step).lr
        waited = self.steps.waited
        run.row = MetricsRow(step=progress.step, tokens=progress.tokens, lr=lr, data_wait=waited)
        run.fill_throughput = self.throughput.stop(run.row, size * length)
        HEARTBEAT.beat()
        if (following := self.steps.sequences(progress)) != size:
            run.console.message(f"from step {progress.step + 1} on the batch has {following:,} sequences")

    def _begin_to_save(self) -> None:
        """Save at a stop from now on: every rank has taken a step. What compiles has compiled."""
        self.run.ranks.meet()
        self.stop.saves_from_now()
        self.run.ranks.limit_collectives(first_calls=False)
