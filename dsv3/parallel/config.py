"""Which wrappers a run puts around the model: each one an object that conf/ instantiates."""

from dataclasses import dataclass, field
from enum import Enum

from dsv3.parallel.degrees import DegreesConfig


class Recomputed(Enum):
    """Which activations are computed again in the backward pass instead of being kept."""

    none = "none"
    full = "full"


@dataclass
class RecomputeConfig:
    """Activation recomputation, a layer at a time."""

    _target_: str = "dsv3.parallel.recompute.Recompute"
    _recursive_: bool = False
    _convert_: str = "object"
    mode: Recomputed = Recomputed.none


@dataclass
class CompileConfig:
    """torch.compile, a layer at a time."""

    _target_: str = "dsv3.parallel.compile.Compile"
    _recursive_: bool = False
    _convert_: str = "object"
    enabled: bool = False


@dataclass
class FullyShardConfig:
    """FSDP2: parameters, gradients and optimizer state sharded over the data-parallel ranks."""

    _target_: str = "dsv3.parallel.fsdp.FullyShard"
    _recursive_: bool = False
    _convert_: str = "object"


@dataclass
class ParallelConfig:
    """The degrees of the mesh and the wrappers that apply to it; null leaves a wrapper out.

    `reshard_after_forward` true frees gathered parameters after the forward pass (ZeRO-3), false keeps
    them until the backward pass. `smallest_world` is what a plain start on CPU launches.
    """

    degrees: DegreesConfig = field(default_factory=DegreesConfig)
    reshard_after_forward: bool = True
    smallest_world: int = 1
    fsdp: FullyShardConfig | None = None
