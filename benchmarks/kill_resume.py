"""Kills a training run again and again and checks that nothing of it is lost or changed.

A run that saves every 3 steps is killed with SIGKILL at random moments (while it starts, trains or
saves) and resumed, until `--kills` kills have happened; a run that gets to its end in between is
followed by another. Every finished run must equal one that was never interrupted: each row of
metrics.jsonl and each tensor of the last checkpoint (weights, optimizer, random state), bit for bit.

With `--workers N` the run is sharded over N processes and only their launcher is killed; the
workers must be gone 10 s later.

    python benchmarks/kill_resume.py
    python benchmarks/kill_resume.py --workers 2 --kills 6 --json benchmarks/results/kill_resume_fsdp.json
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dsv3.checkpoint.dcp_metadata import load_tensors, read_metadata
from dsv3.checkpoint.directory import complete_steps

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).resolve().parent / "results" / "kill_resume.json"
STEPS, SAVE_EVERY = 60, 3
WORKERS_GONE_AFTER = 10.0
# What differs between two runs of the same training: how fast it went and what it took.
VOLATILE = ("tokens_per_second", "mfu", "memory_gib")
SETTINGS = (
    "model.dim=64",
    "model.vocab_size=512",
    "tokenizer.vocab_size=512",
    "data=text",
    "logger=none",
    "train.sequence_length=128",
    "train.global_batch_size=8",
    "train.microbatch_size=4",
    f"train.steps={STEPS}",
    f"train.checkpoint_every={SAVE_EVERY}",
    "train.evaluate_every=20",
    "train.log_every=5",
)


@dataclass
class Kill:
    """One kill: when it came, and what it left in the run directory."""

    run: int
    seconds: float
    """After the start of the command."""
    phase: str
    rows: int
    """Whole lines of metrics.jsonl."""
    newest: int
    """Step of the newest complete checkpoint, 0 without one."""
    workers_gone: float | None
    """Seconds until the last worker had gone; None where there were none."""


class Failed(Exception):
    """A promise that was not kept."""


class Trial:
    """Runs, kills and resumes one training command below `root`."""

    def __init__(self, root: Path, workers: int) -> None:
        self.root = root
        self.workers = workers
        self.resumes = 0
        corpus(root / "text")
        # One thread: a model this small gains nothing from more, and loses where others use the cores.
        share = {"LOCAL_WORLD_SIZE": str(os.cpu_count())} if workers == 1 else {}
        self.environment = os.environ | {"DSV3_CACHE": str(root / "cache")} | share

    def command(self, run: Path) -> list[str]:
        """Start the run, or go on with it where config.yaml says that there is one."""
        program = [sys.executable, str(ROOT / "train.py")]
        if (run / "config.yaml").exists():
            self.resumes += 1
            return [*program, f"resume={run}"]
        layout = ["parallel=fsdp", f"launch.nproc={self.workers}"] if self.workers > 1 else []
        return [*program, *SETTINGS, f"data.path={self.root / 'text'}", *layout, f"run.dir={run}"]

    @contextmanager
    def started(self, run: Path) -> Iterator["subprocess.Popen[bytes]"]:
        """The command in a session of its own; what it says goes to a file beside the run."""
        with run.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(
                self.command(run), stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
            try:
                yield process
            finally:
                kill_all(process)

    def finish(self, run: Path) -> float:
        """Let the run go to its end; the seconds that took. Failed unless it exits with 0."""
        began = time.monotonic()
        with self.started(run) as process:
            self.require_success(process.wait(), run)
        return time.monotonic() - began

    def kill(self, run: Path, number: int, after: float) -> Kill | None:
        """Start or resume, kill after so many seconds; None where the run had ended by then."""
        began = time.time()
        with self.started(run) as process:
            try:
                self.require_success(process.wait(after), run)
                return None
            except subprocess.TimeoutExpired:
                pass
            family = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, 9)
            process.wait()
            gone = seconds_until_gone(family) if family else None
            return Kill(number, after, phase_of(run, began), rows_of(run), newest_of(run), gone)

    def require_success(self, code: int, run: Path) -> None:
        if code != 0:
            said = run.with_suffix(".log").read_text(errors="replace")[-2000:]
            raise Failed(f"{run.name} ended with exit code {code}:\n{said}")


def corpus(folder: Path) -> None:
    """A small folder of text, the same every time."""
    folder.mkdir()
    choose = random.Random(0)
    words = [f"word{number}" for number in range(300)]
    for number in range(200):
        (folder / f"{number:03}.txt").write_text(" ".join(choose.choices(words, k=200)) + "\n")


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """End the process and its children, by their ids."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.kill()
    process.wait()


