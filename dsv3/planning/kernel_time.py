"""Seconds of an operator on a device: those of its FLOPs, of its bytes, and the kernel's own.

They are added, because that is how measured kernels behave. On a B200 grouped matmuls of 128 to 1,024 rows
per expert (4,096 x 7,168) take what 0.53 of the peak, 0.8 of the memory bandwidth and no more give, within 6
%; the longer of the two misses the smallest by half (SimuMax, configs/system/b200_bf16_ceperm.json).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dsv3.config.hardware import HardwareConfig
from dsv3.planning.operators import Kind, Work
from dsv3.planning.step_shape import StepShape


@dataclass(frozen=True)
class KernelTimes:
    """The rates that a device reaches, by kind of operator: peak x share of `hardware.kernels`."""

    flops: dict[Kind, float]
    memory: float
    optimizer: float
    seconds: float
    launch_seconds: float
    sync_seconds: float

    @classmethod
    def of(cls, hardware: HardwareConfig, shape: StepShape) -> "KernelTimes | None":
        """Return the rates for a step's formats; None where the hardware does not tell a peak."""
        in_fp32 = shape.state.compute != 2
        k = (in_fp32 and hardware.kernels_fp32) or hardware.kernels
        peak = hardware.peak_flops_bf16 if not in_fp32 else hardware.peak_flops_fp32
        if shape.tf32:
            peak = hardware.peak_flops_tf32
        exact = hardware.peak_flops_fp32 or peak
        fp8 = hardware.peak_flops_fp8
        if shape.fp8 is not None and shape.fp8.emulated:
            fp8 = exact
        if peak is None or exact is None or hardware.memory_bandwidth is None:
            return None
        if shape.fp8 is not None and fp8 is None:
            return None
        rates = {
            Kind.matmul: peak * k.matmul,
            Kind.grouped: peak * k.grouped,
            Kind.matmul_fp8: (fp8 or peak) * k.matmul_fp8,
            Kind.grouped_fp8: (fp8 or peak) * k.grouped_fp8,
            Kind.attention: peak * k.attention,
            Kind.attention_backward: peak * k.attention_backward,
            Kind.exact: exact * k.matmul,
            Kind.memory: 1.0,
        }
        memory = hardware.memory_bandwidth
        own = (k.seconds, k.launch_seconds, k.sync_seconds)
        return cls(rates, memory * k.memory, memory * k.optimizer, *own)

    def of_work(self, work: Work) -> float:
        """Return the seconds that the device takes for one operator."""
        busy = work.flops / self.flops[work.kind] + work.bytes / self.memory
        return busy + self.seconds * work.kernels

    def launches(self, works: Iterable[Work]) -> float:
        """Return the seconds of the host to launch the kernels of several operators."""
        return self.launch_seconds * sum(work.kernels for work in works)
