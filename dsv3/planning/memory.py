"""Bytes a rank needs: state that stays, activations, and copies that live within a step.

A first estimate without allocator fragmentation, CUDA context and NCCL buffers. The rank reported is
the fullest: shard 0 (uneven shards round up), of the pipeline stage that needs most.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from dsv3.model.config import ModelConfig
from dsv3.parallel.config import Recomputed
from dsv3.parallel.degrees import Degrees
from dsv3.planning import weights
from dsv3.planning.activations import Activations, TokenBytes
from dsv3.planning.weights import Component, Weight

# FSDP2 gathers the next block while it computes this one.
GATHERED_BLOCKS = 2


@dataclass(frozen=True)
class StateBytes:
    """Bytes a number: fp32 master weights and gradients, AdamW's two fp32 moments, the compute dtype."""

    parameter: int = 4
    gradient: int = 4
    optimizer: int = 8
    compute: int = 4


@dataclass(frozen=True)
class StepShape:
    """What a rank computes at once: sequences a microbatch, tokens a row, microbatches a step."""

    microbatch_size: int
    sequence_length: int
    microbatches: int = 1
    recompute: Recomputed = Recomputed.none
    reshard_after_forward: bool = True
    state: StateBytes = field(default_factory=StateBytes)
    fused_kernels: bool = True


