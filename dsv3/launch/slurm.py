"""Slurm: translate srun's variables into torchrun's, and submit launch=slurm as a batch script with sbatch.

The rest of the code reads torchrun's variables (RANK, WORLD_SIZE, ...) alone.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping

from dsv3.config.launch import SlurmLaunchConfig
from dsv3.config.overrides import absolute_paths, override_key, quote, split_override
from dsv3.config.registry import ROOT
from dsv3.errors import RunFailed, UserError
from dsv3.launch.job import Job
from dsv3.launch.run_dir import make_run_dir

SCRIPT, LOG = "submit.sh", "slurm-%j.log"

# Seconds before the time limit at which every rank is asked to stop; it finishes its step and saves.
_STOP_BEFORE_LIMIT = 300

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
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(_tasks_here(environment, world)),
        "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST", "localhost")),
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
    """Return the script: the options for Slurm, and one srun that starts every rank."""
    options = "\n".join(f"#SBATCH {option}" for option in _options(job))
    here = ROOT / "train.py"
    start = [str(here)] if here.is_file() else ["-m", "dsv3.start"]
    program = shlex.join([sys.executable, *start, *_arguments(job)])
    return f"""#!/bin/bash
{options}
# A rank that fails ends the others; the signal above and scancel reach every rank, which then saves.
exec srun --kill-on-bad-exit=1 {program}
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
    yield f"--signal=TERM@{_STOP_BEFORE_LIMIT}"
    if launch.sbatch:
        yield launch.sbatch


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
