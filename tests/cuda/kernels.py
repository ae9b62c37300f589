"""What CUDA's matmul kernels demand of their operands, ported from PyTorch's checks, and scaled_mm's numbers.

Sources: aten/src/ATen/native/GroupedMMUtils.h (grouped_mm) and aten/src/ATen/native/cuda/ScaledBlas.cpp
(scaled_mm with block-wise scales), torch 2.13.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda.device import CHECKS, SUBSTITUTES, CUDARefuses, SimulatedTensor
from tests.cuda.ledger import LEDGER

ALIGNMENT = 16
"""Bytes to which grouped_mm wants the beginnings and the strides of operands aligned."""

HAS_GROUPED_KERNEL = ((9, 0), (10, 0))
"""Compute capabilities with a grouped_mm kernel for bf16; others run one matmul per group."""


def check_grouped_mm(
    a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> None:
    """Refuse what torch._grouped_mm refuses on CUDA; note the wait of its fallback."""
    for label, operand in (("mat_a", a), ("mat_b", b)):
        _require_aligned(label, operand.inner)
    capability = torch.cuda.get_device_capability()
    if not (a.dtype == b.dtype == torch.bfloat16 and capability in HAS_GROUPED_KERNEL):
        LEDGER.wait(f"grouped_mm reads its offsets ({a.dtype})")
    elif a.dim() == 2 and b.dim() == 2:
        _require_ragged_depth(a.inner, b.inner, offs.inner.tolist())


def _require_aligned(label: str, x: Tensor) -> None:
    size, strides, shape = x.element_size(), x.stride(), list(x.shape)
    if x.numel() and x.storage_offset() * size % ALIGNMENT:
        raise CUDARefuses(f"grouped_mm: {label} does not begin at a multiple of {ALIGNMENT} bytes")
    if strides[-2] == 1 and strides[-1] >= max(1, shape[-2]):
        stride = strides[-1]
    elif strides[-1] == 1 and strides[-2] >= max(1, shape[-1]):
        stride = strides[-2]
    else:
        raise CUDARefuses(f"grouped_mm: invalid strides {strides} of {label} {shape}")
    if stride * size % ALIGNMENT:
        raise CUDARefuses(
            f"grouped_mm: strides should be multiples of {ALIGNMENT} bytes, {label} {shape} {x.dtype} has "
            f"{strides}"
        )


def _require_ragged_depth(a: Tensor, b: Tensor, ends: list[int]) -> None:
    """Two ragged operands share the groups along their depth: only one pair of layouts takes any lengths."""
    a_is_row_major = a.stride(-1) == 1 and a.stride(-2) != 1
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    if (a_is_row_major or b.stride(-1) != 1) and (min(lengths) == 0 or any(n % 8 for n in lengths[:-1])):
        raise CUDARefuses(f"grouped_mm: groups of {lengths[:8]} need mat_a column-major and mat_b row-major")


def scaled_mm(
    a: Any, b: Any, scale_a: Any, recipe_a: Any, swizzle_a: Any, scale_b: Any, recipe_b: Any, swizzle_b: Any,
    bias: Any, out_dtype: torch.dtype, contraction: Any = (), use_fast_accum: bool = False,
) -> SimulatedTensor:  # fmt: skip
    """Return a b with the scales of tiles and blocks applied; refuse what cuBLAS refuses."""
    if torch.cuda.get_device_capability()[0] != 9:
        raise CUDARefuses("scaled_mm: block-wise scales are for compute capability 9.0 alone")
    x, y = a.inner, b.inner
    (rows, depth), columns = x.shape, y.shape[1]
    if x.stride(1) != 1 or y.stride(0) != 1:
        raise CUDARefuses(f"scaled_mm: strides {x.stride()} and {y.stride()}, the depth must be innermost")
    if depth % 16 or columns % 16 or x.storage_offset() % 16 or y.storage_offset() % 16:
        raise CUDARefuses(f"scaled_mm: [{rows}, {depth}] x [{depth}, {columns}] is not aligned to 16")
    left = x.float() * _scales_by_value(scale_a[0].inner, recipe_a[0], rows, depth)
    right = y.t().float() * _scales_by_value(scale_b[0].inner, recipe_b[0], columns, depth)
    return SimulatedTensor((left @ right.t()).to(out_dtype), a.device.index)


def _scales_by_value(scales: Tensor, recipe: int, rows: int, depth: int) -> Tensor:
    """Return one scale per value [rows, depth] from the layout that cuBLAS reads; refuse another layout."""
    blocks = -(-depth // 128)
    if recipe == F.ScalingType.BlockWise1x128.value:
        shape = (rows, blocks)
    else:
        shape = (-(-blocks // 4) * 4, -(-rows // 128))
    # A dim of one element has no stride that anybody reads.
    in_order = scales.stride(0) == 1 and (scales.shape[1] == 1 or scales.stride(1) == shape[0])
    if tuple(scales.shape) != shape or not in_order:
        raise CUDARefuses(
            f"scaled_mm: scales {list(scales.shape)} {scales.stride()}, cuBLAS reads {shape} by columns"
        )
    if recipe == F.ScalingType.BlockWise1x128.value:
        return scales.repeat_interleave(128, 1)[:, :depth]
    by_row = scales.t()[:, :blocks].repeat_interleave(128, 0)[:rows]
    return by_row.repeat_interleave(128, 1)[:, :depth]


def register() -> None:
    """Let operators find what this file knows."""
    CHECKS["_grouped_mm"] = check_grouped_mm
    SUBSTITUTES["_scaled_mm_v2"] = scaled_mm
