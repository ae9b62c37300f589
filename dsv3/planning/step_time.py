"""Step time: the seconds of one optimizer step on the busiest rank, and what they are spent on.

The layers' operators and exchanges give the seconds of a microbatch in each stage (stage_time.py), the
schedule puts them on a timeline (pipeline_timeline.py). FSDP's traffic, gradient clipping and the optimizer
come on top. What hardware reaches and what it hides is assumed in conf/hardware, or measured by
task=calibrate.
"""

from collections import Counter
from dataclasses import dataclass

from dsv3.config.hardware import HardwareConfig
from dsv3.config.model import ModelConfig
from dsv3.planning.group_bytes import GroupBytes, stage_bytes
from dsv3.planning.kernel_time import KernelTimes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.pipeline_stages import StageLayers
from dsv3.planning.pipeline_timeline import PipelineTimeline, Span, StageSeconds
from dsv3.planning.sharding import FP32
from dsv3.planning.stage_time import Cause, PassSeconds, Seconds, StageTimes, add, exposed
from dsv3.planning.step_shape import StepShape

__all__ = ["Cause", "StepTime", "least_seconds", "matmul_peak", "step_time"]

TRILLION = 10**12


@dataclass(frozen=True)
class StepTime:
    """The time of one optimizer step."""

    seconds: float
    """On the slowest rank."""
    tokens: int
    """Tokens of the step, over all ranks."""
    ranks: int
    causes: Seconds
    """Seconds of the busiest rank by cause; they sum to `seconds`."""
    pipeline: PipelineTimeline
    source: str
    """Where the assumptions come from."""

    @property
    def timeline(self) -> list[list[Span]]:
        """Return, per pipeline rank, what it computes when."""
        return self.pipeline.spans()

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks."""
        return self.tokens / self.seconds

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens per second and rank."""
        return self.tokens_per_second / self.ranks

    @property
    def days_per_trillion_tokens(self) -> float:
        """Days in which all ranks train on 10^12 tokens."""
        return TRILLION / self.tokens_per_second / 86400

    @property
    def gpu_hours_per_trillion_tokens(self) -> float:
        """Hours of one rank that 10^12 tokens take."""
        return TRILLION / self.tokens_per_second_per_gpu / 3600

    def to_json(self) -> dict[str, object]:
        """Return the numbers by name."""
        return {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "causes": {cause.name: seconds for cause, seconds in self.causes.items()},
            "gpu_hours_per_trillion_tokens": self.gpu_hours_per_trillion_tokens,
            "days_per_trillion_tokens": self.days_per_trillion_tokens,
            "source": self.source,
        }


def step_time(
    model: ModelConfig, degrees: ParallelDims, shape: StepShape, hardware: HardwareConfig
) -> StepTime | None:
    """Return the time of a step of `shape`; None where the hardware's peaks or links are unknown."""
    work = _Work.of(model, degrees, shape, hardware)
    if work is None:
        return None
    pipeline, causes = work.pipeline, dict(work.causes)
    causes[Cause.bubble] = max(0.0, pipeline.seconds - pipeline.busy(work.rank))
    return StepTime(
        seconds=sum(causes.values()),
        tokens=shape.microbatch_size * shape.sequence_length * shape.microbatches * degrees.data_parallel,
        ranks=degrees.world_size,
        causes=causes,
        pipeline=pipeline,
        source=hardware.told_source,
    )


def least_seconds(
    model: ModelConfig, degrees: ParallelDims, shape: StepShape, hardware: HardwareConfig
) -> float | None:
    """Return a lower bound of step_time(...).seconds: what the busiest rank does, without any waiting."""
    work = _Work.of(model, degrees, shape, hardware)
    return None if work is None else sum(work.causes.values())


