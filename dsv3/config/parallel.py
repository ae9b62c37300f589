"""Schemas of the `parallel`, `recompute` and `compile` groups: degrees, and the wrappers around the model."""

from dataclasses import dataclass, field
from enum import Enum

from dsv3.config.registry import Buildable, schema
from dsv3.errors import require, require_positive

KEY = "parallel.degrees"

AUTO = "auto"

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
"""The axes of the mesh, outermost first, by the names of their degrees."""

WORLD_AXES = AXES[:-1]
"""The axes whose degrees multiply to the world size; `ep` borrows ranks of dp_shard, cp and tp."""


@dataclass
class DegreesConfig:
    """Ranks per mesh axis (docs/parallelism.md).

    `auto` fits the world and the model (planning/layout.py).
    """

    pp: int | str | None = None
    """Pipeline ranks; null is 1, auto fits world and model."""
    dp_replicate: int | str | None = None
    """Data-parallel replicas of the shards (HSDP); null is 1, auto fits world and model."""
    dp_shard: int | str | None = None
    """Data-parallel ranks over which FSDP shards; null is what the world leaves."""
    cp: int | str | None = None
    """Context-parallel ranks of a sequence; null is 1, auto fits world and model."""
    tp: int | str | None = None
    """Tensor-parallel ranks of a layer; null is 1, auto fits world and model."""
    ep: int | str | None = None
    """Expert-parallel ranks, out of dp_shard x cp x tp; null is 1, auto fits world and model."""

    def validate(self) -> None:
        """Raise InvalidValue for degrees below 1 and for words other than auto."""
        for axis in AXES:
            degree = getattr(self, axis)
            valid = degree in (None, AUTO) or (isinstance(degree, int) and degree > 0)
            require(valid, axis, degree, f"must be a number above 0, {AUTO} or null")

    @property
    def typed(self) -> dict[str, int]:
        """Return the degrees that are given as numbers, by axis."""
        degrees = {axis: getattr(self, axis) for axis in AXES}
        return {axis: degree for axis, degree in degrees.items() if isinstance(degree, int)}

    def is_auto(self, axis: str) -> bool:
        """Return True where `axis` is to fit world and model; `dp_shard` also when it is left out."""
        return getattr(self, axis) == AUTO or (axis == "dp_shard" and self.dp_shard is None)


class RecomputeMode(Enum):
    """Activation checkpointing: the activations that the backward pass computes again instead of keeping."""

    none = "none"
    selective = "selective"
    full = "full"


class SavedOp(Enum):
    """Results that selective activation checkpointing keeps: costly to compute or exchange for their size."""

    attention = "attention"
    experts = "experts"
    exchange = "exchange"
    matmuls = "matmuls"


Schedule = Enum(
    "Schedule",
    {
        "GPipe": "GPipe",
        "1F1B": "1F1B",
        "Interleaved1F1B": "Interleaved1F1B",
        "InterleavedZeroBubble": "InterleavedZeroBubble",
        "ZBVZeroBubble": "ZBVZeroBubble",
        "DualPipeV": "DualPipeV",
    },
)
"""The pipeline schedules of torch.distributed.pipelining, by its names."""


class DispatchBackend(Enum):
    """The implementation of token dispatch: what carries tokens to their experts."""

    all_to_all = "all_to_all"
    deepep = "deepep"


@schema("recompute", choice="none")
@dataclass
class RecomputeConfig(Buildable):
    """Activation checkpointing, layer by layer."""

    _target_: str = "dsv3.parallel.activation_checkpoint.ActivationCheckpointing"
    mode: RecomputeMode = RecomputeMode.none
    """Activations to compute again: none, all but some operators' (selective), or whole layers (full)."""
    keep: list[SavedOp] = field(
        default_factory=lambda: [SavedOp.attention, SavedOp.experts, SavedOp.exchange]
    )
    """Results that `selective` does not compute again."""


