"""One job: a checked config with its plan, before any process or tensor of it exists."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from dsv3.checkpoint.released.writer import config_json
from dsv3.config import Config
from dsv3.parallel.backends import check_backend
from dsv3.parallel.degrees import Degrees
from dsv3.parallel.laws import check_batch, check_schedule, check_sequence, check_wrapped, resolve
from dsv3.parallel.stages import least_microbatches, stage_count, takes_microbatches
from dsv3.planning.hardware import HardwareConfig, detect
from dsv3.planning.plan import Plan, make_plan
from dsv3.precision.check import check_fp8
from dsv3.runtime.errors import UserError
from dsv3.runtime.world import ranks_per_node, world_size
from dsv3.tasks.config import EvaluateTaskConfig
from dsv3.training.config import check_moments

# Unless set, a microbatch has as many sequences as make about this many tokens ...
_MICROBATCH_TOKENS = 4096
# ... and a global batch this many, or more where ranks or a pipeline need it.
_GLOBAL_BATCH = 8
# With so many microbatches a pipeline rank works 4 / 5 of the time.
_PIPELINE_ROUNDS = 4


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
    degrees = resolve(config.parallel, world, config.model, _sequence_length(config))
    if config.task.uses_model:
        check_wrapped(config.parallel, degrees)
    config = complete(config, degrees)
    train = config.train
    if config.task.trains:
        if train.export_hf_every:
            config_json(config.model, "bfloat16")  # or the first export would end the run
        check_moments(config.optimizer, config.precision.moments)
        check_batch(degrees, train.length, train.batch, train.microbatch)
    elif isinstance(config.task, EvaluateTaskConfig):
        check_sequence(degrees, train.length)
    check_schedule(config.parallel, degrees, train.batch, train.microbatch)
    hardware = detect(config.hardware, ranks_per_node(config, world))
    plan = make_plan(config, degrees, hardware)
    check_backend(config, plan)
    check_fp8(config, plan)
    run_dir = sweep_dir or Path(config.run.dir or f"outputs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    return Job(config, overrides, hardware, plan, run_dir, bool(sweep_dir or config.run.dir))


def complete(config: Config, degrees: Degrees) -> Config:
    """The config with what was left null filled in: lengths, batch sizes, the schedule's end."""
    train = config.train
    length, ranks = _sequence_length(config), degrees.data_parallel
    whole = train.global_batch_size or _global_batch(config, degrees)
    micro = train.microbatch_size or _microbatch(config, degrees, whole // ranks, length)
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


def _global_batch(config: Config, degrees: Degrees) -> int:
    """Sequences of a step: the usual number where every rank gets what it needs, else as many as they do."""
    unit = degrees.data_parallel * (config.train.microbatch_size or 1)
    if degrees.pp == 1:
        return max(_GLOBAL_BATCH, unit)
    per_rank = stage_count(config.parallel, degrees.pp) // degrees.pp
    least = least_microbatches(config.parallel.schedule, degrees.pp, per_rank)
    return _GLOBAL_BATCH if unit * least <= _GLOBAL_BATCH else unit * degrees.pp * _PIPELINE_ROUNDS


def _microbatch(config: Config, degrees: Degrees, sequences: int, length: int) -> int:
    """The largest divisor of a rank's `sequences` that keeps a microbatch small and the pipeline running."""
    per_rank = stage_count(config.parallel, degrees.pp) // degrees.pp

    def runs(microbatch: int) -> bool:
        count, rest = divmod(sequences, microbatch)
        schedule = config.parallel.schedule
        return rest == 0 and (degrees.pp == 1 or takes_microbatches(schedule, degrees.pp, per_rank, count))

    most = min(sequences, max(1, _MICROBATCH_TOKENS // length))
    return max(filter(runs, range(1, most + 1)), default=1)
