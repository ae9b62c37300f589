"""Tensors in blocks: their grid, views of a block at a time, and the pieces that are worked on together."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows and columns worked on together. On CPU 2 MiB of fp32, which stay in a cache and still make each
# operation longer than its call; half of it is 10 to 20 % slower, four times of it up to a half.
PIECE = {"cpu": (256, 2048), "cuda": (4096, 4096)}


def by_block(x: Tensor, block: tuple[int, int], lead: tuple[int, int] = (0, 0)) -> Tensor:
    """[rows, columns] as [block rows, rows of one, block columns, columns of one], 0 around the given."""
    ends = [-(before + length) % size for before, length, size in zip(lead, x.shape, block, strict=True)]
    if any(lead) or any(ends):
        x = F.pad(x, (lead[1], ends[1], lead[0], ends[0]))
    return x.view(-1, block[0], x.shape[1] // block[1], block[1])


def joined(blocks: Tensor) -> Tensor:
    """The [rows, columns] of `by_block`, what was put around them included."""
    return blocks.flatten(2).flatten(0, 1)


class Span(NamedTuple):
    """A piece of rows or columns: its slice of the given tensor, its blocks of the grid, and how far
    after the first of these it begins."""

    given: slice
    blocks: slice
    lead: int


def pieces(x: Tensor, block: tuple[int, int], origin: tuple[int, int]) -> Iterator[tuple[Span, Span]]:
    """Rows and columns of pieces of a few blocks, which cover the rectangle `x` from `origin` on."""
    size = PIECE["cpu" if x.device.type == "cpu" else "cuda"]
    rows, columns = (list(_spans(*axis)) for axis in zip(x.shape, block, origin, size, strict=True))
    return product(rows, columns)


def _spans(length: int, block: int, origin: int, size: int) -> Iterator[Span]:
    step, end = max(1, size // block), origin + length
    for first in range(origin // block, -(-end // block), step):
        last = min(first + step, -(-end // block))
        low, high = max(first * block, origin), min(last * block, end)
        yield Span(slice(low - origin, high - origin), slice(first, last), low - first * block)


def empty_blocks(weight: Tensor, block: tuple[int, int], scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for the codes and scales of a weight; ValueError where given scales are not its grid."""
    rows, columns = weight.shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    if scales is not None and scales.shape != grid:
        raise ValueError(
            f"the scales have shape {list(scales.shape)}, the weight's {list(weight.shape)} in blocks of "
            f"{list(block)} needs {list(grid)}"
        )
    return weight.new_empty(rows, columns, dtype=torch.float8_e4m3fn), weight.new_empty(
        grid, dtype=torch.float32
    )


def check_covered(codes: Tensor, scales: Tensor, block: tuple[int, int], origin: tuple[int, int]) -> None:
    """ValueError where the scales of a whole weight do not reach to the end of a rectangle of it."""
    needed = [-(-(n + first) // size) for n, first, size in zip(codes.shape, origin, block, strict=True)]
    if scales.ndim != 2 or any(has < needs for has, needs in zip(scales.shape, needed, strict=True)):
        raise ValueError(
            f"the scales have shape {list(scales.shape)}, codes {list(codes.shape)} from {list(origin)} on "
            f"in blocks of {list(block)} need at least {needed}"
        )
