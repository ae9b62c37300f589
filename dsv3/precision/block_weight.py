"""A weight that is there as FP8 codes and scales alone, for products that would quantise it anyway."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsv3.precision.blocks import BLOCK, dequantize

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
