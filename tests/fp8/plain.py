"""FP8 operands and their matmuls a second time, from E4M3's definition: a tile at a time, in fp64.

Nothing here calls the arithmetic of dsv3.fp8; it only reads the fields of QuantizedOperand.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dsv3.fp8.operands import QuantizedOperand

NAN = 0x7F
UNIT = 2.0**-24
"""The largest relative error of rounding to fp32."""


def definition(code: int) -> float:
    """Return a finite E4M3 value as Micikevicius et al. define it (arXiv 2209.05433, section 3)."""
    exponent, mantissa = code >> 3 & 15, (code & 7) / 8
    magnitude = (1 + mantissa) * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-6
    return -magnitude if code & 0x80 else magnitude


# Even codes first, for argmin takes the first of two that are equally near.
_CODES = np.array(sorted(range(NAN), key=lambda code: code % 2), dtype=np.uint8)
_VALUES = np.array([definition(int(code)) for code in _CODES])
_TABLE = torch.tensor([math.nan if code & NAN == NAN else definition(code) for code in range(256)]).double()


def nearest(scaled: np.ndarray) -> np.ndarray:
    """Return the codes nearest to fp32 values up to 448, by the distance to every code."""
    apart = np.abs(np.abs(scaled.astype(np.float64))[..., None] - _VALUES)
    codes = _CODES[np.where(np.isnan(apart), 0, apart).argmin(-1)] | (np.signbit(scaled) << 7).astype(
        np.uint8
    )
    return np.where(np.isfinite(scaled), codes, NAN).astype(np.uint8)


def scale_of(tile: np.ndarray, power_of_two: bool) -> np.float32:
    """Return the largest finite magnitude / 448 in fp32, or the next power of two; 1 for zeros."""
    largest = np.abs(tile[np.isfinite(tile)]).max(initial=np.float32(0))
    if largest == 0:
        return np.float32(1)
    scale = max(largest / np.float32(448), np.float32(2.0**-126))
    fraction, exponent = math.frexp(float(scale))
    return np.float32(2.0 ** (exponent - (fraction == 0.5)) if power_of_two else scale)


def quantized(x: Tensor, block: tuple[int, int], power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return codes of `x` as uint8, and fp32 scales of its tiles."""
    numbers, (high, wide) = x.float().numpy(), block
    grid = (-(-x.shape[0] // high), -(-x.shape[1] // wide))
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros(grid, np.float32)
    for i, j in np.ndindex(grid):
        place = np.s_[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
        scales[i, j] = scale_of(numbers[place], power_of_two)
        with np.errstate(invalid="ignore", under="ignore"):
            codes[place] = nearest(numbers[place] / scales[i, j])
    return torch.from_numpy(codes), torch.from_numpy(scales)


def dequantize_reference(
    codes: Tensor,
    scales: Tensor,
    block: tuple[int, int] = (128, 128),
    origin: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return every code times its block's scale in fp32, rounded once to `dtype`; as dsv3's `dequantize`."""
    (rows, columns), (row, column) = codes.shape, origin
    spread = scales.float().repeat_interleave(block[0], 0)[row : row + rows]
    spread = spread.repeat_interleave(block[1], 1)[:, column : column + columns]
    return (codes.float() * spread).to(dtype)


def decoded(operand: QuantizedOperand) -> Tensor:
    """Return the dequantized operand, fp64 [rows, depth]."""
    factors = operand.scales.double().repeat_interleave(operand.block[0], 0)
    factors = factors.repeat_interleave(operand.block[1], 1)
    rows, depth = operand.codes.shape
    return _TABLE[operand.codes.view(torch.uint8).long()] * factors[:rows, :depth]


def multiplied(a: QuantizedOperand, b: QuantizedOperand) -> tuple[Tensor, Tensor]:
    """Return a b^T in fp64, and the largest error that sums in fp32 may have.

    That is one rounding per product of codes, one per block and three for scales, each of the sum of
    magnitudes.
    """
    step, depth = a.block[1], a.codes.shape[1]
    out = torch.zeros(a.codes.shape[0], b.codes.shape[0], dtype=torch.float64)
    sizes = out.clone()
    for n, first in enumerate(range(0, depth, step)):
        left, right = (_TABLE[t.codes.view(torch.uint8).long()][:, first : first + step] for t in (a, b))
        of_left, of_right = (_of_rows(t, n) for t in (a, b))
        factors = of_left[:, None] * of_right
        out += (left @ right.T) * factors
        sizes += (left.abs() @ right.abs().T) * factors
    return out, sizes * UNIT * (min(step, depth) + -(-depth // max(step, 1)) + 3)


def _of_rows(operand: QuantizedOperand, n: int) -> Tensor:
    """Return each row's scale in block `n` of the depth."""
    return torch.tensor(
        [float(operand.scales[row // operand.block[0], n]) for row in range(len(operand.codes))]
    )


def assert_within(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Assert that no value is farther from the expected one than the bound."""
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= bound).all()
