"""What a finished training run tells its user.

task=train: put everything together, run the loop, tell how it went.
"""

import math
import shlex
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median

from dsv3.checkpoint.directory import TOKENIZER_DIR, Progress, find_checkpoint
from dsv3.checkpoint.load import load_weights
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.checkpoint.manifest import verify_together
from dsv3.config.precision import FP8Engine
from dsv3.config.root import Config
from dsv3.config.strict import build, to_yaml
from dsv3.config.task import SamplingConfig
from dsv3.convert.live_export import export_hf
from dsv3.data.loader import Loader
from dsv3.data.sources import PreparedData
from dsv3.data.tokenizer import Tokenizer
from dsv3.distributed.process_group import RankContext, join_process_group, make_deterministic
from dsv3.distributed.signals import Stopped, StopRequest, stop_on_signal
from dsv3.fp8.convert_model import engine_of
from dsv3.launch.job import Job
from dsv3.launch.run_dir import check_same_data, describe_run, make_run_dir
from dsv3.metrics import jsonl
from dsv3.metrics.console import Console
from dsv3.metrics.loggers import Logger
from dsv3.metrics.plots import loss_curve
from dsv3.metrics.recorder import Recorder
from dsv3.metrics.row import MetricsRow
from dsv3.parallel.mesh import place
from dsv3.parallel.parallel_model import ParallelModel, build_parallel_model
from dsv3.planning.parameters import training_flops_per_token
from dsv3.tasks.generate import sample_text
from dsv3.tasks.setup import job_mesh, prepare_data, stored_tokenizer
from dsv3.training.evaluation import evaluate
from dsv3.training.loop import Hooks, Loop, Rates
from dsv3.training.optimizer import build_optimizer
from dsv3.training.profiler import profiler
from dsv3.training.step import TrainStep


def conclude(console: Console, directory: Path, following: list[str]) -> None:
    """Draw loss.png, print the table of results and, as the command to try next, `following`."""
    rows = jsonl.read(directory / "metrics.jsonl")
    if rows:
        loss_curve(rows, directory / "loss.png", f"Loss of {directory.name}")
        console.table("Done", _results(rows, directory))
    console.next_command(shlex.join(["python", "train.py", *following]))


def _results(rows: list[MetricsRow], directory: Path) -> list[tuple[str, str]]:
    evaluations = [row.evaluation_loss for row in rows if row.evaluation_loss is not None]
    rates = [row.tokens_per_second for row in rows if row.tokens_per_second is not None]
    results = [
        ("steps", f"{rows[-1].step}, {rows[-1].tokens:,} tokens"),
        ("first loss", _loss(rows[0].loss)),
        ("last loss", _loss(rows[-1].loss)),
    ]
    if evaluations:
        results.append(("held-out loss", f"{_loss(evaluations[-1])} (first {_loss(evaluations[0])})"))
        results.append(("held-out perplexity", f"{math.exp(min(evaluations[-1], 700.0)):.2f}"))
    if rates:
        results.append(("tokens/s", f"{median(rates):,.0f}"))
    results.append(("peak memory", f"{max(row.memory_gib or 0.0 for row in rows):.2f} GiB"))
    results.append(("written to", f"{directory}"))
    results.append(("", "metrics.jsonl, loss.png, checkpoints/, config.yaml, plan.txt, log.txt"))
    return results


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


SAMPLING = SamplingConfig()

SAMPLE_PROMPT = "def "


class Train:
    """Trains in RUN_DIR, from step 0 or from where the run stopped."""

    def run(self, job: Job) -> float | None:
        """The last held-out loss, which is a sweep's objective; Stopped when a signal ended the run."""
        make_deterministic(job.config.train.deterministic, job.config.train.seed)
        with (
            join_process_group(job.config.launch.timeout) as ranks,
            stop_on_signal(alone=ranks.world == 1) as stop,
        ):
            return _Run(job, ranks, stop).run()


