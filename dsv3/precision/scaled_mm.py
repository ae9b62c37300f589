"""Block-wise FP8 products on Hopper by torch.nn.functional.scaled_mm, which calls cuBLAS (CUDA 12.9).

cuBLAS wants both operands with the depth innermost and a multiple of the block, rows in multiples of 16,
and scales of tiles with the rows innermost; those of blocks have the depth innermost, padded to a multiple
of 4 (github.com/pytorch/pytorch/pull/166752). What is padded has codes of 0 and is cut off again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.precision.blocks import BLOCK
from dsv3.precision.tiles import Tiles

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