def seconds_until_gone(family: list[psutil.Process]) -> float:
    """How long the orphans live on; Failed where it is too long."""
    began = time.monotonic()
    while any(map(alive, family)):
        if time.monotonic() - began > WORKERS_GONE_AFTER:
            for one in filter(alive, family):
                one.kill()
            raise Failed(f"workers outlived their launcher by {WORKERS_GONE_AFTER:.0f} s")
        time.sleep(0.01)
    return time.monotonic() - began


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def phase_of(run: Path, began: float) -> str:
    """What the command begun at `began` was doing when it was killed, by what it has left behind."""
    if not (run / "config.yaml").exists():
        return "before config.yaml"
    if any(path.stat().st_mtime > began for path in (run / "checkpoints").glob(".*")):
        return "while saving"
    return "after a checkpoint" if complete_steps(run) else "before a checkpoint"


def rows_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def newest_of(run: Path) -> int:
    steps = complete_steps(run)
    return int(steps[-1].name.removeprefix("step-")) if steps else 0


def check_same(run: Path, reference: Path) -> None:
    """Failed unless the run equals the reference and has left nothing half-done."""
    mine, theirs = trace(run), trace(reference)
    if [row["step"] for row in mine] != list(range(1, STEPS + 1)):
        raise Failed(f"{run.name}: the steps of metrics.jsonl are {[row['step'] for row in mine]}")
    for a, b in zip(mine, theirs, strict=True):
        if a != b:
            raise Failed(f"{run.name} differs from the uninterrupted run at step {a['step']}: {a} and {b}")
    ours, wanted = tensors(run), tensors(reference)
    different = [name for name in wanted if not torch.equal(ours[name], wanted[name])]
    if ours.keys() != wanted.keys() or different:
        raise Failed(f"{run.name}: the last checkpoint differs in {different or 'its names'}")
    left = [str(path.relative_to(run)) for path in run.rglob("*") if leftover(path)]
    if left:
        raise Failed(f"{run.name}: half-done files are left: {left}")


def trace(run: Path) -> list[dict[str, Any]]:
    """The rows as they stand in the file, less what may differ."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint as raw bytes, so that even a NaN or a -0.0 must be the same."""
    directory = complete_steps(run)[-1]
    entries: dict[str, Any] = dict(read_metadata(directory).state_dict_metadata)
    loaded = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    load_tensors(directory, loaded)
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in loaded.items()}


def leftover(path: Path) -> bool:
    return path.name.startswith((".partial", ".removed")) or path.suffix == ".tmp"


def trial(root: Path, workers: int, kills: int, seed: int) -> dict[str, Any]:
    """All of it: the reference, the kills, the comparisons; the figures."""
    this, moments = Trial(root, workers), random.Random(seed)
    reference = root / "reference"
    this.finish(root / "warm-up")  # fills the data cache, which all other runs share
    whole = this.finish(reference)
    startup = min(whole, this.finish(reference))  # nothing left to train: what a resume costs by itself
    print(f"uninterrupted: {whole:.1f} s, of which about {startup:.1f} s are no training", flush=True)
    this.resumes = 0
    done: list[Kill] = []
    number = 1
    while len(done) < kills:
        run = root / f"run-{number}"
        kill = None
        if newest_of(run) == STEPS:  # nothing is left that a kill could spoil
            this.finish(run)
        else:
            left = startup + (whole - startup) * (STEPS - newest_of(run)) / STEPS
            kill = this.kill(run, number, moments.uniform(0, 1.1 * left))
        if kill is None:
            check_same(run, reference)
            number += 1
            continue
        done.append(kill)
        show(len(done), kill)
    this.finish(root / f"run-{number}")
    check_same(root / f"run-{number}", reference)
    return {
        "workers": workers,
        "seed": seed,
        "kills": len(done),
        "resumes": this.resumes,
        "runs_finished_and_equal": number,
        "phases": {p: sum(k.phase == p for k in done) for p in sorted({k.phase for k in done})},
        "slowest_worker_exit_seconds": max((k.workers_gone or 0.0 for k in done), default=0.0),
        "uninterrupted_seconds": whole,
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "tensors_compared": len(tensors(reference)),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "each": [asdict(kill) for kill in done],
    }


def show(count: int, kill: Kill) -> None:
    """One line of the table."""
    gone = "" if kill.workers_gone is None else f"  workers gone after {kill.workers_gone:.2f} s"
    print(
        f"kill {count:3}  run {kill.run}  at {kill.seconds:5.1f} s  {kill.phase:20}  "
        f"rows {kill.rows:3}  checkpoint {kill.newest:3}{gone}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        try:
            result = trial(Path(folder), options.workers, options.kills, options.seed)
        except Failed as failure:
            print(f"failed: {failure}", file=sys.stderr)
            return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['kills']} kills, {result['resumes']} resumes, {result['runs_finished_and_equal']} runs "
        f"to the end: each row and all {result['tensors_compared']} tensors as without a kill"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
