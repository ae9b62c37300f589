"""Small spaces of layouts, and every layout in them planned one by one."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from dsv3.config.hardware import HardwareConfig
from dsv3.config.parallel import AXES, DegreesConfig, ParallelConfig, PipelineConfig, RecomputeMode, Schedule
from dsv3.config.precision import BlockFP8Config, ComputeType, PrecisionConfig
from dsv3.config.root import Config
from dsv3.errors import UserError
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.planning.hardware import named_hardware
from dsv3.planning.layout import check_batch, check_sequence, resolve_degrees
from dsv3.planning.layout_space import LEAST_TOKENS, MOST_TOKENS, VIRTUAL_STAGES, Choices, LayoutSpace
from dsv3.planning.plan import plan_from_shape, shape_of
from tests.harness.composing import strict_config

BF16 = PrecisionConfig(compute=ComputeType.bf16)

FORMATS = {"bf16": BF16, "fp8": replace(BF16, fp8=BlockFP8Config())}


class Planned(NamedTuple):
    speed: float
    memory: int


def gpu(memory: int | None = None, **overlap: float) -> HardwareConfig:
    """Return an h800, with less memory or other overlap."""
    found = next(each for each in named_hardware() if each.name == "h800")
    found = replace(found, overlap=replace(found.overlap, **overlap))
    return found if memory is None else replace(found, memory_bytes=memory)


def small_config(layers: int = 4, batch: int = 8, length: int = 2048) -> Config:
    """Return the debug model with a few layers, and batches that split in few ways."""
    config = strict_config(
        ["parallel=fsdp", f"model.num_layers={layers}", "hardware=h800", "model.mtp_depths=1"]
    )
    train = replace(config.train, global_batch_size=batch, sequence_length=length)
    return replace(config, train=train)


def space_of(
    world: int, hardware: HardwareConfig, choices: Choices, config: Config | None = None
) -> LayoutSpace:
    return LayoutSpace(config or small_config(), world, hardware, choices)


def every_plan(space: LayoutSpace) -> Iterator[Planned]:
    """Plan every combination of a space's values that the checks of a run accept, each by itself."""
    config, world, choices, hardware = space.config, space.world, space.choices, space.hardware
    train, whole = config.train, range(1, world + 1)
    modes = [choices.recompute] if choices.recompute else list(RecomputeMode)
    sizes = [choices.microbatch_size] if choices.microbatch_size else [2**n for n in range(10)]
    schedules = [choices.schedule] if choices.schedule else list(Schedule)
    numbers = [choices.stages_per_rank] if choices.stages_per_rank else [None, *VIRTUAL_STAGES]
    for pp, replicas, shards, cp, tp, ep in itertools.product(whole, repeat=6):
        typed = dict(zip(AXES, (pp, replicas, shards, cp, tp, ep), strict=True))
        if (
            any(typed[axis] != n for axis, n in choices.axes.items())
            or pp * replicas * shards * cp * tp != world
        ):
            continue
        if any(typed[axis] < n for axis, n in choices.least.items()):
            continue
        if cp > 1 and train.length // cp < LEAST_TOKENS:
            continue
        for schedule, number in (
            [(Schedule["1F1B"], None)] if pp == 1 else itertools.product(schedules, numbers)
        ):
            interleaved = schedule in (Schedule.Interleaved1F1B, Schedule.InterleavedZeroBubble)
            if interleaved == (number is None) and pp > 1:
                continue
            for reshard, size, mode in itertools.product((True, False), sizes, modes):
                if choices.reshard not in (None, reshard) or (size > 1 and size * train.length > MOST_TOKENS):
                    continue
                parallel = ParallelConfig(
                    degrees=DegreesConfig(**typed),
                    schedule=schedule,
                    reshard_after_forward=reshard,
                    pipeline=PipelineConfig(stages_per_rank=number),
                )
                try:
                    degrees = resolve_degrees(parallel, world, config.model, train.length, wrapped=True)
                    check_sequence(degrees, train.length)
                    check_batch(parallel, degrees, BatchSchedule.of(train), size)
                except UserError:
                    continue
                for precision in choices.precisions.values():
                    own = replace(
                        config,
                        parallel=parallel,
                        precision=precision,
                        train=replace(train, microbatch_size=size),
                        recompute=replace(config.recompute, mode=mode),
                    )
                    plan = plan_from_shape(config.model, degrees, hardware, shape_of(own, degrees, hardware))
                    assert plan.time is not None
                    yield Planned(plan.time.tokens_per_second_per_gpu, plan.memory.total)
