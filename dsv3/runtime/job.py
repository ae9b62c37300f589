"""One job: a checked config with its plan, before any process or tensor of it exists."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from dsv3.config import Config
from dsv3.parallel.degrees import Degrees, check_batch, check_model, fill
from dsv3.planning.hardware import HardwareConfig, detect
from dsv3.planning.report import Plan, make_plan
from dsv3.runtime.errors import UserError
from dsv3.runtime.world import world_size

# Unless set, a microbatch has as many sequences as make about this many tokens ...
_MICROBATCH_TOKENS = 4096
# ... and a global batch this many, or one microbatch a rank where there are more ranks.
_GLOBAL_BATCH = 8


@dataclass
class Job:
    """What is handed to the workers; it travels between processes by pickle."""

    config: Config
    overrides: list[str]
    """As typed and quoted, for overrides.yaml."""
    hardware: HardwareConfig
    plan: Plan
    run_dir: Path
    named_run_dir: bool
    """Whether the user (or a sweep) chose run_dir; else it may get a number to be new."""


def plan_job(config: Config, overrides: list[str], sweep_dir: Path | None = None) -> Job:
    """The job of a checked config: its world, degrees and batch, and what they need; UserError if broken."""
    world = world_size(config)
    degrees = fill(config.parallel.degrees, world)
    check_model(degrees, config.model)
    _check_wrapped(config, degrees)
    config = complete(config, degrees)
    train = config.train
    if config.task.trains:
        check_batch(degrees, train.length, train.batch, train.microbatch)
    hardware = detect(config.hardware, max(1, world // config.launch.nnodes))
    plan = make_plan(config, degrees, hardware)
    run_dir = sweep_dir or Path(config.run.dir or f"outputs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    return Job(config, overrides, hardware, plan, run_dir, bool(sweep_dir or config.run.dir))


def complete(config: Config, degrees: Degrees) -> Config:
    """The config with what was left null filled in: lengths, batch sizes, the schedule's end."""
    train = config.train
    length = _sequence_length(config)
    ranks = degrees.data_parallel
    whole = train.global_batch_size or max(_GLOBAL_BATCH, ranks * (train.microbatch_size or 1))
    micro = train.microbatch_size or _microbatch(whole // ranks, length)
    train = replace(train, sequence_length=length, global_batch_size=whole, microbatch_size=micro)
    schedule = replace(config.schedule, total_steps=config.schedule.total_steps or train.steps)
    return replace(config, train=train, schedule=schedule)


def _sequence_length(config: Config) -> int:
    """Tokens of a row: given ids set it, else as typed, else what the rotary embedding was made for."""
    typed, given = config.train.sequence_length, config.data.given_length()
    if typed and given and typed != given:
        raise UserError(
            f"train.sequence_length={typed}: the rows of data.path are {given + 1} ids wide, "
            f"which sets it to {given}; leave it out"
        )
    return given or typed or config.model.rope.original_sequence_length


def _microbatch(sequences: int, length: int) -> int:
    """The largest divisor of a rank's `sequences` that keeps a microbatch small."""
    most = max(1, _MICROBATCH_TOKENS // length)
    return max((n for n in range(1, most + 1) if sequences % n == 0 and n <= sequences), default=1)


def _check_wrapped(config: Config, degrees: Degrees) -> None:
    """UserError for a degree that nothing in this config would carry out; a plan may have any."""
    if not config.task.uses_model:
        return
    if degrees.data_parallel > 1 and config.parallel.fsdp is None:
        raise UserError(f"parallel.degrees: {degrees.data_parallel} data-parallel ranks need parallel=fsdp")
    unbuilt = [axis for axis in ("pp", "cp", "tp", "ep") if getattr(degrees, axis) > 1]
    if unbuilt:
        axis = unbuilt[0]
        raise UserError(
            f"parallel.degrees.{axis}={getattr(degrees, axis)} can be planned (task=plan) but not run yet: "
            "dp_shard and dp_replicate can"
        )
