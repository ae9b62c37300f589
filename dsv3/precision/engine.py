"""What multiplies FP8 operands: one interface, the arithmetic of Hopper's tensor cores in fp32 anywhere."""

from typing import Protocol

import torch
from torch import Tensor

from dsv3.precision.config import FP8Engine
from dsv3.precision.e4m3 import values
from dsv3.precision.scaled_mm import ScaledMM
from dsv3.precision.tiles import Tiles

# On CPU so many rows are worked on together, whose sums then stay in a cache: half the time of all at once.
_ROWS = 128


class Engine(Protocol):
    """Multiplies operands whose blocks along the depth have one length."""

    def multiply(self, a: Tiles, b: Tiles, dtype: torch.dtype) -> Tensor:
        """a b^T [rows of a, rows of b]: products of codes are added up in fp32 over each block of the
        depth, multiplied by both scales, and these sums are added up in fp32; rounded once to `dtype`."""


class Emulated:
    """The definition in fp32, on any device."""

    def multiply(self, a: Tiles, b: Tiles, dtype: torch.dtype) -> Tensor:
        """See Engine."""
        left, right = values(a.codes), values(b.codes)
        of_left, of_right = _by_row(a), _by_row(b)
        out = left.new_zeros(left.shape[0], right.shape[0])
        rows = _ROWS if left.device.type == "cpu" else max(1, left.shape[0])
        parts = (tensor.split(rows) for tensor in (out, left, of_left))
        sums = torch.empty_like(out[:rows])
        for target, codes, scales in zip(*parts, strict=True):
            _add_products(target, (codes, scales), (right, of_right), a.block[1], sums)
        return out.to(dtype)


def _add_products(
    out: Tensor,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    step: int,
    sums: Tensor,
) -> None:
    """Add the products of some rows to `out`; `sums` is room for as many."""
    (left, of_left), (right, of_right) = a, b
    sums = sums[: out.shape[0]]
    for n, first in enumerate(range(0, left.shape[1], step)):
        depth = slice(first, first + step)
        torch.mm(left[:, depth], right[:, depth].t(), out=sums)
        # One after the other: the product of two small scales would be 0, of two large ones infinity.
        out.addcmul_(sums.mul_(of_left[:, n, None]), of_right[:, n].expand_as(sums))


def _by_row(operand: Tiles) -> Tensor:
    """Scales [rows, blocks of the depth]."""
    height = operand.block[0]
    scales = operand.scales
    return scales if height == 1 else scales.repeat_interleave(height, 0)[: operand.codes.shape[0]]


ENGINES: dict[str, Engine] = {FP8Engine.emulated.name: Emulated(), FP8Engine.scaled_mm.name: ScaledMM()}
"""By name, for operators take no objects."""
