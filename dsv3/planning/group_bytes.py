"""Bytes of the groups of weights that FSDP shards as one: a block, and what lies outside of blocks.

A search for a layout asks for the same sums many times: they depend on the kind of a block, on the ranks that
shard a weight and on the formats, and not on the other axes. Blocks of one kind differ in their names alone,
which count where some parameters are frozen.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from dsv3.config.model import ModelConfig
from dsv3.planning import parameters
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Weight
from dsv3.planning.pipeline_stages import StageLayers, block_names, root_weights
from dsv3.planning.sharding import (
    FP32,
    gathered_bytes,
    gathered_from,
    local_numel,
    shard_count,
    shard_numel,
    shard_shape,
)
from dsv3.planning.step_shape import StateBytes

Sent = tuple[tuple[int, int], ...]
"""Bytes that a rank sends, by the number of ranks that shard the weights: (ranks, bytes) of each."""


@dataclass(frozen=True)
class GroupBytes:
    """Bytes of a group of weights on one rank of a layout; shards are those of shard 0, the largest."""

    parameters: int
    """Shards of the master weights."""
    gradients: int
    """Shards of the gradients."""
    optimizer: int
    """Optimizer state of the shards."""
    gathered: int
    """Weights after FSDP's all-gather, in the dtype that they are used in."""
    trained: int
    """Elements with a gradient that a rank computes with."""
    all_gather: Sent
    """Bytes that a rank sends in one all-gather."""
    reduce_scatter: Sent
    """Bytes that a rank sends in one reduce-scatter of gradients."""

    def in_reduction(self, compute: int) -> int:
        """Return the bytes of the gradients in the dtype they come in and in fp32, as they are reduced."""
        return self.trained * (FP32 + compute)


def bytes_of(weights: list[Weight], degrees: ParallelDims, state: StateBytes, in_fp8: bool) -> GroupBytes:
    """Return the bytes of `weights`; `in_fp8` gathers in FP8 where the shards allow it."""
    held = [(weight, shard_shape(weight, degrees), shard_numel(weight, degrees)) for weight in weights]
    trained = [each for each in held if state.trains(each[0])]
    return GroupBytes(
        parameters=sum(count for *_, count in held) * state.parameter,
        gradients=sum(count for *_, count in trained) * state.gradient,
        optimizer=sum(state.optimizer_bytes(weight, shape) for weight, shape, _ in held),
        gathered=sum(gathered_bytes(weight, degrees, state.compute, in_fp8) for weight in weights),
        trained=sum(local_numel(weight, degrees) for weight, *_ in trained),
        all_gather=_sent(
            (shard_count(w, degrees), gathered_from(w, degrees, count, state.compute, in_fp8))
            for w, _, count in held
        ),
        reduce_scatter=_sent((shard_count(w, degrees), count * FP32) for w, _, count in trained),
    )


def _sent(shards: Iterable[tuple[int, int]]) -> Sent:
    """Return what a ring sends of (ranks, bytes of a shard), without weights that are whole."""
    total: dict[int, int] = {}
    for ranks, size in shards:
        if ranks > 1:
            total[ranks] = total.get(ranks, 0) + (ranks - 1) * size
    return tuple(total.items())


def stage_bytes(
    config: ModelConfig, stage: StageLayers, degrees: ParallelDims, state: StateBytes, in_fp8: bool
) -> list[GroupBytes]:
    """Return the bytes of the groups of a stage: first what lies outside of blocks, then block by block."""
    # Only these degrees shard weights: the others would fill the caches with equal rows.
    shards = ParallelDims(dp_shard=degrees.fsdp_size, tp=degrees.tp, ep=degrees.ep)
    own = StageLayers(0, 1 if stage.is_last else 2, (), stage.mtp_depths)
    if not stage.is_first:
        own = StageLayers(1, 2 if stage.is_last else 3, (), stage.mtp_depths)
    root = _root_bytes(config, own, shards, state, in_fp8)
    kinds = stage.block_kinds
    if not state.frozen:
        of_kind = {dense: _block_bytes(config, dense, "", shards, state, in_fp8) for dense in set(kinds)}
        return [root, *(of_kind[dense] for dense in kinds)]
    blocks = zip(kinds, block_names(stage), strict=True)
    return [root, *(_block_bytes(config, dense, name, shards, state, in_fp8) for dense, name in blocks)]


@lru_cache(maxsize=4096)
def _root_bytes(
    config: ModelConfig, stage: StageLayers, degrees: ParallelDims, state: StateBytes, in_fp8: bool
) -> GroupBytes:
    return bytes_of(root_weights(config, stage), degrees, state, in_fp8)


@lru_cache(maxsize=4096)
def _block_bytes(
    config: ModelConfig, dense: bool, name: str, degrees: ParallelDims, state: StateBytes, in_fp8: bool
) -> GroupBytes:
    return bytes_of(parameters.block(config, dense, name), degrees, state, in_fp8)
