"""From times that task=calibrate has measured to the values of a hardware file: the time model, inverted.

The rates of matmuls, of attention and of the optimizer are their work over their time. What the other
operators reach, and what a kernel costs besides its work, follows from the forward and backward passes of
whole models: the share of the memory bandwidth and the seconds per kernel with which the time model
(stage_time.py) comes closest to all of them. So whatever it counts too high or too low on a kind of device,
the shares make up for.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

from dsv3.config.hardware import CPU, HardwareConfig, KernelConfig, NetworkConfig, OverlapConfig
from dsv3.config.model import ModelConfig
from dsv3.planning.calibrated import to_yaml_values
from dsv3.planning.kernel_time import KernelTimes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.operators import Kind, Work
from dsv3.planning.pipeline_stages import build_stages
from dsv3.planning.stage_time import StageTimes
from dsv3.planning.step_shape import StepShape

LEAST_SHARE = 0.01
"""Smallest share of a peak that is believed."""

MOST_SECONDS = 2e-4
"""Largest time of a kernel besides its work that is believed."""

BF16, FP32 = 2, 4
"""Bytes per value of the compute dtypes."""


@dataclass(frozen=True)
class OperatorTime:
    """One operator that was timed by itself."""

    name: str
    kind: Kind
    compute: int
    """Bytes per value."""
    flops: float
    bytes: float
    seconds: float
    kernels: float = 1

    @classmethod
    def of(cls, name: str, compute: int, work: Work, seconds: float) -> "OperatorTime":
        """Return the time of what the time model counts as `work`."""
        return cls(name, work.kind, compute, work.flops, work.bytes, seconds, work.kernels)


@dataclass(frozen=True)
class PassTime:
    """Forward and backward pass of one microbatch through a whole model on one rank."""

    name: str
    model: ModelConfig
    shape: StepShape
    seconds: float


@dataclass(frozen=True)
class CollectiveTime:
    """One collective."""

    kind: str
    """ring (an all-gather or a reduce-scatter), all_to_all or send."""
    ranks: int
    sent: float
    """Bytes that a rank sends."""
    seconds: float
    crosses: bool = False
    """Between nodes."""


@dataclass
class Measurements:
    """All that was timed on one kind of device."""

    operators: list[OperatorTime] = field(default_factory=list)
    copies: list[tuple[float, float]] = field(default_factory=list)
    """(bytes read and written, seconds) of copies within the device's memory."""
    updates: list[tuple[float, float]] = field(default_factory=list)
    """(bytes as the time model counts them, seconds) of clipping and of the optimizer's step."""
    passes: list[PassTime] = field(default_factory=list)
    collectives: list[CollectiveTime] = field(default_factory=list)
    launch_seconds: float = 0.0
    """Seconds of the host per kernel; 0 where the host is the device."""
    sync_seconds: float = 0.0
    """Seconds to read a value that the device has computed."""
    waiting: float = 0.0
    """Share of the time in which other processes had the core of a rank."""


@dataclass(frozen=True)
class Fitted:
    """Values of a hardware file, and how well they tell the measured passes again."""

    values: dict[str, Any]
    passes: list[tuple[str, float, float]]
    """Name, measured and fitted seconds."""


def fit(name: str, found: Measurements) -> Fitted:
    """Return the values of a hardware file `name`; peaks are the best rates that were measured."""
    bandwidth = max(bytes_ / seconds for bytes_, seconds in found.copies)
    peaks = {
        compute: max((o.flops / o.seconds for o in found.operators if o.compute == compute), default=None)
        for compute in (FP32, BF16)
    }
    hardware = HardwareConfig(
        name, memory_bandwidth=bandwidth, peak_flops_bf16=peaks[BF16], peak_flops_fp32=peaks[FP32]
    )
    told: list[tuple[str, float, float]] = []
    nodes: dict[int, KernelConfig] = {}
    for compute in sorted({one.compute for one in found.operators}):
        node, passes = _kernels(hardware, found, compute)
        nodes[compute] = node
        told += passes
    nodes_of_config = {key for key, value in vars(hardware).items() if is_dataclass(value)}
    values = {key: value for key, value in to_yaml_values(hardware).items() if key not in nodes_of_config}
    # A plan in another dtype than those measured takes what there is.
    values["kernels"] = _measured(nodes.get(BF16) or nodes[FP32])
    if BF16 in nodes and FP32 in nodes:
        values["kernels_fp32"] = _measured(nodes[FP32])
    if found.collectives:
        values |= _network(found.collectives)
    if name == CPU:  # the cores that compute also move the bytes
        values["overlap"] = dict.fromkeys(vars(OverlapConfig()), 0.0)
    return Fitted(values, told)


