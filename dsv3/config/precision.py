"""Number formats of matrix products and of AdamW's moments; master weights and gradients are fp32."""

from dataclasses import dataclass
from enum import Enum


class ComputeType(Enum):
    """The dtype of activations and of the weights' working copies."""

    fp32 = "float32"
    bf16 = "bfloat16"


class MomentType(Enum):
    """The dtype of AdamW's two moments; bf16 is the report's (section 3.3.3)."""

    fp32 = "float32"
    bf16 = "bfloat16"


class Granularity(Enum):
    """What shares a scale: tiles of 128 and blocks of 128 x 128 (the report's), or a whole tensor."""

    tile = "tile"
    tensor = "tensor"


class FP8Engine(Enum):
    """What multiplies: PyTorch's block-wise scaled_mm on Hopper, the same arithmetic in fp32 elsewhere."""

    auto = "auto"
    scaled_mm = "scaled_mm"
    emulated = "emulated"


@dataclass
class BlockFP8Config:
    """Linear layers and experts in FP8 (E4M3), forward and backward; DeepSeek-V3's report, section 3.3.

    `power_of_two` rounds scales up to powers of two (ue8m0, V3.1). `dispatch` lets rows travel to their
    experts, and gradients of results back to them, in FP8; results and gradients of rows stay bf16.
    `gather` lets FSDP gather and keep weights in FP8 where a shard holds whole blocks. `granularity=tensor`
    is there to show what goes wrong without tiles.
    """

    _target_: str = "dsv3.fp8.convert_model.BlockFP8"
    _recursive_: bool = False
    _convert_: str = "object"
    granularity: Granularity = Granularity.tile
    power_of_two: bool = False
    engine: FP8Engine = FP8Engine.auto
    dispatch: bool = False
    gather: bool = False


@dataclass
class PrecisionConfig:
    """A type's `.value` is the torch dtype's name; master weights and gradients are fp32.

    `fp8` takes the linear layers' matrix products from `compute`, which everything else keeps.
    """

    compute: ComputeType = ComputeType.fp32
    moments: MomentType = MomentType.fp32
    fp8: BlockFP8Config | None = None
