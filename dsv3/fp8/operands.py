"""Operands of FP8 matrix products: codes with one scale a tile, quantised online (report, section 3.3.2).

Rows of activations that travel in FP8: codes of 1 x 128 tiles with their scales, or both as bytes.

A weight that is there as FP8 codes and scales alone, for products that would quantise it anyway.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsv3.fp8.quantize import BLOCK, broken_blocks, dequantize, quantize


class Recipe(NamedTuple):
    """How operands are quantised: numbers of a tile's long side (0: a whole tensor has one scale)."""

    tile: int = BLOCK
    power_of_two: bool = False

    def activations(self, x: Tensor) -> "Tiles":
        """`x` [tokens, features] in tiles of 1 x 128: its products add up over the features."""
        return self._quantize(x, (1, self.tile))

    def along_tokens(self, x: Tensor) -> "Tiles":
        """`x` [tokens, features] in tiles of 128 x 1, turned to [features, tokens] for sums over tokens."""
        return self._quantize(x, (self.tile, 1)).turned()

    def weight(self, weight: Tensor) -> "Tiles":
        """A weight [out, in] in blocks of 128 x 128."""
        return self._quantize(weight, (self.tile, self.tile))

    def _quantize(self, x: Tensor, block: tuple[int, int]) -> "Tiles":
        whole = max(x.shape[0], 1), max(x.shape[1], 1)
        block = block if self.tile else whole
        return Tiles(*quantize(x, block, power_of_two=self.power_of_two), block)


class Tiles(NamedTuple):
    """An operand [rows, depth] of a product that adds up over `depth`."""

    codes: Tensor
    """[rows, depth] E4M3."""
    scales: Tensor
    """fp32, one a block: [ceil(rows / block[0]), ceil(depth / block[1])]."""
    block: tuple[int, int]

    def turned(self) -> "Tiles":
        """The operand's transpose, as views."""
        return Tiles(self.codes.t(), self.scales.t(), (self.block[1], self.block[0]))

    def broken(self) -> Tensor:
        """How many tiles hold numbers that are not finite; an fp32 scalar."""
        return broken_blocks(self.codes, self.block)


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


SQUARE = (BLOCK, BLOCK)


class BlockWeight(Tensor):
    """A weight [rows, columns], or a stack of them, whose rows are whole blocks of 128.

    It says that it has the compute dtype, in which its gradient comes; FP8 products take `codes` and
    `scales`, and every other operator the numbers that they stand for in that dtype.
    """

    codes: Tensor
    """E4M3, of the weight's shape."""
    scales: Tensor
    """fp32 [all rows / 128, ceil(columns / 128)]."""

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> "BlockWeight":
        """Take codes and scales as they are; they may be filled later."""
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        made.codes, made.scales = codes, scales
        return made

    def numbers(self) -> Tensor:
        """The weight in its dtype."""
        rows = dequantize(self.codes.flatten(0, -2), self.scales, SQUARE, dtype=self.dtype)
        return rows.view(self.codes.shape)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """For torch.compile: the tensors within, and what else is to be known."""
        return ["codes", "scales"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], dtype: torch.dtype, outer_size: Any, outer_stride: Any
    ) -> "BlockWeight":
        """The inverse of __tensor_flatten__."""
        return BlockWeight(inner["codes"], inner["scales"], dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"BlockWeight({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _VIEWS and _shows_all(*args):
            return BlockWeight(args[0].codes, args[0].scales, args[0].dtype)
        if func.namespace == "dsv3":
            # Of an FP8 product, or of its gradient: the weight, and behind it no scales yet.
            rows, weight, _, *rest = args
            return func(rows, weight.codes, weight.scales, *rest, **(kwargs or {}))
        if func._schema.is_mutable:  # of a copy, which would be lost
            raise RuntimeError(f"a BlockWeight cannot be written to, and {func} does")
        numbers = pytree.tree_map_only(BlockWeight, BlockWeight.numbers, (args, kwargs or {}))
        return func(*numbers[0], **numbers[1])


_ATEN = torch.ops.aten

_VIEWS = (_ATEN.detach.default, _ATEN.alias.default, _ATEN.view.default, _ATEN.as_strided.default)


def _shows_all(weight: Tensor, *place: Any) -> bool:
    """Whether a view of this shape, these strides and this offset, if any, is the weight as it is."""
    whole = (list(weight.shape), list(weight.stride()), 0)
    return all(given == mine for given, mine in zip(place, whole, strict=False))
