"""Schema of the `precision` group: the number formats of matmuls and of AdamW's moments."""

from dataclasses import dataclass, replace
from enum import Enum

from dsv3.config.hardware import CPU
from dsv3.config.registry import Buildable, schema


class ComputeType(Enum):
    """The dtype of activations and of the weights' working copies; the value is torch's name.

    `auto` is gone before anything is computed: launch/job.py puts the device's default in its place.
    """

    auto = "auto"
    fp32 = "float32"
    bf16 = "bfloat16"


def default_compute(device: str) -> ComputeType:
    """Return the dtype that `auto` means on a device, by its name: fp32 on cpu, bf16 on any GPU."""
    return ComputeType.fp32 if device == CPU else ComputeType.bf16


class MatmulPrecision(Enum):
    """The arithmetic of fp32 matmuls on a GPU; the value is torch.set_float32_matmul_precision's."""

    highest = "highest"
    high = "high"


class MomentType(Enum):
    """The dtype of AdamW's two moments; bf16 is the report's (section 3.3.3)."""

    fp32 = "float32"
    bf16 = "bfloat16"


class Granularity(Enum):
    """The elements that share a scale: tiles of 128 and blocks of 128 x 128 (the report's), or a tensor."""

    tile = "tile"
    tensor = "tensor"


class FP8Engine(Enum):
    """The FP8 matmul: PyTorch's block-wise scaled_mm on Hopper, the same arithmetic in fp32 on any device."""

    auto = "auto"
    scaled_mm = "scaled_mm"
    emulated = "emulated"


@dataclass
class BlockFP8Config(Buildable):
    """Linear layers and experts in FP8 (E4M3), forward and backward; DeepSeek-V3's report, section 3.3."""

    _target_: str = "dsv3.fp8.convert_model.BlockFP8"
    granularity: Granularity = Granularity.tile
    """Elements that share a scale; `tensor` is there to show what goes wrong without tiles."""
    power_of_two: bool = False
    """Round scales up to powers of two (ue8m0, V3.1)."""
    engine: FP8Engine = FP8Engine.auto
    """FP8 matmul; auto is scaled_mm on a Hopper GPU, and its emulation in fp32 on every other device."""
    dispatch: bool = False
    """Send rows to experts, and gradients of results back, in FP8; results and rows' gradients stay bf16."""
    gather: bool = False
    """Let FSDP gather and keep weights in FP8 where a shard holds whole blocks."""


@schema("precision", choice="auto")
@dataclass
class PrecisionConfig:
    """Number formats; master weights and gradients are fp32."""

    compute: ComputeType = ComputeType.auto
    """Dtype of activations and of the weights' working copies; auto is bf16 on a GPU, and fp32 on CPU."""
    moments: MomentType = MomentType.fp32
    """Dtype of AdamW's two moments."""
    fp8: BlockFP8Config | None = None
    """FP8 for the linear layers' matmuls; everything else keeps `compute`. Null is off."""
    matmul: MatmulPrecision = MatmulPrecision.highest
    """fp32 matmuls on a GPU: exact (highest), or on TF32 tensor cores (high); routers stay exact."""

    @property
    def label(self) -> str:
        """Return the name of the numbers that matmuls take: fp32, bf16 or fp8."""
        return self.compute.name if self.fp8 is None else "fp8"

    def matmul_type(self, fp8_engine: str | None = None) -> str:
        """Return the format that the matmuls of a GPU compute in: tf32, or as in `label`.

        `fp8_engine` is the engine that runs; the emulation of FP8 has no FP8 rate.
        """
        if self.fp8 is not None and fp8_engine == FP8Engine.scaled_mm.name:
            return "fp8"
        in_tf32 = self.compute is ComputeType.fp32 and self.matmul is MatmulPrecision.high
        return "tf32" if in_tf32 else self.compute.name

    def on(self, device: str) -> "PrecisionConfig":
        """Return this config with `auto` replaced by the default of a device, named as hardware is."""
        auto = self.compute is ComputeType.auto
        return replace(self, compute=default_compute(device)) if auto else self
