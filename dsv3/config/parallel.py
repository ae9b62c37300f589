"""How many ranks each axis has: as typed, and resolved (docs/parallelism.md).

Which wrappers a run puts around the model: each one an object that conf/ instantiates.
"""

from dataclasses import dataclass, field, fields
from enum import Enum

from dsv3.errors import require, require_positive

KEY = "parallel.degrees"

AUTO = "auto"


@dataclass
class DegreesConfig:
    """Ranks an axis; `auto` fits world and model (filling.py), null is 1, for `dp_shard` what is left."""

    pp: int | str | None = None
    dp_replicate: int | str | None = None
    dp_shard: int | str | None = None
    cp: int | str | None = None
    tp: int | str | None = None
    ep: int | str | None = None

    def validate(self) -> None:
        """Refuse degrees below 1 and words other than auto."""
        for f in fields(self):
            value = getattr(self, f.name)
            right = value in (None, AUTO) or (isinstance(value, int) and value > 0)
            require(right, f.name, value, f"must be a number above 0, {AUTO} or null")

    @property
    def typed(self) -> dict[str, int]:
        """The degrees that are given as numbers, by axis."""
        return {axis: value for axis, value in vars(self).items() if isinstance(value, int)}

    def is_auto(self, axis: str) -> bool:
        """Whether `axis` is to fit world and model; `dp_shard` is also without a word."""
        return getattr(self, axis) == AUTO or (axis == "dp_shard" and self.dp_shard is None)


class Recomputed(Enum):
    """Which activations are computed again in the backward pass instead of being kept."""

    none = "none"
    selective = "selective"
    full = "full"


class Kept(Enum):
    """Results that selective recomputation keeps: costly to compute, or to exchange, for what they weigh."""

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


class ExchangeBackend(Enum):
    """What carries tokens to their experts."""

    all_to_all = "all_to_all"
    deepep = "deepep"


@dataclass
class RecomputeConfig:
    """Activation recomputation, a layer at a time; `keep` says what `selective` does not repeat."""

    _target_: str = "dsv3.parallel.activation_checkpoint.Recompute"
    _recursive_: bool = False
    _convert_: str = "object"
    mode: Recomputed = Recomputed.none
    keep: list[Kept] = field(default_factory=lambda: [Kept.attention, Kept.experts, Kept.exchange])


class CompileBackend(Enum):
    """What torch.compile makes of a layer: code, or the traced operators one by one (to find a fault)."""

    inductor = "inductor"
    aot_eager = "aot_eager"


@dataclass
class CompileConfig:
    """torch.compile, a layer at a time."""

    _target_: str = "dsv3.parallel.compile.Compile"
    _recursive_: bool = False
    _convert_: str = "object"
    enabled: bool = False
    backend: CompileBackend = CompileBackend.inductor


@dataclass
class FullyShardConfig:
    """FSDP2: parameters, gradients and optimizer state sharded over the ranks that see other tokens.

    `prefetch` gathers the next layer while this one computes; `cpu_offload` keeps the shards in host memory.
    """

    _target_: str = "dsv3.parallel.fsdp.FullyShard"
    _recursive_: bool = False
    _convert_: str = "object"
    prefetch: bool = True
    cpu_offload: bool = False


@dataclass
class TensorParallelConfig:
    """Heads, dense hidden widths and vocabulary over `tp`, the sequence between (docs/parallelism.md)."""

    _target_: str = "dsv3.parallel.tensor_parallel.TensorParallel"
    _recursive_: bool = False
    _convert_: str = "object"


@dataclass
class ExpertParallelConfig:
    """Experts over `ep`, in two levels where it spans nodes; `ranks_per_node` null asks the launch."""

    _target_: str = "dsv3.parallel.expert_parallel.ExpertParallel"
    _recursive_: bool = False
    _convert_: str = "object"
    backend: ExchangeBackend = ExchangeBackend.all_to_all
    ranks_per_node: int | None = None

    def validate(self) -> None:
        require_positive(self, "ranks_per_node")


@dataclass
class ContextParallelConfig:
    """Sequences over `cp` in the zigzag split; keys and values come from gathered latents."""

    _target_: str = "dsv3.parallel.context_parallel.ContextParallel"
    _recursive_: bool = False
    _convert_: str = "object"


@dataclass
class PipelineConfig:
    """Layers over `pp`; `split` names the first layer of every stage but the first, null balances by cost."""

    _target_: str = "dsv3.parallel.pipeline_parallel.Pipeline"
    _recursive_: bool = False
    _convert_: str = "object"
    split: list[int] | None = None
    stages_per_rank: int | None = None
    """Virtual stages a rank; null is the schedule's own number (1 or 2)."""

    def validate(self) -> None:
        require_positive(self, "stages_per_rank")
        split = self.split or []
        allowed = "must be ascending layer numbers above 0: the first layer of every stage but the first"
        require(split == sorted({n for n in split if n > 0}), "split", split, allowed)


@dataclass
class ParallelConfig:
    """The degrees of the mesh and the wrappers, each of which does nothing where its degree is 1.

    `reshard_after_forward` true frees gathered parameters after the forward pass (ZeRO-3), false keeps
    them until the backward pass; null is true wherever the schedule can (stages.py). `min_world_size` is
    what a plain start on CPU launches. Null leaves a wrapper out, and then its degree must be 1.
    """

    degrees: DegreesConfig = field(default_factory=DegreesConfig)
    reshard_after_forward: bool | None = None
    schedule: Schedule = Schedule["1F1B"]
    min_world_size: int = 1
    fsdp: FullyShardConfig | None = field(default_factory=FullyShardConfig)
    tensor: TensorParallelConfig | None = field(default_factory=TensorParallelConfig)
    expert: ExpertParallelConfig | None = field(default_factory=ExpertParallelConfig)
    context: ContextParallelConfig | None = field(default_factory=ContextParallelConfig)
    pipeline: PipelineConfig | None = field(default_factory=PipelineConfig)

    def validate(self) -> None:
        require_positive(self, "min_world_size")
