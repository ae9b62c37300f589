"""Memory per rank in bytes: state (parameters, gradients, optimizer), activations, and copies within a step.

An estimate without allocator fragmentation, workspaces of kernels, CUDA context and NCCL buffers. It is that
of the fullest rank: shard 0 (uneven shards round up) of the pipeline rank that needs most.
"""

from dataclasses import dataclass

from dsv3.config.model import ModelConfig
from dsv3.planning.group_bytes import stage_bytes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Weight
from dsv3.planning.pipeline_stages import StageLayers, stage_weights
from dsv3.planning.sharding import shard_numel
from dsv3.planning.step_peak import fullest_ranks, step_peak
from dsv3.planning.step_shape import StateBytes, StepShape


@dataclass(frozen=True)
class MemoryBytes:
    """Memory of one rank, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """At the fullest moment of a step, as is `weight_copies`."""
    weight_copies: int = 0
    """Weights gathered or cast within a step, and gradients on their way to the state."""
    late_gradients: int = 0
    """Part of `gradients` that is not there yet at the fullest moment of a step."""
    save_copies: int = 0
    """Copies that a background save writes from, if they are in the rank's own memory."""
    offloaded: int = 0
    """State that is in host memory instead of on the device; not part of any total."""
    pinned: int = 0
    """Host memory that is pinned: save copies of a GPU's tensors, and offloaded parameters and gradients."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        state = self.parameters + self.gradients - self.late_gradients + self.optimizer
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
    held = shape.stages_of_ranks(config, degrees)
    ranks = fullest_ranks(config, degrees, shape, held)
    every = (_memory(config, degrees, shape, rank, held[rank]) for rank in ranks)
    return max(every, key=lambda memory: memory.total)


def pipeline_memory(config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> list[MemoryBytes]:
    """Return, per pipeline rank, the bytes of the fullest of its ranks."""
    held = shape.stages_of_ranks(config, degrees)
    return [_memory(config, degrees, shape, rank, stages) for rank, stages in enumerate(held)]


def _memory(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, rank: int, stages: list[StageLayers]
) -> MemoryBytes:
    state = shape.state
    in_fp8 = shape.gathers_in_fp8
    groups = [g for stage in stages for g in stage_bytes(config, stage, degrees, state, in_fp8)]
    sizes = [
        sum(group.parameters for group in groups),
        sum(group.gradients for group in groups),
        sum(group.optimizer for group in groups),
    ]
    on_host = _pinned_state(_weights(config, stages), degrees, state) if shape.cpu_offload else 0
    parameters, gradients, optimizer = [0, 0, 0] if shape.cpu_offload else sizes
    peak = step_peak(config, degrees, shape, rank, stages)
    return MemoryBytes(
        parameters,
        gradients,
        optimizer,
        activations=peak.activations,
        weight_copies=peak.copies,
        late_gradients=0 if shape.cpu_offload else peak.late,
        save_copies=sizes[0] + sizes[2] if shape.host_copies else 0,
        offloaded=on_host + sizes[2] if shape.cpu_offload else 0,
        # A save of offloaded tensors copies within ordinary memory.
        pinned=on_host if shape.cpu_offload else sizes[0] + sizes[2] if shape.pinned_copies else 0,
    )


def _weights(config: ModelConfig, stages: list[StageLayers]) -> list[Weight]:
    return [w for stage in stages for group in stage_weights(config, stage) for w in group]


def _pinned_state(weights: list[Weight], degrees: ParallelDims, state: StateBytes) -> int:
    """Return the bytes of offloaded parameters and gradients, each rounded up to a power of two.

    FSDP2 takes them from PyTorch's pinned allocator, which rounds so; the optimizer's state is not pinned.
    """
    held = [(weight, shard_numel(weight, degrees)) for weight in weights]
    sizes = [count * state.parameter for _, count in held]
    sizes += [count * state.gradient for weight, count in held if state.trains(weight)]
    return sum(1 << (size - 1).bit_length() for size in sizes if size)
