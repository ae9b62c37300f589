"""The order of a mixture: for every sample the source that it comes from, and its number in that source.

Nothing is stored but the stages, so the answer is the same on any layout and after a resume. In a stage the
weights are constant. With shares w_i (weights over their sum, exact fractions), the first x samples of a
stage hold

    N_i(x) = floor(x w_i)  of every source but the heaviest, which takes the rest

so that counts are exact at the end of every block of BLOCK samples, and less than one sample from x w_i (of
the heaviest less than the number of sources). A stage is cut into blocks; what is left at its end belongs to
its last block. In a block, a keyed permutation says which slot is whose.

No count of a block is negative. For all but the heaviest source floor(x w_i) does not fall. The heaviest
has N_h(x) = x - sum floor(x w_i) = x w_h + sum frac(x w_i), the sums over the other k - 1 sources. From x to
x + B it grows by B w_h and k - 1 differences of fractional parts, each above -1: by more than
B w_h - (k - 1). The heaviest of k shares is at least 1 / k, so B >= k (k - 1) is enough: 65,536 samples for
up to 256 sources.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dsv3.tokens.shuffle import Ids, Permutation

BLOCK = 1 << 16
"""Samples of a block, but for the last one of a stage, which has up to twice as many."""

MOST_SOURCES = 256


class Stage(NamedTuple):
    """Samples over which the weights are constant."""

    first: int
    """The first sample; 0 in the first stage."""
    weights: tuple[Fraction, ...]
    """The weight of each source, at least one of them above 0."""


class _Block(NamedTuple):
    """A block of a stage: the sources' slots one after the other, and the permutation that scatters them."""

    first: int
    """The first sample."""
    numbers: Sequence[int] | Ids
    """The number of each sample of the block among the sources' slots."""
    starts: list[int]
    """[sources + 1], the first slot of each source; the last one is the end."""
    taken: list[int]
    """[sources], the samples of each source before the block, from all stages."""


class MixtureOrder:
    """The order of the samples of a mixture.

    Args:
        stages: in their order; no two begin at the same sample.
        seed: scatters the sources over the slots of a block; None spreads each of them evenly and keeps the
            order of its rows.
    """

    def __init__(self, stages: Sequence[Stage], seed: int | None) -> None:
        self.sources = len(stages[0].weights)
        assert 0 < self.sources <= MOST_SOURCES
        self._firsts = [stage.first for stage in stages]
        self._shares = [[weight / sum(stage.weights) for weight in stage.weights] for stage in stages]
        self._seed = seed
        taken = [0] * self.sources
        self._taken = [taken]  # by each source before each stage
        for number, (first, end) in enumerate(zip(self._firsts, self._firsts[1:], strict=False)):
            taken = [
                before + more for before, more in zip(taken, self._counts(number, end - first), strict=True)
            ]
            self._taken.append(taken)
        self._block = lru_cache(8)(self._arrange)
        self._sources_of_block = lru_cache(2)(self._label)

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the source of a sample, and the number of the sample among those of that source."""
        block = self._block(*self._place(sample))
        slot = int(block.numbers[sample - block.first])
        source = bisect_right(block.starts, slot) - 1
        return source, block.taken[source] + slot - block.starts[source]

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` samples come from each source."""
        stage, number = self._place(samples)
        block, own = self._block(stage, number), self._sources_of_block(stage, number)
        found = np.bincount(own[: samples - block.first], minlength=self.sources)
        return [before + more for before, more in zip(block.taken, found.tolist(), strict=True)]

    def shares(self, sample: int) -> list[float]:
        """Return the shares of the sources at a sample."""
        return [float(share) for share in self._shares[bisect_right(self._firsts, sample) - 1]]

    def _place(self, sample: int) -> tuple[int, int]:
        """Return the stage of a sample and its block there."""
        stage = bisect_right(self._firsts, sample) - 1
        number = (sample - self._firsts[stage]) // BLOCK
        if stage + 1 < len(self._firsts):
            number = min(number, max(0, (self._firsts[stage + 1] - self._firsts[stage]) // BLOCK - 1))
        return stage, number

    def _counts(self, stage: int, samples: int) -> list[int]:
        """Return N_i(samples) of a stage."""
        shares = self._shares[stage]
        counts = [samples * share.numerator // share.denominator for share in shares]
        heaviest = max(range(len(shares)), key=lambda source: (shares[source], -source))
        counts[heaviest] += samples - sum(counts)
        return counts

    def _arrange(self, stage: int, number: int) -> _Block:
        first, begin, end = self._firsts[stage], number * BLOCK, (number + 1) * BLOCK
        if stage + 1 < len(self._firsts):
            length = self._firsts[stage + 1] - first
            if number == max(0, length // BLOCK - 1):
                end = length
        before, after = (self._counts(stage, bound) for bound in (begin, end))
        counts = [high - low for low, high in zip(before, after, strict=True)]
        numbers: Sequence[int] | Ids = _spread(counts)
        if self._seed is not None:
            numbers = Permutation(end - begin, self._seed, 4, stage, number)
        taken = [past + here for past, here in zip(self._taken[stage], before, strict=True)]
        return _Block(first + begin, numbers, [0, *accumulate(counts)], taken)

    def _label(self, stage: int, number: int) -> npt.NDArray[np.uint8]:
        """Return the source of each sample of a block."""
        block = self._block(stage, number)
        numbers = block.numbers
        if isinstance(numbers, Permutation):
            numbers = numbers.block(0, len(numbers))
        return (np.searchsorted(block.starts, numbers, side="right") - 1).astype(np.uint8)


def _spread(counts: Sequence[int]) -> Ids:
    """Return the number of each slot where every source is spread evenly, in the order of its samples.

    Sample k of a source with c of them has its place at (2 k + 1) / 2 c of the block.
    """
    places = [(2 * np.arange(count) + 1 << 32) // count for count in counts if count]
    return np.argsort(np.concatenate(places), kind="stable")


def source_seed(seed: int, name: str) -> int:
    """Return the seed of one source: the same whatever else is in the mixture."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