@dataclass(frozen=True)
class MemoryBytes:
    """One rank's bytes; `weight_copies` are compute-dtype weights gathered or cast within a step."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    weight_copies: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())

    def to_json(self) -> dict[str, int]:
        """The contract's five keys: `activations` is all that lives within a step, the copies too."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations + self.weight_copies,
            "total": self.total,
        }


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: its number and count, its layers (True: dense), and what it holds besides."""

    index: int
    stages: int
    dense: list[bool]
    mtp_depths: int

    @property
    def block_kinds(self) -> list[bool]:
        """Its layers and those of its MTP depths, which are never dense."""
        return [*self.dense, *[False] * self.mtp_depths]

    @property
    def is_first(self) -> bool:
        """Whether it holds the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it holds the head."""
        return self.index == self.stages - 1


def rank_memory(config: ModelConfig, degrees: Degrees, shape: StepShape) -> MemoryBytes:
    """Bytes of the fullest rank."""
    every = (stage_memory(config, degrees, shape, stage) for stage in stages(config, degrees.pp))
    return max(every, key=lambda memory: memory.total)


def stage_memory(config: ModelConfig, degrees: Degrees, shape: StepShape, stage: Stage) -> MemoryBytes:
    """Bytes of the fullest rank of one pipeline stage."""
    groups = stage_groups(config, stage)
    held = sum(stored(weight, degrees) for group in groups for weight in group)
    return MemoryBytes(
        parameters=held * shape.state.parameter,
        gradients=held * shape.state.gradient,
        optimizer=held * shape.state.optimizer,
        activations=_activations(config, degrees, shape, stage),
        weight_copies=_weight_copies(groups, degrees, shape),
    )


def stages(config: ModelConfig, pp: int) -> list[Stage]:
    """Layers over stages, as even as can be: the first ones, where dense layers are, take what is over."""
    each, over = divmod(config.num_layers, pp)
    dense = [n < config.num_dense_layers for n in range(config.num_layers)]
    starts = [n * each + min(n, over) for n in range(pp + 1)]
    return [
        Stage(n, pp, dense[starts[n] : starts[n + 1]], config.mtp_depths if n == pp - 1 else 0)
        for n in range(pp)
    ]


def stage_groups(config: ModelConfig, stage: Stage) -> list[list[Weight]]:
    """A stage's weights as parallel/fsdp.py groups them: first what belongs to no block, then the blocks.

    The last stage keeps a copy of the embedding for its MTP depths (DESIGN section 7).
    """
    root: list[Weight] = []
    if stage.is_first or (stage.is_last and stage.mtp_depths):
        root += weights.embedding(config)
    if stage.is_last:
        root += weights.output(config)
    root += stage.mtp_depths * weights.mtp_join(config)
    return [root, *(weights.block(config, dense) for dense in stage.block_kinds)]


def local_shape(weight: Weight, degrees: Degrees) -> tuple[int, ...]:
    """A weight's shape after tensor or expert parallelism, before sharding; uneven parts round up."""
    if weight.component is Component.experts:
        dim, parts = 0, degrees.ep
    elif weight.tensor_dim is not None:
        dim, parts = weight.tensor_dim, degrees.tp
    else:
        return weight.shape
    return (*weight.shape[:dim], -(-weight.shape[dim] // parts), *weight.shape[dim + 1 :])


def stored(weight: Weight, degrees: Degrees, shard: int = 0) -> int:
    """Numbers of `weight` that shard `shard` keeps; FSDP2 cuts the first dim in equal runs of rows.

    Experts are cut by whole experts while there are enough of them, else each by its rows.
    """
    local, shards = local_shape(weight, degrees), shard_count(weight, degrees)
    dim = 1 if weight.component is Component.experts and shards > local[0] else 0
    run = -(-local[dim] // shards)
    rows = max(0, min(run, local[dim] - shard * run))
    return math.prod(local) // local[dim] * rows


def shard_count(weight: Weight, degrees: Degrees) -> int:
    """Ranks one copy of a weight is sharded over."""
    return degrees.expert_shards if weight.component is Component.experts else degrees.dense_shards


def _weight_copies(groups: list[list[Weight]], degrees: Degrees, shape: StepShape) -> int:
    """Bytes of gathered or cast weights, and of one group's gradients before they are scattered.

    Without sharding nothing is gathered; a weight cast at its use (bf16 compute) stays for the backward
    pass all the same.
    """
    # dp_replicate alone is FSDP with one shard, which copies all the same.
    sharded = max(degrees.data_parallel, degrees.dense_shards, degrees.expert_shards) > 1
    casts = shape.state.compute != shape.state.parameter
    root, *blocks = [sum(_copied(weight, degrees, sharded, casts) for weight in group) for group in groups]
    held = not shape.reshard_after_forward if sharded else shape.recompute is Recomputed.none
    blocks.sort(reverse=True)
    copies = root + sum(blocks if held else blocks[: GATHERED_BLOCKS if sharded else 1])
    gradients = max([root, *blocks]) if sharded else 0
    return (copies + gradients) * shape.state.compute


def _copied(weight: Weight, degrees: Degrees, sharded: bool, casts: bool) -> int:
    used_in_fp32 = not weight.is_matrix or weight.component is Component.router
    if not sharded and (not casts or used_in_fp32):
        return 0
    return math.prod(local_shape(weight, degrees))


def _activations(config: ModelConfig, degrees: Degrees, shape: StepShape, stage: Stage) -> int:
    """Saved activations; stage n of p holds p - n microbatches at once (1F1B), the logits of one."""
    saved = Activations(config, shape.state.compute, shape.fused_kernels)
    tokens = shape.microbatch_size * shape.sequence_length // degrees.cp
    blocks = [saved.block(dense) for dense in stage.block_kinds]
    working = TokenBytes(0)
    if shape.recompute is Recomputed.full:
        # The block that is being computed again is whole.
        working = max(blocks, key=lambda block: block.on_rank(tokens, degrees.tp))
        blocks = [saved.block_input()] * len(blocks)
    in_flight = min(shape.microbatches, stage.stages - stage.index)
    kept = _sum(blocks).on_rank(tokens * in_flight, degrees.tp)
    predictions = [saved.logits()] * (1 + stage.mtp_depths) if stage.is_last else []
    once = _sum([working, *predictions, *[saved.mtp_join()] * stage.mtp_depths])
    return kept + once.on_rank(tokens, degrees.tp)


def _sum(parts: Iterable[TokenBytes]) -> TokenBytes:
    return sum(parts, TokenBytes(0))
