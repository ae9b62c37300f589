"""Train for hours on 2 ranks with a fault a minute, and check that nothing is lost and nothing grows.

Faults are drawn: a rank is killed, the launcher is killed, a rank stands still for some seconds (SIGSTOP),
the run is told to save (SIGUSR1) or to stop (SIGTERM). Some batches hold nan. The run restarts by itself
(launch.max_restarts) or is resumed. In the second and third quarter of the time no fault ends a process, so
that memory, descriptors and threads of processes that live long are seen too. A fault meets a run at work: on
a machine with other work one may take longer than a minute to come.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.fault_kills import (
    LIMITS,
    ROOT,
    Broken,
    find_rank,
    kill_all,
    seconds_until_gone,
    stand_still,
    write_text,
)
from benchmarks.fault_kills import strike as strike_process
from dsv3.checkpoint.directory import Progress, complete_steps
from dsv3.errors import STOPPED
from tests.harness.accidents import injected

BATCH, LENGTH = 8, 128
ENDING = ("kill rank", "kill launcher", "stop")
HARMLESS = ("stand still", "save")
FAULT_EVERY = 60.0
BAD_BATCH_EVERY = 400
"""Steps between two batches with nan, on average."""
SAMPLE_EVERY = 5.0
"""Seconds between two looks at memory, descriptors and threads."""
GROWTH = 1.05
"""A process that is measured for long may have so many times the memory of its first minutes at its end."""


def soak(folder: Path, seconds: float, seed: int, rest: float) -> dict[str, Any]:
    """Train for `seconds`; return the figures. Broken where a token is lost, or a process grows.

    Args:
        rest: seconds of sleep after each step, which leave the machine to others.
    """
    choose, run = random.Random(seed), folder / "run"
    write_text(folder / "text")
    bad = sorted({BATCH * choose.randrange(200, 200_000) for _ in range(200_000 // BAD_BATCH_EVERY)})
    command = [
        sys.executable, str(ROOT / "train.py"), "model.dim=64", "model.vocab_size=512",
        "tokenizer.vocab_size=512", "data=text", f"data.path={folder / 'text'}", "logger=none",
        "parallel=fsdp", "launch.nproc=2",
        "launch.max_restarts=1000", "launch.timeout=600", f"train.sequence_length={LENGTH}",
        "train.steps=1000000",
        f"train.global_batch_size={BATCH}", "train.microbatch_size=4", "train.checkpoint_every=50",
        "train.evaluate_every=500", "train.generate_every=0", "train.log_every=50", "schedule=wsd",
        # Of a preset's rate a model this small diverges sooner or later, and ends by train.accidents.most.
        "optimizer.lr=3e-4", "train.accidents.most=50", f"run.dir={run}",
        *injected({first: {"kind": "nan"} for first in bad}),
        f"+train.callbacks.rest={{_target_: tests.harness.accidents.Rest, seconds: {rest}}}",
    ]  # fmt: skip
    resume = [
        sys.executable,
        str(ROOT / "train.py"),
        f"resume={run}",
        "run.allow_targets=[tests.harness.accidents]",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DSV3_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = str(ROOT)
    began, next_fault, written = time.monotonic(), FAULT_EVERY, 0
    done: dict[str, int] = {}
    watched: dict[str, list[tuple[float, float, int, int]]] = {}
    with (folder / "log").open("ab") as log:

        def start(arguments: list[str]) -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                arguments, stdout=log, stderr=log, env=environment, start_new_session=True
            )

        process = start(command)
        try:
            while True:
                time.sleep(SAMPLE_EVERY)
                elapsed = time.monotonic() - began
                if process.poll() is not None:
                    if process.returncode not in (STOPPED, -signal.SIGKILL):
                        said = (folder / "log").read_text(errors="replace")[-2000:]
                        raise Broken(f"the run ended by itself with {process.returncode}:\n{said}")
                    process = start(resume)
                watch(process, watched)
                before, written = written, size_of(run / "metrics.jsonl")
                if written <= before:  # it starts, or goes on from a checkpoint
                    if elapsed > seconds + LIMITS.ended:
                        raise Broken("the run does not go on after its last fault")
                    continue
                if elapsed > seconds:
                    break
                if elapsed > next_fault:
                    next_fault = elapsed + FAULT_EVERY
                    calm = 0.25 < elapsed / seconds < 0.75
                    kind = choose.choice(HARMLESS if calm else HARMLESS + ENDING)
                    if strike(process, kind, choose):
                        done[kind] = done.get(kind, 0) + 1
                        print(f"{elapsed:6.0f} s  {kind}", flush=True)
            if not strike(process, "stop", choose) or process.returncode != STOPPED:
                raise Broken(f"the last stop ended with {process.returncode}")
        finally:
            kill_all(process)
    return {"seconds": seconds, "seed": seed, "faults": done, **check_rows(run), **growth(watched)}


def size_of(file: Path) -> int:
    """Return the bytes of a file, 0 where it is not there yet."""
    return file.stat().st_size if file.exists() else 0


def strike(process: "subprocess.Popen[bytes]", kind: str, choose: random.Random) -> bool:
    """Do what `kind` says to the run; return False where it has no such process at the moment."""
    family = psutil.Process(process.pid).children(recursive=True)
    if kind == "stand still":
        return stand_still(find_rank(process, choose.randrange(2)), choose.uniform(1, 10))
    if kind == "save":
        os.kill(process.pid, signal.SIGUSR1)
    elif kind == "stop":
        os.kill(process.pid, signal.SIGTERM)
        try:
            process.wait(LIMITS.ended)  # a second one would mean: at once, unsaved
        except subprocess.TimeoutExpired:
            raise Broken(f"the run has not stopped {LIMITS.ended:g} s after SIGTERM") from None
    elif kind == "kill launcher":
        strike_process(process, "launcher")
        seconds_until_gone(family, process, "launcher")
    else:
        return strike_process(process, f"rank {choose.randrange(2)}")
    return True


def watch(
    process: "subprocess.Popen[bytes]", watched: dict[str, list[tuple[float, float, int, int]]]
) -> None:
    """Note the memory (private, bytes), descriptors and threads of the launcher and of both ranks."""
    for name, one in (
        ("launcher", psutil.Process(process.pid)),
        *((f"rank {n}", find_rank(process, n)) for n in (0, 1)),
    ):
        try:
            if one is not None:
                found = time.monotonic(), float(one.memory_full_info().uss), one.num_fds(), one.num_threads()
                watched.setdefault(f"{name}, pid {one.pid}", []).append(found)
        except psutil.NoSuchProcess:
            continue


def check_rows(run: Path) -> dict[str, Any]:
    """Return steps, tokens and accidents of the run; Broken unless each token of each step was taken once."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = Progress.read(complete_steps(run)[-1])
    if [row["step"] for row in rows] != list(range(1, newest.step + 1)):
        raise Broken("a step is missing in metrics.jsonl, or there twice")
    wrong = [row["step"] for row in rows if row["tokens"] != row["step"] * BATCH * LENGTH]
    if wrong or newest.samples != newest.step * BATCH:
        raise Broken(f"tokens were lost or taken twice from step {wrong[:1] or newest.step} on")
    kinds = [json.loads(line)["kind"] for line in (run / "accidents.jsonl").read_text().splitlines()]
    skipped = {row["step"] for row in rows if row["loss"] is None}
    return {
        "steps": newest.step,
        "tokens": newest.tokens,
        "tokens_lost": 0,
        "accidents": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "steps_without_a_loss": len(skipped),
    }