@dataclass(frozen=True)
class _Work:
    """Work of the busiest pipeline rank in a step."""

    rank: int
    causes: Seconds
    pipeline: PipelineTimeline

    @classmethod
    def of(
        cls, model: ModelConfig, degrees: ParallelDims, shape: StepShape, hardware: HardwareConfig
    ) -> "_Work | None":
        """Return it; None where the hardware's peaks or links are unknown."""
        kernels = KernelTimes.of(hardware, shape)
        if kernels is None or shape.cpu_offload:
            return None  # the host's optimizer and its link are in no hardware file
        links = hardware.intra_node_bandwidth or hardware.inter_node_bandwidth
        if degrees.world_size > 1 and links is None:
            return None
        times = StageTimes(model, degrees, shape, hardware, kernels)
        held = shape.stages_of_ranks(model, degrees)
        by_stage = {stage.index: times.stage(stage) for stages in held for stage in stages}
        send = 0.0
        if degrees.pp > 1:
            send = times.send_seconds()
            by_stage = {n: _with_sends(passes, send, hardware) for n, passes in by_stage.items()}
        p = shape.pipelining
        seconds = tuple(_stage_seconds(by_stage[n]) for n in range(len(by_stage)))
        pipeline = PipelineTimeline(p.schedule, degrees.pp, p.per_rank, shape.microbatches, seconds, send)
        rank = max(range(degrees.pp), key=pipeline.busy)
        causes: Seconds = dict.fromkeys(Cause, 0.0)
        for stage in held[rank]:
            for part in by_stage[stage.index]:
                causes = add(causes, part, shape.microbatches)
        causes[Cause.dp] += _fsdp_seconds(times, held[rank], seconds)
        causes[Cause.optimizer] += _update_seconds(times, held[rank])
        return cls(rank, causes, pipeline)


def matmul_peak(hardware: HardwareConfig, shape: StepShape) -> float | None:
    """Return the peak of the format that most matmuls compute in, over which MFU is told."""
    if shape.fp8 is not None and not shape.fp8.emulated:
        return hardware.peak_flops_fp8
    if shape.tf32:
        return hardware.peak_flops_tf32
    return hardware.peak_flops_bf16 if shape.state.compute == 2 else hardware.peak_flops_fp32


def _with_sends(passes: PassSeconds, send: float, hardware: HardwareConfig) -> PassSeconds:
    """Add the part of a stage's sends during which it does not compute on."""
    waits = {Cause.pp: send * (1 - hardware.overlap.pp)}
    return passes.plus(PassSeconds(waits, waits, {}))


def _stage_seconds(passes: PassSeconds) -> StageSeconds:
    return StageSeconds(*(sum(part.values()) for part in passes))


def _fsdp_seconds(times: StageTimes, held: list[StageLayers], seconds: tuple[StageSeconds, ...]) -> float:
    """Return the seconds of FSDP's traffic that computing does not hide, per step."""
    share, cost = times.hardware.overlap.dp, times.hardware.overlap.cost
    forward, backward, reduced = times.shape.fsdp_rounds(times.degrees)
    # A backward pass that gathers too, and one that also reduces, each hides what it can.
    both = min(backward, reduced)
    total = 0.0
    for stage in held:
        kinds = Counter(_groups(times, stage))
        gathers = sum(count * times.gather_seconds(group) for group, count in kinds.items())
        reductions = sum(count * times.reduce_seconds(group) for group, count in kinds.items())
        passes = seconds[stage.index]
        total += forward * exposed(gathers, share, passes.forward, cost)
        total += both * exposed(gathers + reductions, share, passes.backward, cost)
        total += (reduced - both) * exposed(reductions, share, passes.backward, cost)
        total += (backward - both) * exposed(gathers, share, passes.backward, cost)
    return total


def _update_seconds(times: StageTimes, held: list[StageLayers]) -> float:
    """Return the seconds of gradient clipping and of the optimizer: bytes of gradients and state."""
    state, moved = times.shape.state, 0
    for group in (group for stage in held for group in _groups(times, stage)):
        # The norm reads gradients, clipping scales them, the update reads them and reads and writes
        # parameters and state.
        elements = group.gradients // state.gradient
        moved += elements * (4 * FP32 + 2 * state.parameter) + 2 * group.optimizer
    return moved / times.kernels.optimizer


def _groups(times: StageTimes, stage: StageLayers) -> list[GroupBytes]:
    shape = times.shape
    return stage_bytes(times.config, stage, times.degrees, shape.state, shape.gathers_in_fp8)
