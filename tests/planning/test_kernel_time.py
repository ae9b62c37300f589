"""Seconds of operators: FLOPs, bytes and the kernel's own are added; each format has its rate."""

from dataclasses import replace

import pytest

from dsv3.config.hardware import HardwareConfig, KernelConfig
from dsv3.planning.kernel_time import KernelTimes
from dsv3.planning.operators import Kind, Work
from dsv3.planning.step_shape import FP8Shape, StateBytes, StepShape

GPU = HardwareConfig(
    "x",
    memory_bandwidth=1e12,
    peak_flops_bf16=1e15,
    peak_flops_fp8=2e15,
    peak_flops_tf32=5e14,
    peak_flops_fp32=6e13,
    kernels=KernelConfig(matmul=0.5, matmul_fp8=0.4, memory=0.8, optimizer=0.7, seconds=1e-6),
    kernels_fp32=KernelConfig(matmul=0.9),
)
FP32 = StepShape(1, 4096)
BF16 = replace(FP32, state=StateBytes(compute=2))


def times(shape: StepShape) -> KernelTimes:
    found = KernelTimes.of(GPU, shape)
    assert found is not None
    return found


def test_flops_bytes_and_kernels_are_added() -> None:
    found = times(BF16)
    assert found.of_work(Work(Kind.matmul, 5e14, 0.0, 0)) == pytest.approx(1.0)
    assert found.of_work(Work(Kind.matmul, 5e14, 1.6e12, 500_000)) == pytest.approx(1 + 2 + 0.5)
    assert found.of_work(Work(Kind.memory, 0.0, 8e11, 1_000_000)) == pytest.approx(1 + 1)
    assert found.launches([Work(Kind.memory, 0, 0, 3), Work(Kind.matmul, 0, 0, 2)]) == pytest.approx(25e-6)
    assert found.optimizer == pytest.approx(7e11)


def test_each_format_has_the_rate_of_its_peak() -> None:
    assert times(BF16).flops[Kind.matmul] == pytest.approx(0.5 * 1e15)
    assert times(FP32).flops[Kind.matmul] == pytest.approx(0.9 * 6e13)
    assert times(replace(FP32, tf32=True)).flops[Kind.matmul] == pytest.approx(0.9 * 5e14)
    # The router's matmul is exact whatever the others are.
    assert times(BF16).flops[Kind.exact] == pytest.approx(0.5 * 6e13)
    fp8, emulated = (times(replace(BF16, fp8=FP8Shape(emulated=e))) for e in (False, True))
    assert fp8.flops[Kind.matmul_fp8] == pytest.approx(0.4 * 2e15)
    assert emulated.flops[Kind.matmul_fp8] == pytest.approx(0.4 * 6e13)


def test_without_a_peak_there_is_no_time() -> None:
    assert KernelTimes.of(replace(GPU, peak_flops_bf16=None), BF16) is None
    assert KernelTimes.of(replace(GPU, peak_flops_fp8=None), replace(BF16, fp8=FP8Shape())) is None
    assert KernelTimes.of(replace(GPU, memory_bandwidth=None), BF16) is None
