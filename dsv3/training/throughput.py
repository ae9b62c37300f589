"""Tokens per second and MFU of a step, measured without making the host wait for a device.

A step is timed from the moment at which its data is asked for to the end of its last operation; what
callbacks do between two steps does not count. On CPU the host's clock says so. A GPU works behind the host,
which may have queued a step long before it is done: there two events in the stream take the times of the
device, and they are read with the step's other metrics, every train.log_every steps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dsv3.metrics.row import MetricsRow

Seconds = Callable[[], float]
"""Returns the seconds of a step; on a GPU it waits until the step is done."""


class HostTimer:
    """Times the steps of a device that works while the host waits: the CPU."""

    def start(self) -> None:
        """Begin a step."""
        self.started = time.perf_counter()

    def stop(self) -> Seconds:
        """End the step."""
        seconds = time.perf_counter() - self.started
        return lambda: seconds


class DeviceTimer:
    """Times the steps of a GPU by events of the current stream."""

    def start(self) -> None:
        """Begin a step where the device now is in its queue."""
        self.started = torch.cuda.Event(enable_timing=True)
        self.started.record()

    def stop(self) -> Seconds:
        """End the step where the queue ends."""
        begin, end = self.started, torch.cuda.Event(enable_timing=True)
        end.record()

        def seconds() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000

        return seconds


@dataclass
class Throughput:
    """Turns a step's seconds into tokens per second and MFU."""

    flops_per_token: float
    peak_flops: float | None
    """FLOP/s of all devices together; None where it is unknown (CPU)."""
    device: torch.device
    timer: HostTimer | DeviceTimer = field(init=False)

    def __post_init__(self) -> None:
        self.timer = DeviceTimer() if self.device.type == "cuda" else HostTimer()

    def start(self) -> None:
        """Begin to time a step."""
        self.timer.start()

    def stop(self, row: MetricsRow, tokens: int) -> Callable[[], None]:
        """End the step of `row`, which took so many `tokens` over all ranks.

        The result fills the row's tokens_per_second and mfu, and has done so on CPU.
        """
        seconds = self.timer.stop()

        def fill() -> None:
            row.tokens_per_second = tokens / seconds()
            if self.peak_flops:
                row.mfu = row.tokens_per_second * self.flops_per_token / self.peak_flops

        if self.device.type == "cpu":
            fill()
        return fill
