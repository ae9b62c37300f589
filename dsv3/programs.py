"""The two programs: train.py (installed as dsv3-train) and convert.py (dsv3-convert); start.py starts them.

Application takes the command line to a composed config. Here the config becomes a job, and the job starts: in
this process, in workers of its own or through Slurm. torch is imported only then.
"""

import os
import sys

from omegaconf import DictConfig

from dsv3.cli.application import Application
from dsv3.cli.arguments import prepare, prepare_convert
from dsv3.cli.help import convert_help, train_help
from dsv3.config.strict import build
from dsv3.config.task import SamplingConfig
from dsv3.convert.request import prepare_conversion
from dsv3.distributed.device import use_expandable_segments
from dsv3.distributed.signals import (
    NOTHING_SAVED,
    NOTHING_TO_SAVE,
    die_with_parent,
    leave_on_signal,
    stop_on_signal,
)
from dsv3.launch.checkpoint_defaults import Composition
from dsv3.launch.job import Job, SweepJob, is_first_on_node, under_launcher
from dsv3.launch.nearest_fix import require_fits
from dsv3.launch.prepare import prepare_job
from dsv3.launch.restarts import allowed_restarts, run_in_workers
from dsv3.launch.run_dir import check_can_make, check_run_dir, check_same_run, owned_run_dir
from dsv3.launch.slurm import in_slurm_step
from dsv3.launch.sweep import FAILED_FILE
from dsv3.metrics.progress import phase
from dsv3.planning.checks import require_room
from dsv3.planning.hardware import require_gpu


def start_job(composed: DictConfig, sweep: SweepJob | None = None) -> float | None:
    """Check and plan what Hydra composed, and run it; return the result, which is a sweep's objective."""
    with phase("planning"):
        job = prepare_job(composed, sweep)
    with owned_run_dir(job):
        with phase("planning"):
            check(job)
        return _start(job, sweep)


def _start(job: Job, sweep: SweepJob | None) -> float | None:
    """Run a job in this process, in workers or through Slurm; return its result."""
    task, settings = job.config.task, job.config.launch
    if task.writes_run:  # the failure mark of an earlier attempt does not count for this one
        (job.run_dir / FAILED_FILE).unlink(missing_ok=True)
    if task.uses_model and settings.submits and not under_launcher() and not in_slurm_step(os.environ):
        from dsv3.launch.slurm import submit

        with phase("submitting to Slurm"):
            submit(job)
        return None
    if task.uses_model:
        require_gpu(job.config.hardware)
        if not job.on_cpu:
            use_expandable_segments(os.environ)
    if not task.writes_run and os.environ.get("RANK", "0") == "0":  # a run tells them itself, and keeps them
        for note in job.notes:
            print(note, file=sys.stderr)
    restarts = allowed_restarts(job) > 0
    if not task.uses_model or (job.plan.world_size == 1 and not restarts) or under_launcher():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent()  # or a kill -9 of torchrun would leave this rank behind
        first = is_first_on_node()
        words = "" if sweep is not None or not first else NOTHING_SAVED if task.writes_run else "stopped"
        importing = phase(f"importing {'torch' if task.uses_model else 'the task'}")
        with leave_on_signal(lambda: words), importing:
            todo = build(task)
        if task.writes_run:  # training listens itself
            return todo.run(job)  # type: ignore[no-any-return]
        with stop_on_signal(True, words, NOTHING_TO_SAVE if first else "", then_ignore=sweep is None):
            return todo.run(job)  # type: ignore[no-any-return]
    return run_in_workers(job)


def check(job: Job) -> None:
    """Run the last checks before a start: UserError for a run directory or a plan that cannot work."""
    if job.config.task.writes_run and job.named_run_dir:
        check_run_dir(job.run_dir, job.config.run.resume)
        if job.config.run.resume:
            check_same_run(job.config, job.run_dir)
    if job.config.task.writes_run:
        check_can_make(job.run_dir, job.config.run.resume)
    if job.config.task.must_fit:
        require_fits(job)
    if job.config.task.holds_model:
        sampling = job.config.task
        # The task counts the tokens of the prompt as well: that takes its tokenizer.
        tokens = sampling.max_tokens if isinstance(sampling, SamplingConfig) else 0
        require_room(job.plan, tokens, job.host_ranks)


def start_conversion(composed: DictConfig, command: Composition | None = None) -> None:
    """Check what Hydra composed of `command`, by default this job's, and convert in its direction."""
    with phase("reading the description of the input"):
        config = prepare_conversion(composed, command)
    with phase("importing torch"):
        from dsv3.convert.convert import convert  # not for a mistake that is found without it

    # While files are written a signal keeps what is finished; before and after, nothing would be lost.
    with stop_on_signal(True, "stopped", NOTHING_TO_SAVE, then_ignore=True):
        summary = convert(config)
    print(summary)


TRAIN = Application("train", "config", train_help, prepare, start_job)
CONVERT = Application("convert", "convert", convert_help, prepare_convert, start_conversion)
