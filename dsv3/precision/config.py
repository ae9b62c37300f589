"""Which number format the matrix products use; weights and optimizer state stay fp32."""

from dataclasses import dataclass
from enum import Enum


class ComputeType(Enum):
    """The dtype of activations and of the weights' working copies."""

    fp32 = "float32"
    bf16 = "bfloat16"


@dataclass
class PrecisionConfig:
    """`compute.value` is the torch dtype's name; master weights, gradients and moments are fp32."""

    compute: ComputeType = ComputeType.fp32
