"""Run train.py and convert.py as real processes: for signals, workers, and what a user's shell sees."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from tests.harness.outcome import Outcome
from tests.harness.tiny import MODEL, TRAINING

ROOT = Path(__file__).resolve().parents[2]
STOP, INTERRUPT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
HANGUP, QUIT, SAVE = signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1
PATIENCE = 120.0
"""The seconds after which a process that did not do its part fails the test."""
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID", "HYDRA_FULL_ERROR")
"""Variables that make a process one of several, or change what it prints: no test inherits them."""


def environment(**more: str) -> dict[str, str]:
    """Return this process's variables without those of a launcher, for a process of its own."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHED} | more


def run_program(program: str, *arguments: str, cwd: Path | None = None) -> Outcome:
    """Run `train.py` or `convert.py` with exactly these arguments."""
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=cwd,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


class Process:
    """A process that is running; its streams go to files, so that no pipe can fill up."""

    def __init__(self, command: list[str], directory: Path, environment: dict[str, str]) -> None:
        self.out, self.err = directory / ".stdout", directory / ".stderr"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.popen = subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=_heed_all_signals,
            )

    def send(self, number: int) -> None:
        """Send a signal to this process alone."""
        self.popen.send_signal(number)

    def workers(self) -> list[psutil.Process]:
        """Return its workers by rank: they are spawned in that order."""
        found = psutil.Process(self.popen.pid).children(recursive=True)
        ranks = [process for process in found if "spawn_main" in " ".join(process.cmdline())]
        return sorted(ranks, key=lambda process: process.pid)

    def wait(self) -> Outcome:
        """Wait for its end, which must come."""
        try:
            code = self.popen.wait(PATIENCE)
        finally:
            self.end()
        return Outcome(code, self.out.read_text(), self.err.read_text())

    def wait_for_steps(self, run_dir: Path, steps: int) -> None:
        """Wait until the run in `run_dir` has taken more than `steps` steps."""
        deadline = time.monotonic() + PATIENCE
        while len(rows(run_dir)) <= steps:
            assert self.popen.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, "no step was taken"
            time.sleep(0.05)

    def end(self) -> None:
        """Kill it and its children if it still runs."""
        if self.popen.poll() is None:
            for child in psutil.Process(self.popen.pid).children(recursive=True):
                child.kill()
            self.popen.kill()
            self.popen.wait()


def _heed_all_signals() -> None:
    """Begin as in a shell's foreground: what is ignored stays so, and a test may run under nohup."""
    for number in (STOP, INTERRUPT, HANGUP, QUIT, SAVE):
        signal.signal(number, signal.SIG_DFL)


class CommandLine:
    """Start train.py with a data cache of the session's, from a directory that is not the repository."""

    def __init__(self, directory: Path, cache: Path, text: Path) -> None:
        self.directory = directory
        self.text = text
        self.environment = environment(DSV3_CACHE=str(cache), XDG_CACHE_HOME=str(cache), OMP_NUM_THREADS="1")
        self.started: list[Process] = []

    def start(self, *arguments: str, launcher: Iterable[str] = ()) -> Process:
        """Start train.py with exactly these arguments."""
        command = [sys.executable, *launcher, str(ROOT / "train.py"), *arguments]
        self.started.append(Process(command, self.directory, self.environment))
        return self.started[-1]

    def run(self, *arguments: str, launcher: Iterable[str] = ()) -> Outcome:
        """Run train.py with exactly these arguments."""
        return self.start(*arguments, launcher=launcher).wait()

    def training(self, run_dir: Path, *arguments: str) -> list[str]:
        """Return the arguments that train the tiny model in `run_dir` and do nothing else."""
        never = ["train.generate_every=0", "train.checkpoint_every=0", "train.evaluate_every=1000"]
        often = ["train.microbatch_size=2", "train.evaluate_tokens=64", "train.log_every=1"]
        data = ["data=text", f"data.path={self.text}"]
        own = ["model.mtp_depths=0"]  # each of these processes starts cold
        return [*MODEL, *own, *TRAINING, *never, *often, *data, *arguments, f"run.dir={run_dir}"]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl; the last one of a running process may be half written."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    """Return whether all have ended within so many seconds."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
