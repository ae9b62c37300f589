"""What happens between two optimizer steps: one small class each, listed in tasks/train.py.

The loop knows none of them by name. A user's own class joins the list from the command line
(docs/extending.md).
"""

import gc
import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.checkpoint.replicas import Replicas
from dsv3.config.launch import ProfileConfig
from dsv3.config.root import Config
from dsv3.data.lanes import LaneRows, left_out, left_out_line, newest
from dsv3.data.mixture import PreparedMixture
from dsv3.data.packing import RowDataset
from dsv3.distributed.process_group import RankContext
from dsv3.distributed.torch_private import record_memory_history, write_memory_snapshot
from dsv3.metrics.console import Console
from dsv3.metrics.loggers import Logger
from dsv3.metrics.recorder import Recorder
from dsv3.metrics.row import MetricsRow, SourceMetrics
from dsv3.model.generation import TimeLimit
from dsv3.training.accidents import AccidentWatch
from dsv3.training.evaluation import NO_TARGET, evaluate
from dsv3.training.plan_check import PlanCheck
from dsv3.training.step import ForwardBackward, StepMetrics
from dsv3.training.stragglers import StragglerWatch

MEMORY_EVENTS = 100_000
"""Allocations and frees that a memory snapshot holds at most, each with its stack of several KB."""


@dataclass
class TrainingRun:
    """The parts of a run that callbacks may use; the same on every rank but where noted."""

    config: Config
    directory: Path
    """The run directory."""
    ranks: RankContext
    forward_backward: ForwardBackward
    """Holds this rank's `model_parts`."""
    optimizer: torch.optim.Optimizer
    progress: Progress
    """Steps, sequences and tokens done."""
    console: Console
    """Silent on ranks other than 0."""
    logger: Logger | None = None
    """None on ranks other than 0."""
    row: MetricsRow = field(default_factory=lambda: MetricsRow(step=0, tokens=0))
    """The row of metrics.jsonl of the step just done."""
    metrics: StepMetrics | None = None
    """The measurements of the step just done, still on the device."""
    fill_throughput: Callable[[], None] = lambda: None
    """Fills the row's tokens_per_second and mfu, waiting for a GPU to end the step; on CPU they are there."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    @property
    def is_last_step(self) -> bool:
        """Return True after the last of train.steps."""
        return self.step == self.config.train.steps


class Callback:
    """Base of all callbacks: does nothing. All ranks call every method together."""

    def on_train_start(self, run: TrainingRun) -> None:
        """Prepare, before the first step of this process."""

    def on_step_end(self, run: TrainingRun) -> None:
        """Act after an optimizer step; `run.row` and `run.metrics` are of that step."""

    def on_save_request(self, run: TrainingRun) -> None:
        """Save what a resume needs, after a step: SIGUSR1 has asked for it, and the run goes on."""

    def on_train_end(self, run: TrainingRun, finished: bool) -> None:
        """Act after the last step of this process; `finished` is False where a signal ended the run early."""

    def close(self, failed: bool) -> None:
        """Release what is held; called in any case, `failed` where an exception ends the run."""

    def on_rewind(self, run: TrainingRun) -> None:
        """Forget what is later than `run.step`: the run has gone back to it (train.accidents.on_alarm)."""

    @property
    def wants_stop(self) -> bool:
        """Return True where the run must stop after this step, as far as this rank knows."""
        return False


class Evaluate(Callback):
    """Measures the held-out loss every `every` steps and at the last one; never where it is 0."""

    def __init__(self, rows: RowDataset, every: int) -> None:
        self.rows = rows
        self.every = every
        self.has_told = False

    def on_step_end(self, run: TrainingRun) -> None:
        """Fill the row's evaluation_loss; the checkpoint of this step carries it too."""
        if is_due(run.step, self.every) or (self.every > 0 and run.is_last_step):
            train = run.config.train
            found = evaluate(
                run.forward_backward, self.rows, train.microbatch, run.ranks, train.evaluate_tokens
            )
            run.row.evaluation_loss = found.loss
            of_sources: dict[str, SourceMetrics] = {
                name: {"evaluation_loss": source.loss} for name, source in found.sources.items()
            }
            run.row.sources = of_sources or None
            if found.loss is None and not self.has_told:
                run.console.message(f"held-out loss {NO_TARGET}")
                self.has_told = True
        found_loss = run.row.evaluation_loss
        run.progress.evaluation_loss = found_loss if found_loss is None or math.isfinite(found_loss) else None


