"""Slurm: translate srun's variables into torchrun's, and submit launch=slurm as a batch script with sbatch.

The rest of the code reads torchrun's variables (RANK, WORLD_SIZE, ...) alone.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace

from dsv3.checkpoint.directory import CONFIG_FILE
from dsv3.config.launch import SlurmLaunchConfig
from dsv3.config.overrides import absolute_paths, override_key, quote, split_override
from dsv3.config.registry import ROOT
from dsv3.distributed.store import LOOPBACK
from dsv3.errors import DONE, KILLED, MISTAKE, STOPPED, RunFailed, UserError
from dsv3.launch.job import Job
from dsv3.launch.resume import ONCE
from dsv3.launch.run_dir import make_run_dir
from dsv3.metrics.accident_journal import ACCIDENTS_FILE, OVER

SCRIPT, LOG = "submit.sh", "slurm-%j.log"

# Seconds before the time limit at which every rank is asked to stop; it finishes its step and saves.
_STOP_BEFORE_LIMIT = 300

# The signal by which Slurm tells the batch script of the time limit: no other event sends it.
_LIMIT_SIGNAL = "USR2"

# Below the ephemeral ports of Linux, above the well-known ones.
_PORTS = range(15_000, 32_000)


def srun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Translate the SLURM_* variables of a process that srun started as one of several; otherwise return {}.

    Only srun sets SLURM_STEP_NUM_TASKS: a batch script and a shell of salloc have SLURM_NTASKS and
    SLURM_PROCID too, but no other processes beside them. Variables that torchrun or the user has set stay.
    """
    world = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if world == 1 or "RANK" in environment or "SLURM_PROCID" not in environment:
        return {}
    here = _tasks_here(environment, world)
    first = first_host(environment.get("SLURM_STEP_NODELIST", "localhost"))
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": LOOPBACK if here == world else first,
        "MASTER_PORT": str(_port(environment)),
    }
    return {name: environment.get(name, value) for name, value in found.items()}


def in_slurm_step(environment: Mapping[str, str]) -> bool:
    """Return True in a job step, if only of one process: what was to be submitted runs already."""
    return "SLURM_STEP_ID" in environment


def first_host(nodes: str) -> str:
    """Return the first of Slurm's compressed list of hosts: gpu003 of `gpu[003-007,012],login`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else nodes)


def tasks_per_node(text: str) -> list[int]:
    """Return Slurm's `8(x2),4` as [8, 8, 4]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _tasks_here(environment: Mapping[str, str], world: int) -> int:
    """Return the number of tasks of the step on this node."""
    counts = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else int(environment.get("SLURM_NTASKS_PER_NODE", world))


def _port(environment: Mapping[str, str]) -> int:
    """Return one port for all ranks of a step, and another for the next job on the same node."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _PORTS[(job * 7 + step) % len(_PORTS)]


def submit(job: Job) -> None:
    """Write RUN_DIR/submit.sh, submit it and print where to look; UserError where there is no sbatch."""
    if shutil.which("sbatch") is None:
        raise UserError("launch=slurm: no sbatch here; submit from a login node, or use launch=local")
    job.run_dir = make_run_dir(job)
    script = job.run_dir / SCRIPT
    script.write_text(batch_script(job))
    submitted = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if submitted.returncode:
        raise RunFailed(f"sbatch refused {script}: {submitted.stderr.strip() or submitted.stdout.strip()}")
    number = submitted.stdout.strip().partition(";")[0]
    print(f"submitted job {number}; its output: {job.run_dir / LOG.replace('%j', number)}")


def batch_script(job: Job) -> str:
    """Return the script: the options for Slurm, and a loop around the srun that starts every rank.

    A run that has begun is resumed, so that a job may come back from the queue.
    """
    options = "\n".join(f"#SBATCH {option}" for option in _options(job))
    here = ROOT / "train.py"
    start = [sys.executable, *([str(here)] if here.is_file() else ["-m", "dsv3.start"])]
    launch = job.config.launch
    assert isinstance(launch, SlurmLaunchConfig)
    return f"""#!/bin/bash
{options}
run_dir={shlex.quote(str(job.run_dir))}
newest() {{ ls -d "$run_dir"/checkpoints/step-* 2>/dev/null | sort -V | tail -n 1; }}

