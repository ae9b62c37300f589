"""The end of a sweep: its jobs as a table, the best first, and the command that compares them.

The report reads the files that the jobs have left, because a job may have run in another process or on
another machine. A sweep of task=plan prints nothing else: a JSON line per job in their order, or a table of
plans, the fastest that fits first.
"""

import contextlib
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dsv3.config.overrides import split_override
from dsv3.config.registry import command
from dsv3.errors import UserError
from dsv3.launch.held_out import differing
from dsv3.launch.job import Job, SweepJob
from dsv3.launch.sweep import FAILED_FILE, RESULT_FILE, Sweep, record_result
from dsv3.planning.step_time import Cause

_GIB = 2**30

_NAMED = ("model", "parallel", "hardware", "precision")


@contextlib.contextmanager
def reported(sweep: Sweep) -> Iterator[None]:
    """Report the sweep that runs meanwhile once it has ended; say how to see the jobs of a stopped one."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        runs = _runs(sweep) if sweep.arguments else []
        if left := sweep.not_run():
            jobs = f"job {left[0]}" if len(left) == 1 else f"jobs {left[0]} to {left[-1]}"
            verb = "was" if len(left) == 1 else "were"
            print(f"{jobs} of {sweep.directory} {verb} not run", file=sys.stderr)
        if any(run.rows for run in runs):
            from dsv3.launch.run_results import held_out_differences

            compare = _compare(sweep, bool(held_out_differences(runs)))
            print(f"the sweep was stopped; its jobs so far: {compare}", file=sys.stderr)
        raise
    except Exception:
        report_sweep(sweep)
        raise
    report_sweep(sweep)


def describe_job(
    config: DictConfig, choices: Mapping[str, Any], typed: Sequence[str], place: SweepJob
) -> dict[str, Any]:
    """Return what the report must know of a job, whether it succeeds or not."""
    form = OmegaConf.select(config, "task.format") if "task" in config else None
    return {
        "task": choices.get("task"),
        "format": getattr(form, "value", None),
        "differs": place.differs,
        "typed": list(typed),
        **{group: choices.get(group) for group in _NAMED},
    }


def record_plan(job: Job, form: str) -> None:
    """Leave the plan of a sweep's job for the report."""
    assert job.sweep is not None
    precision = job.config.precision
    planned = {
        "task": "plan",
        "format": form,
        "differs": job.sweep.differs,
        "typed": job.overrides,
        **{group: job.choices.get(group) for group in _NAMED},
        "hardware": job.hardware.name,
        "precision": "fp8" if precision.fp8 is not None else precision.compute.name,
        "plan": job.plan.to_json(),
    }
    record_result(job.run_dir, planned)


def report_sweep(sweep: Sweep) -> None:
    """Print the results of a sweep's jobs, and how to compare them."""
    if not sweep.arguments:
        return
    left = [*sweep.left(RESULT_FILE), *sweep.left(FAILED_FILE)]
    jobs = {path.parent.name: content for path, content in left if content}
    ordered = dict(sorted(jobs.items(), key=lambda item: (len(item[0]), item[0])))
    plans = {name: job for name, job in ordered.items() if job.get("task") == "plan"}
    if plans:
        _report_plans(plans)
    losses = {name: job for name, job in ordered.items() if job.get("task") == "evaluate"}
    if losses:
        _report_losses(losses)
    runs = _runs(sweep)
    if any(run.rows for run in runs):
        from dsv3.launch import run_results

        mixed = run_results.held_out_differences(runs)
        table = run_results.format_runs(runs, run_results.differing_overrides(runs), None, mixed)
        print(f"\nJobs of {sweep.directory}\n{table}")
        if mixed:
            print(_not_ranked(mixed))
        print(f"\ncompare them:\n  {_compare(sweep, bool(mixed))}", flush=True)