class CountSources(Callback):
    """Fills the row with what has been trained on of each source of a mixture.

    Every `log_every` steps and at steps with a held-out loss: the counts follow from the samples alone, and
    rows of many sources are long.
    """

    def __init__(self, mixture: PreparedMixture, log_every: int) -> None:
        self.mixture = mixture
        self.log_every = log_every

    def on_step_end(self, run: TrainingRun) -> None:
        """Fill the row's sources; what Evaluate has put there stays."""
        if is_due(run.step, self.log_every) or run.is_last_step or run.row.sources:
            counted = self.mixture.progress(run.progress.samples)
            losses = run.row.sources or {}
            run.row.sources = {
                name: {**own, "evaluation_loss": losses.get(name, {}).get("evaluation_loss")}
                for name, own in counted.items()
            }


class WatchStragglers(Callback):
    """Finds the slowest rank every `every` steps, and names one that the others go on waiting for."""

    def __init__(self, watch: StragglerWatch, every: int) -> None:
        self.watch = watch
        self.every = every

    def on_train_start(self, run: TrainingRun) -> None:
        """Begin to measure what ranks wait for."""
        self.watch.start(compiled=run.config.compile.enabled)

    def on_step_end(self, run: TrainingRun) -> None:
        """Fill the row's straggler where it is due."""
        self.watch.count(run.row.data_wait or 0.0)
        if is_due(run.step, self.every):
            found, told = self.watch.compare()
            if found is not None:
                run.row.straggler, run.row.straggler_rank = found.share, found.rank
            if told:
                run.console.message(told)

    def close(self, failed: bool) -> None:
        """Measure no more."""
        self.watch.stop()


class ComparePlan(Callback):
    """Puts what is planned beside what is measured, and tells how a run compares with its plan.

    It stands before RecordMetrics, which completes the rows, so it looks at those of the steps before.
    """

    def __init__(self, check: PlanCheck, recorder: Recorder, every: int) -> None:
        self.check = check
        self.recorder = recorder
        self.every = every

    def on_train_start(self, run: TrainingRun) -> None:
        """Begin at the run's progress."""
        self.check.start(run.progress.tokens)

    def on_rewind(self, run: TrainingRun) -> None:
        """Go back with the run."""
        self.check.start(run.progress.tokens)

    def on_step_end(self, run: TrainingRun) -> None:
        """Tell what the rows so far say, once the memory of all ranks is known, and fill this one."""
        if is_due(run.step - 1, self.every):
            self.check.memory_gib = self.recorder.memory
            for line in self.check.news():
                run.console.message(line)
        self.check.predict(run.row)

    def on_save_request(self, run: TrainingRun) -> None:
        """Count the copies of a background save from now on."""
        self.check.has_saved = True

    def close(self, failed: bool) -> None:
        """Keep the peak for the table at the end of the run."""
        self.check.memory_gib = self.recorder.memory


class RecordMetrics(Callback):
    """Hands every step's row to metrics.jsonl, the console and the logger."""

    def __init__(self, recorder: Recorder, every: int) -> None:
        self.recorder = recorder
        self.every = every

    def on_step_end(self, run: TrainingRun) -> None:
        """Queue the row; write it at every `every` steps."""
        assert run.metrics is not None
        self.recorder.add(run.row, run.metrics.known(), run.fill_throughput)
        if is_due(run.step, self.every):
            self.recorder.flush()

    def on_rewind(self, run: TrainingRun) -> None:
        """Remove the rows of the steps that are taken again."""
        self.recorder.go_back(run.step)

    def close(self, failed: bool) -> None:
        """Write what is queued and close metrics.jsonl."""
        self.recorder.close()


