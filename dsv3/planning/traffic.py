"""Bytes that a rank sends in one optimizer step, by axis, as closed forms.

Collectives are counted as rings: of N bytes over n ranks, all put together, an all-gather and a
reduce-scatter send (n - 1) / n N from each rank, an all-reduce twice that. An exchange is counted by the
rows that leave the rank, with every choice of experts as likely (exchange.py). The backward pass of each
sends as much again; a forward pass that recomputation repeats, once more. Left out are sums of a few
numbers: counts of rows, loads, losses, norms.
"""

from dataclasses import dataclass

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import Kept, Recomputed
from dsv3.planning import expert_copies, parameters
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Weight
from dsv3.planning.pipeline_schedules import order
from dsv3.planning.pipeline_stages import Stage, is_v_shaped, stage_groups
from dsv3.planning.sharding import (
    BLOCK,
    FP32,
    computes_in_fp32,
    fp8_bytes,
    local_shape,
    shard_count,
    stored,
    travels_in_fp8,
)
from dsv3.planning.step_shape import StepShape

# Largest value, sum and chosen logit of vocabulary-parallel cross-entropy.
LOSS_REDUCTIONS = 3


@dataclass(frozen=True)
class TrafficBytes:
    """Bytes sent a rank and step; `dp` is FSDP's, on whichever ranks it shards over."""

    dp: int = 0
    dp_replicate: int = 0
    tp: int = 0
    cp: int = 0
    ep: int = 0
    pp: int = 0

    @property
    def total(self) -> int:
        """All axes."""
        return sum(vars(self).values())

    def to_json(self) -> dict[str, int]:
        """By axis, and the total."""
        return {**vars(self), "total": self.total}


