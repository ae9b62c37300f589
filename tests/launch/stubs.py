"""A Slurm of one node on this machine: sbatch, srun, scontrol and sacct as small programs on the PATH."""

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
environment = dict(os.environ, SBATCH_SCRIPT=script)
environment |= dict(SLURM_JOB_ID="4242", SLURM_NTASKS=tasks, SLURM_PROCID="0")
for number in range(int(array[1]) + 1 if array else 1):
    if array:
        environment |= dict(SLURM_ARRAY_JOB_ID="4242", SLURM_ARRAY_TASK_ID=str(number))
    log = open(script + ".log", "w")
    subprocess.Popen(["bash", script], env=environment, stdout=log, stderr=log, start_new_session=True)
print("4242;cluster" if "--parsable" in sys.argv else "Submitted batch job 4242")
"""
SRUN = """
import os, signal, subprocess, sys, time
command = sys.argv[next(i for i, word in enumerate(sys.argv) if word.startswith("/") and "python" in word):]
tasks = os.environ["SLURM_NTASKS"]
step = dict(os.environ, SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=tasks, SLURM_STEP_TASKS_PER_NODE=tasks,
            SLURM_STEP_NODELIST="localhost", SLURM_NODEID="0", SLURM_JOB_NUM_NODES="1")
ranks = [subprocess.Popen(command, env=dict(step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)))
         for rank in range(int(tasks))]
signal.signal(signal.SIGTERM, lambda *_: [rank.terminate() for rank in ranks])
codes = []
while None in (codes := [rank.poll() for rank in ranks]):
    time.sleep(0.1)
    if "--kill-on-bad-exit=1" in sys.argv and any(code not in (None, 0, 75) for code in codes):
        [rank.kill() for rank in ranks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import os, subprocess, sys
script = os.environ["SBATCH_SCRIPT"]
log = open(script + ".log", "a")
log.write(" ".join(sys.argv[1:]) + "\\n")
log.flush()
subprocess.Popen(["bash", script], stdout=log, stderr=log, start_new_session=True)
"""


def install(folder: Path) -> None:
    """Put the programs into `folder`."""
    folder.mkdir()
    programs = {
        "sbatch": SBATCH,
        "srun": SRUN,
        "scontrol": SCONTROL,
        "sacct": "print('JobID|State|NodeList')\n",
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!{sys.executable}\n{body}")
        (folder / name).chmod(0o755)