class HeedAccidents(Callback):
    """Ends the run where its watch (accidents.py) finds that it must; the run then saves."""

    def __init__(self, watch: AccidentWatch) -> None:
        self.watch = watch

    def on_train_end(self, run: TrainingRun, finished: bool) -> None:
        """Judge a finished run as a whole."""
        if finished:
            self.watch.finish(run.step)

    @property
    def wants_stop(self) -> bool:
        """Return True where too many steps were skipped, or no rewind is left."""
        return self.watch.over is not None


class SaveCheckpoint(Callback):
    """Saves every `every` steps, and at the end of the run in any case.

    Of `rows` that stream, a checkpoint carries the bookmarks of all ranks, and the console tells which rows
    were left out.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        recorder: Recorder,
        every: int,
        rows: RowDataset | None = None,
        watch: AccidentWatch | None = None,
    ) -> None:
        self.manager = manager
        self.watch = watch
        """Knows the statistics that a checkpoint carries."""
        self.recorder = recorder
        self.every = every
        self.rows = rows
        self._told = ""

    def on_step_end(self, run: TrainingRun) -> None:
        """Save where it is due; the last step's checkpoint is `on_train_end`'s."""
        if is_due(run.step, self.every) and not run.is_last_step:
            self._save(run)

    def on_save_request(self, run: TrainingRun) -> None:
        """Save now, unless this step has just been saved."""
        run.console.message(f"SIGUSR1: saving step {run.step}")
        self._save(run)

    def on_train_end(self, run: TrainingRun, finished: bool) -> None:
        """Save, and wait until it is written."""
        self._save(run, wait=True)

    def close(self, failed: bool) -> None:
        """On failure an async save may still be writing a valid checkpoint: wait for it."""
        if failed:
            with suppress(Exception):
                self.manager.wait()

    @property
    def wants_stop(self) -> bool:
        """Return True where an async save has failed: the next save raises its error on every rank."""
        return self.manager.failed

    def _save(self, run: TrainingRun, wait: bool = False) -> None:
        # Rows first: a checkpoint must never be ahead of metrics.jsonl.
        self.recorder.flush()
        if self.watch is not None:
            self.watch.fill(run.progress)
        if isinstance(self.rows, LaneRows):
            own = self.rows.bookmarks(run.progress.samples), self.rows.skipped()
            known = run.ranks.all_gather_object(own)
            run.progress.bookmarks = {
                lane: list(place) for lane, place in newest(each for each, _ in known).items()
            }
            told = left_out_line(left_out(each for _, each in known))
            if told and told != self._told:
                run.console.message(told)
                self._told = told
        self.manager.save(run.forward_backward.model_parts, run.optimizer, run.progress, wait)


class Sample(Callback):
    """Shows a sample of text every `every` steps, and at the end of a finished run; never where it is 0.

    It stops after `seconds`, which the drawing rank measures for all.
    """

    def __init__(
        self, sample: Callable[[int, TimeLimit], str], prompt: str, every: int, seconds: float
    ) -> None:
        self.sample = sample
        """Returns the text that follows `prompt`, from a seed; all ranks call it together."""
        self.prompt = prompt
        self.every = every
        self.seconds = seconds
        self._shown_at: int | None = None

    def on_step_end(self, run: TrainingRun) -> None:
        """Show a sample where it is due."""
        if is_due(run.step, self.every):
            self._show(run)

    def on_train_end(self, run: TrainingRun, finished: bool) -> None:
        """Show what the model writes at the end, unless its last step has just shown it."""
        if finished and self.every > 0 and self._shown_at != run.step:
            self._show(run)

    def _show(self, run: TrainingRun) -> None:
        self._shown_at = run.step
        limit = TimeLimit(self.seconds)
        text = self.sample(run.step, limit)
        run.console.sample(self.prompt, text)
        if limit.reached:
            run.console.message(f"the sample was cut off after train.generate_seconds={self.seconds:g}")
        if run.logger is not None:
            run.logger.text("sample", self.prompt + text, run.step)


class ExportHF(Callback):
    """Writes the weights as a HuggingFace checkpoint into hf/step-N of the run directory."""

    def __init__(self, export: Callable[[Path], None], every: int) -> None:
        self.export = export
        """Writes into a directory; all ranks call it together."""
        self.every = every

    def on_step_end(self, run: TrainingRun) -> None:
        """Export where it is due."""
        if is_due(run.step, self.every):
            self.export(run.directory / "hf" / f"step-{run.step}")


class CompareReplicas(Callback):
    """Compares what ranks hold alike every `every` steps; a save does it too (checkpoint/replicas.py)."""

    def __init__(self, replicas: Replicas, every: int) -> None:
        self.replicas = replicas
        self.every = every

    def on_step_end(self, run: TrainingRun) -> None:
        """Compare where it is due; RunFailed on all ranks where some differ."""
        if is_due(run.step, self.every):
            self.replicas.compare(run.forward_backward.model_parts, run.optimizer, run.progress)


class CollectGarbage(Callback):
    """Collects garbage on all ranks at the same steps: at random moments ranks would wait for one another."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_start(self, run: TrainingRun) -> None:
        """Turn Python's own collections off."""
        gc.disable()

    def on_step_end(self, run: TrainingRun) -> None:
        """Collect the young generations where it is due."""
        if is_due(run.step, self.every):
            gc.collect(1)

    def close(self, failed: bool) -> None:
        """Turn Python's own collections on again."""
        gc.enable()


