"""launch=slurm: the command as a batch script in its run directory, handed to sbatch."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

from dsv3.config import CONF
from dsv3.runtime.config import SlurmLaunchConfig
from dsv3.runtime.errors import RunFailed, UserError
from dsv3.runtime.job import Job
from dsv3.runtime.quoting import absolute_paths, quote, split_override
from dsv3.runtime.rundir import make_run_dir

SCRIPT, LOG = "submit.sh", "slurm-%j.log"
# Seconds before the time limit at which every rank is asked to stop; it finishes its step and saves.
_STOP_BEFORE_LIMIT = 300


def submit(job: Job) -> None:
    """Write RUN_DIR/submit.sh, submit it and say where to look; UserError where there is no sbatch."""
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
    """The script: what Slurm is asked for, and one srun that starts every rank with the same arguments."""
    options = "\n".join(f"#SBATCH {option}" for option in _options(job))
    program = shlex.join([sys.executable, str(CONF.parent / "train.py"), *_arguments(job)])
    return f"""#!/bin/bash
{options}
# A rank that fails ends the others; the signal above and scancel reach every rank, which then saves.
exec srun --kill-on-bad-exit=1 {program}
"""


def _options(job: Job) -> Iterator[str]:
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
    """The job's overrides as they could be typed, with the run directory that has been made."""
    pairs = [(split_override(override), override) for override in absolute_paths(job.overrides)]
    kept = [override for pair, override in pairs if pair and pair[0] not in ("run.dir", "run.resume")]
    where = "resume" if job.config.run.resume else "run.dir"
    return [*kept, f"{where}={quote(str(job.run_dir))}"]
