"""Traffic: the bytes that a rank sends per optimizer step, by mesh axis, as closed forms.

Collectives are counted as rings: over n ranks with N bytes in all, an all-gather and a reduce-scatter send
(n - 1) / n x N from each rank, an all-reduce twice that. Token dispatch is counted by the rows that leave the
rank under uniform routing (dispatch_volume.py). The backward pass of each sends as much again; a forward pass
that activation checkpointing repeats sends once more. Left out are sums of a few values: row counts, loads,
losses, norms.
"""

from dataclasses import dataclass, replace

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import RecomputeMode, SavedOp
from dsv3.planning import parameters
from dsv3.planning.dispatch_volume import dispatch_levels
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Weight
from dsv3.planning.pipeline_schedules import schedule_actions
from dsv3.planning.pipeline_stages import StageLayers, is_v_shaped, stage_weights
from dsv3.planning.sharding import (
    FP8_BLOCK,
    FP32,
    fp8_bytes,
    gathered_from,
    shard_count,
    shard_numel,
)
from dsv3.planning.step_shape import StepShape

LOSS_VALUES = 3
"""Values per token that a rank tells the others for the loss: largest logit, sum, the target's logit."""


@dataclass(frozen=True)
class TrafficBytes:
    """Bytes sent per rank and step, by axis; `dp` is FSDP's traffic over all ranks that it shards over."""

    dp: int = 0
    dp_replicate: int = 0
    tp: int = 0
    cp: int = 0
    ep: int = 0
    pp: int = 0

    @property
    def total(self) -> int:
        """Bytes over all axes."""
        return sum(vars(self).values())

    def to_json(self) -> dict[str, int]:
        """Return the bytes by axis, and the total."""
        return {**vars(self), "total": self.total}


