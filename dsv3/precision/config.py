"""Which number format the matrix products use and AdamW's moments are kept in; master weights stay fp32."""

from dataclasses import dataclass
from enum import Enum


class ComputeType(Enum):
    """The dtype of activations and of the weights' working copies."""

    fp32 = "float32"
    bf16 = "bfloat16"


class MomentType(Enum):
    """The dtype of AdamW's two moments; bf16 is the report's (section 3.3.1)."""

    fp32 = "float32"
    bf16 = "bfloat16"


@dataclass
class PrecisionConfig:
    """A value's `.value` is the torch dtype's name; master weights and gradients are fp32."""

    compute: ComputeType = ComputeType.fp32
    moments: MomentType = MomentType.fp32
