"""Bytes a rank needs: state that stays, activations, and copies that live within a step.

A first estimate without allocator fragmentation, CUDA context and NCCL buffers. The rank reported is
the fullest: shard 0 (uneven shards round up), of the pipeline rank that needs most.
"""

from dataclasses import dataclass

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import Recomputed
from dsv3.planning.activations import Activations, TokenBytes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Weight
from dsv3.planning.pipeline_schedules import order
from dsv3.planning.pipeline_stages import Stage, stage_groups
from dsv3.planning.sharding import (
    FP32,
    computes_in_fp32,
    gathered_bytes,
    local_numel,
    multiplies_in_fp8,
    stored,
)
from dsv3.planning.step_shape import StepShape

# FSDP2 gathers the next block while it computes this one.
GATHERED_BLOCKS = 2


@dataclass(frozen=True)
class MemoryBytes:
    """One rank's bytes; `weight_copies` are weights gathered or cast within a step, and their gradients.

    `save_copies` are what a checkpoint is written from while training goes on, where that is the memory of
    the host. `offloaded` is what the host keeps of the state in place of the device; it is in no total.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    weight_copies: int = 0
    save_copies: int = 0
    offloaded: int = 0

    @property
    def total(self) -> int:
        """All that is on the device."""
        state = self.parameters + self.gradients + self.optimizer
        return state + self.activations + self.weight_copies + self.save_copies

    def to_json(self) -> dict[str, int]:
        """The contract's five keys: `activations` is all that is no state, the copies too."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.total - self.parameters - self.gradients - self.optimizer,
            "total": self.total,
        }


def rank_memory(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> MemoryBytes:
    """Bytes of the fullest rank."""
    return max(pipeline_memory(config, degrees, shape), key=lambda memory: memory.total)


def pipeline_memory(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> list[MemoryBytes]:
    """Bytes of the fullest rank among those of each pipeline rank."""
    held = shape.stages_of_ranks(config, degrees)
    return [_memory(config, degrees, shape, rank, stages) for rank, stages in enumerate(held)]


def _memory(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, rank: int, stages: list[Stage]
) -> MemoryBytes:
    groups = [stage_groups(config, stage) for stage in stages]
    held = sum(stored(weight, degrees) for stage in groups for group in stage for weight in group)
    state = shape.state
    sizes = [held * state.parameter, held * state.gradient, held * state.optimizer]
    parameters, gradients, optimizer = [0, 0, 0] if shape.cpu_offload else sizes
    return MemoryBytes(
        parameters,
        gradients,
        optimizer,
        activations=_activations(config, degrees, shape, rank, stages),
        weight_copies=_weight_copies(groups, degrees, shape),
        save_copies=sizes[0] + sizes[2] if shape.staged else 0,
        offloaded=sum(sizes) if shape.cpu_offload else 0,
    )


def _weight_copies(stages: list[list[list[Weight]]], degrees: ParallelDims, shape: StepShape) -> int:
    """Bytes of gathered or cast weights, and of gradients before they are scattered.

    Under pipeline parallelism torch's stages keep gathered weights and unscattered fp32 gradients until
    the last microbatch. In one process nothing is gathered; a weight cast at its use (bf16 compute)
    stays for the backward pass all the same.
    """
    if degrees.world_size == 1:
        return _casts(stages[0], shape)
    compute, pipelined = shape.state.compute, degrees.pp > 1
    roots = sum(_gathered(stage[0], degrees, shape) for stage in stages)
    blocks = [_gathered(block, degrees, shape) for stage in stages for block in stage[1:]]
    blocks.sort(reverse=True)
    copies = roots + sum(blocks if pipelined or not shape.reshard_after_forward else blocks[:GATHERED_BLOCKS])
    numbers = [sum(local_numel(w, degrees) for w in group) for stage in stages for group in stage]
    # The gradients of one group in the dtype they come in, and in fp32 as they are summed.
    scattered = max(numbers) * (FP32 + compute)
    return copies + scattered + (sum(numbers) * FP32 if pipelined else 0)


def _gathered(group: list[Weight], degrees: ParallelDims, shape: StepShape) -> int:
    compute, in_fp8 = shape.state.compute, shape.gathers_in_fp8
    return sum(gathered_bytes(weight, degrees, compute, in_fp8) for weight in group)


def _casts(groups: list[list[Weight]], shape: StepShape) -> int:
    """Bytes of the weights that one process casts; under recomputation those of a block at a time."""
    if shape.state.compute == shape.state.parameter:
        return 0
    root, *blocks = [sum(_cast(weight, shape) for weight in group) for group in groups]
    kept = sum(blocks) if shape.recompute is Recomputed.none else max(blocks)
    return (root + kept) * shape.state.compute


def _cast(weight: Weight, shape: StepShape) -> int:
    """Numbers of a weight whose cast is kept; products in FP8 keep the master and cast it again."""
    kept = weight.is_matrix and not computes_in_fp32(weight)
    return 0 if not kept or (shape.fp8 is not None and multiplies_in_fp8(weight)) else weight.numel


def _activations(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, rank: int, held: list[Stage]
) -> int:
    """Saved activations of the microbatches that are under way together, at the worst moment of a step."""
    saved = Activations(config, shape.state.compute, shape.fused_kernels, degrees, shape.ranks_per_node)
    tokens = shape.tokens(degrees)
    each = {stage.index: _kept(saved, shape, stage).on_rank(tokens, degrees.tp) for stage in held}
    working = 0
    if shape.recompute is not Recomputed.none:
        # The block that is being computed again is whole.
        kinds = {dense for stage in held for dense in stage.block_kinds}
        working = max(saved.block(dense).on_rank(tokens, degrees.tp) for dense in kinds)
    if degrees.pp == 1:
        return each[0] + working
    boundary = saved.block_input().on_rank(tokens, degrees.tp)
    ends = sum(1 + (not stage.is_first) - stage.is_last for stage in held)
    # torch's stages receive every microbatch's input and gradient in a buffer of its own.
    return _peak(degrees, shape, rank, each) + working + ends * boundary * shape.microbatches


def _peak(degrees: ParallelDims, shape: StepShape, rank: int, each: dict[int, int]) -> int:
    """The most bytes at once, where a forward pass keeps `each` stage's until its backward pass is over."""
    p, now, most = shape.pipelining, 0, 0
    for action in order(p.schedule, rank, degrees.pp, p.per_rank, shape.microbatches):
        if action.kind == "F":
            now += each[action.stage]
            most = max(most, now)
        elif action.kind != "I":
            now -= each[action.stage]
    return most


def _kept(saved: Activations, shape: StepShape, stage: Stage) -> TokenBytes:
    """What one microbatch leaves at a stage."""
    kept = TokenBytes(0)
    for dense in stage.block_kinds:
        if shape.recompute is Recomputed.none:
            kept += saved.block(dense)
        elif shape.recompute is Recomputed.full:
            kept += saved.block_input()
        else:
            kept += saved.kept(dense, shape.keep)
    for _ in range(stage.predictions):
        kept += saved.logits()
    for _ in range(stage.mtp_depths):
        kept += saved.mtp_join()
    return kept
