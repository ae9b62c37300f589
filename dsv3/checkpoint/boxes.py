"""Boxes of a tensor: what shards, chunks and released tensors have in common."""

from collections.abc import Sequence


def overlap(
    offset: Sequence[int], sizes: Sequence[int], other: Sequence[int], other_sizes: Sequence[int]
) -> tuple[list[int], list[int]] | None:
    """Where two boxes of a tensor, by offsets and sizes, meet: first and end by dim; None if nowhere."""
    low = [max(a, b) for a, b in zip(offset, other, strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(offset, sizes, other, other_sizes, strict=True)]
    return (low, high) if all(a < b for a, b in zip(low, high, strict=True)) else None


def inside(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """The box from `low` to `high`, counted from `origin`: an index."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
