"""The order of a mixture: exact counts, every row of a source in turn, and nothing but the sample decides."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from dsv3.data import mixture_order
from dsv3.data.mixture_order import MOST_SOURCES, MixtureOrder, Stage, source_seed

THREE = [
    Stage(0, (Fraction("0.7"), Fraction("0.2"), Fraction("0.1"))),
    Stage(1000, (Fraction("0.05"), Fraction(0), Fraction(3))),
    Stage(1010, (Fraction(1), Fraction(1), Fraction(1))),
]
"""A stage of whole blocks and a rest, one shorter than a block, and one without end."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_order, "BLOCK", 64)


@pytest.mark.parametrize("seed", [3, None])
def test_each_source_gives_its_rows_one_after_the_other_and_the_counts_say_how_many(seed: int | None) -> None:
    order = MixtureOrder(THREE, seed)
    seen: list[list[int]] = [[], [], []]
    for sample in range(1500):
        assert order.counts(sample) == [len(numbers) for numbers in seen]
        source, number = order.locate(sample)
        seen[source].append(number)
    assert order.counts(1000) == [700, 200, 100]
    for numbers in seen:
        assert len(set(numbers)) == len(numbers)
        # At the end of each block the source has given all numbers below its count; in one, they are mixed.
        assert max(numbers) < len(numbers) + 64
        assert (numbers == sorted(numbers)) == (seed is None)
    for end in (64, 640, 1000, 1010, 1010 + 64 * 7):
        counts = order.counts(end)
        given = [order.locate(sample) for sample in range(end)]
        assert [sorted(n for s, n in given if s == source) for source in range(3)] == [
            list(range(count)) for count in counts
        ]


def test_counts_are_the_floors_at_the_end_of_every_block() -> None:
    order = MixtureOrder(THREE, 1)
    for end in range(64, 961, 64):  # the last block of the stage has the rest
        heavy, *others = order.counts(end) if end < 960 else order.counts(1000)
        end = end if end < 960 else 1000
        assert others == [end * 2 // 10, end // 10]
        assert heavy == end - sum(others)
    # The third stage goes on from what the others have taken, also after 10^15 samples in no time.
    before, far = order.counts(1010), 1010 + 64 * 10**13
    assert order.counts(far) == [
        taken + more
        for taken, more in zip(
            before, (64 * 10**13 - 2 * (64 * 10**13 // 3), *[64 * 10**13 // 3] * 2), strict=True
        )
    ]


def test_no_count_of_a_block_is_negative_for_any_weights_and_as_many_sources_as_may_be() -> None:
    """The bound B >= k (k - 1) is the one of the module's docstring: 64 samples for 8 sources."""
    draws = np.random.default_rng(0)
    for _ in range(30):
        count = int(draws.integers(1, 9))
        weights = tuple(Fraction(int(w)) for w in draws.integers(1, 50, count))
        order = MixtureOrder([Stage(0, weights)], 0)
        counts = [np.array(order.counts(64 * block)) for block in range(40)]
        assert all((later >= earlier).all() for earlier, later in pairwise(counts))
    assert MOST_SOURCES * (MOST_SOURCES - 1) <= 1 << 16


def test_a_sample_alone_decides_and_the_seed_scatters() -> None:
    straight, jumping = MixtureOrder(THREE, 3), MixtureOrder(THREE, 3)
    expected = [straight.locate(sample) for sample in range(1500)]
    for sample in np.random.default_rng(0).permutation(1500).tolist():
        assert jumping.locate(sample) == expected[sample]
    other = MixtureOrder(THREE, 4)
    assert [other.locate(sample) for sample in range(1500)] != expected
    # Each block of a stage, and each stage, has an arrangement of its own.
    even = MixtureOrder([Stage(0, (Fraction(1), Fraction(1))), Stage(128, (Fraction(1), Fraction(1)))], 3)
    blocks = [tuple(even.locate(first + n)[0] for n in range(64)) for first in (0, 64, 128)]
    assert len(set(blocks)) == 3


def test_weights_are_the_decimal_numbers_they_were_typed_as() -> None:
    order = MixtureOrder([Stage(0, tuple(map(Fraction, ("0.1", "0.2", "0.7"))))], 0)
    assert order.counts(64 * 1000) == [6400, 12800, 44800]
    assert order.shares(5) == [0.1, 0.2, 0.7]


def test_without_a_seed_sources_are_spread_evenly() -> None:
    order = MixtureOrder([Stage(0, (Fraction(3), Fraction(1)))], None)
    for sample in range(640):
        assert abs(order.counts(sample)[1] - sample / 4) <= 1


def test_a_source_keeps_its_seed_whatever_else_is_in_the_mixture() -> None:
    assert source_seed(0, "web") == source_seed(0, "web") != source_seed(0, "code")
    assert source_seed(0, "web") != source_seed(1, "web")
