"""What happens to the arguments before Hydra parses them: quoting, resume, the machine's defaults.

How many processes a job has, from the config, the launcher's environment and the machine.

One job: a checked config with its plan, before any process or tensor of it exists.
"""

import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from dsv3.config.hardware import HardwareConfig
from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.config.task import EvaluateTaskConfig
from dsv3.config.training import check_moments
from dsv3.errors import UserError
from dsv3.hf.config_json import config_json
from dsv3.planning.checks import check_backend, check_fp8
from dsv3.planning.hardware import detect, visible_gpus
from dsv3.planning.layout import (
    ParallelDims,
    check_batch,
    check_schedule,
    check_sequence,
    check_wrapped,
    resolve,
)
from dsv3.planning.pipeline_stages import least_microbatches, stage_count, takes_microbatches
from dsv3.planning.plan import Plan, make_plan


def under_launcher() -> bool:
    """Whether torchrun (or srun, see slurm.py) started this process as one of several."""
    return "RANK" in os.environ


def is_first_here() -> bool:
    """Whether this process is alone, or the first of its node: what all ranks meet is told once a console."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def world_size(config: Config) -> int:
    """Ranks of the job: as launched, as configured, or what the layout needs at least (all GPUs here).

    UserError where the config and the launcher disagree, or the GPUs are not there.
    """
    launch = config.launch
    chosen = launch.world_size or (launch.nproc * launch.nnodes if launch.nproc else None)
    if not config.task.uses_model:
        return chosen or _smallest(config)
    if under_launcher():
        return _launched(chosen)
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
    gpus = 0 if launch.submits else len(visible_gpus())  # those of the node it will run on are not known
    # GPUs that are here set the size of a world that can grow; on CPU the layout does.
    grown = gpus * launch.nnodes if _grows(config) else 1
    world = chosen or (max(_product(config), grown) if gpus else _smallest(config))
    here = world // launch.nnodes
    if gpus and here > gpus:
        raise UserError(
            f"launch.nproc={here}, but this node has {gpus} GPUs: use launch.nproc={gpus} or fewer"
        )
    return world


def ranks_per_node(config: Config, world: int) -> int:
    """Ranks of `world` that share this node's memory: as launched, else as configured."""
    launched = os.environ.get("LOCAL_WORLD_SIZE") if under_launcher() else None
    return max(1, int(launched) if launched and config.task.uses_model else world // config.launch.nnodes)


def _smallest(config: Config) -> int:
    """The smallest world that the layout is made for."""
    product = _product(config)
    return -(-config.parallel.min_world_size // product) * product if _grows(config) else product


def _product(config: Config) -> int:
    """The ranks that the typed degrees need."""
    typed = config.parallel.degrees.typed
    stage = math.prod(typed.get(axis, 1) for axis in ("dp_shard", "cp", "tp"))
    if "dp_shard" not in typed:
        stage = math.lcm(stage, typed.get("ep", 1))
    return stage * typed.get("pp", 1) * typed.get("dp_replicate", 1)


def _grows(config: Config) -> bool:
    """Whether a degree is left to take more ranks."""
    degrees = config.parallel.degrees
    return any(map(degrees.is_auto, ("pp", "dp_replicate", "dp_shard", "cp", "tp")))


def _launched(chosen: int | None) -> int:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if chosen not in (None, world):
        raise UserError(
            f"launch.nproc x launch.nnodes make {chosen}, but the launcher started {world} processes: "
            "leave launch.* out under torchrun and srun"
        )
    return world


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


def complete(config: Config, degrees: ParallelDims) -> Config:
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
    typed = config.train.sequence_length
    given: int | None = build(config.data).sequence_length if config.data.sets_sequence_length else None
    if typed and given and typed != given:
        raise UserError(
            f"train.sequence_length={typed}: the rows of data.path are {given + 1} ids wide, "
            f"which sets it to {given}; leave it out"
        )
    return given or typed or config.model.rope.original_sequence_length


def _global_batch(config: Config, degrees: ParallelDims) -> int:
    """Sequences of a step: the usual number where every rank gets what it needs, else as many as they do."""
    unit = degrees.data_parallel * (config.train.microbatch_size or 1)
    if degrees.pp == 1:
        return max(_GLOBAL_BATCH, unit)
    per_rank = stage_count(config.parallel, degrees.pp) // degrees.pp
    least = least_microbatches(config.parallel.schedule, degrees.pp, per_rank)
    return _GLOBAL_BATCH if unit * least <= _GLOBAL_BATCH else unit * degrees.pp * _PIPELINE_ROUNDS


def _microbatch(config: Config, degrees: ParallelDims, sequences: int, length: int) -> int:
    """The largest divisor of a rank's `sequences` that keeps a microbatch small and the pipeline running."""
    per_rank = stage_count(config.parallel, degrees.pp) // degrees.pp

    def runs(microbatch: int) -> bool:
        count, rest = divmod(sequences, microbatch)
        schedule = config.parallel.schedule
        return rest == 0 and (degrees.pp == 1 or takes_microbatches(schedule, degrees.pp, per_rank, count))

    most = min(sequences, max(1, _MICROBATCH_TOKENS // length))
    return max(filter(runs, range(1, most + 1)), default=1)