def _report_plans(jobs: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a JSON line per job where any asks for JSON, else one table."""
    if any(job.get("format") == "json" for job in jobs.values()):
        for number, job in jobs.items():
            print(json.dumps(_plan_line(number, job)), flush=True)
        return
    from dsv3.metrics.console import format_table

    ordered = sorted(jobs.items(), key=lambda item: _plan_rank(item[1]))
    rows = [[number, " ".join(job["differs"]), *_plan_cells(job)] for number, job in ordered]
    titles = ["job", "overrides", "fits", "GiB per rank", "device GiB", "tokens/s per GPU", "mfu", "bubble"]
    last = "largest cause"
    left = ("job", "overrides", "fits", last)
    print(format_table(rows, [*titles, last], left_aligned=left), flush=True)


def _plan_rank(job: Mapping[str, Any]) -> tuple[int, float]:
    """Return a sort key: what fits before what does not and what is refused, the fastest first."""
    if "plan" not in job:
        return 3, 0.0
    plan = job["plan"]
    return {True: 0, None: 1, False: 2}[plan["fits"]], -(plan["tokens_per_second_per_gpu"] or 0.0)


def _plan_line(number: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object of a job: what it is, and its plan or the reason why it has none."""
    pairs = [pair for override in job["typed"] if (pair := split_override(override))]
    overrides = {key: value for key, value in pairs if key not in ("task", "task.format")}
    named = {group: job.get(group) for group in _NAMED}
    result = job["plan"] if "plan" in job else {"error": job["reason"]}
    return {"job": int(number) if number.isdecimal() else number, "overrides": overrides, **named, **result}


def _plan_cells(job: Mapping[str, Any]) -> list[str]:
    """Return the cells of a job's plan: fits, memory, speed, MFU, bubble and what takes most of the time.

    A job that was refused has its reason in place of the last.
    """
    if "plan" not in job:
        return ["refused", *["-"] * 5, " ".join(str(job.get("reason", "")).split())]
    plan = job["plan"]
    fits = {True: "yes", False: "no", None: "unknown"}[plan["fits"]]
    total, device = plan["memory_bytes"]["total"], plan["device_memory_bytes"]
    speed, mfu = plan["tokens_per_second_per_gpu"], plan["mfu"]
    return [
        fits,
        f"{total / _GIB:,.2f}",
        "-" if device is None else f"{device / _GIB:,.2f}",
        "-" if speed is None else f"{speed:,.0f}",
        "-" if mfu is None else f"{mfu:.1%}",
        f"{plan['bubble']:.1%}",
        _largest_cause(plan["time"]),
    ]


def _largest_cause(time: Mapping[str, Any] | None) -> str:
    """Return what a planned step spends most of its time on, and the share."""
    if time is None:
        return "-"
    name, seconds = max(time["causes"].items(), key=lambda cause: cause[1])
    return f"{Cause[name].value} {seconds / time['seconds']:.0%}"


def _report_losses(jobs: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the held-out losses of evaluations to stderr, the lowest first: stdout has their JSON."""
    from dsv3.metrics.console import format_table

    def loss(job: Mapping[str, Any]) -> float:
        known = job.get("loss")
        return math.inf if known is None else float(known)

    rows = []
    for number, job in sorted(jobs.items(), key=lambda item: loss(item[1])):
        perplexity = math.exp(min(loss(job), 700.0))
        known = ["-", "-", "no target" if "loss" in job else "failed"]
        if job.get("loss") is not None:
            known = [f"{loss(job):,.4f}", f"{perplexity:,.2f}", "done"]
        rows.append([number, " ".join(job["differs"]), *known])
    titles = ["job", "overrides", "held-out loss", "perplexity", "state"]
    print(f"\n{format_table(rows, titles, left_aligned=('job', 'overrides', 'state'))}", file=sys.stderr)
    mixed = differing({number: job["held_out_data"] for number, job in jobs.items() if "loss" in job})
    if mixed:
        print(_not_ranked(mixed), file=sys.stderr)


def _not_ranked(mixed: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the line that says on what the held-out data of jobs differ."""
    from dsv3.launch.run_results import format_differences

    return f"the losses do not rank them, their held-out data differ: {format_differences(mixed)}"


def _runs(sweep: Sweep) -> list[Any]:
    """Return the training runs in the sweep's directory; none where it has none."""
    from dsv3.launch.run_results import find_runs

    try:
        return find_runs(sweep.directory) if sweep.directory else []
    except UserError:
        return []


def _compare(sweep: Sweep, mixed: bool) -> str:
    """Return the command that compares the sweep's jobs; `mixed`: on held-out data that differ."""
    asked = ["task.mixed_data=true"] if mixed else []
    return shlex.join([*command("train"), "task=compare", f"task.runs={sweep.directory}", *asked])
