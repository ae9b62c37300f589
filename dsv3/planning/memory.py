"""Memory per rank in bytes: state (parameters, gradients, optimizer), activations, and copies within a step.

An estimate without allocator fragmentation, CUDA context and NCCL buffers. It is that of the fullest rank:
shard 0 (uneven shards round up) of the pipeline rank that needs most.
"""

from dataclasses import dataclass

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import RecomputeMode
from dsv3.planning.activations import Activations, TokenBytes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Weight
from dsv3.planning.pipeline_schedules import schedule_actions
from dsv3.planning.pipeline_stages import StageLayers, stage_weights
from dsv3.planning.sharding import (
    FP32,
    gathered_bytes,
    is_used_in_fp32,
    local_numel,
    shard_numel,
    shard_shape,
    uses_fp8_matmul,
)
from dsv3.planning.step_shape import StateBytes, StepShape

GATHERED_BLOCKS = 2
"""FSDP2 gathers the next block while it computes the current one."""


@dataclass(frozen=True)
class MemoryBytes:
    """Memory of one rank, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    weight_copies: int = 0
    """Weights gathered or cast within a step, and their gradients before the reduce-scatter."""
    save_copies: int = 0
    """Copies that a background save writes from, if they are in the rank's own memory."""
    offloaded: int = 0
    """State that is in host memory instead of on the device; not part of any total."""
    pinned: int = 0
    """Host memory that is pinned: save copies of a GPU's tensors, and offloaded parameters and gradients."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        state = self.parameters + self.gradients + self.optimizer
        return state + self.activations + self.weight_copies + self.save_copies

    def to_json(self) -> dict[str, int]:
        """Return the five keys of the contract; `activations` contains everything but the state."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.total - self.parameters - self.gradients - self.optimizer,
            "total": self.total,
        }


