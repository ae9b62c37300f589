"""task=train: put model, data, optimizer and callbacks together, run the loop, tell how it went."""

import math
import os
import shlex
from collections import Counter
from contextlib import ExitStack
from multiprocessing import parent_process
from pathlib import Path
from statistics import median
from typing import Any

from dsv3.checkpoint.agreement import on_main
from dsv3.checkpoint.directory import (
    TOKENIZER_DIR,
    Progress,
    complete_steps,
    find_checkpoint,
    newest_checkpoint,
)
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.checkpoint.retention import last_good
from dsv3.checkpoint.training_record import TrainingRecord
from dsv3.config.registry import command
from dsv3.config.strict import build, to_yaml
from dsv3.config.task import SamplingConfig
from dsv3.config.training import TrainConfig
from dsv3.convert.hf_assets import keep_assets
from dsv3.convert.live_export import LiveExporter
from dsv3.data.mixture import PreparedMixture
from dsv3.data.sources import PreparedData
from dsv3.distributed.process_group import RankContext, make_deterministic
from dsv3.distributed.signals import NOTHING_SAVED, Stopped, StopSignal, stop_on_signal
from dsv3.errors import RunOver, UserError
from dsv3.fp8.convert_model import fp8_engine_name
from dsv3.launch.job import Job
from dsv3.launch.run_dir import (
    check_same_data,
    data_recorded_at,
    make_run_dir,
    read_origin,
    record_run,
    write_run_files,
)
from dsv3.launch.trained_on import changed_data_notes, other_data_notes, other_order_notes
from dsv3.metrics import accident_journal, jsonl
from dsv3.metrics.accident_journal import ACCIDENTS_FILE, OVER
from dsv3.metrics.console import Console
from dsv3.metrics.loggers import Logger
from dsv3.metrics.plots import plot_loss_curve
from dsv3.metrics.progress import phase
from dsv3.metrics.recorder import Recorder
from dsv3.metrics.row import MetricsRow
from dsv3.model.generation import TimeLimit
from dsv3.parallel.parallel_model import ParallelModel
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.planning.parameters import training_flops_per_token
from dsv3.tasks.assembly import Assembly, assemble, own_tokenizer
from dsv3.tasks.generate import sample_text
from dsv3.tasks.setup import join_ranks, prepare_data
from dsv3.tasks.this_run import THIS_RUN_FILE, RunFacts
from dsv3.training import callbacks
from dsv3.training.accidents import AccidentWatch
from dsv3.training.callbacks import Callback, TrainingRun
from dsv3.training.evaluation import rows_to_score
from dsv3.training.loop import Loop
from dsv3.training.plan_check import Held, PlanCheck
from dsv3.training.rewind import Rewinder
from dsv3.training.step import TrainStep
from dsv3.training.step_taker import StepTaker
from dsv3.training.stragglers import StragglerWatch
from dsv3.training.stragglers import summary as summary_of_stragglers
from dsv3.training.throughput import Throughput

SAMPLING = SamplingConfig()
SAMPLE_PROMPT = "def "

LOGGER_PATIENCE = 1800.0
"""Seconds that a logger may take to start, or to send what is left; it does not say how far it is."""


class TrainTask:
    """Trains in the run directory, from step 0 or from where the run stopped."""

    def run(self, job: Job) -> float | None:
        """Return the last held-out loss, a sweep's objective; raise Stopped when a signal ended the run."""
        make_deterministic(job.config.train.deterministic, job.config.train.seed)
        # The command that has started this process says it itself, and so do the jobs of a sweep.
        main = os.environ.get("RANK", "0") == "0"
        silent = job.sweep is not None or parent_process() is not None or not main
        with (
            # Here torch imports more of itself.
            stop_on_signal(
                leaves=True,
                message="" if silent else NOTHING_SAVED,
                save_message="SIGUSR1: the run will save after its first step" if main else "",
                then_ignore=job.sweep is None,
            ) as request,
            join_ranks(job) as ranks,
        ):
            return _train(job, ranks, StopSignal(request, ranks.meeting and ranks.meeting.apart()))


