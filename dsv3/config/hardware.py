"""Schema of the `hardware` group: the device that a rank runs on, and what it reaches of its peaks."""

import re
from dataclasses import dataclass, field, fields

from dsv3.config.registry import PATH_OR_NAME, schema
from dsv3.errors import require, require_positive

# H200 is not GH200; PCIe and NVL cards of the same name are slower, so they are left to what they report.
NAMED = re.compile(r"\b(GB300|GB200|B200|H200|H800|H100|A100)\b(?!.*(?:PCI|NVL))")

_HOPPER = re.compile(r"\b(G?H(?:100|200|800|20))\b", re.IGNORECASE)

FASTEST = 1e24
"""Most FLOP/s or bytes/s of a device: with less than 1, or more than this, a plan has no meaning."""

_TOLD = 500

AUTO, CPU = "auto", "cpu"
"""The names that are no GPU's: ask this machine, and its CPU."""


def is_hopper(name: str) -> bool:
    """Return True for the name of a Hopper GPU, whose tensor cores have block-wise scales."""
    return _HOPPER.search(name) is not None


def calibrate_command(ranks: int) -> str:
    """Return the command that measures what a plan lacks for `ranks` that share a CPU's cores."""
    return f"python train.py task=calibrate{f' launch.nproc={ranks}' if ranks > 1 else ''}"


@dataclass
class KernelConfig:
    """Shares of the peaks that kernels reach, and what each costs besides (docs/planning.md).

    A kernel takes its FLOPs and its bytes at these shares and `seconds` more: one of little work reaches
    less.
    """

    matmul: float = 0.75
    """Share of the peak that large bf16, fp32 or tf32 matmuls reach."""
    matmul_fp8: float = 0.65
    """Share of the fp8 peak that large matmuls with tile and block scales reach."""
    grouped: float = 0.65
    """Share of the peak that the grouped matmuls of experts reach in bf16 or fp32."""
    grouped_fp8: float = 0.55
    """Share of the fp8 peak that the grouped matmuls of experts reach."""
    attention: float = 0.55
    """Share of the peak that causal attention reaches in the forward pass."""
    attention_backward: float = 0.45
    """Share of the peak that causal attention reaches in the backward pass."""
    memory: float = 0.8
    """Share of the memory bandwidth that operators reach which are not matmuls."""
    optimizer: float = 0.8
    """Share of the memory bandwidth that gradient clipping and the optimizer reach."""
    seconds: float = 5e-6
    """Seconds that a kernel takes besides its work: to fill the device and to drain it."""
    launch_seconds: float = 5e-6
    """Seconds of the host per kernel launch; they count where the host is slower than the device."""
    sync_seconds: float = 5e-5
    """Seconds that the device idles when the host waits for a value, such as the rows per expert."""

    def validate(self) -> None:
        """Raise InvalidValue for shares outside of 0 to 1 and for negative seconds."""
        _require_shares(self, above_zero=True)


@dataclass
class NetworkConfig:
    """Shares of the bandwidths that collectives reach, and their latencies."""

    ring_intra: float = 0.8
    """Share of the bandwidth within a node that all-gathers and reduce-scatters reach."""
    ring_inter: float = 0.75
    """Share of the bandwidth between nodes that all-gathers and reduce-scatters reach."""
    all_to_all_intra: float = 0.7
    """Share of the bandwidth within a node that token dispatch by all_to_all reaches."""
    all_to_all_inter: float = 0.6
    """Share of the bandwidth between nodes that token dispatch by all_to_all reaches."""
    deepep_intra: float = 0.75
    """Share of the bandwidth within a node that token dispatch by deepep reaches."""
    deepep_inter: float = 0.85
    """Share of the bandwidth between nodes that token dispatch by deepep reaches."""
    send: float = 0.8
    """Share of a bandwidth that a pipeline stage's send to one other rank reaches."""
    intra_seconds: float = 1e-5
    """Latency of a collective within a node in seconds; it grows with the logarithm of the ranks."""
    inter_seconds: float = 2e-5
    """Latency of a collective between nodes in seconds; it grows with the logarithm of the ranks."""

    def validate(self) -> None:
        """Raise InvalidValue for shares outside of 0 to 1 and for negative seconds."""
        _require_shares(self, above_zero=True)


@dataclass
class OverlapConfig:
    """Share of each axis's traffic that runs behind computing, from 0 (none) to 1 (all that fits)."""

    dp: float = 0.9
    """Share of FSDP's all-gathers and reduce-scatters that is hidden."""
    tp: float = 0.0
    """Share of tensor parallelism's exchanges that is hidden."""
    cp: float = 0.0
    """Share of context parallelism's all-gathers that is hidden."""
    ep: float = 0.0
    """Share of token dispatch that is hidden."""
    ep_paired: float = 0.0
    """Share of token dispatch that DualPipeV hides behind the other direction's microbatch."""
    pp: float = 1.0
    """Share of sends between stages during which the sender computes on."""
    cost: float = 0.0
    """Seconds of computing that a second of hidden traffic costs: both run on the same processors."""

    def validate(self) -> None:
        """Raise InvalidValue for shares outside of 0 to 1."""
        _require_shares(self, above_zero=False)


LEAST = 1e-6
"""Least share of a peak that is reached."""

LONGEST = 3600.0
"""Most seconds of a latency or a launch."""


def _require_shares(node: KernelConfig | NetworkConfig | OverlapConfig, above_zero: bool) -> None:
    for f in fields(node):
        value = getattr(node, f.name)
        if f.name.endswith("seconds"):
            require(0 <= value <= LONGEST, f.name, value, f"must lie between 0 and {LONGEST:g}")
        elif above_zero:
            require(LEAST <= value <= 1, f.name, value, f"must be at least {LEAST:g} and at most 1")
        else:
            require(0 <= value <= 1, f.name, value, "must lie between 0 and 1")


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
    """Devices of one node: of everything that the fast links join."""
    kernels: KernelConfig = field(default_factory=KernelConfig)
    """What kernels reach."""
    kernels_fp32: KernelConfig | None = None
    """What kernels reach where the compute dtype is fp32; null is as `kernels`."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """What collectives reach."""
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    """What is hidden behind computing."""
    calibration: str | None = field(default=None, metadata=PATH_OR_NAME)
    """File of task=calibrate; null is that of this machine, if there is one, and `off` leaves it out."""
    source: str = ""
    """Where the shares and seconds come from; empty stands for the file of the name, assumed."""

    def validate(self) -> None:
        """Raise InvalidValue for numbers that are not above 0, and for rates that no device has."""
        others = ("name", "source", "calibration", "kernels", "kernels_fp32", "network", "overlap")
        numbers = [f.name for f in fields(self) if f.name not in others]
        require_positive(self, *numbers)
        for name in numbers:
            if isinstance(value := getattr(self, name), float):
                require(1 <= value <= FASTEST, name, value, f"must lie between 1 and {FASTEST:g}")
        told = self.source.isprintable() and len(self.source) <= _TOLD
        allowed = f"must be at most {_TOLD} characters, none that steers a terminal"
        require(told, "source", self.source, allowed)

    @property
    def told_source(self) -> str:
        """Return where the numbers come from, for people."""
        return self.source or f"assumed: conf/hardware/{self.name}.yaml"
