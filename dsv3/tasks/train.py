"""task=train: put model, data, optimizer and callbacks together, run the loop, tell how it went."""

import math
import os
import shlex
from contextlib import ExitStack
from multiprocessing import parent_process
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dsv3.checkpoint.agreement import on_main
from dsv3.checkpoint.directory import (
    ASSETS_DIR,
    TOKENIZER_DIR,
    Progress,
    find_checkpoint,
    newest_checkpoint,
)
from dsv3.checkpoint.load import load_weights
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.checkpoint.manifest import verify_together
from dsv3.checkpoint.training_record import TrainingRecord
from dsv3.config.registry import command
from dsv3.config.root import Config
from dsv3.config.strict import build, to_yaml
from dsv3.config.task import SamplingConfig
from dsv3.config.training import TrainConfig
from dsv3.convert.hf_assets import keep_assets
from dsv3.convert.live_export import LiveExporter
from dsv3.data.lanes import LaneRows
from dsv3.data.loader import DataLoader
from dsv3.data.mixture import PreparedMixture
from dsv3.data.prefetch import Prefetcher
from dsv3.data.sources import PreparedData
from dsv3.distributed.process_group import RankContext, make_deterministic
from dsv3.distributed.signals import NOTHING_SAVED, Stopped, StopSignal, stop_on_signal
from dsv3.errors import UserError
from dsv3.fp8.convert_model import fp8_engine_name
from dsv3.launch.job import Job, under_launcher
from dsv3.launch.run_dir import (
    check_same_data,
    data_recorded_at,
    make_run_dir,
    read_origin,
    record_run,
    write_run_files,
)
from dsv3.launch.trained_on import changed_data_notes, other_data_notes, other_order_notes
from dsv3.metrics import jsonl
from dsv3.metrics.console import Console
from dsv3.metrics.loggers import Logger
from dsv3.metrics.plots import plot_loss_curve
from dsv3.metrics.progress import phase
from dsv3.metrics.recorder import Recorder
from dsv3.metrics.row import MetricsRow
from dsv3.model.generation import TimeLimit
from dsv3.parallel.mesh import assign_data_shard
from dsv3.parallel.parallel_model import ParallelModel, build_parallel_model
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.planning.parameters import training_flops_per_token
from dsv3.tasks.generate import sample_text
from dsv3.tasks.setup import build_mesh, join_ranks, load_own_tokenizer, prepare_data, stop_at_assets
from dsv3.tasks.this_run import THIS_RUN_FILE, RunFacts
from dsv3.tokens.tokenizer import Tokenizer
from dsv3.training import callbacks
from dsv3.training.callbacks import Callback, TrainingRun
from dsv3.training.evaluation import rows_to_score
from dsv3.training.loop import Loop
from dsv3.training.optimizer import build_optimizer
from dsv3.training.schedule import build_schedule
from dsv3.training.step import TrainStep
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
        silent = job.sweep is not None or parent_process() is not None or os.environ.get("RANK", "0") != "0"
        with (
            # Here torch imports more of itself.
            stop_on_signal(
                not under_launcher(), leaves=True, message="" if silent else NOTHING_SAVED
            ) as request,
            join_ranks(job) as ranks,
        ):
            return _train(job, ranks, StopSignal(request, ranks.meeting and ranks.meeting.apart()))


