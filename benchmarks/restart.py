"""Measure the seconds from the kill -9 of a rank to the next optimizer step, and where they go.

The debug model trains on 2 ranks of one node with launch.max_restarts, and saves every few steps. Rank 1 is
killed; what can be seen from outside says how far the restart is: processes, their sockets and libraries, the
run's files. For comparison the same run is killed with its launcher and resumed by its command. The results
go into benchmarks/results/restart.json, a table into docs/launching.md.

    python -m benchmarks.restart
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks.pages import fill
from dsv3.checkpoint.directory import complete_steps, step_number

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).resolve().parent / "results" / "restart.json"
SETTINGS = [
    *("data=text", "logger=none", "parallel=fsdp", "launch.nproc=2", "launch.max_restarts=3"),
    *(
        "train.steps=100000",
        "train.checkpoint_every=5",
        "train.generate_every=0",
        "train.evaluate_every=100000",
    ),
    *("train.log_every=1", "train.sequence_length=256", "train.global_batch_size=2"),
]
PHASES = {
    "ranks gone": "the launcher sees the death, the other rank is ended",
    "new ranks": "the launcher decides, and starts processes",
    "torch": "Python starts, torch is imported",
    "process group": "the rest of the imports, the ranks meet",
    "ready": "data from the cache, model, weights, optimizer, run files",
    "step": "the first step",
}
PATIENCE = 300.0


class Run:
    """A training command and what can be seen of it from outside."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.environment = environment

    def start(self, *arguments: str) -> None:
        """Start train.py."""
        self.popen = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """Return the workers that live."""
        found = []
        for process in psutil.Process(self.popen.pid).children():
            try:
                if "spawn_main" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                pass
        return sorted(found, key=lambda process: process.pid)

    def steps(self) -> int:
        """Return the last step in metrics.jsonl."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def told(self) -> int:
        """Return the number of times that the run has said what it is about to do."""
        path = self.directory / "this_run.txt"
        return path.read_text().count("convergence") if path.exists() else 0

    def saved(self) -> int:
        """Return the step of the newest checkpoint."""
        steps = complete_steps(self.directory)
        return step_number(steps[-1]) if steps else 0

    def wait_for_save(self, step: int) -> None:
        """Wait for a checkpoint after `step`."""
        wait(lambda: self.saved() > step)

    def end(self) -> None:
        """Kill all of it."""
        family = [psutil.Process(self.popen.pid), *psutil.Process(self.popen.pid).children(recursive=True)]
        for process in family:
            process.kill()
        self.popen.wait()
        psutil.wait_procs(family[1:], timeout=PATIENCE)


def wait(condition: Callable[[], object]) -> float:
    """Wait until `condition` holds; return the time."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("it did not come")
        time.sleep(0.01)
    return time.monotonic()


def follow(run: Run, old: list[psutil.Process], told: int, began: float) -> dict[str, float]:
    """Return the seconds of each phase of a start, which follows `old` ranks, since `began`."""
    seen = [began, wait(lambda: not any(map(psutil.Process.is_running, old)))]
    known = {process.pid for process in old}

    def new() -> list[psutil.Process]:
        return [process for process in run.ranks() if process.pid not in known]

    seen.append(wait(lambda: len(new()) == 2))
    first = new()[0]
    seen.append(wait(lambda: any("libtorch_python" in each.path for each in first.memory_maps())))
    seen.append(
        wait(lambda: any(each.status == psutil.CONN_LISTEN for each in first.net_connections("inet")))
    )
    seen.append(wait(lambda: run.told() > told))
    resumed = run.saved()
    seen.append(wait(lambda: run.steps() > resumed))
    return {name: b - a for name, a, b in zip(PHASES, seen[:-1], seen[1:], strict=True)}


def kill_rank(run: Run) -> dict[str, float]:
    """Kill rank 1 once there is something to lose; return the phases of the restart."""
    wait(lambda: run.saved() and run.steps() > run.saved() + 1)
    ranks, told, saved = run.ranks(), run.told(), run.saved()
    ranks[1].send_signal(signal.SIGKILL)
    phases = follow(run, ranks, told, time.monotonic())
    run.wait_for_save(saved)  # or the restarts would be used up
    return phases


def resume(run: Run) -> dict[str, float]:
    """Kill all of the run and resume it; return the phases of that."""
    run.end()
    told, saved, began = run.told(), run.saved(), time.monotonic()
    run.start(f"resume={run.directory}")
    phases = follow(run, [], told, began)
    phases["new ranks"] += phases.pop("ranks gone")
    run.wait_for_save(saved)
    return phases


def measure(times: int) -> dict[str, Any]:
    """Kill and restart, kill and resume, so many times each."""
    with tempfile.TemporaryDirectory(prefix="dsv3-restart-") as folder:
        text = Path(folder, "text")
        text.mkdir()
        (text / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20_000)
        environment = os.environ | {
            "DSV3_CACHE": f"{folder}/cache",
            "OMP_NUM_THREADS": "1",
            "DSV3_PROGRESS": "off",
        }
        run = Run(Path(folder, "run"), environment)
        try:
            run.start(*SETTINGS, f"data.path={text}", f"run.dir={run.directory}")
            restarts = [kill_rank(run) for _ in range(times)]
            resumes = [resume(run) for _ in range(times)]
        finally:
            run.end()

    def middle(measured: list[dict[str, float]]) -> dict[str, float]:
        middles = {name: round(median(each[name] for each in measured), 2) for name in measured[0]}
        return middles | {"all": round(median(sum(each.values()) for each in measured), 2)}

    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, torch {torch.__version__}"
    return {
        "machine": machine,
        "times": times,
        "restart": middle(restarts),
        "resume_by_hand": middle(resumes),
        "each_restart": [round(sum(each.values()), 2) for each in restarts],
        "each_resume": [round(sum(each.values()), 2) for each in resumes],
    }


def table(result: dict[str, Any]) -> list[str]:
    """Return the phases as lines of a table."""
    rows = ["| phase | after a kill -9 of rank 1, s | `resume=` typed, s |", "|---|---|---|"]
    for name, meaning in PHASES.items():
        by_hand = result["resume_by_hand"].get(name)
        rows.append(f"| {meaning} | {result['restart'][name]} | {'' if by_hand is None else by_hand} |")
    rows.append(f"| **all** | **{result['restart']['all']}** | **{result['resume_by_hand']['all']}** |")
    return rows


def main() -> int:
    """Measure, and write result and table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=5, help="kills of each kind")
    result = measure(parser.parse_args().times)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    fill("launching.md", "restart", table(result))
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