def _train(job: Job, world: RankContext, stop: StopSignal) -> float | None:
    """Train on this rank of `world`, which reads the data share that the layout gives it."""
    config, tokenizer = job.config, own_tokenizer(job)
    data = prepare_data(config, world, tokenizer)
    change = None
    if config.run.resume:

        def compare_data() -> dict[str, Any] | None:
            stored = (data.fingerprint, data.record, job.run_dir, config.data.allow_change)
            changed = check_same_data(*stored)
            data.verify_newer(data_recorded_at(job.run_dir))
            return changed

        change = on_main(world, compare_data)
    start = _starting_checkpoint(job, world)
    held = Held.measure(world)
    built = assemble(job, world, data, initial=start is None)
    model, ranks = built.model, built.ranks
    with phase("making the run directory"):  # ranks wait for one another here
        made = world.broadcast_object(make_run_dir(job) if world.is_main else job.run_dir)
        directory = job.enter_run_dir(made)
    world.watch(directory)
    fingerprints = data.fingerprint, data.tokenizer_fingerprint
    record = record_run(job, *fingerprints, change) if world.is_main else None
    manager = CheckpointManager(
        directory, config.checkpoint, world, record, config.train.check_replicas_every > 0
    )
    progress = _restore(built, start, manager)
    built.go_on(progress)
    if world.is_main and job.restart is not None:
        accident_journal.append(directory / ACCIDENTS_FILE, {**job.restart, "step": progress.step})
    job.notes += manager.notes
    log_path = directory / "log.txt"
    console = Console(config.train.log_every, log_path=log_path, quiet=not ranks.is_main)
    run = TrainingRun(config, directory, ranks, model.forward_backward, built.optimizer, progress, console)
    with ExitStack() as stack:
        stack.callback(console.close)
        if ranks.is_main:
            assert record is not None
            _describe(RunFacts(job, run, data, record, tokenizer is not None))
            run.logger = _open_logger(run, stack, record)
        steps = built.steps(progress.statistics, config.train.accidents)
        watch = _watch_accidents(run, steps.step)
        metrics = directory / "metrics.jsonl"
        recorder = Recorder(metrics, ranks, config.train.log_every, console, run.logger, watch)
        check = PlanCheck(job.plan, held, config.train.length, config.train.checkpoint_every)
        listed = _build_callbacks(run, model, data, manager, recorder, watch, check)
        console.start(config.train.steps, progress.step, _tokens_to_come(config.train, progress))
        finished = _build_loop(job, run, steps, listed, stop, Rewinder(watch, manager)).train()
        if watch.over is not None:
            if ranks.is_main:
                entry = {"kind": OVER, "step": progress.step, "reason": watch.over}
                accident_journal.append(directory / ACCIDENTS_FILE, entry)
            raise RunOver(watch.over)
        if not finished:
            resume = shlex.join([*command("train"), f"resume={directory}", *job.resume_flags])
            raise Stopped(f"stopped after step {progress.step} and saved; go on: {resume}")
        if ranks.is_main:
            _conclude(run, data, job.resume_flags, check)
        return recorder.latest.evaluation_loss if recorder.latest else None


def _build_callbacks(
    run: TrainingRun,
    model: ParallelModel,
    data: PreparedData,
    manager: CheckpointManager,
    recorder: Recorder,
    watch: AccidentWatch,
    check: PlanCheck,
) -> list[Callback]:
    """Return what happens between two steps, in this order; train.callbacks come last."""
    train, profile, tokenizer = run.config.train, run.config.profile, data.tokenizer
    replicas = manager.replicas
    watcher = StragglerWatch(run.ranks, model.mesh.degrees.pp if model.mesh else 1)
    exporter = LiveExporter(model, run.directory, run.ranks, train.export_hf_dtype)

    def export(folder: Path) -> None:
        exporter.write(folder, manager.record, run.step)

    listed: list[Callback] = [
        callbacks.Evaluate(data.held_out, train.evaluate_every),
        *([callbacks.CountSources(data, train.log_every)] if isinstance(data, PreparedMixture) else []),
        *([callbacks.WatchStragglers(watcher, train.log_every)] if run.ranks.world > 1 else []),
        callbacks.ComparePlan(check, recorder, train.log_every),
        callbacks.RecordMetrics(recorder, train.log_every),
        callbacks.HeedAccidents(watch),
        *([callbacks.CompareReplicas(replicas, train.check_replicas_every)] if replicas else []),
        callbacks.SaveCheckpoint(manager, recorder, train.checkpoint_every, data.train, watch),
    ]
    if tokenizer is not None:  # data that is token ids already has no text to show

        def sample(seed: int, limit: TimeLimit) -> str:
            return sample_text(model, tokenizer, SAMPLING, SAMPLE_PROMPT, seed, limit)

        listed.append(callbacks.Sample(sample, SAMPLE_PROMPT, train.sample_every, train.generate_seconds))
    listed.append(callbacks.ExportHF(export, train.export_hf_every))
    listed.append(callbacks.CollectGarbage(train.collect_garbage_every))
    if profile.enabled:
        listed.append(callbacks.Profile(profile))
    for name, node in train.callbacks.items():
        callback = build(node)
        if not isinstance(callback, Callback):
            raise UserError(
                f"train.callbacks.{name}: {node['_target_']} is no dsv3.training.callbacks.Callback"
            )
        listed.append(callback)
    return listed


