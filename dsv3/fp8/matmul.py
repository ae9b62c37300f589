"""Block-wise FP8 products on Hopper by torch.nn.functional.scaled_mm, which calls cuBLAS (CUDA 12.9).

cuBLAS wants both operands with the depth innermost and a multiple of the block, rows in multiples of 16,
and scales of tiles with the rows innermost; those of blocks have the depth innermost, padded to a multiple
of 4 (github.com/pytorch/pytorch/pull/166752). What is padded has codes of 0 and is cut off again.


What multiplies FP8 operands: one interface, the arithmetic of Hopper's tensor cores in fp32 anywhere.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.config.precision import FP8Engine
from dsv3.fp8.operands import Tiles
from dsv3.fp8.quantize import BLOCK, values

ROWS = 16
"""Rows of an operand come in multiples of this, in bytes of codes as well."""

_DEPTH_OF_SCALES = 4


class ScaledMM:
    """cuBLAS multiplies; of the two operands the first has tiles, the second tiles or blocks."""

    def multiply(self, a: Tiles, b: Tiles, dtype: torch.dtype) -> Tensor:
        """See engine.Engine."""
        rows, columns = a.codes.shape[0], b.codes.shape[0]
        if 0 in (rows, columns, a.codes.shape[1]):
            return a.scales.new_zeros(rows, columns, dtype=dtype)
        a, b = _padded(a), _padded(b)
        out = F.scaled_mm(
            a.codes, b.codes.t(), _laid_out(a), _kind(a), _laid_out(b), _kind(b), output_dtype=dtype
        )
        return out[:rows, :columns]


def _kind(operand: Tiles) -> F.ScalingType:
    return F.ScalingType.BlockWise1x128 if operand.block[0] == 1 else F.ScalingType.BlockWise128x128


def _padded(operand: Tiles) -> Tiles:
    """Whole blocks, depth innermost."""
    height = max(operand.block[0], ROWS)
    codes = operand.codes
    below, behind = -codes.shape[0] % height, -codes.shape[1] % BLOCK
    # As bytes, which every device can pad and copy; 0 is 0 in E4M3 too.
    grown = F.pad(codes.view(torch.uint8), (0, behind, 0, below)) if below or behind else codes
    missing = -(-grown.shape[0] // operand.block[0]) - operand.scales.shape[0]
    scales = F.pad(operand.scales, (0, 0, 0, missing), value=1.0)
    return Tiles(grown.contiguous().view(torch.float8_e4m3fn), scales, operand.block)


def _laid_out(operand: Tiles) -> Tensor:
    """Scales in the order that cuBLAS reads them in."""
    scales = operand.scales
    if operand.block[0] == 1:
        return scales.t().contiguous().t()
    return F.pad(scales, (0, -scales.shape[1] % _DEPTH_OF_SCALES), value=1.0).contiguous().t()


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
