"""Sharding: how a layout splits a weight, first over tensor or expert ranks, then into FSDP shards.

The integers behind parallel/tensor_parallel.py, expert_parallel.py and fsdp.py.
"""

import math

from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Component, Weight

FP32 = 4
"""Bytes of a value."""

FP8_BLOCK = 128
"""Rows and columns that share a scale (fp8/quantize.py, which imports torch)."""


def local_shape(weight: Weight, degrees: ParallelDims) -> tuple[int, ...]:
    """Return a weight's shape after tensor or expert parallelism, before FSDP; uneven parts round up."""
    if weight.component is Component.experts:
        dim, parts = 0, degrees.ep
    elif weight.tensor_dim is not None:
        dim, parts = weight.tensor_dim, degrees.tp
    else:
        return weight.shape
    return (*weight.shape[:dim], -(-weight.shape[dim] // parts), *weight.shape[dim + 1 :])


def local_numel(weight: Weight, degrees: ParallelDims) -> int:
    """Count the elements of `weight` that a rank computes with, after FSDP's all-gather."""
    return math.prod(local_shape(weight, degrees))


def shard_shape(weight: Weight, degrees: ParallelDims, shard: int = 0) -> tuple[int, ...]:
    """Return the shape of shard number `shard` of `weight`.

    FSDP2 splits a dim into equal runs, the last ones shorter. Experts are split by whole experts while there
    are enough of them, else each by its rows.
    """
    local, shards = local_shape(weight, degrees), shard_count(weight, degrees)
    dim = 1 if weight.component is Component.experts and shards > local[0] else 0
    run = -(-local[dim] // shards)
    rows = max(0, min(run, local[dim] - shard * run))
    return (*local[:dim], rows, *local[dim + 1 :])


def shard_numel(weight: Weight, degrees: ParallelDims, shard: int = 0) -> int:
    """Count the elements of `weight` in shard number `shard`."""
    return math.prod(shard_shape(weight, degrees, shard))


def shard_count(weight: Weight, degrees: ParallelDims) -> int:
    """Count the ranks over which FSDP shards the local part of a weight."""
    if weight.component is Component.experts:
        return degrees.efsdp_size
    return degrees.replicated_fsdp_size if weight.tensor_dim is None else degrees.fsdp_size


def is_used_in_fp32(weight: Weight) -> bool:
    """Return True if a weight is used in fp32, without a cast: norms and routers."""
    return weight.component in (Component.norms, Component.router)


def uses_fp8_matmul(weight: Weight) -> bool:
    """Return True for the linear layers and experts that precision.fp8 converts."""
    return weight.is_matrix and weight.component not in (Component.head, Component.router)


def is_gathered_in_fp8(weight: Weight, degrees: ParallelDims) -> bool:
    """Return True if FSDP can gather a weight in FP8: its shards are whole blocks, of rows or of experts."""
    local, shards = local_shape(weight, degrees), shard_count(weight, degrees)
    rows, odd = divmod(local[0], shards)
    whole = weight.shape[1] if weight.component is Component.experts else rows
    return uses_fp8_matmul(weight) and shards > 1 and not odd and whole % FP8_BLOCK == 0


def fp8_bytes(shape: tuple[int, ...], block: tuple[int, int] = (FP8_BLOCK, FP8_BLOCK)) -> int:
    """Return the bytes of FP8 codes and of their blocks' fp32 scales; blocks lie in the last two dims."""
    *outer, rows, columns = shape
    scales = -(-rows // block[0]) * -(-columns // block[1])
    return math.prod(outer) * (rows * columns + FP32 * scales)


def gathered_bytes(weight: Weight, degrees: ParallelDims, compute: int, in_fp8: bool = False) -> int:
    """Return the bytes of a gathered weight in the dtype that it is used in.

    `compute` is the bytes per value of the compute dtype; `in_fp8` gathers in FP8 if the shards allow it.
    """
    if in_fp8 and is_gathered_in_fp8(weight, degrees):
        return fp8_bytes(local_shape(weight, degrees))
    return local_numel(weight, degrees) * (FP32 if is_used_in_fp32(weight) else compute)


def gathered_from(weight: Weight, degrees: ParallelDims, held: int, compute: int, in_fp8: bool) -> int:
    """Return the bytes that a rank gives to an all-gather of a weight of which it holds `held` elements."""
    if in_fp8 and is_gathered_in_fp8(weight, degrees):
        return fp8_bytes(local_shape(weight, degrees)) // shard_count(weight, degrees)
    return held * (FP32 if is_used_in_fp32(weight) else compute)