class _Run:
    """One training run on one rank: what Train.run puts together, in the order it is needed."""

    def __init__(self, job: Job, ranks: RankContext, stop: StopRequest) -> None:
        self.job = job
        self.config: Config = job.config
        self.ranks = ranks
        self.stop = stop
        self.data: PreparedData = prepare_data(self.config, ranks, self._stored_tokenizer())
        if self.config.run.resume:
            check_same_data(self.data.fingerprint, job.run_dir)
        mesh = job_mesh(job, ranks)
        self.model: ParallelModel = build_parallel_model(self.config, mesh, ranks.device)
        moments = self.config.precision.moments
        self.optimizer = build_optimizer(self.config.optimizer, self.model.parts, moments)
        self.ranks = place(ranks, mesh)
        self.directory: Path = ranks.broadcast_object(make_run_dir(job) if ranks.is_main else job.run_dir)
        job.run_dir = self.directory
        ranks.watch(self.directory)
        self.manager = CheckpointManager(self.directory, self.config.checkpoint, ranks)
        self.progress = self._restore()
        self.logger: Logger | None = None
        self.console = Console(
            self.config.train.log_every, log_path=self.directory / "log.txt", quiet=not ranks.is_main
        )

    def run(self) -> float | None:
        with ExitStack() as stack:
            stack.callback(self.console.close)
            stack.push(self._finish_save)
            if self.ranks.is_main:
                self._describe()
            logger = self.logger = self._open_logger(stack)
            path, every = self.directory / "metrics.jsonl", self.config.train.log_every
            layers = self.config.model.moe_layers()
            recorder = Recorder(path, self.ranks, every, self.console, logger, layers)
            stack.callback(recorder.close)
            profile = stack.enter_context(profiler(self.config.profile, self.directory, self.ranks))
            loop = self._loop(recorder, Hooks(self._evaluate, self._generate, self._export, profile))
            self.console.start(self.config.train.steps, self.progress.step)
            finished = loop.run()
            recorder.close()
            if not finished:
                raise Stopped(f"stopped after step {self.progress.step} and saved; go on: {self._resume()}")
            self._generate(self.progress.step)
            if self.ranks.is_main:
                conclude(self.console, self.directory, self._following())
            return recorder.latest.evaluation_loss if recorder.latest else None

    def _export(self, step: int) -> None:
        """The weights as HuggingFace's, in hf/step-N of the run."""
        export_hf(
            self.model, self.directory / "hf" / f"step-{step}", self.directory / TOKENIZER_DIR, self.ranks
        )

    def _stored_tokenizer(self) -> Tokenizer | None:
        """The one whose ids the weights know: the run's own, or that of the checkpoint it begins with."""
        if self.config.run.resume:
            folder = self.job.run_dir / TOKENIZER_DIR
            return Tokenizer.from_file(folder) if folder.is_dir() else None
        if self.config.checkpoint.load:
            checkpoint = find_checkpoint(self.config.checkpoint.load)
            return stored_tokenizer(self.config, checkpoint, self.job.overrides)
        return None

    def _restore(self) -> Progress:
        """Continue from the newest checkpoint, or take the weights of `checkpoint.load`, or start anew."""
        metrics = self.directory / "metrics.jsonl"
        progress = self.manager.restore(self.model.parts, self.optimizer) if self.config.run.resume else None
        if progress is None and self.config.checkpoint.load:
            checkpoint = find_checkpoint(self.config.checkpoint.load)
            verify_together(checkpoint, self.ranks)
            load_weights(self.model.parts, checkpoint)
        progress = progress or Progress()
        if self.ranks.is_main and metrics.exists():
            jsonl.cut_back(metrics, progress.step)
        return progress

    def _describe(self) -> None:
        if self.data.tokenizer is not None:
            self.data.tokenizer.save(self.directory / TOKENIZER_DIR)
        describe_run(self.job, {"fingerprint": self.data.fingerprint, **self.data.summary})
        if engine_of(self.model.parts) == FP8Engine.emulated.name:
            self.console.message(
                f"FP8 products are emulated on {self.ranks.device.type}: the same numbers, slower"
            )
        if self.progress.step:
            self.console.message(f"going on after step {self.progress.step} of {self.directory}")

    def _open_logger(self, stack: ExitStack) -> Logger | None:
        if not self.ranks.is_main:
            return None
        logger: Logger = build(self.config.logger)
        stack.push(lambda kind, error, trace: logger.finish(0 if kind is None else 1))
        files = [self.directory / name for name in ("config.yaml", "plan.txt")]
        logger.open(self.directory, to_yaml(self.config), files, self.console.message)
        return logger

    def _loop(self, recorder: Recorder, hooks: Hooks) -> Loop:
        config, train = self.config, self.config.train
        assert self.data.train is not None
        length = self.data.sequence_length
        flops = training_flops_per_token(config.model, length)
        fast = engine_of(self.model.parts) == FP8Engine.scaled_mm.name
        multiplies_in = "fp8" if fast else config.precision.compute.name
        peak = getattr(self.job.hardware, f"peak_flops_{multiplies_in}")
        peak = peak and peak * self.ranks.world
        rates = Rates(train.batch, train.batch * length, flops, peak)
        step = TrainStep(self.model.forward_backward, self.optimizer, self.ranks, train.clip_norm)
        loader = Loader(
            self.data.train, train.batch, train.microbatch, self.ranks.data_rank, self.ranks.data_world
        )
        return Loop(
            train, config.optimizer.lr, build(config.schedule), step, loader, recorder, self.manager,
            rates, hooks, self.progress, self.stop, self.ranks,
        )  # fmt: skip

    def _finish_save(self, kind: type[BaseException] | None, *_: object) -> None:
        """A run that fails has a sound checkpoint in flight perhaps: it is the last one, so wait for it."""
        if kind is not None:
            with suppress(Exception):
                self.manager.wait()

    def _evaluate(self) -> float:
        train, rows = self.config.train, self.data.held_out
        return evaluate(
            self.model.forward_backward, rows, train.microbatch, self.ranks, train.evaluate_batches
        ).loss

    def _generate(self, step: int) -> None:
        """Show a sample, on all ranks together; data that is ids already has no text to show."""
        if self.data.tokenizer is None:
            return
        text = sample_text(self.model, self.data.tokenizer, SAMPLING, SAMPLE_PROMPT, step)
        self.console.sample(SAMPLE_PROMPT, text)
        if self.logger is not None:
            self.logger.text("sample", SAMPLE_PROMPT + text, step)

    def _following(self) -> list[str]:
        """The command to try next: go on where it was to stop early, else use the model."""
        load = f"checkpoint.load={self.directory}"
        if self.progress.step < self.config.train.steps:
            return [f"resume={self.directory}"]
        if self.data.tokenizer is None:
            return [
                "task=evaluate",
                load,
                "data=tokens",
                f"data.path={getattr(self.config.data, 'path', '')}",
            ]
        return ["task=generate", load, "task.prompt=import "]

    def _resume(self) -> str:
        return shlex.join(["python", "train.py", f"resume={self.directory}"])
