"""E4M3 codes (torch.float8_e4m3fn) from numbers in fp32 and back, without their scales.

Tensors in blocks: their grid, views of a block at a time, and the pieces that are worked on together.

Block-wise FP8 (E4M3): one fp32 scale for each block of a weight, as in the released checkpoints.

DeepSeek-V3's report, section 3.3: weights have blocks of 128 x 128, activations and gradients tiles of
1 x 128 or 128 x 1. A weight [rows, columns] has a grid of [ceil(rows / block), ceil(columns / block)]
scales, stored as `*_scale_inv`: what its codes are multiplied by. Each direction has a plain form that
says what it computes and a fast form with the same bits; neither needs a compiler or a GPU.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0
"""The largest number of E4M3 (torch.float8_e4m3fn); past it there is only NaN."""

NAN = 0x7F
"""Its code for what is not a number, but for the sign."""

# E4M3's bits seven places up, the sign at the top, are an fp16 number 2^-8 times as large, for fp16 has
# one exponent bit more and a bias of 15 for 7. Exact, subnormals included, and twenty times as fast as
# PyTorch's conversion on CPU. The scale takes the 2^8 back: the product is the same unless it overflows.
SHIFT, _WITHOUT_BIT_14, LIFT = 1 << 7, ~(1 << 14), 2.0**8


@torch.no_grad()
def values(codes: Tensor) -> Tensor:
    """What codes stand for without their scales, in fp32."""
    if codes.device.type != "cpu" or has_nan(codes):
        return codes.float()
    return shifted(codes).mul_(LIFT)


def encode(scaled: Tensor) -> Tensor:
    """The nearest E4M3 codes, ties to even; `scaled` itself is held at +-448."""
    # PyTorch 2.13 saturates on CPU by itself; nothing says that others do, where there is NaN past 448.
    return scaled.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def encode_with_nan(scaled: Tensor) -> Tensor:
    """`encode` where there may be NaN, which has a sign of its own on each processor."""
    codes = encode(scaled)
    codes.view(torch.uint8).masked_fill_(scaled.isnan(), NAN)
    return codes


def has_nan(codes: Tensor) -> bool:
    """Whether any code is NaN; makes the host wait for a GPU."""
    return codes.numel() > 0 and int((codes.view(torch.uint8) | 0x80).amax()) == 0x80 | NAN


def shifted(codes: Tensor) -> Tensor:
    """Codes without NaN as fp32, times 2^-8."""
    half = codes.view(torch.int8).to(torch.int16).mul_(SHIFT).bitwise_and_(_WITHOUT_BIT_14)
    return half.view(torch.float16).float()


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


BLOCK = 128
"""Rows and columns that share a scale in the released weights."""

_SMALLEST_SCALE = 2.0**-126  # fp32's smallest normal number: below it amax / 448 loses its digits

_LARGEST_LIFTED = 2.0**120

_SURELY_NORMAL = 2.0**-100  # scales from here to the inverse have products far from under- and overflow


@torch.no_grad()
def dequantize_plain(
    codes: Tensor,
    scales: Tensor,
    block: tuple[int, int] = (BLOCK, BLOCK),
    origin: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What `dequantize` computes: every code times its block's scale in fp32, rounded once to `dtype`."""
    check_covered(codes, scales, block, origin)
    (rows, columns), (row, column) = codes.shape, origin
    spread = scales.float().repeat_interleave(block[0], 0)[row : row + rows]
    spread = spread.repeat_interleave(block[1], 1)[:, column : column + columns]
    return (codes.float() * spread).to(dtype)


