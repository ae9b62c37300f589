"""Plan a job: its world size, degrees, batch sizes and needs, before any process or tensor of it exists.

The world size comes from the config, the launcher's environment and the GPUs of this machine.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsv3.checkpoint.directory import HF_DIR, find_checkpoint, is_hf_checkpoint
from dsv3.checkpoint.training_record import TrainingRecord
from dsv3.config.convergence import flatten
from dsv3.config.hardware import CPU, HardwareConfig
from dsv3.config.launch import LaunchConfig
from dsv3.config.optimizer import check_moments
from dsv3.config.parallel import WORLD_AXES, DegreesConfig, ParallelConfig
from dsv3.config.precision import ComputeType
from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.config.training import BIAS_SPEED, GENERATE_EVERY, GENERATE_SHARE
from dsv3.distributed.directory_lock import DirectoryLock
from dsv3.errors import UserError
from dsv3.hf.config_writer import config_json
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.planning.checks import check_expert_backend, check_fp8
from dsv3.planning.hardware import detect_hardware, visible_gpus
from dsv3.planning.layout import (
    ParallelDims,
    check_batch,
    check_schedule,
    check_sequence,
    resolve_degrees,
)
from dsv3.planning.parameter_groups import check_groups
from dsv3.planning.pipeline_stages import min_microbatches, stage_count, supports_microbatches
from dsv3.planning.plan import Plan, make_plan

# Unless set, a microbatch has as many sequences as make about this many tokens ...
MICROBATCH_TOKENS = 4096

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
    # The GPUs of the node that Slurm will choose are not known yet; hardware=cpu leaves those here alone.
    gpus = 0 if launch.submits or config.hardware.name == CPU else len(visible_gpus())
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


@dataclass(frozen=True)
class SweepJob:
    """The place of a job in its sweep."""

    number: str
    """Name of the job's directory."""
    place: int
    """From 1: the trials that an earlier command has finished count as well."""
    total: int | None
    """Jobs of the sweep; None where the sweeper does not say."""
    differs: list[str]
    """Overrides of the swept keys."""
    directory: Path
    """That of the sweep."""

    @property
    def heading(self) -> str:
        """Return the line that announces the job."""
        place = f"{self.place} of {self.total}" if self.total else f"{self.place}"
        return f"job {self.number} ({place}): {' '.join(self.differs)} -> {self.directory / self.number}"

    @property
    def short_name(self) -> str:
        """Return what differs by the last words of its keys, `lr=1e-3 top_k=2`, where those differ."""
        short = [override.partition("=")[0].rpartition(".")[2] for override in self.differs]
        if len(set(short)) < len(short):
            return " ".join(self.differs)
        values = [override.partition("=")[2] for override in self.differs]
        return " ".join(f"{key}={value}" for key, value in zip(short, values, strict=True))


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
    """Arguments that a resume must be given again: run.allow_targets is not stored."""
    typed: list[str] = field(default_factory=list)
    """Overrides of this command alone; those of a resumed run are among `overrides` too."""
    config_dirs: list[str] = field(default_factory=list)
    """Folders of config files beside dsv3's own that the command was composed with."""
    choices: dict[str, str] = field(default_factory=dict)
    """Names of the choices of the config groups, such as {"model": "16b"}."""
    sweep: SweepJob | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a value is what it is, by the key, of every value that was filled in."""
    own_data: bool = False
    """The data is what checkpoint.load was trained on, and its held-out rows are those of its run."""
    recipe: list[str] = field(default_factory=list)
    """Lines on what a run took from its model's recipe, and what else the model's report did."""
    notes: list[str] = field(default_factory=list)
    """Lines that the run prints before its first step: what it took without being told."""
    restart: dict[str, Any] | None = None
    """Of an attempt after the first: its line in accidents.jsonl, without the step (launch/restarts.py)."""
    held: list[DirectoryLock] = field(default_factory=list, repr=False)
    """The run directory's lock, which workers keep with their launcher (launch/run_dir.py)."""
    on_run_dir: Callable[[Path], None] | None = field(default=None, repr=False)
    """Tells the launcher, from rank 0, where the run is; set in the worker."""

    def enter_run_dir(self, directory: Path) -> Path:
        """Take note of the run directory that rank 0 has made, and return it."""
        self.run_dir = directory
        if self.on_run_dir is not None:
            self.on_run_dir(directory)
        return directory

    @property
    def on_cpu(self) -> bool:
        """Return True where hardware=cpu keeps the job from the GPUs, if there are any."""
        return self.config.hardware.name == CPU

    @property
    def host_ranks(self) -> int | None:
        """Return the ranks that share the memory of a node, the more the less for each; None on GPUs."""
        shared = self.plan.hardware.name == CPU and self.config.hardware.memory_bytes is None
        return ranks_per_node(self.config, self.plan.world_size) if shared else None


