"""Take the next optimizer step of a run, wherever that goes on: in the training loop and in task=replay.

The step follows from the run's progress alone: the batch from the sequences that are done, the learning rate
and the loss weights from the number of the step.
"""

import time
from dataclasses import dataclass

from dsv3.checkpoint.directory import Progress
from dsv3.config.root import Config
from dsv3.data.batch import Batch
from dsv3.data.prefetch import Prefetcher
from dsv3.training.schedule import Schedule, StepHyperparameters
from dsv3.training.step import StepMetrics, TrainStep


@dataclass
class StepTaker:
    """The steps of one run on this rank; all ranks call its methods together."""

    step: TrainStep
    batches: Prefetcher
    schedule: Schedule
    config: Config
    waited: float = 0.0
    """Seconds that the last step waited for its batch."""

    def sequences(self, progress: Progress) -> int:
        """Return the sequences of the step behind `progress`, over all ranks."""
        return self.batches.batch.size(progress.samples)

    def hyperparameters(self, step: int) -> StepHyperparameters:
        """Return the learning rate, the loss weights and the speed of the expert bias of a step, from 1."""
        lr = self.config.optimizer.lr * self.schedule(step)
        return StepHyperparameters.at(self.schedule.share(step), lr, self.config.train)

    def microbatches(self, progress: Progress) -> list[Batch]:
        """Return this rank's microbatches of the step behind `progress`; `waited` says how long that took."""
        asked = time.perf_counter()
        microbatches = self.batches.microbatches(progress.samples)
        self.waited = time.perf_counter() - asked
        return microbatches

    def take(self, progress: Progress) -> StepMetrics:
        """Take the step behind `progress`, and move it on by that step."""
        metrics = self.step(self.microbatches(progress), self.hyperparameters(progress.step + 1))
        self.pass_over(progress)
        return metrics

    def pass_over(self, progress: Progress) -> None:
        """Move `progress` on by a step without taking it: its data is done with, and the model as before."""
        sequences = self.sequences(progress)
        progress.step += 1
        progress.samples += sequences
        progress.tokens += sequences * self.config.train.length