def rank_traffic(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> TrafficBytes:
    """What the rank that sends most sends."""
    return max(pipeline_traffic(config, degrees, shape), key=lambda traffic: traffic.total)


def pipeline_traffic(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> list[TrafficBytes]:
    """What each of the ranks of each pipeline rank sends."""
    held = shape.stages_of_ranks(config, degrees)
    return [_traffic(config, degrees, shape, rank, stages) for rank, stages in enumerate(held)]


def _traffic(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, rank: int, held: list[Stage]
) -> TrafficBytes:
    gathers = _gathers(degrees, shape, rank)
    layers = [dense for stage in held for dense in stage.block_kinds]
    micro = shape.microbatches
    reductions = 1 if degrees.pp > 1 else micro
    return TrafficBytes(
        dp=sum(_sharding(config, degrees, shape, stage, gathers[stage.index], reductions) for stage in held),
        dp_replicate=sum(_replicas(config, degrees, stage, reductions) for stage in held),
        tp=micro * sum(_tensor_ends(config, degrees, shape, stage) for stage in held)
        + micro * sum(_tensor_layer(config, degrees, shape, dense) for dense in layers),
        cp=micro * len(layers) * _context_layer(config, degrees, shape),
        ep=micro * layers.count(False) * _exchange_layer(config, degrees, shape),
        pp=sum(_boundaries(config, degrees, shape, stage) for stage in held)
        + _embedding_copy(config, degrees, shape, rank),
    )


def _ring(ranks: int, total: int) -> int:
    """Bytes sent by one of `ranks` ranks that gather, or scatter the sum of, `total` bytes."""
    return total * (ranks - 1) // ranks


def _gathers(degrees: ParallelDims, shape: StepShape, rank: int) -> dict[int, tuple[int, int]]:
    """How often FSDP gathers the root and the blocks of each stage of a rank in a step.

    Under pipeline parallelism torch's stages keep what the backward pass has gathered until the last
    microbatch, so that only forward passes that free it cause another gathering.
    """
    micro, p = shape.microbatches, shape.pipelining
    if degrees.pp == 1:
        return {0: (micro, micro * (2 if shape.reshard_after_forward else 1))}
    counts: dict[int, int] = {}
    there: set[int] = set()
    for action in order(p.schedule, rank, degrees.pp, p.per_rank, micro):
        if action.stage not in there:
            counts[action.stage] = counts.get(action.stage, 0) + 1
            there.add(action.stage)
        if action.kind == "F" and shape.reshard_after_forward:
            there.remove(action.stage)
    return {stage: (1, count) for stage, count in counts.items()}


def _sharding(
    config: ModelConfig,
    degrees: ParallelDims,
    shape: StepShape,
    stage: Stage,
    gathers: tuple[int, int],
    sums: int,
) -> int:
    """Parameters gathered in the dtype they are used in, gradients scattered in fp32."""
    root, *blocks = stage_groups(config, stage)
    total = _head_again(config, degrees, shape)
    total += sum(_sharded(weight, degrees, shape, gathers[0], sums) for weight in root)
    return total + sum(
        _sharded(weight, degrees, shape, gathers[1], sums) for block in blocks for weight in block
    )


def _head_again(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> int:
    """A split head is freed after each of its backward passes, of which MTP adds one a depth."""
    if degrees.tp == 1 or degrees.pp > 1:
        return 0
    again = shape.microbatches * config.mtp_depths
    return _sharded(parameters.output(config)[-1], degrees, shape, again, sums=0)


def _sharded(weight: Weight, degrees: ParallelDims, shape: StepShape, gathers: int, sums: int) -> int:
    """One weight's part of _sharding; the shards of uneven ones travel at the length of the longest."""
    ranks, held = shard_count(weight, degrees), stored(weight, degrees)
    if shape.gathers_in_fp8 and travels_in_fp8(weight, degrees):
        gathered = fp8_bytes(local_shape(weight, degrees)) // ranks
    else:
        gathered = held * (FP32 if computes_in_fp32(weight) else shape.state.compute)
    return _ring(ranks, ranks * (gathers * gathered + sums * held * FP32))


def _replicas(config: ModelConfig, degrees: ParallelDims, stage: Stage, sums: int) -> int:
    """The shards' gradients, summed over the replicas in fp32."""
    held = sum(stored(weight, degrees) for group in stage_groups(config, stage) for weight in group)
    return sums * 2 * _ring(degrees.dp_replicate, held * FP32)


def _tensor_layer(config: ModelConfig, degrees: ParallelDims, shape: StepShape, dense: bool) -> int:
    """Latents gathered, heads' sums scattered; in a dense layer hidden states gathered and scattered."""
    a, repeats = config.attention, _passes(shape)
    latents = (a.q_lora_rank or config.dim) + a.kv_lora_rank + a.qk_rope_head_dim
    numbers = repeats * (latents + config.dim)
    if dense:
        # Recomputation ends before the last exchange of a layer: nothing in the layer needs its result.
        numbers += (repeats + 2) * config.dim
    return _ring(degrees.tp, shape.tokens(degrees) * numbers * shape.state.compute)


def _passes(shape: StepShape) -> int:
    """How often an exchange within a layer is made: forward, backward, and forward again."""
    return 2 if shape.recompute is Recomputed.none else 3


def _tensor_ends(config: ModelConfig, degrees: ParallelDims, shape: StepShape, stage: Stage) -> int:
    """Embedded tokens scattered, hidden states gathered for the head, both ways; and the loss."""
    tokens = shape.tokens(degrees)
    hidden = 2 * (stage.embeds + stage.predictions) * config.dim * shape.state.compute
    loss = 2 * LOSS_REDUCTIONS * stage.predictions * FP32
    return _ring(degrees.tp, tokens * (hidden + loss))


def _context_layer(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> int:
    """Latents of keys and values gathered to whole rows."""
    a = config.attention
    row = shape.tokens(degrees) * degrees.cp * (a.kv_lora_rank + a.qk_rope_head_dim) * shape.state.compute
    return _passes(shape) * _ring(degrees.cp, row)


def _exchange_layer(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> int:
    """Rows to experts, with the weights of those behind each rank, and rows back; and so again backward."""
    tokens = shape.tokens(degrees) // degrees.tp
    row = config.dim * shape.state.compute
    there = fp8_bytes((1, config.dim), (1, BLOCK)) if shape.fp8 is not None and shape.fp8.dispatch else row
    again = shape.recompute is Recomputed.full or (
        shape.recompute is Recomputed.selective and Kept.exchange not in shape.keep
    )
    total = 0.0
    for level in expert_copies.levels(config.moe, degrees.ep, shape.ranks_per_node):
        marked = there + 2 * FP32 * level.experts
        total += level.sent * (3 if again else 2) * (marked + row)
    return round(tokens * total)


def _boundaries(config: ModelConfig, degrees: ParallelDims, shape: StepShape, stage: Stage) -> int:
    """Hidden states to the next stage and their gradients to the one before, where those are elsewhere."""
    size = shape.tokens(degrees) // degrees.tp * config.dim * shape.state.compute
    return shape.microbatches * size * _neighbours_elsewhere(degrees, shape, stage)


def _neighbours_elsewhere(degrees: ParallelDims, shape: StepShape, stage: Stage) -> int:
    if degrees.pp == 1:
        return 0
    sent = int(not stage.is_first) + int(not stage.is_last)
    # At the foot of a V two stages in a row are on one rank.
    foot = is_v_shaped(shape.pipelining.schedule) and stage.index in (degrees.pp - 1, degrees.pp)
    return sent - int(foot)


def _embedding_copy(config: ModelConfig, degrees: ParallelDims, shape: StepShape, rank: int) -> int:
    """The gradients of the first and the last stage's embedding, summed where MTP makes a copy of it."""
    apart = degrees.pp > 1 and not is_v_shaped(shape.pipelining.schedule)
    if not apart or not config.mtp_depths or rank not in (0, degrees.pp - 1):
        return 0
    (embedding,) = parameters.embedding(config)
    return 2 * _ring(2, stored(embedding, degrees) * FP32)