def plan_job(config: Config, overrides: list[str], sweep_dir: Path | None = None) -> Job:
    """Plan the job of a checked config: world, degrees, batch, memory; UserError where they cannot be."""
    if config.task.chooses_layout:
        return _job_of_layouts(config, overrides, sweep_dir)
    world = world_size(config)
    length = _sequence_length(config)
    if config.task.lays_out:
        degrees = resolve_degrees(config.parallel, world, config.model, length, config.task.uses_model)
    else:
        degrees = ParallelDims(dp_shard=world)
    hardware = detect_hardware(config.hardware, ranks_per_node(config, world))
    config, reasons = complete_config(config, degrees, hardware, length)
    train = config.train
    if config.task.trains:
        if train.export_hf_every:
            config_json(config.model, "bfloat16")  # or the first export would end the run
        check_moments(config.optimizer, config.precision.moments)
        check_groups(config.optimizer, config.model)
        check_sequence(degrees, train.length)
        check_batch(config.parallel, degrees, BatchSchedule.of(train), train.microbatch)
    else:
        if config.task.reads_rows:
            check_sequence(degrees, train.length)
        check_schedule(config.parallel, degrees, train.batch, train.microbatch)
    plan = make_plan(config, degrees, hardware, reasons.get("precision.compute", "as configured"))
    if config.task.trains and config.train.generate_every is None:
        config, plan, reasons["train.generate_every"] = _with_samples(config, plan)
    check_expert_backend(config, plan)
    notes = check_fp8(config, plan)
    notes += config.data.notes(degrees.data_parallel) if config.task.trains else []
    run_dir = sweep_dir or Path(config.run.dir or f"outputs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    named_run_dir = bool(sweep_dir or config.run.dir)
    return Job(config, overrides, hardware, plan, run_dir, named_run_dir, reasons=reasons, notes=notes)


def _job_of_layouts(config: Config, overrides: list[str], sweep_dir: Path | None) -> Job:
    """Return the job of a task that chooses layouts itself: its plan is a stand-in, that of one process."""
    alone = replace(config, parallel=ParallelConfig(degrees=DegreesConfig(dp_shard=1)), launch=LaunchConfig())
    hardware = detect_hardware(config.hardware, ranks_per_node=1)
    degrees = ParallelDims()
    alone, _ = complete_config(alone, degrees, hardware, _sequence_length(config))
    plan = make_plan(alone, degrees, hardware)
    return Job(config, overrides, hardware, plan, sweep_dir or Path(), named_run_dir=False)


def complete_config(
    config: Config, degrees: ParallelDims, hardware: HardwareConfig, length: int
) -> tuple[Config, dict[str, str]]:
    """Return the config with null and auto values filled in, and the reasons of these values by their keys.

    They are the sequence `length`, batch sizes, the schedule's end, the compute dtype and the speed of the
    expert bias.
    """
    train, ranks, reasons = config.train, degrees.data_parallel, {}
    if config.data.sets_sequence_length:
        reasons["train.sequence_length"] = "the width of the rows sets it"
    elif train.sequence_length is None:
        reasons["train.sequence_length"] = "the model's pre-training length"
    whole = train.global_batch_size
    if whole is None:
        whole = _global_batch(config, degrees)
        needed = f"as {ranks} data-parallel ranks need" + (" in a pipeline" if degrees.pp > 1 else "")
        reasons["train.global_batch_size"] = needed if whole != _GLOBAL_BATCH else "the default"
    ramp = train.batch_ramp
    if ramp.start is not None and ramp.increment is None:
        ramp = replace(ramp, increment=ramp.start)
        reasons["train.batch_ramp.increment"] = "train.batch_ramp.start"
    micro = train.microbatch_size
    if micro is None:
        sizes = BatchSchedule(whole, ramp.start, ramp.increment or 1).sizes
        micro = _microbatch(config, degrees, [size // ranks for size in sizes], length)
        reasons["train.microbatch_size"] = f"at most about {MICROBATCH_TOKENS:,} tokens"
    if config.precision.compute is ComputeType.auto:
        found = config.hardware.name == "auto"
        named = "no GPU was found" if hardware.name == CPU else f"{hardware.name} was found"
        reasons["precision.compute"] = named if found else f"hardware={config.hardware.name}"
    balance = train.balance
    if balance.bias_speed is None:
        speed, reasons["train.balance.bias_speed"] = _bias_speed(config)
        balance = replace(balance, bias_speed=speed)
    if config.schedule.total_steps is None:
        reasons["schedule.total_steps"] = "train.steps"
    train = replace(
        train,
        sequence_length=length,
        global_batch_size=whole,
        batch_ramp=ramp,
        microbatch_size=micro,
        balance=balance,
    )
    schedule = replace(config.schedule, total_steps=config.schedule.total_steps or train.steps)
    precision = config.precision.on(hardware.name)
    data = config.data.completed(whole, is_ramped=ramp.start is not None)
    if data != config.data:
        reasons |= dict.fromkeys(("data.lanes", "data.lane_rows"), "train.global_batch_size")
    return replace(config, data=data, train=train, schedule=schedule, precision=precision), reasons


def _with_samples(config: Config, plan: Plan) -> tuple[Config, Plan, str]:
    """Return config and plan with train.generate_every filled in, by what the plan says a sample costs.

    The reason is the third.
    """
    most = config.train.generate_seconds
    plan = replace(plan, upkeep=replace(plan.upkeep, generate_every=GENERATE_EVERY))
    sample = plan.between_steps.sample()
    assert sample.share is not None
    told = f"{sample.seconds:.2g}" if sample.seconds < 10 else f"{sample.seconds:,.0f}"
    reason = f"planned to take {told} s each, {sample.share:.1%} of {GENERATE_EVERY} steps"
    if sample.seconds <= most and sample.share <= GENERATE_SHARE:
        every = GENERATE_EVERY
    else:
        every = 0
        plan = replace(plan, upkeep=replace(plan.upkeep, generate_every=every))
        limit = f"train.generate_seconds={most:g}" if sample.seconds > most else f"{GENERATE_SHARE:.0%}"
        reason += f", more than {limit}"
    plan = replace(plan, upkeep=replace(plan.upkeep, generate_reason=reason))
    return replace(config, train=replace(config.train, generate_every=every)), plan, reason


def _bias_speed(config: Config) -> tuple[float, str]:
    """Return the speed of the expert bias where none is typed, and its reason.

    The biases of a released model are part of how it routes: a fine-tune must not move them unasked. A run
    that goes on from the weights of such a fine-tune keeps them too.
    """
    load = config.checkpoint.load
    if load is None or config.run.resume or not config.task.trains:
        return BIAS_SPEED, "the report's"
    checkpoint = find_checkpoint(load)
    if record := TrainingRecord.read(checkpoint):
        held = flatten(record.config).get("train.balance.bias_speed") == 0
        return (0.0, f"as in the run of {load}") if held else (BIAS_SPEED, "the report's")
    if is_hf_checkpoint(checkpoint) or (checkpoint / HF_DIR).is_dir():
        return 0.0, f"{load} is a released model"
    return BIAS_SPEED, "the report's"


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
    """Return the sequences per step: the usual number where every rank gets an equal share, else more."""
    unit = degrees.data_parallel * (config.train.microbatch_size or 1)
    equal_shares = -(-_GLOBAL_BATCH // unit) * unit
    if degrees.pp == 1:
        return equal_shares
    per_rank = stage_count(config.parallel, degrees.pp) // degrees.pp
    least = min_microbatches(config.parallel.schedule, degrees.pp, per_rank)
    return equal_shares if unit * least <= equal_shares else unit * degrees.pp * _PIPELINE_ROUNDS


def _microbatch(config: Config, degrees: ParallelDims, sequences: Sequence[int], length: int) -> int:
    """Return the sequences per microbatch; gradient accumulation goes over the rest of a rank's sequences.

    It is the largest divisor that keeps a microbatch near MICROBATCH_TOKENS and suits the pipeline schedule,
    for every number of `sequences` that a rank has in a step: where the batch ramps up there are several.
    """
    per_rank = stage_count(config.parallel, degrees.pp) // degrees.pp

    def suits(count: int, rest: int) -> bool:
        schedule = config.parallel.schedule
        return rest == 0 and (degrees.pp == 1 or supports_microbatches(schedule, degrees.pp, per_rank, count))

    def runs(microbatch: int) -> bool:
        return all(suits(*divmod(number, microbatch)) for number in sequences)

    most = min(*sequences, max(1, MICROBATCH_TOKENS // length))
    return max(filter(runs, range(1, most + 1)), default=1)