def _kernels(
    hardware: HardwareConfig, found: Measurements, compute: int
) -> tuple[KernelConfig, list[tuple[str, float, float]]]:
    """Return what kernels reach in one dtype, and how it tells the passes in it."""
    passes = [one for one in found.passes if one.shape.state.compute == compute]
    assert passes

    def node(memory: float, seconds: float) -> KernelConfig:
        return _shares(hardware, found, compute, memory, seconds)

    def told(memory: float, seconds: float) -> list[float]:
        tried = replace(hardware, kernels=node(memory, seconds), kernels_fp32=None)
        return [pass_seconds(one, tried) for one in passes]

    def distance(memory: float, seconds: float) -> float:
        pairs = zip(told(memory, seconds), passes, strict=True)
        return sum(math.log(fitted / one.seconds) ** 2 for fitted, one in pairs)

    def best_seconds(memory: float) -> float:
        # The model is linear in them: least squares of the relative errors.
        shares = [
            (without / one.seconds, (beside - without) / one.seconds / MOST_SECONDS)
            for without, beside, one in zip(
                told(memory, 0.0), told(memory, MOST_SECONDS), passes, strict=True
            )
        ]
        best = sum(slope * (1 - base) for base, slope in shares) / sum(slope**2 for _, slope in shares)
        return min(MOST_SECONDS, max(0.0, best))

    share = 10 ** _minimum(lambda x: distance(10**x, best_seconds(10**x)), math.log10(LEAST_SHARE), 0.0)
    seconds = best_seconds(share)
    names, measured = [one.name for one in passes], [one.seconds for one in passes]
    return node(share, seconds), list(zip(names, measured, told(share, seconds), strict=True))


def _shares(
    hardware: HardwareConfig, found: Measurements, compute: int, memory: float, seconds: float
) -> KernelConfig:
    """Return the shares that follow from the operators' times, if their bytes and kernels cost so much."""
    peak = hardware.peak_flops_bf16 if compute == BF16 else hardware.peak_flops_fp32
    bandwidth = hardware.memory_bandwidth
    assert peak is not None
    assert bandwidth is not None
    shares: dict[str, float] = {}
    for kind in (Kind.matmul, Kind.grouped, Kind.attention, Kind.attention_backward):
        rates = []
        for one in (one for one in found.operators if (one.kind, one.compute) == (kind, compute)):
            besides = one.bytes / (bandwidth * memory) + seconds * one.kernels
            rates.append(one.flops / max(one.seconds - besides, one.seconds / 10) / peak)
        shares[kind.value] = _share(geometric_mean(rates))
    shares["optimizer"] = _share(geometric_mean(moved / taken / bandwidth for moved, taken in found.updates))
    host = {"launch_seconds": found.launch_seconds, "sync_seconds": found.sync_seconds}
    return KernelConfig(memory=memory, seconds=seconds, **shares, **host)


def pass_seconds(one: PassTime, hardware: HardwareConfig) -> float:
    """Return the seconds that the time model has for a forward and a backward pass on one rank."""
    kernels = KernelTimes.of(hardware, one.shape)
    assert kernels is not None
    (stage,) = build_stages(one.model, 1)
    times = StageTimes(one.model, ParallelDims(), one.shape, hardware, kernels).stage(stage)
    return sum(sum(part.values()) for part in times)


def _minimum(function: Callable[[float], float], low: float, high: float, steps: int = 18) -> float:
    """Return where a function with one minimum between `low` and `high` is smallest (golden section)."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(steps):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return min(low, (low + high) / 2, high, key=function)


def _network(found: Sequence[CollectiveTime]) -> dict[str, Any]:
    """Return the bandwidths, the latencies and the shares that each kind of collective reaches."""
    values: dict[str, Any] = {}
    network: dict[str, float] = {}
    for crosses, links, key in (
        (False, "intra", "intra_node_bandwidth"),
        (True, "inter", "inter_node_bandwidth"),
    ):
        there = [one for one in found if one.crosses == crosses]
        if not there:
            continue
        # The smallest messages are all latency.
        smallest = min(one.sent for one in there)
        least = [one.seconds / math.log2(one.ranks) for one in there if one.sent <= 2 * smallest]
        latency = network[f"{links}_seconds"] = geometric_mean(least)
        rates: dict[str, list[float]] = {}
        largest = max(one.sent for one in there)
        for one in (one for one in there if one.sent >= largest / 4):
            rates.setdefault(one.kind, []).append(
                one.sent / max(one.seconds - latency * math.log2(one.ranks), one.seconds / 10)
            )
        reached = {kind: geometric_mean(each) for kind, each in rates.items()}
        values[key] = max(reached.values())
        for kind, rate in reached.items():
            network["send" if kind == "send" else f"{kind}_{links}"] = _share(rate / values[key])
    known = vars(NetworkConfig())
    values["network"] = {key: _rounded(value) for key, value in network.items() if key in known}
    return values


def _measured(node: KernelConfig) -> dict[str, float]:
    """Return what was measured of a node, without the shares of FP8."""
    return {key: _rounded(value) for key, value in vars(node).items() if "fp8" not in key}


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean: a rate of half and one of twice the size even out."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _share(value: float) -> float:
    return min(1.0, max(LEAST_SHARE, value))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