def _watch_accidents(run: TrainingRun, step: TrainStep) -> AccidentWatch:
    """Return what judges the rows of the run."""
    assert step.guard is not None
    config, parts = run.config, run.forward_backward.model_parts
    about = (config.train, config.model, run.directory, run.ranks, parts)
    return AccidentWatch(*about, step.guard, run.progress, run.console)


def _build_loop(
    job: Job,
    run: TrainingRun,
    steps: StepTaker,
    listed: list[Callback],
    stop: StopSignal,
    rewinder: Rewinder,
) -> Loop:
    """Return the loop over the training rows."""
    config, ranks, length = run.config, run.ranks, run.config.train.length
    kind = config.precision.matmul_type(fp8_engine_name(run.forward_backward.model_parts))
    peak = getattr(job.hardware, f"peak_flops_{kind}")
    throughput = Throughput(
        flops_per_token=training_flops_per_token(config.model, length),
        peak_flops=peak and peak * ranks.world,
        device=ranks.device,
    )
    return Loop(run, steps, throughput, listed, stop, rewinder)


def _tokens_to_come(train: TrainConfig, progress: Progress) -> tuple[int, int]:
    """Return the tokens that are done and those at the end of the run."""
    steps = train.steps - progress.step
    samples = BatchSchedule.of(train).samples_after(progress.samples, steps) - progress.samples
    return progress.tokens, progress.tokens + samples * train.length


def _starting_checkpoint(job: Job, world: RankContext) -> Path | None:
    """Return what fills the model: the run's newest checkpoint, else checkpoint.load, else None."""

    def find() -> Path | None:
        found = newest_checkpoint(job.run_dir) if job.config.run.resume else None
        load = job.config.checkpoint.load
        return find_checkpoint(load) if found is None and load else found

    return on_main(world, find)


def _restore(built: Assembly, start: Path | None, manager: CheckpointManager) -> Progress:
    """Continue from the newest checkpoint, or take the weights of checkpoint.load, or start at step 0."""
    parts = built.model.model_parts
    progress = manager.restore(parts, built.optimizer) if built.config.run.resume else None
    progress = progress or built.begin_with(start)
    metrics = manager.run_dir / "metrics.jsonl"
    if built.ranks.is_main and metrics.exists():
        jsonl.truncate_after(metrics, progress.step)
    if built.ranks.is_main:
        accident_journal.cut_back(manager.run_dir / ACCIDENTS_FILE, progress.samples)
    return progress


def _describe(facts: RunFacts) -> None:
    """Write the files that describe the run, and tell what it is about to do; this_run.txt gets longer."""
    run, data = facts.run, facts.data
    if data.tokenizer is not None:
        data.tokenizer.save(run.directory / TOKENIZER_DIR)
    if not run.config.run.resume:  # the place that the weights came from may be gone by then
        load, keeps_ids = run.config.checkpoint.load, data.tokenizer is None or facts.owns_tokenizer
        keep_assets(run.directory, find_checkpoint(load) if load else None, keeps_ids)
    held_out = len(data.held_out)
    scored = len(rows_to_score(data.held_out, run.config.train.evaluate_tokens))
    counted = {**data.summary, "rows_held_out": held_out, "rows_evaluated": scored}
    write_run_files(facts.job, counted, facts.record, data.record)
    facts.job.notes += other_data_notes(facts.record) + changed_data_notes(facts.record.data_changes)
    facts.job.notes += other_order_notes(run.directory) if run.config.run.resume else []
    facts.job.notes += data.tokenizer.notes() if data.tokenizer is not None else []
    lines = facts.lines()
    for line in lines:
        run.console.message(line)
    with (run.directory / THIS_RUN_FILE).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("\n".join(lines) + "\n")


def _open_logger(run: TrainingRun, stack: ExitStack, record: TrainingRecord) -> Logger:
    """Return the configured logger, opened; `stack` finishes it with the run's exit code."""
    logger: Logger = build(run.config.logger)

    def finish(kind: type[BaseException] | None, *_: object) -> None:
        with phase("finishing the logger", patience=LOGGER_PATIENCE):
            logger.finish(0 if kind is None else 1)

    stack.push(finish)
    files = [run.directory / name for name in ("config.yaml", "plan.txt", THIS_RUN_FILE)]
    with phase("starting the logger", patience=LOGGER_PATIENCE):
        values = to_yaml(run.config) | read_origin(run.directory) | {"convergence": record.convergence}
        logger.open(run.directory, values, files, run.console.message)
    return logger