def rank_memory(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> MemoryBytes:
    """Return the bytes of the fullest rank."""
    return max(pipeline_memory(config, degrees, shape), key=lambda memory: memory.total)


def pipeline_memory(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> list[MemoryBytes]:
    """Return, per pipeline rank, the bytes of the fullest of its ranks."""
    held = shape.stages_of_ranks(config, degrees)
    return [_memory(config, degrees, shape, rank, stages) for rank, stages in enumerate(held)]


def _memory(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, rank: int, stages: list[StageLayers]
) -> MemoryBytes:
    groups = [stage_weights(config, stage) for stage in stages]
    weights = [weight for stage in groups for group in stage for weight in group]
    state = shape.state
    sizes = [
        sum(shard_numel(weight, degrees) for weight in weights) * state.parameter,
        sum(shard_numel(weight, degrees) for weight in weights if state.trains(weight)) * state.gradient,
        sum(state.optimizer_bytes(weight, shard_shape(weight, degrees)) for weight in weights),
    ]
    parameters, gradients, optimizer = [0, 0, 0] if shape.cpu_offload else sizes
    return MemoryBytes(
        parameters,
        gradients,
        optimizer,
        activations=_activations(config, degrees, shape, rank, stages),
        weight_copies=_weight_copies(groups, degrees, shape),
        save_copies=sizes[0] + sizes[2] if shape.host_copies else 0,
        offloaded=_pinned_state(weights, degrees, state) + sizes[2] if shape.cpu_offload else 0,
        pinned=_pinned(weights, degrees, shape, sizes[0] + sizes[2]),
    )


def _pinned(weights: list[Weight], degrees: ParallelDims, shape: StepShape, copies: int) -> int:
    """Return the bytes of pinned host memory; a save of offloaded tensors copies within ordinary memory."""
    if shape.cpu_offload:
        return _pinned_state(weights, degrees, shape.state)
    return copies if shape.pinned_copies else 0


def _pinned_state(weights: list[Weight], degrees: ParallelDims, state: StateBytes) -> int:
    """Return the bytes of offloaded parameters and gradients, each rounded up to a power of two.

    FSDP2 takes them from PyTorch's pinned allocator, which rounds so; the optimizer's state is not pinned.
    """
    held = [(weight, shard_numel(weight, degrees)) for weight in weights]
    sizes = [count * state.parameter for _, count in held]
    sizes += [count * state.gradient for weight, count in held if state.trains(weight)]
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


def _weight_copies(stages: list[list[list[Weight]]], degrees: ParallelDims, shape: StepShape) -> int:
    """Return the bytes of gathered or cast weights, and of gradients before the reduce-scatter.

    Under pipeline parallelism torch's stages keep gathered weights and unsharded fp32 gradients until the
    last microbatch. One process gathers nothing, but a weight that is cast where it is used (bf16 compute)
    stays for the backward pass.
    """
    if degrees.world_size == 1:
        return _cast_copies(stages[0], shape)
    compute, pipelined = shape.state.compute, degrees.pp > 1
    roots = sum(_gathered(stage[0], degrees, shape) for stage in stages)
    blocks = [_gathered(block, degrees, shape) for stage in stages for block in stage[1:]]
    blocks.sort(reverse=True)
    copies = roots + sum(blocks if pipelined or not shape.reshard_after_forward else blocks[:GATHERED_BLOCKS])
    trains = shape.state.trains
    sizes = [sum(local_numel(w, degrees) for w in group if trains(w)) for stage in stages for group in stage]
    # The gradients of one group, in the dtype they come in and in fp32 as they are reduced.
    reduced = max(sizes) * (FP32 + compute)
    return copies + reduced + (sum(sizes) * FP32 if pipelined else 0)


def _gathered(group: list[Weight], degrees: ParallelDims, shape: StepShape) -> int:
    compute, in_fp8 = shape.state.compute, shape.gathers_in_fp8
    return sum(gathered_bytes(weight, degrees, compute, in_fp8) for weight in group)


def _cast_copies(groups: list[list[Weight]], shape: StepShape) -> int:
    """Return the bytes of weights that one process casts; with activation checkpointing of one block only."""
    if shape.state.compute == shape.state.parameter:
        return 0

    def saves_cast(weight: Weight) -> bool:
        # FP8 matmuls save the master weight and quantize it again.
        in_fp8 = shape.fp8 is not None and uses_fp8_matmul(weight)
        return weight.is_matrix and not is_used_in_fp32(weight) and not in_fp8

    root, *blocks = [sum(weight.numel for weight in group if saves_cast(weight)) for group in groups]
    kept = sum(blocks) if shape.recompute is RecomputeMode.none else max(blocks)
    return (root + kept) * shape.state.compute


def _activations(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, rank: int, stages: list[StageLayers]
) -> int:
    """Return the bytes of saved activations of all microbatches in flight, at the peak of a step."""
    saved = Activations(config, shape.state.compute, shape.fused_kernels, degrees, shape.ranks_per_node)
    tokens = shape.tokens(degrees)
    each = {stage.index: _per_microbatch(saved, shape, stage).on_rank(tokens, degrees.tp) for stage in stages}
    working = 0
    if shape.recompute is not RecomputeMode.none:
        # The block that is being recomputed has all of its activations.
        kinds = {dense for stage in stages for dense in stage.block_kinds}
        working = max(saved.block(dense).on_rank(tokens, degrees.tp) for dense in kinds)
    if degrees.pp == 1:
        return each[0] + working
    boundary = saved.block_input().on_rank(tokens, degrees.tp)
    ends = sum(1 + (not stage.is_first) - stage.is_last for stage in stages)
    # torch's stages receive every microbatch's input and gradient in a buffer of its own.
    return _peak(degrees, shape, rank, each) + working + ends * boundary * shape.microbatches


def _peak(degrees: ParallelDims, shape: StepShape, rank: int, each: dict[int, int]) -> int:
    """Return the most bytes at once, if a microbatch keeps `each` stage's bytes from forward to backward."""
    p, now, most = shape.pipelining, 0, 0
    for action in schedule_actions(p.schedule, rank, degrees.pp, p.per_rank, shape.microbatches):
        if action.kind == "F":
            now += each[action.stage]
            most = max(most, now)
        elif action.kind != "I":
            now -= each[action.stage]
    return most


def _per_microbatch(saved: Activations, shape: StepShape, stage: StageLayers) -> TokenBytes:
    """Return what the forward pass of one microbatch saves in a stage."""
    kept = TokenBytes(0)
    for dense in stage.block_kinds:
        if shape.recompute is RecomputeMode.none:
            kept += saved.block(dense)
        elif shape.recompute is RecomputeMode.full:
            kept += saved.block_input()
        else:
            kept += saved.selective(dense, shape.keep)
    for _ in range(stage.predictions):
        kept += saved.logits()
    for _ in range(stage.mtp_depths):
        kept += saved.mtp_join()
    return kept