# Near the time limit every rank saves, and the job may go back into the queue. Slurm itself sends SIGTERM to
# the ranks; this shell waits for them to have saved.
limit= stopped= restarts=0
trap 'limit=yes; kill -TERM "$ranks"' {_LIMIT_SIGNAL}
trap 'stopped=yes' TERM
while :; do
    before=$(newest)
    if [ -e "$run_dir/{CONFIG_FILE}" ]; then
        program=({shlex.join([*start, *_resume_arguments(job)])})
    else
        program=({shlex.join([*start, *_arguments(job)])})
    fi
    # A rank that fails ends the others.
    srun --kill-on-bad-exit=1 "${{program[@]}}" &
    ranks=$!
    # A signal to this shell ends `wait`, and hides the exit code of a srun that ends at the same moment, in
    # bash 5.2 even if it waited for another process. So it only sleeps, and hears a signal 0.5 s later.
    while kill -0 "$ranks" 2>/dev/null; do sleep 0.5; done
    wait "$ranks"
    code=$?
    case $code in
        {STOPPED})
            if [ -n "$limit" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
            exit $code ;;
        {DONE} | {MISTAKE} | {KILLED}) exit $code ;;
    esac
    # launch.max_restarts: in a row without a new checkpoint, and not where the same would happen again.
    [ "$(newest)" = "$before" ] || restarts=0
    restarts=$((restarts + 1))
    over=$(tail -n 1 "$run_dir/{ACCIDENTS_FILE}" 2>/dev/null | grep '"kind": "{OVER}"')
    if [ -n "$stopped$limit$over" ] || [ $restarts -gt {launch.max_restarts} ]; then exit $code; fi
    echo "restart $restarts of {launch.max_restarts}: srun ended with exit code $code" >&2
done
"""


def _options(job: Job) -> Iterator[str]:
    """Yield the options of sbatch."""
    launch = job.config.launch
    assert isinstance(launch, SlurmLaunchConfig)
    ranks = job.plan.world_size // launch.nnodes
    yield f"--job-name={shlex.quote(job.run_dir.name)}"
    yield f"--nodes={launch.nnodes}"
    yield f"--ntasks-per-node={ranks}"
    if job.hardware.name != "cpu":
        yield f"--gpus-per-node={ranks}"
    for name in ("partition", "account", "time", "cpus_per_task"):
        if (value := getattr(launch, name)) is not None:
            yield f"--{name.replace('_', '-')}={shlex.quote(str(value))}"
    yield f"--output={shlex.quote(str(job.run_dir / LOG))}"
    if launch.requeue:
        yield "--requeue"
        yield "--open-mode=append"
        yield f"--signal=B:{_LIMIT_SIGNAL}@{_STOP_BEFORE_LIMIT}"
    else:
        yield f"--signal=TERM@{_STOP_BEFORE_LIMIT}"
    if launch.sbatch:
        yield launch.sbatch


def _resume_arguments(job: Job) -> list[str]:
    """Return the arguments with which the job comes back: its run keeps all but what counts once."""
    if job.config.run.resume:
        return _arguments(job)
    once = [each for each in job.overrides if override_key(each) in ONCE]
    resume_flags = [*once, *job.resume_flags]
    config = replace(job.config, run=replace(job.config.run, resume=True))
    return _arguments(replace(job, config=config, typed=resume_flags))


def _arguments(job: Job) -> list[str]:
    """Return the job's arguments as one could type them, with the run directory that has been made."""
    # A resume composes over the run: what it was started with, typed again, would count as typed now.
    own = job.typed if job.config.run.resume else job.overrides
    pairs = [(split_override(override), override) for override in absolute_paths(own)]
    kept = [override for pair, override in pairs if pair and pair[0] not in ("run.dir", "run.resume")]
    folders = ",".join(quote(f"file://{folder}") for folder in job.config_dirs)
    flags = [f"hydra.searchpath=[{folders}]"] if folders else []
    where = "resume" if job.config.run.resume else "run.dir"
    return [*flags, *kept, *_names(job), f"{where}={quote(str(job.run_dir))}"]


def _names(job: Job) -> list[str]:
    """Return the logger's names of a sweep's job as arguments: the job step knows of no sweep."""
    if job.sweep is None:
        return []
    typed = set(map(override_key, job.overrides))
    names = {name: getattr(job.config.logger, name, None) for name in ("name", "group", "job_type")}
    pairs = {f"logger.{name}": value for name, value in names.items() if value is not None}
    return [f"{key}={quote(value)}" for key, value in pairs.items() if key not in typed]
