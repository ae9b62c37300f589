"""The campaign of faults: kills, stalls, damaged inputs, full disks, fuzzing and a soak.

    python -m benchmarks.faults                     all parts but the soak: some 2 hours on 2 cores
    python -m benchmarks.faults --only kills --layouts fsdp,pp --kills 40
    python -m benchmarks.faults --only soak --seconds 7200
    chrt --idle 0 python -m benchmarks.faults --slower 20       beside other work: limits of time are longer

The results go to docs/reliability.md, those of a layout or reader as soon as it is done. What a part finds
ends it, with exit code 1 and the message. Parts:

- `kills`: SIGKILL of ranks, launchers and whole runs over layouts (fault_kills.py).
- `stalls`: a rank that stands still, shortly and for longer than launch.timeout.
- `inputs`: damaged copies of every kind of input (tests/faults/corruptions.py).
- `disks`: runs on a small tmpfs that is full at one moment or another; needs root.
- `fuzz`: atheris over the readers of strangers' files, `--seconds` each (fuzz_readers.py).
- `soak`: hours of training with a fault a minute (fault_soak.py).
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.fault_kills import (
    LAYOUTS,
    LIMITS,
    ROOT,
    Broken,
    Trial,
    check_same,
    find_rank,
    kill_layout,
    stand_still,
    write_text,
)
from benchmarks.fault_soak import soak
from benchmarks.fuzz_readers import READERS
from benchmarks.pages import fill
from dsv3.checkpoint.directory import complete_steps
from dsv3.checkpoint.manifest import verify

RESULT = Path(__file__).resolve().parent / "results" / "faults.json"


def kills(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Kill runs of every layout; see fault_kills.py."""
    shared = {"text": folder / "text", "cache": folder / "cache"}
    write_text(shared["text"])
    for layout in options.layouts.split(","):
        yield {layout: kill_layout(folder, layout, options.kills, options.seed, shared)}