def growth(watched: dict[str, list[tuple[float, float, int, int]]]) -> dict[str, Any]:
    """Return the medians of the second and the last fifth of the process of each kind that lived longest.

    Broken where one has grown. The first fifth is left out: buffers and caches fill.
    """
    told: dict[str, Any] = {}
    grown: list[str] = []
    for kind in ("launcher", "rank 0", "rank 1"):
        longest = max((found for name, found in watched.items() if name.startswith(f"{kind},")), key=len)
        fifth = len(longest) // 5
        early, late = longest[fifth : 2 * fifth], longest[-fifth:]
        if fifth < 5:
            raise Broken(f"no {kind} lived long enough to be measured")
        pairs = {
            name: (median(entry[place] for entry in early), median(entry[place] for entry in late))
            for place, name in ((1, "memory_mib"), (2, "descriptors"), (3, "threads"))
        }
        pairs["memory_mib"] = (
            round(pairs["memory_mib"][0] / 2**20, 1),
            round(pairs["memory_mib"][1] / 2**20, 1),
        )
        told[kind] = {"seconds": round(longest[-1][0] - longest[0][0]), **pairs}
        for name, (before, after) in pairs.items():
            if after > before * (GROWTH if name == "memory_mib" else 1):
                grown.append(f"{name} of {kind} grew from {before} to {after}")
    if grown:
        raise Broken(f"{', '.join(grown)}; all of them: {told}")
    return {"longest_lived": told}
