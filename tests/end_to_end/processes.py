"""Real processes of train.py on a model that trains in a blink."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0
MODEL = [
    "model.vocab_size=300",
    "model.dim=32",
    "model.num_layers=2",
    "model.dense_hidden_dim=48",
    "model.mtp_depths=0",
    "model.attention.heads=2",
    "model.attention.q_lora_rank=16",
    "model.attention.kv_lora_rank=16",
    "model.attention.qk_nope_head_dim=8",
    "model.attention.qk_rope_head_dim=4",
    "model.attention.v_head_dim=8",
    "model.moe.num_experts=4",
    "model.moe.top_k=2",
    "model.moe.hidden_dim=16",
    "model.moe.num_groups=1",
    "model.moe.top_k_groups=1",
]
TRAINING = [
    "tokenizer.vocab_size=300",
    "data.held_out=0.1",
    "train.sequence_length=32",
    "train.global_batch_size=4",
    "train.microbatch_size=2",
    "train.evaluate_every=0",
    "train.evaluate_batches=1",
    "train.generate_every=0",
    "train.checkpoint_every=0",
    "train.log_every=1",
    "logger=none",
]


@dataclass
class Finished:
    """What a process gave back."""

    code: int
    out: str
    err: str


class Process:
    """A process that is running; its streams go to files, so that no pipe can fill up."""

    def __init__(self, command: list[str], directory: Path, environment: dict[str, str]) -> None:
        self.out, self.err = directory / ".stdout", directory / ".stderr"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.popen = subprocess.Popen(
                command, cwd=directory, env=environment, stdout=out, stderr=err, start_new_session=True
            )

    def send(self, number: int) -> None:
        """Send a signal to this process alone."""
        self.popen.send_signal(number)

    def workers(self) -> list[psutil.Process]:
        """Its ranks, by rank: they are spawned in that order."""
        found = psutil.Process(self.popen.pid).children(recursive=True)
        ranks = [process for process in found if "spawn_main" in " ".join(process.cmdline())]
        return sorted(ranks, key=lambda process: process.pid)

    def wait(self) -> Finished:
        """Its end, which must come."""
        try:
            code = self.popen.wait(PATIENCE)
        finally:
            self.end()
        return Finished(code, self.out.read_text(), self.err.read_text())

    def wait_for_steps(self, run_dir: Path, steps: int) -> None:
        """Until the run in `run_dir` has taken more than `steps` steps."""
        deadline = time.monotonic() + PATIENCE
        while len(rows(run_dir)) <= steps:
            assert self.popen.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, "no step was taken"
            time.sleep(0.05)

    def end(self) -> None:
        """Kill it and its children where it still runs."""
        if self.popen.poll() is None:
            for child in psutil.Process(self.popen.pid).children(recursive=True):
                child.kill()
            self.popen.kill()
            self.popen.wait()


class CommandLine:
    """Starts train.py with a data cache of the session's, from a directory that is not the repository."""

    def __init__(self, directory: Path, cache: Path, text: Path) -> None:
        self.directory = directory
        self.text = text
        dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HYDRA_FULL_ERROR", "SLURM_STEP_ID")
        self.environment = {key: value for key, value in os.environ.items() if key not in dropped}
        self.environment |= {"DSV3_CACHE": str(cache), "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str, launcher: Iterable[str] = ()) -> Process:
        """Start train.py with exactly these arguments."""
        command = [sys.executable, *launcher, str(ROOT / "train.py"), *arguments]
        return Process(command, self.directory, self.environment)

    def run(self, *arguments: str, launcher: Iterable[str] = ()) -> Finished:
        """Run train.py with exactly these arguments."""
        return self.start(*arguments, launcher=launcher).wait()

    def training(self, run_dir: Path, *arguments: str) -> list[str]:
        """The arguments that train the small model in `run_dir`."""
        return [*MODEL, *TRAINING, "data=text", f"data.path={self.text}", *arguments, f"run.dir={run_dir}"]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all have ended within so many seconds."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


STOP, INTERRUPT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
