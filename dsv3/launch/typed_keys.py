"""Hold every typed key to an effect: refuse what the task does not read, and tell what changes nothing here.

A task says in `reads` which keys it reads (config/task.py). A key that it reads may still have no effect
beside other values of the command: one table below says when each acts. An experiment's values are not typed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser

from dsv3.config.data import TrainedTokenizerConfig
from dsv3.config.model import RopeScaling
from dsv3.config.model_difference import YARN_KEYS
from dsv3.config.overrides import as_typed
from dsv3.config.parallel import RecomputeMode
from dsv3.config.registry import SCHEMAS
from dsv3.config.root import Config
from dsv3.config.task import TaskConfig
from dsv3.errors import UserError
from dsv3.launch.job import Job, under_launcher
from dsv3.training.schedule import build_schedule

OFF = {
    "logger": ("none", "console"),
    "profile": ("off",),
    "compile": ("off",),
    "recompute": ("none",),
    "parallel": ("none",),
    "precision": ("fp32",),
    "launch": ("local",),
    "hardware": ("auto",),
    "experiments": ("null",),
}
"""The choices that switch something off. They hold for a task that has no such thing, too."""


def typed_leaves(typed: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield (key, override) of each typed value, those of a typed node `train={steps:3}` one by one."""
    for override, (key, value) in typed.items():
        if not value.startswith("{"):
            yield key, override
            continue
        for name in _flat(OverridesParser.create().parse_override(override).value(), ""):
            yield f"{key}{name}", override


