"""The fit turns times that follow from a known device back into that device."""

import math
from dataclasses import replace
from typing import Any

import pytest

from dsv3.config.hardware import HardwareConfig, KernelConfig
from dsv3.config.parallel import RecomputeMode
from dsv3.planning.calibration_fit import (
    BF16,
    FP32,
    CollectiveTime,
    Measurements,
    OperatorTime,
    PassTime,
    fit,
    pass_seconds,
)
from dsv3.planning.operators import Kind
from dsv3.planning.step_shape import StateBytes, StepShape
from tests.planning.presets import preset

BANDWIDTH, LATENCY, LINK = 20e9, 3e-5, 5e9
NODES = {
    BF16: KernelConfig(
        matmul=1.0, grouped=0.6, attention=0.3, attention_backward=0.2, memory=0.25, optimizer=0.5,
        seconds=2e-5, launch_seconds=0.0, sync_seconds=0.0,
    ),
    FP32: KernelConfig(
        matmul=1.0, grouped=0.9, attention=0.5, attention_backward=0.6, memory=0.4, optimizer=0.5,
        seconds=1e-5, launch_seconds=0.0, sync_seconds=0.0,
    ),
}  # fmt: skip
PEAKS = {BF16: 400e9, FP32: 100e9}


def hardware(compute: int) -> HardwareConfig:
    return HardwareConfig(
        "cpu",
        memory_bandwidth=BANDWIDTH,
        kernels=NODES[compute],
        peak_flops_bf16=PEAKS[BF16],
        peak_flops_fp32=PEAKS[FP32],
    )


def measurements() -> Measurements:
    found = Measurements(copies=[(1e9, 1e9 / BANDWIDTH), (1e6, 1e6 / BANDWIDTH * 1.5)])
    found.updates = [(1e9, 1e9 / (BANDWIDTH * 0.5))]
    for compute, node in NODES.items():
        for kind in (Kind.matmul, Kind.grouped, Kind.attention, Kind.attention_backward):
            rate = PEAKS[compute] * getattr(node, kind.value)
            # So large that bytes and the kernel itself cost next to nothing, as for the probes' peak.
            seconds = 1e13 / rate + 1e6 / (BANDWIDTH * node.memory) + node.seconds
            found.operators.append(OperatorTime("", kind, compute, 1e13, 1e6, seconds))
            if kind is not Kind.matmul:  # and small, where bytes and kernel take a part of the time
                seconds = 3e7 / rate + 1e5 / (BANDWIDTH * node.memory) + node.seconds
                found.operators.append(OperatorTime("", kind, compute, 3e7, 1e5, seconds))
        for width in (128, 512):
            model = replace(preset("debug"), dim=width, num_layers=3)
            shape = StepShape(1, 2 * width, state=StateBytes(compute=compute), fused_kernels=False)
            seconds = pass_seconds(PassTime("", model, shape, 0.0), hardware(compute))
            found.passes.append(PassTime(f"{width}", model, shape, seconds))
    for ranks in (2, 4):
        for sent in (1e3, 1e9):
            for name, share in (("ring", 1.0), ("all_to_all", 0.5), ("send", 0.8)):
                seconds = LATENCY * math.log2(ranks) + sent / (LINK * share)
                found.collectives.append(CollectiveTime(name, ranks, sent, seconds))
    return found


LISTS = ("operators", "passes")


def _compute(one: OperatorTime | PassTime) -> int:
    return one.compute if isinstance(one, OperatorTime) else one.shape.state.compute


def test_a_device_is_found_again_from_its_times() -> None:
    fitted = fit("cpu", measurements())
    values = fitted.values
    assert values["memory_bandwidth"] == pytest.approx(BANDWIDTH, rel=1e-3)
    assert values["peak_flops_bf16"] == pytest.approx(PEAKS[BF16], rel=1e-2)
    assert values["peak_flops_fp32"] == pytest.approx(PEAKS[FP32], rel=1e-2)
    for key, node in (("kernels", NODES[BF16]), ("kernels_fp32", NODES[FP32])):
        for name, value in values[key].items():
            assert value == pytest.approx(getattr(node, name), rel=0.05, abs=1e-9), (key, name)
    assert all(told == pytest.approx(measured, rel=0.02) for _, measured, told in fitted.passes)
    assert values["intra_node_bandwidth"] == pytest.approx(LINK, rel=1e-2)
    network = values["network"]
    shares = {"ring_intra": 1.0, "all_to_all_intra": 0.5, "send": 0.8, "intra_seconds": LATENCY}
    assert network == pytest.approx(shares, rel=0.05)
    assert set(values["overlap"].values()) == {0.0}


def test_what_was_not_measured_is_left_to_the_preset() -> None:
    found = replace(measurements(), collectives=[])
    kept: dict[str, Any] = {
        key: [one for one in getattr(found, key) if _compute(one) == BF16] for key in LISTS
    }
    found = replace(found, **kept)
    values = fit("h100", found).values
    assert (
        not {
            "network",
            "kernels_fp32",
            "peak_flops_fp32",
            "overlap",
            "intra_node_bandwidth",
            "peak_flops_fp8",
            "memory_bytes",
        }
        & values.keys()
    )
    assert "matmul_fp8" not in values["kernels"]


def test_a_pass_that_computes_again_takes_longer() -> None:
    model = replace(preset("debug"), num_layers=3)
    shape = StepShape(1, 256, state=StateBytes(compute=FP32), fused_kernels=False)
    plain, again = (
        pass_seconds(PassTime("", model, replace(shape, recompute=mode), 0.0), hardware(FP32))
        for mode in (RecomputeMode.none, RecomputeMode.full)
    )
    assert plain < again < 2 * plain