def _train(job: Job, world: RankContext, stop: StopSignal) -> float | None:
    """Train on this rank of `world`, which reads the data share that the layout gives it."""
    config, own_tokenizer = job.config, _own_tokenizer(job)
    data = prepare_data(config, world, own_tokenizer)
    change = None
    if config.run.resume:

        def compare_data() -> dict[str, Any] | None:
            stored = (data.fingerprint, data.record, job.run_dir, config.data.allow_change)
            changed = check_same_data(*stored)
            data.verify_newer(data_recorded_at(job.run_dir))
            return changed

        change = on_main(world, compare_data)
    mesh = build_mesh(job, world)
    start = _starting_checkpoint(job, world)
    model = build_parallel_model(config, mesh, world.device, initial=start is None)
    optimizer = build_optimizer(config.optimizer, model.model_parts, config.precision.moments)
    ranks = assign_data_shard(world, mesh)
    with phase("making the run directory"):  # ranks wait for one another here
        job.run_dir = directory = world.broadcast_object(make_run_dir(job) if world.is_main else job.run_dir)
    world.watch(directory)
    fingerprints = data.fingerprint, data.tokenizer_fingerprint
    record = record_run(job, *fingerprints, change) if world.is_main else None
    manager = CheckpointManager(directory, config.checkpoint, world, record)
    progress = _restore(config, start, world, manager, model, optimizer)
    if isinstance(data.train, LaneRows):
        data.train.go_on(progress.bookmarks)
    job.notes += manager.notes
    log_path = directory / "log.txt"
    console = Console(config.train.log_every, log_path=log_path, quiet=not ranks.is_main)
    run = TrainingRun(config, directory, ranks, model.forward_backward, optimizer, progress, console)
    with ExitStack() as stack:
        stack.callback(console.close)
        if ranks.is_main:
            assert record is not None
            _describe(RunFacts(job, run, data, record, own_tokenizer is not None))
            run.logger = _open_logger(run, stack, record)
        layers = config.model.moe_layers()
        metrics = directory / "metrics.jsonl"
        recorder = Recorder(metrics, ranks, config.train.log_every, console, run.logger, layers)
        listed = _build_callbacks(run, model, data, manager, recorder)
        console.start(config.train.steps, progress.step, _tokens_to_come(config.train, progress))
        if not _build_loop(job, run, data, listed, stop).train():
            resume = shlex.join([*command("train"), f"resume={directory}", *job.resume_flags])
            raise Stopped(f"stopped after step {progress.step} and saved; go on: {resume}")
        if ranks.is_main:
            _conclude(run, data, job.resume_flags)
        return recorder.latest.evaluation_loss if recorder.latest else None


