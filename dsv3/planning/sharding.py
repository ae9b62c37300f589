"""How a layout cuts a weight: over tensor or expert ranks first, then over the shards of FSDP.

What parallel/tensor.py, expert.py and fsdp.py do, in integers.
"""

import math

from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Component, Weight

FP32 = 4

BLOCK = 128
"""Rows and columns that share a scale (precision/blocks.py, which imports torch)."""


def local_shape(weight: Weight, degrees: ParallelDims) -> tuple[int, ...]:
    """A weight's shape after tensor or expert parallelism, before sharding; uneven parts round up."""
    if weight.component is Component.experts:
        dim, parts = 0, degrees.ep
    elif weight.tensor_dim is not None:
        dim, parts = weight.tensor_dim, degrees.tp
    else:
        return weight.shape
    return (*weight.shape[:dim], -(-weight.shape[dim] // parts), *weight.shape[dim + 1 :])


def local_numel(weight: Weight, degrees: ParallelDims) -> int:
    """Numbers of `weight` that a rank computes with, gathered."""
    return math.prod(local_shape(weight, degrees))


def stored(weight: Weight, degrees: ParallelDims, shard: int = 0) -> int:
    """Numbers of `weight` that shard `shard` keeps; FSDP2 cuts a dim in equal runs, the last ones shorter.

    Experts are cut by whole experts while there are enough of them, else each by its rows.
    """
    local, shards = local_shape(weight, degrees), shard_count(weight, degrees)
    dim = 1 if weight.component is Component.experts and shards > local[0] else 0
    run = -(-local[dim] // shards)
    rows = max(0, min(run, local[dim] - shard * run))
    return math.prod(local) // local[dim] * rows


def shard_count(weight: Weight, degrees: ParallelDims) -> int:
    """Ranks that the part of a weight which one of them computes with is sharded over."""
    if weight.component is Component.experts:
        return degrees.efsdp_size
    return degrees.replicated_fsdp_size if weight.tensor_dim is None else degrees.fsdp_size


def computes_in_fp32(weight: Weight) -> bool:
    """Whether a weight is used as its fp32 master: norms and routers are, the embedding is looked up."""
    return weight.component in (Component.norms, Component.router)


def multiplies_in_fp8(weight: Weight) -> bool:
    """Whether a weight is one of the linear layers and experts that precision.fp8 takes."""
    return weight.is_matrix and weight.component not in (Component.head, Component.router)


def travels_in_fp8(weight: Weight, degrees: ParallelDims) -> bool:
    """Whether FSDP gathers a weight, by shards of whole blocks: rows, or experts of whole blocks each."""
    local, shards = local_shape(weight, degrees), shard_count(weight, degrees)
    rows, odd = divmod(local[0], shards)
    whole = weight.shape[1] if weight.component is Component.experts else rows
    return multiplies_in_fp8(weight) and shards > 1 and not odd and whole % BLOCK == 0


def fp8_bytes(shape: tuple[int, ...], block: tuple[int, int] = (BLOCK, BLOCK)) -> int:
    """Bytes of codes and of the fp32 scales of their blocks, in the last two dims."""
    *outer, rows, columns = shape
    scales = -(-rows // block[0]) * -(-columns // block[1])
    return math.prod(outer) * (rows * columns + FP32 * scales)


def gathered_bytes(weight: Weight, degrees: ParallelDims, compute: int, in_fp8: bool = False) -> int:
    """Bytes of the gathered part of a weight, in the dtype it is used in; `in_fp8` where whole blocks are."""
    if in_fp8 and travels_in_fp8(weight, degrees):
        return fp8_bytes(local_shape(weight, degrees))
    return local_numel(weight, degrees) * (FP32 if computes_in_fp32(weight) else compute)
