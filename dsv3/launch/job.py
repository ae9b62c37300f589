"""Plan a job: its world size, degrees, batch sizes and needs, before any process or tensor of it exists.

The world size comes from the config, the launcher's environment and the GPUs of this machine.
"""

import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from dsv3.config.hardware import HardwareConfig
from dsv3.config.parallel import WORLD_AXES
from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.config.training import check_moments
from dsv3.errors import UserError
from dsv3.hf.config_json import config_json
from dsv3.planning.checks import check_expert_backend, check_fp8
from dsv3.planning.hardware import detect_hardware, visible_gpus
from dsv3.planning.layout import (
    ParallelDims,
    check_batch,
    check_schedule,
    check_sequence,
    check_wrappers,
    resolve_degrees,
)
from dsv3.planning.pipeline_stages import min_microbatches, stage_count, supports_microbatches
from dsv3.planning.plan import Plan, make_plan

# Unless set, a microbatch has as many sequences as make about this many tokens ...
_MICROBATCH_TOKENS = 4096

# ... and a global batch has so many sequences, or more where ranks or a pipeline need it.
_GLOBAL_BATCH = 8

# With so many microbatches per stage a pipeline rank works 4 / 5 of the time.
_PIPELINE_ROUNDS = 4


def under_launcher() -> bool:
    """Return True where torchrun (or srun, see slurm.py) started this process as one of several."""
    return "RANK" in os.environ


