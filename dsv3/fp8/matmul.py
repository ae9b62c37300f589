"""The matmul engines of FP8: an emulation in fp32 for any device, and cuBLAS on Hopper.

Both compute what Hopper's tensor cores do: sums over a block of the depth, times both scales, added in fp32.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.config.precision import FP8Engine
from dsv3.fp8.operands import QuantizedOperand
from dsv3.fp8.quantize import BLOCK, codes_to_float

CPU_ROWS = 128
"""Rows that the emulation computes together on CPU: their sums stay in a cache, which halves the time."""

CUBLAS_ROWS = 16
"""cuBLAS takes operands whose rows, and bytes of codes per row, are a multiple of this."""

CUBLAS_SCALE_DEPTH = 4
"""cuBLAS takes the scales of 128 x 128 blocks padded along the depth to a multiple of this."""


class FP8MatmulEngine(Protocol):
    """A matmul of two operands whose blocks have the same length along the depth."""

    def matmul(self, a: QuantizedOperand, b: QuantizedOperand, dtype: torch.dtype) -> Tensor:
        """Return a b^T [rows of a, rows of b] in `dtype`.

        Products of codes are summed in fp32 over each block of the depth. Each sum is multiplied by both
        scales, and the results are added in fp32 and rounded once to `dtype`.
        """


class EmulatedEngine:
    """The definition of FP8MatmulEngine in fp32, on any device."""

    def matmul(self, a: QuantizedOperand, b: QuantizedOperand, dtype: torch.dtype) -> Tensor:
        """Return a b^T, see FP8MatmulEngine."""
        left, right = codes_to_float(a.codes), codes_to_float(b.codes)
        left_scales, right_scales = _scales_by_row(a), _scales_by_row(b)
        out = left.new_zeros(left.shape[0], right.shape[0])
        step = CPU_ROWS if left.device.type == "cpu" else max(1, left.shape[0])
        buffer = torch.empty_like(out[:step])
        parts = (tensor.split(step) for tensor in (out, left, left_scales))
        for target, codes, scales in zip(*parts, strict=True):
            sums = buffer[: target.shape[0]]
            for n, first in enumerate(range(0, left.shape[1], a.block[1])):
                depth = slice(first, first + a.block[1])
                torch.mm(codes[:, depth], right[:, depth].t(), out=sums)
                # One scale after the other: the product of two small ones would be 0, of two large ones inf.
                target.addcmul_(sums.mul_(scales[:, n, None]), right_scales[:, n].expand_as(sums))
        return out.to(dtype)


class ScaledMMEngine:
    """Block-wise FP8 matmuls on Hopper by torch.nn.functional.scaled_mm, which calls cuBLAS (CUDA 12.9).

    The first operand has tiles, the second tiles or blocks. cuBLAS wants both operands with the depth
    innermost and a multiple of the block, and rows in multiples of 16. Scales of tiles have the rows
    innermost; scales of blocks have the depth innermost, padded to a multiple of 4
    (github.com/pytorch/pytorch/pull/166752). Padding has codes of 0 and is cut off again.
    """

    def matmul(self, a: QuantizedOperand, b: QuantizedOperand, dtype: torch.dtype) -> Tensor:
        """Return a b^T, see FP8MatmulEngine."""
        rows, columns = a.codes.shape[0], b.codes.shape[0]
        if 0 in (rows, columns, a.codes.shape[1]):
            return a.scales.new_zeros(rows, columns, dtype=dtype)
        a, b = _pad(a), _pad(b)
        tiles, blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
        kinds = [tiles if operand.block[0] == 1 else blocks for operand in (a, b)]
        out = F.scaled_mm(
            a.codes,
            b.codes.t(),
            _cublas_scales(a),
            kinds[0],
            _cublas_scales(b),
            kinds[1],
            output_dtype=dtype,
        )
        return out[:rows, :columns]


MATMUL_ENGINES: dict[str, FP8MatmulEngine] = {
    FP8Engine.emulated.name: EmulatedEngine(),
    FP8Engine.scaled_mm.name: ScaledMMEngine(),
}
"""The engines by name, because custom operators take no objects."""


def _scales_by_row(operand: QuantizedOperand) -> Tensor:
    """Return the scales as [rows, blocks of the depth]."""
    height, scales = operand.block[0], operand.scales
    return scales if height == 1 else scales.repeat_interleave(height, 0)[: operand.codes.shape[0]]


def _pad(operand: QuantizedOperand) -> QuantizedOperand:
    """Pad an operand to whole blocks, with the depth innermost."""
    height = max(operand.block[0], CUBLAS_ROWS)
    codes = operand.codes
    below, behind = -codes.shape[0] % height, -codes.shape[1] % BLOCK
    # As bytes, which every device can pad and copy; 0 is 0 in E4M3 too.
    padded = F.pad(codes.view(torch.uint8), (0, behind, 0, below)) if below or behind else codes
    missing = -(-padded.shape[0] // operand.block[0]) - operand.scales.shape[0]
    scales = F.pad(operand.scales, (0, 0, 0, missing), value=1.0)
    return QuantizedOperand(padded.contiguous().view(torch.float8_e4m3fn), scales, operand.block)


def _cublas_scales(operand: QuantizedOperand) -> Tensor:
    """Lay out scales in the order in which cuBLAS reads them."""
    scales = operand.scales
    if operand.block[0] == 1:
        return scales.t().contiguous().t()
    return F.pad(scales, (0, -scales.shape[1] % CUBLAS_SCALE_DEPTH), value=1.0).contiguous().t()