def _build_callbacks(
    run: TrainingRun, model: ParallelModel, data: PreparedData, manager: CheckpointManager, recorder: Recorder
) -> list[Callback]:
    """Return what happens between two steps, in this order; train.callbacks come last."""
    train, profile, tokenizer = run.config.train, run.config.profile, data.tokenizer
    exporter = LiveExporter(model, run.directory, run.ranks, train.export_hf_dtype)

    def export(folder: Path) -> None:
        exporter.write(folder, manager.record, run.step)

    listed: list[Callback] = [
        callbacks.Evaluate(data.held_out, train.evaluate_every),
        *([callbacks.CountSources(data, train.log_every)] if isinstance(data, PreparedMixture) else []),
        callbacks.RecordMetrics(recorder, train.log_every),
        callbacks.SaveCheckpoint(manager, recorder, train.checkpoint_every, data.train),
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


def _build_loop(
    job: Job, run: TrainingRun, data: PreparedData, listed: list[Callback], stop: StopSignal
) -> Loop:
    """Return the loop over the training rows."""
    config, ranks = run.config, run.ranks
    train, length = config.train, data.sequence_length
    assert data.train is not None
    kind = config.precision.matmul_type(fp8_engine_name(run.forward_backward.model_parts))
    peak = getattr(job.hardware, f"peak_flops_{kind}")
    throughput = Throughput(
        flops_per_token=training_flops_per_token(config.model, length),
        peak_flops=peak and peak * ranks.world,
        device=ranks.device,
    )
    step = TrainStep(run.forward_backward, run.optimizer, ranks, train.clip_norm)
    batch, pinned = BatchSchedule.of(train), ranks.device.type == "cuda"
    loader = DataLoader(data.train, batch, train.microbatch, ranks.data_rank, ranks.data_world, pinned)
    batches = Prefetcher(loader, train.prefetch, ranks.device)
    return Loop(run, step, batches, build_schedule(config), throughput, listed, stop)


def _tokens_to_come(train: TrainConfig, progress: Progress) -> tuple[int, int]:
    """Return the tokens that are done and those at the end of the run."""
    steps = train.steps - progress.step
    samples = BatchSchedule.of(train).samples_after(progress.samples, steps) - progress.samples
    return progress.tokens, progress.tokens + samples * train.length


def _own_tokenizer(job: Job) -> Tokenizer | None:
    """Return the tokenizer whose ids the weights know: the run's own, or that of checkpoint.load."""
    if job.config.run.resume:
        folder = job.run_dir / TOKENIZER_DIR
        if not folder.is_dir():
            return None
        tokenizer = Tokenizer.from_file(folder)
        stop_at_assets(tokenizer, job.run_dir / ASSETS_DIR)
        return tokenizer
    if job.config.checkpoint.load:
        return load_own_tokenizer(job.config, find_checkpoint(job.config.checkpoint.load))
    return None


def _starting_checkpoint(job: Job, world: RankContext) -> Path | None:
    """Return what fills the model: the run's newest checkpoint, else checkpoint.load, else None."""

    def find() -> Path | None:
        found = newest_checkpoint(job.run_dir) if job.config.run.resume else None
        load = job.config.checkpoint.load
        return find_checkpoint(load) if found is None and load else found

    return on_main(world, find)


def _restore(
    config: Config,
    start: Path | None,
    world: RankContext,
    manager: CheckpointManager,
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Continue from the newest checkpoint, or take the weights of checkpoint.load, or start at step 0."""
    progress = manager.restore(model.model_parts, optimizer) if config.run.resume else None
    if progress is None and start is not None:
        verify_together(start, world)
        load_weights(model.model_parts, start, world)
    progress = progress or Progress()
    metrics = manager.run_dir / "metrics.jsonl"
    if world.is_main and metrics.exists():
        jsonl.truncate_after(metrics, progress.step)
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
    with (run.directory / THIS_RUN_FILE).open("a", encoding="utf-8") as file:
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


def _conclude(run: TrainingRun, data: PreparedData, resume_flags: list[str]) -> None:
    """Draw loss.png, print the table of results and the command to try next."""
    rows = jsonl.read_rows(run.directory / "metrics.jsonl")
    if rows:
        with phase("drawing loss.png"):
            plot_loss_curve(rows, run.directory / "loss.png", f"Loss of {run.directory.name}")
        run.console.table("Done", _results(rows, run.directory, run.config.train.steps))
    load = f"checkpoint.load={run.directory}"
    if run.step < run.config.train.steps:  # train.stop_after
        following = [f"resume={run.directory}", *resume_flags]
    elif data.tokenizer is None:
        following = ["task=evaluate", load]
        if run.config.data.sets_sequence_length:
            following += ["data=tokens", f"data.path={getattr(run.config.data, 'path', '')}"]
    else:
        following = ["task=generate", load, "task.prompt=import "]
    run.console.next_command(shlex.join([*command("train"), *following]))


def _results(rows: list[MetricsRow], directory: Path, steps: int) -> list[tuple[str, str]]:
    """Return the table of a finished run: losses in nats, throughput, memory and where the files are."""

    def shown(loss: float | None) -> str:
        return "unknown" if loss is None else f"{loss:.4f}"

    evaluations = [row.evaluation_loss for row in rows if row.evaluation_loss is not None]
    rates = [row.tokens_per_second for row in rows if row.tokens_per_second is not None]
    of = f" of {steps:,}" if rows[-1].step < steps else ""  # train.stop_after
    results = [
        ("steps", f"{rows[-1].step:,}{of}, {rows[-1].tokens:,} tokens"),
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
        results.append(("tokens/s", f"{median(rates):,.0f}"))
    results.append(("peak memory", f"{max(row.memory_gib or 0.0 for row in rows):.2f} GiB"))
    results.append(("written to", f"{directory}"))
    files = f"config.yaml, {THIS_RUN_FILE}, plan.txt, log.txt"
    results.append(("", f"metrics.jsonl, loss.png, checkpoints/, {files}"))
    return results
