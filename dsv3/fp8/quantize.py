"""Block-wise FP8 (E4M3): quantization to codes with one fp32 scale per block, and dequantization.

DeepSeek-V3 report, section 3.3: weights have blocks of 128 x 128, activations and gradients tiles of
1 x 128 or 128 x 1. A weight [rows, columns] has a grid of [ceil(rows / block), ceil(columns / block)]
scales, stored as `*_scale_inv` in the released checkpoints: a value is its code times its block's scale.
Nothing here needs a compiler or a GPU. `quantize_reference` says what `quantize` computes; the tests hold
both to the same bits.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Rows and columns that share a scale in the released weights."""

E4M3_MAX = 448.0
"""The largest value of E4M3 (torch.float8_e4m3fn); past it there is only NaN."""

NAN_CODE = 0x7F
"""E4M3's code for NaN, apart from the sign bit."""

CHUNK_SHAPE = {"cpu": (256, 2048), "cuda": (4096, 4096)}
"""Rows and columns that are computed together.

On CPU 2 MiB of fp32, which stay in a cache and still make each operation longer than its call; half of it
is 10 to 20 % slower, four times of it up to a half.
"""

# E4M3's bits seven places up, the sign at the top, are an fp16 number 2^-8 times as large, because fp16 has
# one exponent bit more and a bias of 15 instead of 7. This is exact, subnormals included, and twenty times as
# fast as PyTorch's conversion on CPU. The scale takes the 2^8 back: the same unless it overflows.
_SHIFT, _WITHOUT_BIT_14, _LIFT = 1 << 7, ~(1 << 14), 2.0**8

_SMALLEST_SCALE = 2.0**-126  # fp32's smallest normal number: below it amax / 448 loses its digits

_LARGEST_LIFTED = 2.0**120

_SURELY_NORMAL = 2.0**-100  # scales from here to the inverse have products far from under- and overflow


@torch.no_grad()
def codes_to_float(codes: Tensor) -> Tensor:
    """Return the fp32 values of codes, without their scales."""
    if codes.device.type != "cpu" or _has_nan(codes):
        return codes.float()
    return _shift_to_float(codes).mul_(_LIFT)


