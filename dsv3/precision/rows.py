"""Rows of activations that travel in FP8: codes of 1 x 128 tiles with their scales, or both as bytes."""

import torch
from torch import Tensor

from dsv3.precision.blocks import BLOCK, dequantize, quantize

TILE = (1, BLOCK)
SCALE_BYTES = 4


def packed_width(dim: int) -> int:
    """Bytes of a row of `dim` numbers."""
    return dim + SCALE_BYTES * -(-dim // BLOCK)


@torch.no_grad()
def encode(rows: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes [rows, dim] E4M3 of `rows` [rows, dim], and fp32 scales [rows, ceil(dim / 128)]."""
    codes, scales = quantize(rows, TILE, power_of_two=power_of_two)
    return codes, scales


@torch.no_grad()
def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [rows, dim] of `encode`, in `dtype`."""
    return dequantize(codes, scales, TILE, dtype=dtype)


@torch.no_grad()
def pack(rows: Tensor, power_of_two: bool = False) -> Tensor:
    """`rows` [rows, dim] as uint8 [rows, packed_width(dim)]."""
    codes, scales = encode(rows, power_of_two)
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], dim=1)


@torch.no_grad()
def unpack(packed: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The rows [rows, dim] of `pack`, in `dtype`."""
    # Copies, even of no row: numbers of 4 bytes must begin at a multiple of 4.
    codes, scales = packed[:, :dim].clone(), packed[:, dim:].clone()
    return decode(codes.view(torch.float8_e4m3fn), scales.view(torch.float32), dtype)