def _conclude(run: TrainingRun, data: PreparedData, resume_flags: list[str], check: PlanCheck) -> None:
    """Draw loss.png, print the table of results and the command to try next."""
    rows = jsonl.read_rows(run.directory / "metrics.jsonl")
    if rows:
        with phase("drawing loss.png"):
            plot_loss_curve(rows, run.directory / "loss.png", f"Loss of {run.directory.name}")
        run.console.table("Done", _results(rows, run, check))
    load = f"checkpoint.load={run.directory}"
    if run.step < run.config.train.steps:  # train.stop_after
        following = [f"resume={run.directory}", *resume_flags]
    elif data.tokenizer is None:
        following = ["task=evaluate", load, *resume_flags]  # the checkpoint names the data with all its keys
    else:
        following = ["task=generate", load, "task.prompt=import ", *resume_flags]
    run.console.next_command(shlex.join([*command("train"), *following]))


def _results(rows: list[MetricsRow], run: TrainingRun, check: PlanCheck) -> list[tuple[str, str]]:
    """Return the table of a finished run: losses in nats, throughput, memory and where the files are."""
    directory, steps = run.directory, run.config.train.steps

    def shown(loss: float | None) -> str:
        return "unknown" if loss is None else f"{loss:.4f}"

    evaluations = [row.evaluation_loss for row in rows if row.evaluation_loss is not None]
    rates = [row.tokens_per_second for row in rows if row.tokens_per_second is not None]
    of = f" of {steps:,}" if rows[-1].step < steps else ""  # train.stop_after
    padding = _padding(rows)
    holds = f", {padding:.1%} of them padding" if padding else ""
    results = [
        ("steps", f"{rows[-1].step:,}{of}, {rows[-1].tokens:,} tokens{holds}"),
        ("first loss", shown(rows[0].loss)),
        ("last loss", shown(rows[-1].loss)),
    ]
    if evaluations:
        first = f" (first {shown(evaluations[0])})" if len(evaluations) > 1 else ""
        results.append(("held-out loss", f"{shown(evaluations[-1])}{first}"))
        results.append(("held-out perplexity", f"{math.exp(min(evaluations[-1], 700.0)):.2f}"))
    last = next((row for row in reversed(rows) if row.sources and row.evaluation_loss is not None), None)
    for name, own in (last.sources or {}).items() if last is not None else ():
        trained = f"{own.get('tokens') or 0:,.0f} tokens, {own.get('epochs') or 0:.3g} epochs"
        results.append((f"  {name}", f"{shown(own.get('evaluation_loss'))}, {trained}"))
    if rates:
        included = ", padding included" if padding else ""
        results.append(("tokens/s", f"{median(rates):,.0f}{included}"))
    told = summary_of_stragglers([(row.straggler_rank, row.straggler) for row in rows])
    results += [("slowest rank", told)] if told else []
    results += _accidents(rows[-1], directory)
    results.append(("peak memory", f"{max(row.memory_gib or 0.0 for row in rows):.2f} GiB"))
    results += check.summary()
    results.append(("written to", f"{directory}"))
    files = f"config.yaml, {THIS_RUN_FILE}, plan.txt, log.txt"
    results.append(("", f"metrics.jsonl, loss.png, checkpoints/, {files}"))
    return results


def _padding(rows: list[MetricsRow]) -> float:
    """Return the share of all places trained on that hold no token, as far as rows tell."""
    before, padding = 0, 0.0
    for row in rows:
        padding += (row.padding or 0.0) * (row.tokens - before)
        before = row.tokens
    return padding / max(1, before)


def _accidents(last: MetricsRow, directory: Path) -> list[tuple[str, str]]:
    """Return what the table says of bad numbers; nothing where there were none."""
    told = []
    entries = accident_journal.read(directory / ACCIDENTS_FILE)
    counts = Counter(entry["kind"] for entry in entries)
    if entries:
        names = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        told.append(("accidents", f"{names}: {ACCIDENTS_FILE}"))
    if last.skipped:
        told.append(("skipped steps", f"{last.skipped:,} of {last.step:,}"))
    if last.alarm:
        good = last_good(complete_steps(directory))
        where = "there is no good checkpoint" if good is None else f"the last good checkpoint is {good.name}"
        told.append(("ALARM", f"the loss is above its past; {where}"))
    return told