@torch.no_grad()
def dequantize(
    codes: Tensor,
    scales: Tensor,
    block: tuple[int, int] = (BLOCK, BLOCK),
    origin: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantize a rectangle [rows, columns] of a weight to `dtype`, or into `out` where it is given.

    A value is fp32(code) x scale in fp32, rounded once to nearest even; NaN codes give NaN, of any sign and
    payload.

    Args:
        codes: [rows, columns], the rectangle of the weight that begins at `origin` (row, column), anywhere in
            a block.
        scales: the grid of the whole weight; a grid of the rectangle alone would have to begin with a block.
        out: [rows, columns], may be a strided view.

    Raises:
        ValueError: `scales` does not reach to the end of the rectangle, or `out` has another shape.
    """
    needed = [-(-(n + first) // size) for n, first, size in zip(codes.shape, origin, block, strict=True)]
    if scales.ndim != 2 or any(has < needs for has, needs in zip(scales.shape, needed, strict=True)):
        raise ValueError(
            f"the scales have shape {list(scales.shape)}, codes {list(codes.shape)} from {list(origin)} on "
            f"in blocks of {list(block)} need at least {needed}"
        )
    out = codes.new_empty(codes.shape, dtype=dtype) if out is None else out
    if out.shape != codes.shape:
        raise ValueError(f"out has shape {list(out.shape)}, the codes {list(codes.shape)}")
    scales = scales.float()
    for rows, columns in _chunks(codes, block, origin):
        chunk, grid = codes[rows.given, columns.given], scales[rows.blocks, columns.blocks]
        values = _dequantize_chunk(chunk, grid, block, (rows.lead, columns.lead))
        out[rows.given, columns.given].copy_(values)
    return out


@torch.no_grad()
def quantize(
    weight: Tensor,
    block: tuple[int, int] = (BLOCK, BLOCK),
    scales: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantize a whole `weight` (fp32 or bf16) to E4M3 codes [rows, columns] and fp32 scales, one per block.

    A block's scale is its largest magnitude / 448 in fp32, at least 2^-126; with `power_of_two` it is rounded
    up to a power of two (ue8m0, DeepSeek-V3.1). Codes are w / scale, rounded to nearest even and clamped to
    +-448. A block of zeros gets the scale 1. NaN and infinity do not count for a new scale and become the NaN
    code 0x7f: they are not hidden, and they do not hurt their neighbours.

    `scales` is a grid to keep, that of the released weights. A block keeps its scale if and only if the codes
    for it give back the block's `weight` bit for bit in its dtype (any NaN for NaN); otherwise it gets a new
    one. A block that was dequantized and not trained therefore has the same bytes again, of codes and scale,
    whatever its codes, where
    - the scale's magnitude is at least 31/32 x 2^-140 in fp32, 31/32 x 2^-124 in bf16 (below, products
      are rounded to multiples of 2^-149 or 2^-133 that no longer tell all codes apart),
    - no product rounds to infinity but that of a code of +-448, and
    - no code is 0xff: both NaNs come back as 0x7f.
    The scale may be negative, the block partial, of zeros, or without a code of 448. A scale of 0 is
    kept by zeros alone, one of infinity by none; a scale of NaN is, but all its codes become 0x7f.

    Raises:
        ValueError: `scales` is not the grid of `weight`.
    """
    codes, chosen = _allocate(weight, block, scales)
    for rows, columns in _chunks(codes, block, (0, 0)):
        kept = None if scales is None else scales[rows.blocks, columns.blocks].float()
        chunk, grid = _quantize_chunk(weight[rows.given, columns.given], block, kept, power_of_two)
        codes.view(torch.int8)[rows.given, columns.given].copy_(chunk.view(torch.int8))
        chosen[rows.blocks, columns.blocks] = grid
    return codes, chosen


@torch.no_grad()
def quantize_reference(
    weight: Tensor,
    block: tuple[int, int] = (BLOCK, BLOCK),
    scales: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `quantize` one block at a time; `quantize` itself uses it for chunks with NaN or infinity."""
    codes, chosen = _allocate(weight, block, scales)
    for i, j in product(range(chosen.shape[0]), range(chosen.shape[1])):
        rows, columns = (slice(n * size, (n + 1) * size) for n, size in zip((i, j), block, strict=True))
        values, target = weight[rows, columns], codes[rows, columns]
        if scales is not None:
            chosen[i, j] = scales[i, j]
            # 0 / 0 is NaN, but zeros come back from the scale 0 as well.
            unscaled = bool(chosen[i, j] == 0) and not bool(values.any())
            scaled = values.float() if unscaled else values.float() / chosen[i, j]
            target.copy_(_round_with_nan(scaled))
            back = (target.float() * chosen[i, j]).to(weight.dtype)
            if bool((_bits(back).eq(_bits(values)) | (back.isnan() & values.isnan())).all()):
                continue
        finite = values.float().where(values.isfinite(), torch.nan)
        chosen[i, j] = _scale(finite.nan_to_num(nan=0.0).abs().amax(), power_of_two)
        target.copy_(_round_with_nan(finite / chosen[i, j]))
    return codes, chosen


@torch.no_grad()
def count_nonfinite_blocks(codes: Tensor, block: tuple[int, int]) -> Tensor:
    """Count the blocks that hold a NaN code, which `quantize` makes of NaN and infinity; an fp32 scalar."""
    if codes.device.type == "cpu" and not _has_nan(codes):
        return torch.zeros(())
    nan = (codes.view(torch.uint8) & 0x7F).eq(NAN_CODE).float()
    return _to_blocks(nan, block).amax((1, 3)).sum()


class _AxisChunk(NamedTuple):
    """A chunk of rows or columns, which begins in the block `blocks.start`, `lead` places after its start."""

    given: slice
    """Its slice of the given tensor."""
    blocks: slice
    """Its blocks of the grid."""
    lead: int


def _chunks(
    x: Tensor, block: tuple[int, int], origin: tuple[int, int]
) -> Iterator[tuple[_AxisChunk, _AxisChunk]]:
    """Yield rows and columns of chunks of a few blocks that cover `x`, which lies at `origin` of a weight."""

    def axis_chunks(length: int, block: int, origin: int, size: int) -> Iterator[_AxisChunk]:
        step, end = max(1, size // block), origin + length
        for first in range(origin // block, -(-end // block), step):
            last = min(first + step, -(-end // block))
            low, high = max(first * block, origin), min(last * block, end)
            yield _AxisChunk(slice(low - origin, high - origin), slice(first, last), low - first * block)

    size = CHUNK_SHAPE["cpu" if x.device.type == "cpu" else "cuda"]
    rows, columns = (list(axis_chunks(*axis)) for axis in zip(x.shape, block, origin, size, strict=True))
    return product(rows, columns)


def _to_blocks(x: Tensor, block: tuple[int, int], lead: tuple[int, int] = (0, 0)) -> Tensor:
    """View [rows, columns] as [block rows, rows per block, block columns, columns per block].

    Zeros are added before `x` (`lead` rows and columns) and after it, to fill partial blocks.
    """
    ends = [-(before + length) % size for before, length, size in zip(lead, x.shape, block, strict=True)]
    if any(lead) or any(ends):
        x = F.pad(x, (lead[1], ends[1], lead[0], ends[0]))
    return x.view(-1, block[0], x.shape[1] // block[1], block[1])


def _from_blocks(blocks: Tensor) -> Tensor:
    """Return the [rows, columns] of `_to_blocks`, padding included."""
    return blocks.flatten(2).flatten(0, 1)


def _allocate(weight: Tensor, block: tuple[int, int], scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Allocate the codes and scales of a weight; ValueError where given scales do not have its grid."""
    rows, columns = weight.shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    if scales is not None and scales.shape != grid:
        raise ValueError(
            f"the scales have shape {list(scales.shape)}, the weight's {list(weight.shape)} in blocks of "
            f"{list(block)} needs {list(grid)}"
        )
    codes = weight.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    return codes, weight.new_empty(grid, dtype=torch.float32)


def _quantize_chunk(
    weight: Tensor, block: tuple[int, int], kept: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a few blocks; `kept` are scales to keep where they reproduce `weight`."""
    values, same = _to_blocks(weight.float(), block), None
    rows, columns = weight.shape
    if kept is not None:
        unchanged = _requantize(weight, values, kept)
        if unchanged is not None:
            return unchanged, kept
        codes = _round(_from_blocks(values / kept[:, None, :, None])[:rows, :columns])
        if _has_nan(codes):
            return quantize_reference(weight, block, kept, power_of_two)
        back = _dequantize_chunk(codes, kept, block, (0, 0)).to(weight.dtype)
        differ = _bits(back).bitwise_xor_(_bits(weight)).view(torch.uint8)
        same = _to_blocks(differ, (block[0], block[1] * back.element_size())).amax(1).amax(2).eq(0)
        if bool(same.all()):
            return codes, kept
    largest = values.abs().amax((1, 3))
    # The answer makes the host wait for a GPU; training, where `kept` is None, does not ask for it there.
    asks = kept is not None or weight.device.type == "cpu"
    finite = asks and bool(largest.isfinite().all())
    if not finite and kept is not None:
        return quantize_reference(weight, block, kept, power_of_two)
    if not finite:
        values = values.where(values.isfinite(), torch.nan)
        largest = values.nan_to_num(nan=0.0).abs().amax((1, 3))
    scales = _scale(largest, power_of_two)
    if kept is not None and same is not None:
        scales = torch.where(same, kept, scales)
    scaled = _from_blocks(values / scales[:, None, :, None])[:rows, :columns]
    return (_round if finite else _round_with_nan)(scaled), scales


def _requantize(weight: Tensor, values: Tensor, kept: Tensor) -> Tensor | None:
    """Return the codes of a chunk all of whose blocks keep their scales, in half the time; None for others.

    `values` are the blocks of `weight` in fp32. They are rounded to fp16 and then to E4M3, half up. Next to a
    tie that is not the nearest code; but there no code gives the weight back, from which it is 2^-5 away, and
    a product in the normal range 2^-8.
    """
    usual = (kept.abs() > _SURELY_NORMAL) & (kept.abs() < 1 / _SURELY_NORMAL)
    if weight.device.type != "cpu" or not bool(usual.all()):
        return None
    scales = kept[:, None, :, None] * _LIFT
    half = (values / scales).half().view(torch.int16).add_(_SHIFT // 2).bitwise_and_(-_SHIFT)
    if int((half & 0x7FFF).amax()) >= NAN_CODE * _SHIFT:  # past 448, or NaN
        return None
    back = half.view(torch.float16).float().mul_(scales)
    back = _from_blocks(back)[: weight.shape[0], : weight.shape[1]].to(weight.dtype)
    if int(_bits(back).bitwise_xor_(_bits(weight)).view(torch.uint8).amax()) != 0:
        return None
    # The sign moves down to its place in the code.
    half.bitwise_or_((half >> 1).bitwise_and_(1 << 14)).bitwise_right_shift_(7)
    codes = _from_blocks(half.to(torch.int8)).view(torch.float8_e4m3fn)
    return codes[: weight.shape[0], : weight.shape[1]]


def _dequantize_chunk(codes: Tensor, scales: Tensor, block: tuple[int, int], lead: tuple[int, int]) -> Tensor:
    """Return the fp32 values of codes that begin `lead` rows and columns into the first block of `scales`."""
    lift = 1.0
    if codes.device.type != "cpu" or _has_nan(codes) or not bool((scales.abs() < _LARGEST_LIFTED).all()):
        values = codes.float()
    else:
        values, lift = _shift_to_float(codes), _LIFT
    values = _to_blocks(values, block, lead).mul_(scales[:, None, :, None] * lift)
    rows, columns = codes.shape
    return _from_blocks(values)[lead[0] : lead[0] + rows, lead[1] : lead[1] + columns]


def _scale(largest: Tensor, power_of_two: bool) -> Tensor:
    """Return the scales of blocks with these largest magnitudes, which are finite fp32."""
    # A tensor as divisor: by a number, CUDA multiplies with its rounded inverse.
    scale = (largest / torch.full_like(largest, E4M3_MAX)).clamp_min(_SMALLEST_SCALE)
    if power_of_two:
        # Any fraction carries into the exponent. The division's rounding never reaches or leaves a power
        # of two: 448 x 2^n and its two neighbours have quotients that are farther apart than that.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scale.where(largest > 0, 1.0)


def _round(scaled: Tensor) -> Tensor:
    """Round to the nearest E4M3 codes, ties to even; `scaled` itself is clamped to +-448."""
    # PyTorch 2.13 saturates on CPU by itself; no document says so of other devices, and past 448 comes NaN.
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _round_with_nan(scaled: Tensor) -> Tensor:
    """Round as `_round` where there may be NaN, whose sign differs between processors."""
    codes = _round(scaled)
    codes.view(torch.uint8).masked_fill_(scaled.isnan(), NAN_CODE)
    return codes


def _shift_to_float(codes: Tensor) -> Tensor:
    """Return codes without NaN as fp32, times 2^-8."""
    half = codes.view(torch.int8).to(torch.int16).mul_(_SHIFT).bitwise_and_(_WITHOUT_BIT_14)
    return half.view(torch.float16).float()


def _has_nan(codes: Tensor) -> bool:
    """Return whether any code is NaN; this makes the host wait for a GPU."""
    return codes.numel() > 0 and int((codes.view(torch.uint8) | 0x80).amax()) == 0x80 | NAN_CODE


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)