def rank_traffic(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> TrafficBytes:
    """Return the traffic of the rank that sends most."""
    return max(pipeline_traffic(config, degrees, shape), key=lambda traffic: traffic.total)


def pipeline_traffic(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> list[TrafficBytes]:
    """Return, per pipeline rank, the traffic of each of its ranks."""
    held = shape.stages_of_ranks(config, degrees)
    return [_traffic(config, degrees, shape, rank, stages) for rank, stages in enumerate(held)]


def _traffic(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, rank: int, held: list[StageLayers]
) -> TrafficBytes:
    gathers = _all_gathers(degrees, shape, rank)
    layers = [dense for stage in held for dense in stage.block_kinds]
    micro = shape.microbatches
    reductions = 1 if degrees.pp > 1 else micro
    return TrafficBytes(
        dp=sum(_fsdp(config, degrees, shape, stage, gathers[stage.index], reductions) for stage in held),
        dp_replicate=sum(_all_reduce_replicas(config, degrees, shape, stage, reductions) for stage in held),
        tp=micro * sum(_tensor_parallel_ends(config, degrees, shape, stage) for stage in held)
        + micro * sum(_tensor_parallel_layer(config, degrees, shape, dense) for dense in layers),
        cp=micro * len(layers) * _context_parallel_layer(config, degrees, shape),
        ep=micro * layers.count(False) * _dispatch_layer(config, degrees, shape),
        pp=sum(_stage_boundaries(config, degrees, shape, stage) for stage in held)
        + _embedding_duplicate(config, degrees, shape, rank),
    )


def forward_traffic(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, stage: StageLayers, decodes: bool = False
) -> TrafficBytes:
    """Return what a rank sends in one forward pass of a microbatch through a stage, as outside of training.

    Left out is what FSDP gathers in the first of several passes and then keeps (`once_gathered_traffic`). The
    MTP depths compute nothing. A pass that `decodes` is whole on each context rank, and gathers the
    logits of one token per row in place of the hidden states of all for the head and its loss.
    """
    blocks = stage_weights(config, stage)[1 : 1 + len(stage.dense)]
    # Without recomputation the backward pass sends on these axes what the forward pass sends.
    both, tokens = replace(shape, recompute=RecomputeMode.none), shape.tokens(degrees)
    tp = sum(_tensor_parallel_layer(config, degrees, both, dense) for dense in stage.dense) // 2
    hidden = tokens * config.dim * shape.state.compute
    logits = shape.microbatch_size * config.vocab_size * FP32
    scored = hidden + degrees.tp * LOSS_VALUES * FP32 * tokens
    ends = hidden * stage.is_first + (logits if decodes else scored) * stage.is_last
    return TrafficBytes(
        dp=sum(_fsdp_weight(w, degrees, shape, 1, reductions=0) for block in blocks for w in block),
        tp=tp + _ring(degrees.tp, ends),
        cp=0 if decodes else len(stage.dense) * _context_parallel_layer(config, degrees, both) // 2,
        ep=stage.dense.count(False) * _dispatch_layer(config, degrees, both) // 2,
        pp=0 if stage.is_last else hidden // degrees.tp,
    )


def once_gathered_traffic(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, stage: StageLayers
) -> int:
    """Return the bytes that a rank sends, once, to gather what FSDP keeps between passes outside of training.

    That is what lies outside of the layers, and the layer of an MTP depth, which the last one prefetches.
    """
    root, *blocks = stage_weights(config, stage)
    weights = [weight for group in (root, *blocks[len(stage.dense) :][:1]) for weight in group]
    return sum(_fsdp_weight(weight, degrees, shape, 1, reductions=0) for weight in weights)


def _ring(ranks: int, total: int) -> int:
    """Return the bytes that one of `ranks` ranks sends to all-gather or reduce-scatter `total` bytes."""
    return total * (ranks - 1) // ranks


def _all_gathers(degrees: ParallelDims, shape: StepShape, rank: int) -> dict[int, tuple[int, int]]:
    """Count, per stage of a rank, FSDP's all-gathers per step of the root and of each block.

    Under pipeline parallelism torch's stages keep what the backward pass has gathered until the last
    microbatch, so that only a forward pass that frees it causes another all-gather.
    """
    micro, p = shape.microbatches, shape.pipelining
    if degrees.pp == 1:
        return {0: (micro, micro * (2 if shape.reshard_after_forward else 1))}
    counts: dict[int, int] = {}
    gathered: set[int] = set()
    for action in schedule_actions(p.schedule, rank, degrees.pp, p.per_rank, micro):
        if action.stage not in gathered:
            counts[action.stage] = counts.get(action.stage, 0) + 1
            gathered.add(action.stage)
        if action.kind == "F" and shape.reshard_after_forward:
            gathered.remove(action.stage)
    return {stage: (1, count) for stage, count in counts.items()}


def _fsdp(
    config: ModelConfig,
    degrees: ParallelDims,
    shape: StepShape,
    stage: StageLayers,
    gathers: tuple[int, int],
    reductions: int,
) -> int:
    """Count all-gathers of parameters in the dtype they are used in, reduce-scatters of fp32 gradients."""
    root, *blocks = stage_weights(config, stage)
    total = sum(_fsdp_weight(weight, degrees, shape, gathers[0], reductions) for weight in root)
    for block in blocks:
        total += sum(_fsdp_weight(weight, degrees, shape, gathers[1], reductions) for weight in block)
    return total


def _fsdp_weight(
    weight: Weight, degrees: ParallelDims, shape: StepShape, gathers: int, reductions: int
) -> int:
    """Count one weight's part of _fsdp; uneven shards are sent at the length of the longest."""
    ranks, held = shard_count(weight, degrees), shard_numel(weight, degrees)
    reductions *= shape.state.trains(weight)
    gathered = gathered_from(weight, degrees, held, shape.state.compute, shape.gathers_in_fp8)
    return _ring(ranks, ranks * (gathers * gathered + reductions * held * FP32))


def _all_reduce_replicas(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, stage: StageLayers, reductions: int
) -> int:
    """Count all-reduces of the shards' gradients over the replicas, in fp32."""
    trained = [w for group in stage_weights(config, stage) for w in group if shape.state.trains(w)]
    held = sum(shard_numel(weight, degrees) for weight in trained)
    return reductions * 2 * _ring(degrees.dp_replicate, held * FP32)


def _tensor_parallel_layer(config: ModelConfig, degrees: ParallelDims, shape: StepShape, dense: bool) -> int:
    """Count latents gathered and heads' sums scattered; in a dense layer hidden states both ways too."""
    a, repeats = config.attention, _passes(shape)
    latents = (a.q_lora_rank or config.dim) + a.kv_lora_rank + a.qk_rope_head_dim
    values = repeats * (latents + config.dim)
    if dense:
        # Recomputation ends before the last exchange of a layer: nothing in the layer needs its result.
        values += (repeats + 2) * config.dim
    return _ring(degrees.tp, shape.tokens(degrees) * values * shape.state.compute)


def _passes(shape: StepShape) -> int:
    """Count how often an exchange within a layer runs: forward, backward, and in a recomputed forward."""
    return 2 if shape.recompute is RecomputeMode.none else 3


def _tensor_parallel_ends(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, stage: StageLayers
) -> int:
    """Count embeddings scattered and hidden states gathered for the head, both ways; and the loss."""
    tokens = shape.tokens(degrees)
    hidden = 2 * (stage.embeds + stage.predictions) * config.dim * shape.state.compute
    loss = degrees.tp * LOSS_VALUES * stage.predictions * FP32
    return _ring(degrees.tp, tokens * (hidden + loss))


def _context_parallel_layer(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> int:
    """Count the all-gather of the latents of keys and values over the whole sequence."""
    a = config.attention
    row = shape.tokens(degrees) * degrees.cp * (a.kv_lora_rank + a.qk_rope_head_dim) * shape.state.compute
    return _passes(shape) * _ring(degrees.cp, row)


def _dispatch_layer(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> int:
    """Count rows to experts with their weights and rows back, and both again in the backward pass."""
    tokens = shape.tokens(degrees) // degrees.tp
    row = config.dim * shape.state.compute
    in_fp8 = shape.fp8 is not None and shape.fp8.dispatch
    outward = fp8_bytes((1, config.dim), (1, FP8_BLOCK)) if in_fp8 else row
    repeated = shape.recompute is RecomputeMode.full or (
        shape.recompute is RecomputeMode.selective and SavedOp.exchange not in shape.keep
    )
    total = 0.0
    for level in dispatch_levels(config.moe, degrees.ep, shape.ranks_per_node):
        # A row carries the weights of the experts behind its rank.
        with_weights = outward + 2 * FP32 * level.experts
        total += level.sent * (3 if repeated else 2) * (with_weights + row)
    return round(tokens * total)


def _stage_boundaries(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, stage: StageLayers
) -> int:
    """Count hidden states to the next stage and gradients to the previous one, if on other ranks."""
    if degrees.pp == 1:
        return 0
    neighbors = int(not stage.is_first) + int(not stage.is_last)
    # At the foot of a V two consecutive stages are on one rank.
    foot = is_v_shaped(shape.pipelining.schedule) and stage.index in (degrees.pp - 1, degrees.pp)
    size = shape.tokens(degrees) // degrees.tp * config.dim * shape.state.compute
    return shape.microbatches * size * (neighbors - int(foot))


def _embedding_duplicate(config: ModelConfig, degrees: ParallelDims, shape: StepShape, rank: int) -> int:
    """Count the all-reduce of the embedding's gradient over the end stages, if MTP duplicates it."""
    apart = degrees.pp > 1 and not is_v_shaped(shape.pipelining.schedule)
    if not apart or not config.mtp_depths or rank not in (0, degrees.pp - 1):
        return 0
    (embedding,) = parameters.embedding(config)
    if not shape.state.trains(embedding):
        return 0
    return 2 * _ring(2, shard_numel(embedding, degrees) * FP32)
