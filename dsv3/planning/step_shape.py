"""The shape of an optimizer step: what the plan reads from a config besides the model and the degrees."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from dsv3.config.model import ModelConfig, MoEConfig
from dsv3.config.parallel import DispatchBackend, RecomputeMode, SavedOp
from dsv3.planning.dispatch_volume import DispatchLevel, dispatch_levels
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameter_groups import HIDDEN_MATRICES, is_frozen
from dsv3.planning.parameters import Weight
from dsv3.planning.pipeline_stages import PipelineShape, StageLayers, build_stages, stages_of_rank


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter: fp32 master weight and gradient, optimizer state, copy in the compute dtype.

    The optimizer's config says what its state takes (config/optimizer.py); the default is AdamW with fp32
    moments.
    """

    parameter: int = 4
    gradient: int = 4
    optimizer: int = 8
    compute: int = 4
    unknown_optimizer: str = ""
    """`_target_` of an optimizer whose state is not known; its bytes are then assumed."""
    hidden: int | None = None
    """Optimizer state of the matrices of hidden layers, where it is another (Muon)."""
    factored: bool = False
    """The state of a matrix is a value per row and one per column, each of `optimizer` bytes (Adafactor)."""
    frozen: tuple[str, ...] = ()
    """Patterns of parameters that are not trained."""

    def trains(self, weight: Weight) -> bool:
        """Return True where a weight has a gradient and optimizer state."""
        return not self.frozen or not is_frozen(weight.name, self.frozen)

    def optimizer_bytes(self, weight: Weight, shard: tuple[int, ...]) -> int:
        """Return the bytes of optimizer state of a shard of `weight` of this shape."""
        if not self.trains(weight):
            return 0
        if self.factored and len(shard) > 1:
            *stack, rows, columns = shard
            return math.prod(stack) * (rows + columns) * self.optimizer if math.prod(shard) else 0
        of_hidden = self.hidden is not None and weight.component in HIDDEN_MATRICES
        return math.prod(shard) * (self.hidden if of_hidden and self.hidden is not None else self.optimizer)

    def to_text(self) -> str:
        """Describe the policy in the words of docs/precision.md."""
        optimizer = f"optimizer {self.optimizer}"
        if self.unknown_optimizer:
            optimizer += f" (assumed for {self.unknown_optimizer})"
        elif self.factored:
            optimizer += " per row and column"
        elif self.hidden is not None:
            optimizer = f"optimizer {self.hidden} (hidden matrices) or {self.optimizer}"
        kept = f"master {self.parameter}, gradient {self.gradient}, {optimizer}"
        frozen = f"; frozen: {', '.join(self.frozen)}" if self.frozen else ""
        return f"{kept}, compute copy {self.compute}{frozen}"


@dataclass(frozen=True)
class FP8Shape:
    """FP8 matmuls in linear layers and experts; `dispatch` sends rows, `gather` gathers weights in FP8."""

    dispatch: bool = False
    gather: bool = False
    emulated: bool = False
    """The matmuls are emulated in fp32: the numbers of FP8 without its speed."""


@dataclass(frozen=True)
class StepShape:
    """Sizes and settings that decide what a rank computes at once and keeps in memory."""

    microbatch_size: int
    """Sequences per microbatch."""
    sequence_length: int
    """Tokens per sequence."""
    microbatches: int = 1
    """Microbatches per step (gradient accumulation, or the pipeline's)."""
    recompute: RecomputeMode = RecomputeMode.none
    """Activation checkpointing."""
    reshard_after_forward: bool = True
    state: StateBytes = field(default_factory=StateBytes)
    fused_kernels: bool = True
    """A norm is one kernel, as on GPUs."""
    keep: tuple[SavedOp, ...] = ()
    """Operators whose results selective activation checkpointing keeps."""
    pipelining: PipelineShape = field(default_factory=PipelineShape)
    cpu_offload: bool = False
    """Parameters, gradients and optimizer state are in host memory."""
    host_copies: bool = False
    """A background save writes from copies in the memory that the rank itself uses (on CPU)."""
    pinned_copies: bool = False
    """A background save writes from copies of a GPU's tensors in pinned host memory."""
    ranks_per_node: int | None = None
    """None is one node."""
    fp8: FP8Shape | None = None
    compiled: bool = False
    """Element-wise operators are fused, as torch.compile does."""
    tf32: bool = False
    """fp32 matmuls run on TF32 tensor cores."""
    dispatch: DispatchBackend = DispatchBackend.all_to_all
    """The implementation of token dispatch."""

    fused_operators: ClassVar[bool] = False
    """Operators that other software fuses and this does not: gate and up projection are one matmul, kernels
    write FP8 operands with their results, and the router's matmul runs on tensor cores."""

    @property
    def gathers_in_fp8(self) -> bool:
        """True if FSDP gathers weights as FP8 codes and scales whenever their shards allow it."""
        return self.fp8 is not None and self.fp8.gather

    def tokens(self, degrees: ParallelDims) -> int:
        """Return the tokens of a microbatch that the ranks of one tp group share."""
        return self.microbatch_size * self.sequence_length // degrees.cp

    def dispatch_levels(self, moe: MoEConfig, degrees: ParallelDims) -> list[DispatchLevel]:
        """Return the exchanges of rows that take a token to its experts; see dispatch_volume.py."""
        return dispatch_levels(moe, degrees.ep, self.ranks_per_node)

    def fsdp_rounds(self, degrees: ParallelDims) -> tuple[int, int, int]:
        """Return how often a step gathers a stage's weights in forward and in backward passes, and reduces.

        Under pipeline parallelism torch's stages keep what the backward pass has gathered until the last
        microbatch, so that only a forward pass that frees it causes another all-gather.
        """
        if degrees.pp > 1:
            return (self.microbatches if self.reshard_after_forward else 1), 0, 1
        return self.microbatches, self.microbatches * self.reshard_after_forward, self.microbatches

    def stages_of_ranks(self, config: ModelConfig, degrees: ParallelDims) -> list[list[StageLayers]]:
        """Return the stages of each pipeline rank; without pipeline parallelism one with the whole model."""
        if degrees.pp == 1:
            return [build_stages(config, 1)]
        p = self.pipelining
        every = build_stages(config, degrees.pp * p.per_rank, p.split)
        ranks = range(degrees.pp)
        return [
            [every[n] for n in stages_of_rank(p.schedule, rank, degrees.pp, p.per_rank)] for rank in ranks
        ]