def _flat(value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield path
        return
    for key, item in value.items():
        yield from _flat(item, f"{path}.{key}")


def refuse_unread(task: type[TaskConfig], typed: Mapping[str, tuple[str, str]]) -> None:
    """Raise UserError for typed keys (by override: key, value) that `task` does not read."""
    known = {"experiments", *(f.name for f in fields(Config))}
    unread = {
        override: None
        for key, override in typed_leaves(typed)
        if key.partition(".")[0] in known
        and not task.reads_key(key)
        and typed[override][1].strip("'\"") not in OFF.get(key, ())
    }
    if unread:
        name = next(name.partition("/")[2] for name, node in SCHEMAS.items() if node is task)
        do, them = ("does", "it") if len(unread) == 1 else ("do", "them")
        raise UserError(f"{' '.join(map(as_typed, unread))} {do} nothing with task={name}: leave {them} out")


class Condition(NamedTuple):
    """Keys that act in some jobs alone."""

    keys: tuple[str, ...]
    """Each a key or the beginning of one; `logger=` is the choice of a group."""
    acts: Callable[[Job], object]
    """Returns a true value where the keys act."""
    because: str
    """The reason why they do not in another job."""


def _has_moe(job: Job) -> bool:
    return job.config.model.num_moe_layers > 0


def _moves_bias(job: Job) -> bool:
    return _has_moe(job) and job.config.model.moe.selection_bias


def _takes_tokenizer(job: Job) -> bool:
    """Return whether ids that are given may come with a tokenizer that is typed."""
    trained = job.config.tokenizer._target_ == TrainedTokenizerConfig._target_
    return not job.config.data.sets_sequence_length and not trained


def _peak_counts(dtype: str) -> Callable[[Job], bool]:
    """Return whether step time or MFU counts this peak: that of a matmul's dtype, and fp32 for routers."""

    def counts(job: Job) -> bool:
        precision = job.config.precision
        return dtype in ("fp32", precision.compute.name, "fp8" if precision.fp8 else "")

    return counts


CONDITIONS = [
    Condition(
        ("parallel.schedule", "parallel.pipeline"),
        lambda job: job.plan.degrees.pp > 1,
        "the layout has one pipeline stage",
    ),
    Condition(
        ("parallel.fsdp", "parallel.reshard_after_forward"),
        lambda job: job.plan.world_size > 1,
        "there is one rank, and nothing to shard",
    ),
    Condition(("parallel.expert",), lambda job: job.plan.degrees.ep > 1, "experts are not split (ep=1)"),
    Condition(("parallel.tensor",), lambda job: job.plan.degrees.tp > 1, "layers are not split (tp=1)"),
    Condition(("parallel.context",), lambda job: job.plan.degrees.cp > 1, "sequences are not split (cp=1)"),
    Condition(
        ("parallel.min_world_size",),
        lambda job: not (under_launcher() or job.config.launch.nproc or job.config.launch.world_size),
        "the number of ranks is given",
    ),
    Condition(
        YARN_KEYS,
        lambda job: job.config.model.rope.scaling is RopeScaling.yarn,
        "model.rope.scaling is none",
    ),
    Condition(("model.moe", "train.balance"), _has_moe, "the model has no MoE layers"),
    Condition(
        ("train.balance.bias_speed", "train.balance.bias_until"),
        _moves_bias,
        "the router has no expert bias (model.moe.selection_bias=false)",
    ),
    Condition(
        ("train.balance.bias_until",),
        lambda job: job.config.train.balance.bias_speed != 0,
        "train.balance.bias_speed is 0",
    ),
    Condition(("train.mtp_loss",), lambda job: job.config.model.mtp_depths, "model.mtp_depths is 0"),
    Condition(
        ("train.mtp_loss.weight",),
        lambda job: job.config.train.mtp_loss.switch_at >= build_schedule(job.config).share(1),
        "train.mtp_loss.switch_at comes before the first step",
    ),
    Condition(
        ("train.mtp_loss.final_weight",),
        lambda job: job.config.train.mtp_loss.switch_at < 1,
        "train.mtp_loss.switch_at comes after the last step",
    ),
    Condition(
        ("train.stop_after",),
        lambda job: (job.config.train.stop_after or 0) < job.config.train.steps,
        "the run ends before",
    ),
    Condition(
        ("train.generate_every", "train.generate_seconds"),
        lambda job: not job.config.data.sets_sequence_length,
        "the data is token ids already",
    ),
    Condition(
        ("tokenizer", "tokenizer="),
        lambda job: not job.config.data.holds_ids or _takes_tokenizer(job),
        "the data is token ids already",
    ),
    Condition(
        ("train.generate_seconds",),
        lambda job: job.config.train.generate_every != 0,
        "train.generate_every is 0",
    ),
    Condition(
        ("train.evaluate_tokens", "checkpoint.keep_best"),
        lambda job: job.config.train.evaluate_every or not job.config.task.trains,
        "train.evaluate_every=0 measures no held-out loss",
    ),
    Condition(
        ("data.revision",),
        lambda job: not Path(getattr(job.config.data, "dataset", None) or "").is_dir(),
        "data.dataset is a directory, and not of the hub",
    ),
    Condition(
        ("data.cache_dir",),
        lambda job: not job.config.data.holds_ids or job.config.data.caches,
        "the data is token ids already, and nothing is cached",
    ),
    Condition(
        ("data.held_out",),
        lambda job: getattr(job.config.data, "held_out_path", None) is None,
        "data.held_out_path names what is held out",
    ),
    Condition(
        ("data.cache_bytes",),
        lambda job: "://" in (getattr(job.config.data, "path", None) or ""),
        "data.path is on this machine",
    ),
    Condition(("data.shuffle",), lambda job: job.config.task.trains, "held-out rows have one order"),
    Condition(
        ("data.held_out",),
        lambda job: job.config.task.trains or job.own_data or not job.config.data.sets_sequence_length,
        "every row of the file is evaluated",
    ),
    Condition(
        ("model.init_std",),
        lambda job: job.config.task.trains and not job.config.checkpoint.load,
        "the weights come from the checkpoint",
    ),
    Condition(
        ("schedule.final",),
        lambda job: getattr(job.config.schedule, "decay", 1) > 0,
        "schedule.decay is 0",
    ),
    Condition(
        ("optimizer.dampening",),
        lambda job: getattr(job.config.optimizer, "momentum", 1) > 0,
        "optimizer.momentum is 0",
    ),
    Condition(
        ("recompute.keep",),
        lambda job: job.config.recompute.mode is RecomputeMode.selective,
        "recompute.mode is not selective",
    ),
    Condition(("compile.backend",), lambda job: job.config.compile.enabled, "compile is off"),
    Condition(("profile.wait", "profile.steps"), lambda job: job.config.profile.enabled, "profile is off"),
    Condition(
        tuple(f"logger.{key}" for key in ("project", "entity", "name", "group", "job_type", "tags", "notes")),
        lambda job: getattr(getattr(job.config.logger, "mode", None), "name", "") != "disabled",
        "logger.mode is disabled",
    ),
    Condition(
        ("launch.node_rank", "launch.rendezvous"),
        lambda job: job.config.launch.nnodes > 1 and not (job.config.launch.submits or under_launcher()),
        "one node is used, or a launcher numbers them",
    ),
    Condition(
        ("launch.max_restarts",),
        lambda job: job.config.task.writes_run and (job.config.launch.submits or not under_launcher()),
        "the processes are another launcher's, or write no run to go on from",
    ),
    Condition(("launch.timeout",), lambda job: job.plan.world_size > 1, "one rank waits for nobody"),
    Condition(
        ("hardware.devices_per_node",),
        lambda job: job.plan.world_size > 1 and not job.config.launch.nproc,
        "the ranks of a node are known",
    ),
    Condition(
        ("hardware.network", "hardware.intra_node_bandwidth", "hardware.inter_node_bandwidth"),
        lambda job: job.plan.world_size > 1,
        "one rank sends nothing",
    ),
    *(
        Condition(
            (f"hardware.peak_flops_{dtype}",),
            _peak_counts(dtype),
            f"no matmul of the model is in {dtype}",
        )
        for dtype in ("fp32", "bf16", "fp8")
    ),
    Condition(
        ("run.dir",),
        lambda job: job.config.task.trains,
        "this task writes no run directory",
    ),
]
"""The keys that act in some jobs alone; the last words of each go behind `changes nothing here:`."""


def inert_notes(job: Job, typed: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return a line per reason for the typed keys that have no effect in this job."""
    reasons: dict[str, list[str]] = {}
    for key, _ in typed_leaves(typed):
        reason = why_inert(job, key)
        if reason is not None:
            reasons.setdefault(reason, []).append(key)
    return [
        f"{', '.join(keys)} {'changes' if len(keys) == 1 else 'change'} nothing here: {reason}"
        for reason, keys in reasons.items()
    ]


def why_inert(job: Job, key: str) -> str | None:
    """Return the reason why `key` has no effect in this job; None where it has one, or always has."""
    return next((c.because for c in CONDITIONS if matches(key, c.keys) and not c.acts(job)), None)


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Return True where a key is one of `patterns` or lies below one; `group=` matches the choice alone."""
    return any(key == p.removesuffix("=") or key.startswith(f"{p}.") for p in patterns)
