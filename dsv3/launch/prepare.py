"""Turn a composed config into a planned job: resolve the model node, check types, plan; imports no torch."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.directory import (
    CONFIG_FILE,
    find_checkpoint,
    newest_checkpoint,
    step_number,
    stray_notes,
)
from dsv3.checkpoint.retention import doubt_notes
from dsv3.config.convergence import flatten, shown
from dsv3.config.logger import LoggerConfig, RunOrigin
from dsv3.config.overrides import job_overrides, override_key, split_override
from dsv3.config.registry import LAYOUTS, RECIPE_SCHEDULE, RECIPES, RECIPES_LR, SCHEMAS, recipes
from dsv3.config.root import Config
from dsv3.config.strict import strict, to_yaml
from dsv3.errors import UserError
from dsv3.launch.checkpoint_defaults import Composition, compose_over_checkpoint, stored_model_notes
from dsv3.launch.job import Job, SweepJob, plan_job
from dsv3.launch.replayed_run import find_step
from dsv3.launch.resume import ResumedRun, resume_notes
from dsv3.launch.run_dir import read_stored_values
from dsv3.launch.schedule_outlook import fit_warmup, schedule_notes
from dsv3.launch.search import why_no_objective
from dsv3.launch.trained_on import (
    reads_own_data,
    require_tokenizer,
    training_record,
    untold_note,
    with_own_microbatch,
)
from dsv3.launch.typed_keys import inert_notes, refuse_unread, typed_leaves
from dsv3.planning.hardware import other_gpu


def prepare_job(composed: DictConfig, sweep: SweepJob | None = None) -> Job:
    """Check everything that can be checked before a process starts, and plan; UserError otherwise.

    `sweep` is the place of a job in its sweep.
    """
    hydra = HydraConfig.get()
    overrides = job_overrides()
    typed = {override: pair for override in overrides if (pair := split_override(override))}
    _refuse_tables(typed)
    task: Any = OmegaConf.get_type(composed, "task")
    refuse_unread(task, typed)
    command = Composition.of_this_job()
    resumes = composed.run.resume and not task.replays
    run = ResumedRun.read(Path(composed.run.dir)) if resumes else None
    composed = compose_over_checkpoint(composed, command)
    config: Config = strict(composed, OmegaConf.select(composed, "run.allow_targets") or ())
    replayed = find_step(config) if task.replays else None
    model_notes = stored_model_notes(config, command)
    require_tokenizer(config, {key for key, _ in typed.values()})
    in_sweep = Path(hydra.runtime.output_dir) if hydra.mode is RunMode.MULTIRUN else None
    load = config.checkpoint.load if config.task.reads_checkpoint else None
    record = training_record(find_checkpoint(load)) if load else None
    own_data = reads_own_data(config, record, {key for key, _ in typed.values()})
    _require_objective(config, hydra)
    if config.task.reads_rows and "train.evaluate_tokens" not in {key for key, _ in typed_leaves(typed)}:
        # The default bounds what a run pays again and again; a loss that is asked for is that of all rows.
        config = replace(config, train=replace(config.train, evaluate_tokens=None))
    warmup = config.schedule.warmup_steps
    warmup_notes: list[str] = []
    if config.task.trains:
        config, warmup_notes = fit_warmup(config, overrides, resumed=config.run.resume)
    job = plan_job(config, run.merged(overrides) if run else overrides, in_sweep)
    if config.schedule.warmup_steps != warmup:
        job.reasons["schedule.warmup_steps"] = "a tenth of the schedule"
    job.sweep, job.choices = sweep, {group: str(choice) for group, choice in hydra.runtime.choices.items()}
    job.notes += model_notes + (replayed.notes if replayed is not None else [])
    job.typed, job.config_dirs = overrides, [path.removeprefix("file://") for path in command.search]
    job.resume_flags = [each for each, (key, _) in typed.items() if key.lstrip("+") == "run.allow_targets"]
    if record is not None and own_data:
        job.own_data, job.config = True, with_own_microbatch(job, record, config.train.microbatch_size)
    if load:
        job.notes += doubt_notes(find_checkpoint(load))
    if load and record is None:
        job.notes.append(untold_note(job.config, find_checkpoint(load)))
    if run is not None:
        job.choices = run.named_choices(job.choices)
    job.config = replace(job.config, logger=_named_logger(job))
    if run is not None:
        job.notes += resume_notes(run, job.config, overrides, job.config_dirs) + stray_notes(run.directory)
        job.config_dirs = list(dict.fromkeys([*job.config_dirs, *run.config_dirs]))
    if job.config.task.uses_model and not job.config.launch.submits:
        job.notes += filter(None, [other_gpu(job.config.hardware)])
    # In a sweep of any task run.dir is where the jobs that fail are marked.
    told = {override: pair for override, pair in typed.items() if not (in_sweep and pair[0] == "run.dir")}
    if not task.chooses_layout:  # whose plan is none of the layouts that it chooses
        job.notes += inert_notes(job, told)
    if job.config.task.trains and replayed is None:
        newest = newest_checkpoint(run.directory) if run else None
        done = step_number(newest) if newest else 0
        job.notes += warmup_notes + schedule_notes(job.config, done, flatten(run.config) if run else None)
        job.recipe = [] if run else _recipe_lines(job, str(hydra.runtime.choices.get("model")))
    return job


def _require_objective(config: Config, hydra: Any) -> None:
    """Raise UserError for a job of a search that would have no result, which the search minimizes."""
    if hydra.mode is RunMode.MULTIRUN and not hydra.sweeper["_target_"].endswith("BasicSweeper"):
        why = why_no_objective(config)
        if why is not None:
            raise UserError(why)


def _refuse_tables(typed: Mapping[str, tuple[str, str]]) -> None:
    """Raise UserError for overrides (by override: key, value) of dsv3's own tables, and for empty nodes."""
    for override, (key, value) in typed.items():
        if key == LAYOUTS:
            raise UserError(
                f"{LAYOUTS} cannot be set directly: model and parallel choose it, "
                "parallel.degrees.* changes it"
            )
        if key in (RECIPES, RECIPES_LR):
            raise UserError(f"{RECIPES} cannot be set directly: model chooses it; type the keys it sets")
        if re.fullmatch(r"\{\s*\}", value):
            raise UserError(f"{override}: an empty node sets nothing; name its keys, {key}.KEY=VALUE")


