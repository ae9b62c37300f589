"""Describe the hardware that the ranks run on."""

import re
from dataclasses import dataclass, fields

from dsv3.errors import require_positive

# H200 is not GH200; PCIe and NVL cards of the same name are slower, so they are left to what they report.
NAMED = re.compile(r"\b(GB200|B200|H200|H800|H100|A100)\b(?!.*(?:PCI|NVL))")


@dataclass
class HardwareConfig:
    """One device: bytes, dense FLOP/s, and bytes/s (the networks' in one direction); null is unknown.

    On a CPU `memory_bytes` is one rank's share of the host.
    """

    name: str
    memory_bytes: int | None = None
    memory_bandwidth: float | None = None
    peak_flops_bf16: float | None = None
    peak_flops_fp8: float | None = None
    peak_flops_fp32: float | None = None
    intra_node_bandwidth: float | None = None
    inter_node_bandwidth: float | None = None
    devices_per_node: int | None = None

    def validate(self) -> None:
        """Refuse numbers that are not above 0."""
        require_positive(self, *(f.name for f in fields(self) if f.name != "name"))