class Profile(Callback):
    """profile=on: a torch.profiler trace of some steps and, on CUDA, a memory snapshot, one file per rank.

    Allocations are recorded during the profiled steps alone, and the last MEMORY_EVENTS of them.
    """

    def __init__(self, config: ProfileConfig) -> None:
        self.config = config
        self.stack = ExitStack()
        self.profiler: profile | None = None
        self.recording = False

    def on_train_start(self, run: TrainingRun) -> None:
        """Start the profiler; traces go to RUN_DIR/profile/."""
        folder = run.directory / "profile"
        folder.mkdir(exist_ok=True)
        cuda = run.ranks.device.type == "cuda"

        def write(finished: profile) -> None:
            finished.export_chrome_trace(str(folder / f"trace-rank{run.ranks.rank}.json"))
            if self.recording:
                write_memory_snapshot(str(folder / f"memory-rank{run.ranks.rank}.pickle"))
                self._stop_recording()

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        plan = schedule(wait=self.config.wait, warmup=1, active=self.config.steps, repeat=1)
        profiler = profile(activities=activities, schedule=plan, on_trace_ready=write)
        self.profiler = self.stack.enter_context(profiler)

    def on_step_end(self, run: TrainingRun) -> None:
        """Tell the profiler that a step is done; record memory from where its steps begin."""
        assert self.profiler is not None
        self.profiler.step()
        if self.profiler.step_num == self.config.wait + 1 and run.ranks.device.type == "cuda":
            record_memory_history(MEMORY_EVENTS)
            self.recording = True

    def close(self, failed: bool) -> None:
        """End the profiler; it writes what it has of steps that it has begun."""
        self.stack.close()
        self._stop_recording()

    def _stop_recording(self) -> None:
        if self.recording:
            record_memory_history(None)
        self.recording = False


def is_due(step: int, every: int) -> bool:
    """Return whether something done every `every` steps is due after `step`; 0 is never."""
    return every > 0 and step % every == 0
