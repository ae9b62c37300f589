"""The nearest values that would have worked, for the messages of broken laws."""

from collections.abc import Iterable


def nearest_of(works: Iterable[int], value: int) -> list[int]:
    """The largest of `works` below `value` and the smallest above it, where there are such."""
    works = sorted(works)
    return [n for n in works if n < value][-1:] + [n for n in works if n > value][:1]


def nearest_multiples(unit: int, value: int) -> list[int]:
    """The multiples of `unit` next to `value`, without 0."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def join(numbers: Iterable[int]) -> str:
    """`numbers` as they stand in a message."""
    return ", ".join(map(str, numbers))
