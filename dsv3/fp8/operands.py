"""FP8 operands of matmuls: E4M3 codes with one fp32 scale per tile or block, quantized online.

Section 3.3.2 of the DeepSeek-V3 report. The same quantization of rows serves token dispatch in FP8, and a
weight that was all-gathered in FP8 stays codes and scales (QuantizedWeight).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.distributed.torch_private import make_wrapper_tensor, map_tensors, writes_arguments
from dsv3.fp8.quantize import BLOCK, count_nonfinite_blocks, dequantize, quantize

ACTIVATION_TILE = (1, BLOCK)

WEIGHT_BLOCK = (BLOCK, BLOCK)


class QuantizedOperand(NamedTuple):
    """An operand [rows, depth] of a matmul that sums over `depth`."""

    codes: Tensor
    """[rows, depth] E4M3."""
    scales: Tensor
    """fp32, one per block: [ceil(rows / block[0]), ceil(depth / block[1])]."""
    block: tuple[int, int]
    """Rows and depth that share a scale: a tile of activations or a block of a weight."""

    def transpose(self) -> "QuantizedOperand":
        """Return the operand's transpose, as views."""
        return QuantizedOperand(self.codes.t(), self.scales.t(), (self.block[1], self.block[0]))

    def nonfinite_tiles(self) -> Tensor:
        """Count the tiles that hold values that are not finite; an fp32 scalar."""
        return count_nonfinite_blocks(self.codes, self.block)


class FP8Recipe(NamedTuple):
    """The quantization of the operands: `tile` values per scale along a tile, 0 for one scale per tensor."""

    tile: int = BLOCK
    power_of_two: bool = False

    def quantize_activations(self, x: Tensor) -> QuantizedOperand:
        """Quantize `x` [tokens, features] in tiles of 1 x 128, for matmuls that sum over the features."""
        return self._quantize(x, (1, self.tile))

    def quantize_along_tokens(self, x: Tensor) -> QuantizedOperand:
        """Quantize `x` [tokens, features] in tiles of 128 x 1 and transpose it, for sums over the tokens."""
        return self._quantize(x, (self.tile, 1)).transpose()

    def quantize_weight(self, weight: Tensor) -> QuantizedOperand:
        """Quantize a weight [out, in] in blocks of 128 x 128."""
        return self._quantize(weight, (self.tile, self.tile))

    def _quantize(self, x: Tensor, block: tuple[int, int]) -> QuantizedOperand:
        tensor_block = max(x.shape[0], 1), max(x.shape[1], 1)
        block = block if self.tile else tensor_block
        return QuantizedOperand(*quantize(x, block, power_of_two=self.power_of_two), block)


@torch.no_grad()
def quantize_rows(rows: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize `rows` [rows, dim] to E4M3 codes [rows, dim] and fp32 scales [rows, ceil(dim / 128)]."""
    return quantize(rows, ACTIVATION_TILE, power_of_two=power_of_two)


@torch.no_grad()
def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows [rows, dim] of `quantize_rows`, in `dtype`."""
    return dequantize(codes, scales, ACTIVATION_TILE, dtype=dtype)


@torch.no_grad()
def pack_rows(rows: Tensor, power_of_two: bool = False) -> Tensor:
    """Quantize `rows` [rows, dim] to uint8 [rows, dim + 4 ceil(dim / 128)]: codes, then scales as bytes."""
    codes, scales = quantize_rows(rows, power_of_two)
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], dim=1)


@torch.no_grad()
def unpack_rows(packed: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the rows [rows, dim] of `pack_rows`, in `dtype`."""
    # Copies, even of no row: values of 4 bytes must begin at a multiple of 4.
    codes, scales = packed[:, :dim].clone(), packed[:, dim:].clone()
    return dequantize_rows(codes.view(torch.float8_e4m3fn), scales.view(torch.float32), dtype)


_ATEN = torch.ops.aten

_VIEWS = (_ATEN.detach.default, _ATEN.alias.default, _ATEN.view.default, _ATEN.as_strided.default)


class QuantizedWeight(Tensor):
    """A weight [rows, columns], or a stack of them, held as FP8 codes and scales; rows are whole blocks.

    Its dtype is the compute dtype, which is also that of its gradient. FP8 operators take `codes` and
    `scales`; every other operator gets the dequantized weight.
    """

    codes: Tensor
    """E4M3, of the weight's shape."""
    scales: Tensor
    """fp32 [all rows / 128, ceil(columns / 128)]."""

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> "QuantizedWeight":
        """Wrap codes and scales without a copy; they may be filled later."""
        made: QuantizedWeight = make_wrapper_tensor(cls, codes.shape, dtype, codes.device)
        made.codes, made.scales = codes, scales
        return made

    def dequantize(self) -> Tensor:
        """Return the weight as a plain tensor in its dtype."""
        rows = dequantize(self.codes.flatten(0, -2), self.scales, WEIGHT_BLOCK, dtype=self.dtype)
        return rows.view(self.codes.shape)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """Return the names of the inner tensors and the dtype, for torch.compile."""
        return ["codes", "scales"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], dtype: torch.dtype, outer_size: Any, outer_stride: Any
    ) -> "QuantizedWeight":
        """Invert __tensor_flatten__."""
        return QuantizedWeight(inner["codes"], inner["scales"], dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedWeight({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _VIEWS:
            # A view of the weight's own shape, strides and offset, as far as they are given, is the weight.
            weight, *geometry = args
            own = (list(weight.shape), list(weight.stride()), 0)
            if all(given == mine for given, mine in zip(geometry, own, strict=False)):
                return QuantizedWeight(weight.codes, weight.scales, weight.dtype)
        if func.namespace == "dsv3":
            # An FP8 matmul or its gradient: arguments are rows, weight and the weight's scales, here None.
            rows, weight, _, *rest = args
            return func(rows, weight.codes, weight.scales, *rest, **(kwargs or {}))
        if writes_arguments(func):  # it would write to the dequantized copy, which is lost
            raise RuntimeError(f"a QuantizedWeight cannot be written to, and {func} does")
        plain = map_tensors(QuantizedWeight, QuantizedWeight.dequantize, (args, kwargs or {}))
        return func(*plain[0], **plain[1])
