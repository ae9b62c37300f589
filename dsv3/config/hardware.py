"""Schema of the `hardware` group: the device that a rank runs on."""

import re
from dataclasses import dataclass, fields

from dsv3.config.registry import schema
from dsv3.errors import require_positive

# H200 is not GH200; PCIe and NVL cards of the same name are slower, so they are left to what they report.
NAMED = re.compile(r"\b(GB200|B200|H200|H800|H100|A100)\b(?!.*(?:PCI|NVL))")

_HOPPER = re.compile(r"\b(G?H(?:100|200|800|20))\b", re.IGNORECASE)

AUTO, CPU = "auto", "cpu"
"""The names that are no GPU's: ask this machine, and its CPU."""


def is_hopper(name: str) -> bool:
    """Return True for the name of a Hopper GPU, whose tensor cores have block-wise scales."""
    return _HOPPER.search(name) is not None


@schema("hardware")
@dataclass
class HardwareConfig:
    """One device; null is unknown."""

    name: str
    """Name of the device, or auto to ask this machine."""
    memory_bytes: int | None = None
    """Memory in bytes; on a CPU one rank's share of the host."""
    memory_bandwidth: float | None = None
    """Memory bandwidth in bytes/s."""
    peak_flops_bf16: float | None = None
    """Peak of dense bf16 matmuls in FLOP/s."""
    peak_flops_fp8: float | None = None
    """Peak of dense fp8 matmuls in FLOP/s."""
    peak_flops_fp32: float | None = None
    """Peak of dense fp32 matmuls in FLOP/s."""
    peak_flops_tf32: float | None = None
    """Peak of dense fp32 matmuls on TF32 tensor cores in FLOP/s (precision.matmul=high)."""
    intra_node_bandwidth: float | None = None
    """Bandwidth of one device to the others of its node in bytes/s, in one direction."""
    inter_node_bandwidth: float | None = None
    """Bandwidth of one device to other nodes in bytes/s, in one direction."""
    devices_per_node: int | None = None
    """Devices of one node."""

    def validate(self) -> None:
        """Raise InvalidValue for numbers that are not above 0."""
        require_positive(self, *(f.name for f in fields(self) if f.name != "name"))