def _named_logger(job: Job) -> LoggerConfig:
    """Return the logger's config with the names that follow from the command; a resumed run keeps its own."""
    logger = job.config.logger
    if job.config.run.resume:
        stored = read_stored_values(job.run_dir / CONFIG_FILE)
        null = [f.name for f in fields(logger) if getattr(logger, f.name) is None]
        own: dict[str, Any] = {name: stored.get(f"logger.{name}") for name in null}
        logger = replace(logger, **own)
    names = [job.choices.get(group) for group in ("model", "parallel", "experiments")]
    if job.config.checkpoint.load and "model" not in map(override_key, job.overrides):
        names[0] = None  # the checkpoint's
    precision = "fp8" if job.config.precision.fp8 is not None else job.config.precision.compute.name
    origin = RunOrigin(
        command=shlex.join(job.overrides),
        choices=[
            name for name in (*names[:2], precision, *names[2:]) if name not in (None, "None", "stored")
        ],
        sweep=job.sweep.directory.absolute().name if job.sweep else None,
        differs=job.sweep.short_name if job.sweep else "",
    )
    return logger.filled_in(origin)


def _recipe_lines(job: Job, model: str) -> list[str]:
    """Return what the run took from the recipe of its model, and what else the model's report did."""
    row, config = recipes().get(model), job.config
    if row is None:
        return []
    has = flatten(to_yaml(config))
    nodes = {node: row[node] for node in ("optimizer", "schedule", "train")}
    wanted = {f"{node}.{key}": value for node, values in nodes.items() for key, value in values.items()}
    taken = [f"{key}={shown(value)}" for key, value in wanted.items() if has.get(key) == value]
    own = row.get(RECIPE_SCHEDULE)
    if own and isinstance(config.schedule, SCHEMAS[f"schedule/{own['choice']}"]):
        taken.insert(0, f"schedule={own['choice']}")
    filled = "train.global_batch_size" in job.reasons
    small = ": a small layout cannot hold the report's batch, so it is no default" if filled else ""
    start = config.train.batch_ramp.start
    ramp = f" after a ramp from {start:,}" if start is not None else ""
    lines = [
        f"{row['source']}: {' '.join(taken) or 'nothing of it was left'}",
        f"the report also has {row['report']}; this run has {config.train.batch:,} sequences of "
        f"{config.train.length:,} tokens per step{ramp}{small}",
    ]
    return [*lines, f"the report's batch: {' '.join(row['batch'])}"] if filled else lines
