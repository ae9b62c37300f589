"""Kill training runs again and again, and check that nothing of them is lost or changed.

A run that saves every 3 steps is killed with SIGKILL at random moments (while it starts, trains or saves) and
resumed, until its layout's kills are spent; a run that gets to its end in between is followed by another. The
victim is drawn: one rank, the launcher, or every process of the run at once, as by a power cut. Of each
layout's kills a half is spent on ranks of runs with launch.max_restarts, which go on by themselves.

Every finished run must equal one of the same layout that was never interrupted: each row of metrics.jsonl
and each tensor of the last checkpoint (weights, optimizer, random state), bit for bit. No process of a run
may live 10 s after a kill that ends it. LIMITS are for a machine with nothing else to do.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dsv3.checkpoint.dcp_metadata import load_tensors, read_metadata
from dsv3.checkpoint.directory import complete_steps

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY = 60, 3
VOLATILE = (
    *("tokens_per_second", "mfu", "memory_gib", "data_wait", "straggler", "straggler_rank"),
    *("planned_tokens_per_second", "planned_memory_gib"),
)
"""Metrics that differ between two runs of the same training: how fast it went, and what it took."""
SETTINGS = (
    "model.dim=64",
    "model.vocab_size=512",
    "tokenizer.vocab_size=512",
    "data=text",
    "logger=none",
    "train.sequence_length=128",
    "train.global_batch_size=8",
    "train.microbatch_size=2",
    f"train.steps={STEPS}",
    f"train.checkpoint_every={SAVE_EVERY}",
    "train.evaluate_every=20",
    "train.generate_every=0",
    "train.log_every=5",
    "launch.timeout=3600",  # a rank may wait long for a core; LIMITS find a hang
)
RESTARTING = ("launch.max_restarts=1000",)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "none": (1, ()),
    "fsdp": (2, ("parallel=fsdp", "launch.nproc=2")),
    "tp_ep": (2, ("parallel=tp_ep", "launch.nproc=2", "parallel.degrees.ep=2")),
    "pp": (2, ("parallel=pp", "launch.nproc=2")),
    "cp": (2, ("parallel=cp", "launch.nproc=2")),
    "hsdp": (4, ("parallel=hsdp", "launch.nproc=4")),
}
"""Ranks and overrides by name."""


@dataclass
class Limits:
    """Limits of time in seconds."""

    gone: float = 10.0
    """Processes of a killed run may live so long."""
    ended: float = 300.0
    """A command that has not ended counts as hung."""

    def stretch(self, factor: float) -> None:
        """Allow `factor` times as long, on a machine that has other work of a higher priority."""
        self.gone, self.ended = self.gone * factor, self.ended * factor


LIMITS = Limits()


@dataclass
class Kill:
    """One kill: whom it met and when, and what it left in the run directory."""

    run: int
    victim: str
    restarts: bool
    """The run goes on by itself."""
    seconds: float
    """After the start of the command; for a run that goes on by itself, after a new checkpoint."""
    phase: str
    rows: int
    """Whole lines of metrics.jsonl."""
    newest: int
    """Step of the newest complete checkpoint, 0 without one."""
    gone: float | None
    """Seconds until the last process had gone; None where the run goes on."""


class Broken(Exception):
    """A promise that was not kept."""


class Trial:
    """Starts, kills and resumes runs of one layout below `root`."""

    def __init__(self, root: Path, layout: str, cache: Path, text: Path) -> None:
        self.root = root
        self.ranks, self.layout = LAYOUTS[layout]
        self.text = text
        self.resumes = 0
        root.mkdir()
        # One thread per rank: a model this small gains nothing from more.
        self.environment = os.environ | {"DSV3_CACHE": str(cache), "OMP_NUM_THREADS": "1"}

    def command(self, run: Path, more: Sequence[str] = ()) -> list[str]:
        """Return the command that starts the run, or goes on with it where config.yaml says there is one.

        `more` are further overrides of a run that starts.
        """
        program = [sys.executable, str(ROOT / "train.py")]
        if (run / "config.yaml").exists():
            self.resumes += 1
            return [*program, f"resume={run}"]
        return [*program, *SETTINGS, *self.layout, *more, f"data.path={self.text}", f"run.dir={run}"]

    @contextmanager
    def started(
        self, run: Path, more: Sequence[str] = (), log: Path | None = None
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Start the command in a session of its own; what it says goes to `log`, or a file beside the run."""
        with (log or run.with_suffix(".log")).open("ab") as said:
            process = subprocess.Popen(
                self.command(run, more),
                stdout=said,
                stderr=said,
                env=self.environment,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                kill_all(process)

    def finish(self, run: Path) -> float:
        """Let the run go to its end; return the seconds that took. Broken unless it exits with 0."""
        began = time.monotonic()
        with self.started(run) as process:
            self.require_success(process, run)
        return time.monotonic() - began

    def require_success(self, process: "subprocess.Popen[bytes]", run: Path) -> None:
        """Wait for the end; Broken unless the exit code is 0."""
        try:
            code = process.wait(LIMITS.ended)
        except subprocess.TimeoutExpired:
            raise Broken(f"{run.name} has not ended after {LIMITS.ended:g} s:\n{self._said(run)}") from None
        if code != 0:
            raise Broken(f"{run.name} ended with exit code {code}:\n{self._said(run)}")

    def kill(self, run: Path, number: int, after: float, victim: str) -> Kill | None:
        """Start or resume, kill after so many seconds; return None where the run had ended by then."""
        began = time.time()
        with self.started(run) as process:
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                family = psutil.Process(process.pid).children(recursive=True)
                if not strike(process, victim):
                    strike(process, victim := "launcher")
                gone = seconds_until_gone([*family, psutil.Process(process.pid)], process, victim)
                where = phase_of(run, began)
                return Kill(number, victim, False, after, where, rows_of(run), newest_of(run), gone)
            self.require_success(process, run)
        return None

    def kill_ranks(self, run: Path, number: int, kills: int, moments: random.Random) -> list[Kill]:
        """Start a run that restarts by itself and kill ranks of it; return the kills until it has ended."""
        done: list[Kill] = []
        newest, began, wait = 0, time.monotonic(), moments.uniform(0, 4)
        with self.started(run, RESTARTING) as process:
            while len(done) < kills and process.poll() is None:
                time.sleep(0.1)
                # Kills without a checkpoint between them are those of runs that are resumed: here the
                # launcher would pause longer and longer.
                if newest_of(run) == newest:
                    began = time.monotonic()
                elif time.monotonic() - began > wait:
                    victim = f"rank {moments.randrange(self.ranks)}"
                    if strike(process, victim):
                        newest, where = newest_of(run), phase_of(run, time.time() - wait)
                        done.append(Kill(number, victim, True, wait, where, rows_of(run), newest, None))
                        wait = moments.uniform(0, 4)
            self.require_success(process, run)
        return done

    def _said(self, run: Path) -> str:
        return run.with_suffix(".log").read_text(errors="replace")[-2000:]


def write_text(folder: Path) -> None:
    """Write a small folder of text, the same every time."""
    folder.mkdir(exist_ok=True)
    choose = random.Random(0)
    words = [f"word{number}" for number in range(300)]
    for number in range(200):
        (folder / f"{number:03}.txt").write_text(" ".join(choose.choices(words, k=200)) + "\n")


def strike(process: "subprocess.Popen[bytes]", victim: str) -> bool:
    """Kill the victim; return False where it is a rank that has not been started."""
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim == "launcher":
        os.kill(process.pid, signal.SIGKILL)
    else:
        worker = find_rank(process, int(victim.removeprefix("rank ")))
        if worker is None:
            return False
        try:
            worker.kill()
        except psutil.NoSuchProcess:  # it has just ended
            return False
    return True


def find_rank(process: "subprocess.Popen[bytes]", rank: int) -> psutil.Process | None:
    """Return the worker of a rank; None where there is none at the moment.

    A launcher starts its workers in the order of their ranks, and other children by other means.
    """
    workers = []
    try:
        for child in psutil.Process(process.pid).children():
            if any("spawn_main" in argument for argument in child.cmdline()):
                workers.append(child)
    except psutil.NoSuchProcess:
        return None
    return sorted(workers, key=lambda worker: worker.create_time())[rank] if rank < len(workers) else None


def stand_still(rank: psutil.Process | None, seconds: float) -> bool:
    """Stop a rank for so many seconds; return False where it has ended, or there is none."""
    if rank is None:
        return False
    try:
        rank.suspend()
        time.sleep(seconds)
        rank.resume()
    except psutil.NoSuchProcess:
        return False
    return True


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """End the process and its children, by their ids."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def seconds_until_gone(
    family: list[psutil.Process], process: "subprocess.Popen[bytes]", victim: str
) -> float:
    """Return how long the family lives on after a kill of `victim`; Broken where it is too long."""
    began = time.monotonic()
    while process.poll() is None or any(map(_alive, family)):
        if time.monotonic() - began > LIMITS.gone:
            left = list(filter(_alive, family))
            for one in left:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            raise Broken(f"{len(left)} processes outlived a kill of {victim} by {LIMITS.gone:g} s")
        time.sleep(0.01)
    return time.monotonic() - began


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def phase_of(run: Path, began: float) -> str:
    """Return what the run was doing when it was killed, by what it has left since `began`."""
    if not (run / "config.yaml").exists():
        return "before config.yaml"
    for path in (run / "checkpoints").glob(".*"):
        with suppress(FileNotFoundError):  # a run that goes on has just given it its name
            if path.stat().st_mtime > began:
                return "while saving"
    return "after a checkpoint" if complete_steps(run) else "before a checkpoint"


def rows_of(run: Path) -> int:
    """Return the whole lines of metrics.jsonl."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def newest_of(run: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 without one."""
    steps = complete_steps(run)
    return int(steps[-1].name.removeprefix("step-")) if steps else 0


def check_same(run: Path, reference: Path) -> None:
    """Broken unless the run equals the reference and has left nothing half-done."""
    mine, theirs = trace(run), trace(reference)
    if [row["step"] for row in mine] != list(range(1, STEPS + 1)):
        raise Broken(f"{run.name}: the steps of metrics.jsonl are {[row['step'] for row in mine]}")
    for a, b in zip(mine, theirs, strict=True):
        if a != b:
            raise Broken(f"{run.name} differs from the uninterrupted run at step {a['step']}: {a} and {b}")
    ours, wanted = tensors(run), tensors(reference)
    different = [name for name in wanted if name not in ours or not torch.equal(ours[name], wanted[name])]
    if ours.keys() != wanted.keys() or different:
        raise Broken(f"{run.name}: the last checkpoint differs in {different or 'its names'}")
    left = [str(path.relative_to(run)) for path in run.rglob("*") if _is_leftover(path)]
    if left:
        raise Broken(f"{run.name}: half-done files are left: {left}")


def trace(run: Path) -> list[dict[str, Any]]:
    """Return the rows as they stand in the file, less what may differ."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the last checkpoint as raw bytes: even a NaN or a -0.0 must be the same."""
    directory = complete_steps(run)[-1]
    entries: dict[str, Any] = dict(read_metadata(directory).state_dict_metadata)
    loaded = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    load_tensors(directory, loaded)
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in loaded.items()}


