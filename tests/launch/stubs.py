"""A Slurm of one node on this machine: sbatch, srun and sacct as small programs on the PATH."""

import sys
from pathlib import Path

SBATCH = """
import os, re, subprocess, sys
script = sys.argv[-1]
text = open(script).read()
if "--partition=full" in text:
    sys.exit("sbatch: error: invalid partition specified: full")
tasks = re.search(r"--ntasks-per-node=(\\d+)", text)[1]
array = re.search(r"--array=0-(\\d+)", text)
environment = dict(os.environ, SLURM_JOB_ID="4242", SLURM_NTASKS=tasks, SLURM_PROCID="0")
for number in range(int(array[1]) + 1 if array else 1):
    if array:
        environment |= dict(SLURM_ARRAY_JOB_ID="4242", SLURM_ARRAY_TASK_ID=str(number))
    log = open(script + ".log", "w")
    subprocess.Popen(["bash", script], env=environment, stdout=log, stderr=log, start_new_session=True)
print("4242;cluster" if "--parsable" in sys.argv else "Submitted batch job 4242")
"""
SRUN = """
import os, subprocess, sys
command = sys.argv[next(i for i, word in enumerate(sys.argv) if word.startswith("/") and "python" in word):]
tasks = os.environ["SLURM_NTASKS"]
step = dict(os.environ, SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=tasks, SLURM_STEP_TASKS_PER_NODE=tasks,
            SLURM_STEP_NODELIST="localhost", SLURM_NODEID="0", SLURM_JOB_NUM_NODES="1")
ranks = [subprocess.Popen(command, env=dict(step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)))
         for rank in range(int(tasks))]
sys.exit(max(rank.wait() for rank in ranks))
"""


def install(folder: Path) -> None:
    """Put the programs into `folder`."""
    folder.mkdir()
    for name, body in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", "print('JobID|State|NodeList')\n")):
        (folder / name).write_text(f"#!{sys.executable}\n{body}")
        (folder / name).chmod(0o755)
