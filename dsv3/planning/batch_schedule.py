"""The global batch size of every step: constant, or a ramp by tokens (train.batch_ramp).

A ramp grows in equal increments, each after an equal share of its tokens, as Megatron-LM's
--rampup-batch-size does with samples. The size of a step depends on the sequences consumed before it and on
nothing else, in whole numbers: it is the same on every layout and after every resume, and the steps take the
sequences 0, 1, 2 .. one after another. Steps are therefore no measure of tokens: ask `samples_after`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from dsv3.config.training import TrainConfig
from dsv3.errors import UserError

RAMP = "train.batch_ramp"


class Stretch(NamedTuple):
    """Consecutive steps of one batch size."""

    first_sample: int
    """Sequences consumed before its first step."""
    size: int
    """Sequences of each step."""
    steps: int | None
    """None: it does not end."""


@dataclass(frozen=True)
class BatchSchedule:
    """Sequences of a step by the sequences consumed before it."""

    final: int
    """Sequences of every step, or of every step behind the ramp."""
    start: int | None = None
    """Sequences of the first step; None: there is no ramp."""
    increment: int = 1
    """Sequences by which the batch grows; it divides final - start."""
    tokens: int = 1
    """Tokens over which it grows."""
    sequence_length: int = 1
    """Tokens of a sequence."""

    @classmethod
    def of(cls, train: TrainConfig) -> "BatchSchedule":
        """Return the batch sizes of a completed config."""
        ramp = train.batch_ramp
        if ramp.start is None:
            return cls(train.batch)
        assert ramp.increment is not None
        assert ramp.tokens is not None
        return cls(train.batch, ramp.start, ramp.increment, ramp.tokens, train.length)

    @property
    def first(self) -> int:
        """Return the sequences of a run's first step."""
        return self.final if self.start is None else self.start

    @property
    def increments(self) -> int:
        """Return how often the batch grows."""
        return (self.final - self.first) // self.increment

    @property
    def sizes(self) -> range:
        """Return every size that a step can have, ascending."""
        return range(self.first, self.final + 1, self.increment)

    def size(self, samples: int) -> int:
        """Return the sequences of the step that begins behind `samples` consumed sequences."""
        grown = samples * self.sequence_length * self.increments // self.tokens
        return self.first + min(grown, self.increments) * self.increment

    def stretches(self, samples: int = 0) -> Iterator[Stretch]:
        """Yield what a run does from `samples` on, one stretch per size; the last one does not end."""
        while (size := self.size(samples)) < self.final:
            # The batch grows where samples x length x increments reaches a multiple of the tokens.
            number = (size - self.first) // self.increment + 1
            grows_at = -(-number * self.tokens // (self.sequence_length * self.increments))
            steps = -(-(grows_at - samples) // size)
            yield Stretch(samples, size, steps)
            samples += steps * size
        yield Stretch(samples, self.final, None)

    def samples_after(self, samples: int, steps: int) -> int:
        """Return the sequences consumed once `steps` more steps are taken behind `samples`."""
        for stretch in self.stretches(samples):
            if stretch.steps is None or steps <= stretch.steps:
                return stretch.first_sample + steps * stretch.size
            steps -= stretch.steps
        raise AssertionError("the last stretch does not end")

    def share(self, step: int, steps: int) -> float:
        """Return the share of a run of `steps` steps that is done after `step`, by the data it has taken."""
        if self.start is None:
            return step / steps
        return self.samples_after(0, step) / self.samples_after(0, steps)

    @property
    def ramp_steps(self) -> int:
        """Return the steps that a run takes before it has the final size."""
        return sum(stretch.steps or 0 for stretch in self.stretches())

    def told(self) -> str:
        """Return the ramp in a few words, or the constant size."""
        if self.start is None:
            return f"{self.final:,} sequences"
        by = f"{self.first:,} to {self.final:,} sequences by {self.increment:,}"
        return f"{by} over the first {self.tokens:,} tokens"


def check_ramp(
    batch: BatchSchedule,
    unit: int,
    factors: str,
    supports: Callable[[int], bool] = lambda count: True,
    refused: str = "",
) -> None:
    """Raise UserError for a size of the ramp that does not split, with the nearest ramps that do.

    Args:
        batch: its final size splits.
        unit: sequences of one microbatch over all data-parallel ranks.
        factors: what makes the unit, for the message.
        supports: whether a pipeline runs so many microbatches per step.
        refused: what to say of microbatches that it does not run.
    """

    def works(size: int) -> bool:
        return size % unit == 0 and supports(size // unit)

    wrong = next((size for size in batch.sizes if not works(size)), None)
    if wrong is None:
        return
    assert batch.start is not None
    why = (
        f"no multiple of {unit} ({factors})"
        if wrong % unit
        else f"{wrong // unit} microbatches a step, {refused}"
    )
    raise UserError(
        f"{RAMP}.start={batch.start} and {RAMP}.increment={batch.increment} make a batch of {wrong:,} "
        f"sequences, {why}\n{_nearest(batch, unit, works)}"
    )


def _nearest(batch: BatchSchedule, unit: int, works: Callable[[int], bool]) -> str:
    """Return the ramps nearest to `batch` whose sizes all work: another increment, start, or both."""
    assert batch.start is not None
    rises = [size for size in range(unit, batch.final, unit) if works(size)]

    def increments(start: int) -> list[int]:
        """Return the increments that work from `start`, the nearest first."""
        found = (n for n in range(unit, batch.final - start + 1, unit) if (batch.final - start) % n == 0)
        right = [n for n in found if all(map(works, range(start, batch.final, n)))]
        return sorted(right, key=lambda n: abs(n - batch.increment))

    if works(batch.start) and (found := increments(batch.start)):
        return f"nearest that work: {RAMP}.increment={' or '.join(map(str, sorted(found[:2])))}"
    told = []
    below, above = [s for s in rises if s <= batch.start], [s for s in rises if s > batch.start]
    for starts in (reversed(below), above):
        ramps = ((start, found[0]) for start in starts if (found := increments(start)))
        told += [f"{RAMP}.start={start} {RAMP}.increment={n}" for start, n in islice(ramps, 1)]
    return (
        f"nearest that work: {', or '.join(told)}"
        if told
        else "no ramp works: take a smaller train.microbatch_size, or leave it out"
    )