def stalls(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Let a rank stand still: for some seconds, which nobody may notice, and until the run counts as hung."""
    shared = {"text": folder / "text", "cache": folder / "cache"}
    write_text(shared["text"])
    choose, trial = random.Random(options.seed), Trial(folder / "fsdp", "fsdp", **shared)
    reference = trial.root / "reference"
    trial.finish(reference)
    short, hung = trial.root / "short", trial.root / "hung"
    stood = 0
    with trial.started(short) as process:
        while process.poll() is None:
            time.sleep(choose.uniform(0.2, 1.0))
            stood += stand_still(find_rank(process, choose.randrange(2)), choose.uniform(0.5, 2.0))
        trial.require_success(process, short)
    check_same(short, reference)
    # A rank that waits for a core is not hung: the timeout grows with the limits.
    seconds, began = round(LIMITS.ended / 30), time.monotonic()
    with trial.started(hung, [f"launch.timeout={seconds}", "launch.max_restarts=3"]) as process:
        while not (complete_steps(hung) and (rank := find_rank(process, 1))):
            if time.monotonic() - began > LIMITS.ended or process.poll() is not None:
                raise Broken("the run has ended, or has no checkpoint yet")
            time.sleep(0.1)
        rank.suspend()
        trial.require_success(process, hung)
    check_same(hung, reference)
    if not any(hung.glob("stacks-*/rank-*.txt")):
        raise Broken("the hang left no stacks")
    yield {"short_stalls": stood, "stalls_beyond_the_timeout": 1, "timeout": seconds}


def inputs(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Give as many damaged inputs to every reader; see tests/faults/corruptions.py."""
    from tests.faults import data_readers, file_readers
    from tests.faults.corruptions import corruptions, judge
    from tests.faults.run_readers import RUNS

    results: dict[str, Any] = {}
    for reader in [*file_readers.READERS.values(), *data_readers.READERS.values(), RUNS]:
        outcomes = []
        for case in corruptions(reader, options.seed, options.inputs):
            place = folder / "case"
            place.mkdir(exist_ok=True)
            verdict = judge(case, place, seconds=LIMITS.ended / 10)
            outcomes.append(verdict.outcome)
            if verdict.outcome == "fault":
                raise Broken(f"{case.name}: {verdict.message}")
        name = f"{reader.name}, as data" if reader.name in results else reader.name
        results[name] = {outcome: outcomes.count(outcome) for outcome in ("refused", "read")}
        print(f"inputs {name}: {results[name]}", flush=True)
    yield results


def disks(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run on a tmpfs that fills up at some moment; make room; the resumed run must equal one with room."""
    shared = {"text": folder / "text", "cache": folder / "cache"}
    write_text(shared["text"])
    trial = Trial(folder / "none", "none", **shared)
    reference = trial.root / "reference"
    trial.finish(reference)
    used = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    codes: list[int] = []
    for number in range(options.disks):
        share = 1.4 * number / options.disks
        with small_disk(folder / f"disk-{number}", used * 4) as disk:
            ballast = disk / "ballast"
            with ballast.open("wb") as file:  # leaves `share` of what a run needs
                os.posix_fallocate(file.fileno(), 0, max(1, int(used * (4 - share))))
            run = disk / "run"
            with trial.started(run, log=folder / f"disk-{number}.log") as process:
                try:
                    code = process.wait(LIMITS.ended)
                except subprocess.TimeoutExpired:
                    raise Broken(f"a disk with {share:.0%} of the room: the run does not end") from None
            said = (folder / f"disk-{number}.log").read_text(errors="replace")
            if code not in (0, 1, 2) or "Traceback" in said:
                raise Broken(f"a disk with {share:.0%} of the room: exit code {code}:\n{said[-2000:]}")
            if code and "No space left on device" not in said:
                raise Broken(f"the message does not speak of space:\n{said[-2000:]}")
            for step in complete_steps(run):
                verify(step)
            codes.append(code)
            ballast.unlink()
            trial.finish(run)
            check_same(run, reference)
            print(f"disk with {share:.0%} of the room: exit code {code}", flush=True)
    yield {"disks": len(codes), "exit_codes": {str(code): codes.count(code) for code in sorted(set(codes))}}


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of `size` bytes while the body runs."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fuzz(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fuzz each reader in a process of its own for --seconds of its CPU time; see fuzz_readers.py."""
    for name in options.readers.split(","):
        command = [sys.executable, "-m", "benchmarks.fuzz_readers", name, "--seconds", str(options.seconds)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace"
        )
        if ended.returncode:
            raise Broken(f"{name}:\n{(ended.stdout + ended.stderr)[-3000:]}")
        row = {"seconds": options.seconds, **json.loads(ended.stdout.splitlines()[-1]), "found": 0}
        print(f"fuzz {name}: {row}", flush=True)
        yield {name: row}


def soaked(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train for --seconds with a fault a minute; see fault_soak.py."""
    yield soak(folder, options.seconds, options.seed, options.rest)


PARTS: dict[str, Callable[[Path, argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "kills": kills,
    "stalls": stalls,
    "inputs": inputs,
    "disks": disks,
    "fuzz": fuzz,
    "soak": soaked,
}


def write_page(results: dict[str, Any]) -> None:
    """Write the tables of docs/reliability.md."""
    rows = results.get("kills", {})
    if rows:
        lines = [
            "| layout | ranks | kills | of them in runs that restart | while saving | resumes | runs equal "
            "| gone after |"
        ]
        lines.append("|---|---|---|---|---|---|---|---|")
        for layout, row in rows.items():
            saving = row["phases"].get("while saving", 0)
            lines.append(
                f"| {layout} | {row['ranks']} | {row['kills']} | {row['kills_of_runs_that_restart']} "
                f"| {saving} | {row['resumes']} | {row['runs_finished_and_equal']} "
                f"| {row['slowest_exit_seconds']:.1f} s |"
            )
        fill("reliability.md", "kills", lines)
    lines = ["| part | result |", "|---|---|"]
    if stalled := results.get("stalls"):
        told = f"{stalled['short_stalls']} stalls of 0.5 to 2 s, and one beyond launch.timeout"
        lines.append(f"| a rank stands still | {told}: equal to the run without |")
    if damaged := results.get("inputs"):
        refused, read = (sum(row[name] for row in damaged.values()) for name in ("refused", "read"))
        told = f"{refused + read:,} for {len(damaged)} readers: {refused:,} refused in one or two lines"
        lines.append(f"| damaged inputs | {told}, {read:,} read, no traceback, none took 30 s |")
    if full := results.get("disks"):
        codes = ", ".join(f"{count} with {code}" for code, count in full["exit_codes"].items())
        lines.append(
            f"| full disks | {full['disks']} runs ended, {codes}; with room again all went on, and equal |"
        )
    for name, row in results.get("fuzz", {}).items():
        lines.append(
            f"| fuzzing {name} | {row['inputs']:,} inputs in {row['seconds']} s of CPU time, "
            f"{row['found']} found |"
        )
    if soaked := results.get("soak"):
        faults = ", ".join(f"{count} x {kind}" for kind, count in sorted(soaked["faults"].items()))
        told = f"{soaked['seconds'] / 3600:.1f} h, {soaked['steps']:,} steps, {faults}, "
        told += (
            f"{soaked['accidents'].get('nonfinite', 0)} batches with nan; {soaked['tokens_lost']} tokens lost"
        )
        lines.append(f"| soak | {told} |")
        for name, row in soaked["longest_lived"].items():
            grown = "; ".join(
                f"{what.replace('_', ' ').replace('mib', 'MiB')} {row[what][0]} -> {row[what][1]}"
                for what in ("memory_mib", "descriptors", "threads")
            )
            lines.append(f"| {name} over {row['seconds']:,} s | {grown} |")
    fill("reliability.md", "faults", lines)


def main() -> int:
    """Run the chosen parts, and write results and page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="kills,stalls,inputs,disks,fuzz", help="parts, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of kills")
    parser.add_argument("--kills", type=int, default=40, help="per layout")
    parser.add_argument("--inputs", type=int, default=100, help="damaged inputs per reader")
    parser.add_argument("--disks", type=int, default=12, help="full disks")
    parser.add_argument("--readers", default=",".join(READERS), help="of fuzz")
    parser.add_argument("--seconds", type=int, default=600, help="per reader of fuzz, and of soak")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds of sleep after each step of soak")
    parser.add_argument("--slower", type=float, default=1.0, help="how much longer everything may take")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the results go")
    options = parser.parse_args()
    LIMITS.stretch(options.slower)
    for name in options.only.split(","):
        folder = Path(tempfile.mkdtemp(prefix=f"faults-{name}-"))
        try:
            for new in PARTS[name](folder, options):
                keep(name, new, options)
        except Broken as broken:
            print(f"{name}: {broken}\nits runs are in {folder}", file=sys.stderr)
            return 1
        shutil.rmtree(folder)
    return 0


def keep(name: str, new: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the results of a part, or of one layout or reader of it, beside those there are."""
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    # By layout and reader: the others keep their results.
    results[name] = results.get(name, {}) | new if name in ("kills", "fuzz") else new
    about = {"torch": torch.__version__, "cores": len(os.sched_getaffinity(0)), "seed": options.seed}
    options.json.write_text(json.dumps({**results, "about": about}, indent=1) + "\n")
    if options.json == RESULT:
        write_page(results)


if __name__ == "__main__":
    sys.exit(main())