def is_first_on_node() -> bool:
    """Return True for the first process of a node, or the only one: it prints what all ranks meet."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def world_size(config: Config) -> int:
    """Return the ranks of the job: as launched, as configured, or as the layout and the GPUs here need.

    UserError where the config and the launcher disagree, or the GPUs are missing.
    """
    launch = config.launch
    chosen = launch.world_size or (launch.nproc * launch.nnodes if launch.nproc else None)
    if not config.task.uses_model:
        return chosen or _smallest(config)
    if under_launcher():
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if chosen not in (None, started):
            raise UserError(
                f"launch.nproc x launch.nnodes make {chosen}, but the launcher started {started} processes: "
                "leave launch.* out under torchrun and srun"
            )
        return started
    if launch.world_size and not launch.nproc:
        raise UserError(
            f"launch.world_size={launch.world_size} alone is for task=plan: "
            "to start processes give launch.nproc (and launch.nnodes)"
        )
    if launch.nnodes > 1 and launch.rendezvous is None and not launch.submits:
        raise UserError(
            f"launch.nnodes={launch.nnodes} needs launch.rendezvous=HOST:PORT of node 0, launch.node_rank=N "
            "on each node; or use torchrun, srun or launch=slurm"
        )
    gpus = 0 if launch.submits else len(visible_gpus())  # the GPUs of the node to run on are not known yet
    # The GPUs of this node set the size of a world that can grow; on CPU the layout does.
    grown = gpus * launch.nnodes if _grows(config) else 1
    world = chosen or (max(_product(config), grown) if gpus else _smallest(config))
    here = world // launch.nnodes
    if gpus and here > gpus:
        raise UserError(
            f"launch.nproc={here}, but this node has {gpus} GPUs: use launch.nproc={gpus} or fewer"
        )
    return world


def ranks_per_node(config: Config, world: int) -> int:
    """Return the ranks of `world` that share this node's memory: as launched, else as configured."""
    launched = os.environ.get("LOCAL_WORLD_SIZE") if under_launcher() else None
    return max(1, int(launched) if launched and config.task.uses_model else world // config.launch.nnodes)


def _smallest(config: Config) -> int:
    """Return the smallest world that the layout is made for."""
    product = _product(config)
    return -(-config.parallel.min_world_size // product) * product if _grows(config) else product


def _product(config: Config) -> int:
    """Return the ranks that the typed degrees need."""
    typed = config.parallel.degrees.typed
    stage = math.prod(typed.get(axis, 1) for axis in ("dp_shard", "cp", "tp"))
    if "dp_shard" not in typed:
        stage = math.lcm(stage, typed.get("ep", 1))
    return stage * typed.get("pp", 1) * typed.get("dp_replicate", 1)


def _grows(config: Config) -> bool:
    """Return True where some degree is left to take more ranks."""
    degrees = config.parallel.degrees
    return any(map(degrees.is_auto, WORLD_AXES))


@dataclass
class Job:
    """A planned job as the workers receive it; it travels between processes by pickle."""

    config: Config
    overrides: list[str]
    """As typed and quoted, for overrides.yaml."""
    hardware: HardwareConfig
    plan: Plan
    run_dir: Path
    named_run_dir: bool
    """The user (or a sweep) chose run_dir; otherwise it may get a number to be new."""
    resume_flags: list[str] = field(default_factory=list)
    """Arguments that a resume must be given again: --config-dir and run.allow_targets are not stored."""
    notes: list[str] = field(default_factory=list)
    """Lines that the run prints before its first step: what it took without being told."""


def plan_job(config: Config, overrides: list[str], sweep_dir: Path | None = None) -> Job:
    """Plan the job of a checked config: world, degrees, batch, memory; UserError where they cannot be."""
    world = world_size(config)
    degrees = resolve_degrees(config.parallel, world, config.model, _sequence_length(config))
    if config.task.uses_model:
        check_wrappers(config.parallel, degrees)
    config = complete_config(config, degrees)
    train = config.train
    if config.task.trains:
        if train.export_hf_every:
            config_json(config.model, "bfloat16")  # or the first export would end the run
        check_moments(config.optimizer, config.precision.moments)
        check_batch(degrees, train.length, train.batch, train.microbatch)
    elif config.task.reads_rows:
        check_sequence(degrees, train.length)
    check_schedule(config.parallel, degrees, train.batch, train.microbatch)
    hardware = detect_hardware(config.hardware, ranks_per_node(config, world))
    plan = make_plan(config, degrees, hardware)
    check_expert_backend(config, plan)
    check_fp8(config, plan)
    run_dir = sweep_dir or Path(config.run.dir or f"outputs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    return Job(config, overrides, hardware, plan, run_dir, bool(sweep_dir or config.run.dir))


def complete_config(config: Config, degrees: ParallelDims) -> Config:
    """Return the config with null values filled in: lengths, batch sizes, the schedule's end."""
    train = config.train
    length, ranks = _sequence_length(config), degrees.data_parallel
    whole = train.global_batch_size or _global_batch(config, degrees)
    micro = train.microbatch_size or _microbatch(config, degrees, whole // ranks, length)
    train = replace(train, sequence_length=length, global_batch_size=whole, microbatch_size=micro)
    schedule = replace(config.schedule, total_steps=config.schedule.total_steps or train.steps)
    return replace(config, train=train, schedule=schedule)


def _sequence_length(config: Config) -> int:
    """Return the tokens per row: set by given ids, else as typed, else the rotary embedding's own length."""
    typed = config.train.sequence_length
    given: int | None = build(config.data).sequence_length if config.data.sets_sequence_length else None
    if typed and given and typed != given:
        raise UserError(
            f"train.sequence_length={typed}: the rows of data.path are {given + 1} ids wide, "
            f"which sets it to {given}; leave it out"
        )
    return given or typed or config.model.rope.original_sequence_length


def _global_batch(config: Config, degrees: ParallelDims) -> int:
    """Return the sequences per step: the usual number where it suffices for every rank, else more."""
    unit = degrees.data_parallel * (config.train.microbatch_size or 1)
    if degrees.pp == 1:
        return max(_GLOBAL_BATCH, unit)
    per_rank = stage_count(config.parallel, degrees.pp) // degrees.pp
    least = min_microbatches(config.parallel.schedule, degrees.pp, per_rank)
    return _GLOBAL_BATCH if unit * least <= _GLOBAL_BATCH else unit * degrees.pp * _PIPELINE_ROUNDS


def _microbatch(config: Config, degrees: ParallelDims, sequences: int, length: int) -> int:
    """Return the sequences per microbatch; gradient accumulation goes over the rest of a rank's `sequences`.

    It is the largest divisor that keeps a microbatch near _MICROBATCH_TOKENS and suits the pipeline schedule.
    """
    per_rank = stage_count(config.parallel, degrees.pp) // degrees.pp

    def runs(microbatch: int) -> bool:
        count, rest = divmod(sequences, microbatch)
        schedule = config.parallel.schedule
        return rest == 0 and (degrees.pp == 1 or supports_microbatches(schedule, degrees.pp, per_rank, count))

    most = min(sequences, max(1, _MICROBATCH_TOKENS // length))
    return max(filter(runs, range(1, most + 1)), default=1)