class CompileBackend(Enum):
    """The backend of torch.compile: code, or the traced operators one by one (to find a fault)."""

    inductor = "inductor"
    aot_eager = "aot_eager"


@schema("compile", choice="off")
@dataclass
class CompileConfig(Buildable):
    """torch.compile, layer by layer."""

    _target_: str = "dsv3.parallel.compile.Compile"
    enabled: bool = False
    """Compile the layers."""
    backend: CompileBackend = CompileBackend.inductor
    """inductor generates code; aot_eager runs the traced operators one by one, to find a fault."""


@dataclass
class FullyShardConfig(Buildable):
    """FSDP2: parameters, gradients and optimizer state sharded over the ranks that see other tokens."""

    _target_: str = "dsv3.parallel.fsdp.FullyShard"
    prefetch: bool = True
    """All-gather the next layer while this one computes."""
    cpu_offload: bool = False
    """Keep the shards in host memory."""


@dataclass
class TensorParallelConfig(Buildable):
    """Heads, dense hidden widths and vocabulary over `tp`, the sequence between (docs/parallelism.md)."""

    _target_: str = "dsv3.parallel.tensor_parallel.TensorParallel"


@dataclass
class ExpertParallelConfig(Buildable):
    """Experts over `ep`, in two levels where it spans nodes."""

    _target_: str = "dsv3.parallel.expert_parallel.ExpertParallel"
    backend: DispatchBackend = DispatchBackend.all_to_all
    """Implementation of token dispatch: all_to_all, or deepep on GPUs."""
    ranks_per_node: int | None = None
    """Ranks per node, for the exchange in two levels; null asks the launch."""

    def validate(self) -> None:
        require_positive(self, "ranks_per_node")


@dataclass
class ContextParallelConfig(Buildable):
    """Sequences over `cp` in the zigzag split; keys and values come from gathered latents."""

    _target_: str = "dsv3.parallel.context_parallel.ContextParallel"


@dataclass
class PipelineConfig(Buildable):
    """Layers over `pp`."""

    _target_: str = "dsv3.parallel.pipeline_parallel.PipelineParallel"
    split: list[int] | None = None
    """First layer of every stage but the first; null balances the stages by cost."""
    stages_per_rank: int | None = None
    """Virtual stages per rank; null is the schedule's own number (1 or 2)."""

    def validate(self) -> None:
        require_positive(self, "stages_per_rank")
        split = self.split or []
        allowed = "must be ascending layer numbers above 0: the first layer of every stage but the first"
        require(split == sorted({n for n in split if n > 0}), "split", split, allowed)


@schema("parallel")
@dataclass
class ParallelConfig:
    """Degrees of the mesh and the wrappers, each of which does nothing where its degree is 1.

    A wrapper that is null is left out, and then its degree must be 1.
    """

    degrees: DegreesConfig = field(default_factory=DegreesConfig)
    """Ranks per mesh axis."""
    reshard_after_forward: bool | None = None
    """Free gathered parameters after the forward pass (ZeRO-3); null does where the schedule can."""
    schedule: Schedule = Schedule["1F1B"]
    """Pipeline schedule."""
    min_world_size: int = 1
    """Ranks that a plain start on CPU launches at least."""
    fsdp: FullyShardConfig | None = field(default_factory=FullyShardConfig)
    """FSDP2; null leaves it out."""
    tensor: TensorParallelConfig | None = field(default_factory=TensorParallelConfig)
    """Tensor parallelism; null leaves it out."""
    expert: ExpertParallelConfig | None = field(default_factory=ExpertParallelConfig)
    """Expert parallelism; null leaves it out."""
    context: ContextParallelConfig | None = field(default_factory=ContextParallelConfig)
    """Context parallelism; null leaves it out."""
    pipeline: PipelineConfig | None = field(default_factory=PipelineConfig)
    """Pipeline parallelism; null leaves it out."""

    def validate(self) -> None:
        require_positive(self, "min_world_size")
