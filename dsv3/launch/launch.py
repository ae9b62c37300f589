"""Starts what a job needs: nothing, this process, workers of its own or a Slurm job; torch only then.

From what Hydra composed to a job that may run: typed, completed, planned; imports no torch.
"""

import os

from omegaconf import DictConfig

from dsv3.config.strict import build
from dsv3.launch.job import Job, under_launcher
from dsv3.launch.prepare import prepare_job
from dsv3.launch.run_dir import check_run_dir, check_same_run
from dsv3.launch.slurm import in_step
from dsv3.launch.sweep import FAILED_FILE
from dsv3.planning.checks import require_room
from dsv3.planning.report import require_fits


def launch(job: Job) -> float | None:
    """Run the job's task here, in workers started for it or in a Slurm job; rank 0's result, if here."""
    check(job)
    task, settings = job.config.task, job.config.launch
    if task.writes_run:  # an earlier attempt's failure says nothing of this one
        (job.run_dir / FAILED_FILE).unlink(missing_ok=True)
    if task.uses_model and settings.submits and not under_launcher() and not in_step(os.environ):
        from dsv3.launch.slurm import submit

        submit(job)
        return None
    if not task.uses_model or job.plan.world_size == 1 or under_launcher():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from dsv3.launch.workers import die_with_parent

            die_with_parent()  # or a kill -9 of torchrun would leave this rank behind
        return build(task).run(job)  # type: ignore[no-any-return]
    from dsv3.launch.workers import start_workers

    return start_workers(job)


def check(job: Job) -> None:
    """The last checks before anything starts: UserError for a run directory or a plan that cannot do."""
    if job.config.task.writes_run and job.named_run_dir:
        check_run_dir(job.run_dir, job.config.run.resume)
        if job.config.run.resume:
            check_same_run(job.config, job.run_dir)
    if job.config.task.must_fit:
        require_fits(job.plan)
    if job.config.task.holds_model:
        require_room(job.config.model, job.plan.degrees, job.hardware)


def carry_out(composed: DictConfig) -> float | None:
    """What train.py does with a composed config; a sweep's objective is the result."""

    return launch(prepare_job(composed))