def _is_leftover(path: Path) -> bool:
    return path.name.startswith((".partial", ".removed")) or path.suffix == ".tmp"


def kill_layout(
    folder: Path, layout: str, kills: int, seed: int, shared: Mapping[str, Path]
) -> dict[str, Any]:
    """Spend the kills of one layout; return its figures. `shared` has the data: `cache` and `text`."""
    trial, moments = Trial(folder / layout, layout, **shared), random.Random(f"{layout} {seed}")
    root, reference = trial.root, trial.root / "reference"
    trial.finish(root / "warm-up")  # fills the data cache, which all other runs share
    whole = trial.finish(reference)
    startup = min(whole, trial.finish(reference))  # nothing left to train: what a resume costs by itself
    print(
        f"{layout}: uninterrupted {whole:.1f} s, of which about {startup:.1f} s are no training", flush=True
    )
    trial.resumes = 0
    done: list[Kill] = []
    number, by_itself = 1, kills // 2 if trial.ranks > 1 else 0
    victims = (
        ["launcher", "all", *(f"rank {rank}" for rank in range(trial.ranks))] if trial.ranks > 1 else ["all"]
    )

    def next_run() -> Path:
        return root / f"run-{number}"

    while len(done) < kills - by_itself:
        kill = None
        if newest_of(next_run()) == STEPS:  # nothing is left that a kill could spoil
            trial.finish(next_run())
        else:
            left = startup + (whole - startup) * (STEPS - newest_of(next_run())) / STEPS
            kill = trial.kill(next_run(), number, moments.uniform(0, 1.1 * left), moments.choice(victims))
        if kill is None:
            check_same(next_run(), reference)
            number += 1
        else:
            done.append(kill)
            _show(layout, len(done), kill)
    trial.finish(next_run())
    check_same(next_run(), reference)
    while len(done) < kills:
        number += 1
        new = trial.kill_ranks(next_run(), number, kills - len(done), moments)
        check_same(next_run(), reference)
        for kill in new:
            done.append(kill)
            _show(layout, len(done), kill)
    return {
        "ranks": trial.ranks,
        "kills": len(done),
        "kills_of_runs_that_restart": sum(kill.restarts for kill in done),
        "resumes": trial.resumes,
        "runs_finished_and_equal": number,
        "victims": _counts(kill.victim for kill in done),
        "phases": _counts(kill.phase for kill in done),
        "slowest_exit_seconds": max((kill.gone or 0.0 for kill in done), default=0.0),
        "uninterrupted_seconds": whole,
        "tensors_compared": len(tensors(reference)),
        "each": [asdict(kill) for kill in done],
    }


def _counts(names: Iterator[str]) -> dict[str, int]:
    found = list(names)
    return {name: found.count(name) for name in sorted(set(found))}


def _show(layout: str, count: int, kill: Kill) -> None:
    gone = "goes on" if kill.gone is None else f"gone after {kill.gone:.2f} s"
    print(
        f"{layout} kill {count:3}  run {kill.run}  {kill.victim:8}  at {kill.seconds:5.1f} s  "
        f"{kill.phase:20}  rows {kill.rows:3}  checkpoint {kill.newest:3}  {gone}",
        flush=True,
    )