@torch.no_grad()
def dequantize(
    codes: Tensor,
    scales: Tensor,
    block: tuple[int, int] = (BLOCK, BLOCK),
    origin: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """The numbers [rows, columns] of a rectangle of a weight, in `dtype`, or in `out` where it is given.

    `codes` [rows, columns] is the rectangle that begins at `origin` (row, column) of the weight, anywhere
    in a block; `scales` is the grid of the whole weight, for a grid of the rectangle alone would have to
    begin with a block. `out` may be a strided view. A number is fp32(code) x scale in fp32, rounded once
    to nearest even; NaN codes give NaN, of any sign and payload. ValueError if `scales` does not reach
    over the rectangle, or `out` has another shape.
    """
    check_covered(codes, scales, block, origin)
    out = codes.new_empty(codes.shape, dtype=dtype) if out is None else out
    if out.shape != codes.shape:
        raise ValueError(f"out has shape {list(out.shape)}, the codes {list(codes.shape)}")
    scales = scales.float()
    for rows, columns in pieces(codes, block, origin):
        part, factors = codes[rows.given, columns.given], scales[rows.blocks, columns.blocks]
        out[rows.given, columns.given].copy_(_numbers(part, factors, block, (rows.lead, columns.lead)))
    return out


@torch.no_grad()
def quantize_plain(
    weight: Tensor,
    block: tuple[int, int] = (BLOCK, BLOCK),
    scales: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `quantize` computes, a block at a time."""
    codes, chosen = empty_blocks(weight, block, scales)
    for i, j in product(range(chosen.shape[0]), range(chosen.shape[1])):
        rows, columns = (slice(n * size, (n + 1) * size) for n, size in zip((i, j), block, strict=True))
        part, place = weight[rows, columns], codes[rows, columns]
        if scales is not None:
            chosen[i, j] = scales[i, j]
            place.copy_(encode_with_nan(part.float() / chosen[i, j]))
            back = (place.float() * chosen[i, j]).to(weight.dtype)
            if bool((_bits(back).eq(_bits(part)) | (back.isnan() & part.isnan())).all()):
                continue
        numbers = part.float().where(part.isfinite(), torch.nan)
        chosen[i, j] = _scale(numbers.nan_to_num(nan=0.0).abs().amax(), power_of_two)
        place.copy_(encode_with_nan(numbers / chosen[i, j]))
    return codes, chosen


@torch.no_grad()
def quantize(
    weight: Tensor,
    block: tuple[int, int] = (BLOCK, BLOCK),
    scales: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """E4M3 codes [rows, columns] and fp32 scales, one a block, of a whole `weight` in fp32 or bf16.

    A block's scale is its largest magnitude / 448 in fp32, at least 2^-126; with `power_of_two` the next
    power of two from there up (ue8m0, DeepSeek-V3.1). Codes are w / scale, rounded to nearest even and
    held at +-448. A block of zeros gets the scale 1. NaN and infinite numbers do not count for a new scale
    and become the NaN code 0x7f, so that they are not hidden and their neighbours not hurt.

    `scales` is a grid to keep, that of the released weights: a block keeps its scale if and only if the
    codes for it give back the block's `weight` bit for bit in its dtype (any NaN for NaN), and gets a new
    one otherwise. So a block that was dequantized and not trained has the same bytes again, of codes and
    scale, whichever its codes where
    - the scale's magnitude is at least 31/32 x 2^-140 in fp32, 31/32 x 2^-124 in bf16 (below, products
      are rounded to multiples of 2^-149 or 2^-133 that no longer tell all codes apart),
    - no product rounds to infinity but that of a code of +-448, and
    - no code is 0xff: both NaNs come back as 0x7f.
    The scale may be negative, the block partial, of zeros, or without a code of 448. A scale of 0 or
    infinity is not kept, one of NaN is, but all its codes become 0x7f. ValueError if `scales` is not the
    grid of `weight`.
    """
    codes, chosen = empty_blocks(weight, block, scales)
    for rows, columns in pieces(codes, block, (0, 0)):
        kept = None if scales is None else scales[rows.blocks, columns.blocks].float()
        part, grid = _quantize_piece(weight[rows.given, columns.given], block, kept, power_of_two)
        codes.view(torch.int8)[rows.given, columns.given].copy_(part.view(torch.int8))
        chosen[rows.blocks, columns.blocks] = grid
    return codes, chosen


def _quantize_piece(
    weight: Tensor, block: tuple[int, int], kept: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a few blocks."""
    numbers, same = by_block(weight.float(), block), None
    rows, columns = weight.shape
    if kept is not None:
        unchanged = _reencode(weight, numbers, kept)
        if unchanged is not None:
            return unchanged, kept
        codes = encode(joined(numbers / kept[:, None, :, None])[:rows, :columns])
        if has_nan(codes):
            return quantize_plain(weight, block, kept, power_of_two)
        back = _numbers(codes, kept, block, (0, 0)).to(weight.dtype)
        differ = _bits(back).bitwise_xor_(_bits(weight)).view(torch.uint8)
        same = by_block(differ, (block[0], block[1] * back.element_size())).amax(1).amax(2).eq(0)
        if bool(same.all()):
            return codes, kept
    largest = numbers.abs().amax((1, 3))
    # The answer would make the host wait for a GPU, which in training is not asked: `kept` is null there.
    asks = kept is not None or weight.device.type == "cpu"
    finite = asks and bool(largest.isfinite().all())
    if not finite and kept is not None:
        return quantize_plain(weight, block, kept, power_of_two)
    if not finite:
        numbers = numbers.where(numbers.isfinite(), torch.nan)
        largest = numbers.nan_to_num(nan=0.0).abs().amax((1, 3))
    scales = _scale(largest, power_of_two)
    if kept is not None and same is not None:
        scales = torch.where(same, kept, scales)
    scaled = joined(numbers / scales[:, None, :, None])[:rows, :columns]
    return (encode if finite else encode_with_nan)(scaled), scales


def _reencode(weight: Tensor, numbers: Tensor, kept: Tensor) -> Tensor | None:
    """The codes of a tile all of whose blocks keep their scales, in half the time; None for any other.

    It rounds to fp16 and then to E4M3, half up. Next to a tie that is not the nearest code; but there no
    code gives the weight back, from which it is 2^-5 away, and a product in the normal range 2^-8.
    """
    usual = (kept.abs() > _SURELY_NORMAL) & (kept.abs() < 1 / _SURELY_NORMAL)
    if weight.device.type != "cpu" or not bool(usual.all()):
        return None
    scales = kept[:, None, :, None] * LIFT
    half = (numbers / scales).half().view(torch.int16).add_(SHIFT // 2).bitwise_and_(-SHIFT)
    if int((half & 0x7FFF).amax()) >= NAN * SHIFT:  # past 448, or NaN
        return None
    back = half.view(torch.float16).float().mul_(scales)
    back = joined(back)[: weight.shape[0], : weight.shape[1]].to(weight.dtype)
    if int(_bits(back).bitwise_xor_(_bits(weight)).view(torch.uint8).amax()) != 0:
        return None
    # The sign moves down to where the code has it.
    half.bitwise_or_((half >> 1).bitwise_and_(1 << 14)).bitwise_right_shift_(7)
    codes = joined(half.to(torch.int8)).view(torch.float8_e4m3fn)
    return codes[: weight.shape[0], : weight.shape[1]]


@torch.no_grad()
def broken_blocks(codes: Tensor, block: tuple[int, int]) -> Tensor:
    """How many blocks hold a NaN code, as `quantize` makes of NaN and infinity; an fp32 scalar."""
    if codes.device.type == "cpu" and not has_nan(codes):
        return torch.zeros(())
    nan = (codes.view(torch.uint8) & 0x7F).eq(NAN).float()
    return by_block(nan, block).amax((1, 3)).sum()


def _numbers(codes: Tensor, scales: Tensor, block: tuple[int, int], lead: tuple[int, int]) -> Tensor:
    """fp32 numbers of codes that begin `lead` rows and columns after the first block of `scales` does."""
    lift = 1.0
    if codes.device.type != "cpu" or has_nan(codes) or not bool((scales.abs() < _LARGEST_LIFTED).all()):
        numbers = codes.float()
    else:
        numbers, lift = shifted(codes), LIFT
    numbers = by_block(numbers, block, lead).mul_(scales[:, None, :, None] * lift)
    rows, columns = codes.shape
    return joined(numbers)[lead[0] : lead[0] + rows, lead[1] : lead[1] + columns]


def _scale(largest: Tensor, power_of_two: bool) -> Tensor:
    """Scales for blocks with these largest magnitudes, which are finite fp32."""
    # A tensor as divisor: by a number, CUDA multiplies with its rounded inverse.
    scale = (largest / torch.full_like(largest, LARGEST)).clamp_min(_SMALLEST_SCALE)
    if power_of_two:
        # Any fraction carries into the exponent. The division's rounding never reaches or leaves a power
        # of two: 448 x 2^n and its two neighbours have quotients that are farther apart than that.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scale.where(largest > 0, 1.0)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)
