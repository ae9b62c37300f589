"""Predicted against measured seconds per training step on this CPU, after calibration.

First task=calibrate measures this machine for 1, 2 and 4 ranks. Then each case is planned, and its steps
are taken by real processes over gloo (benchmarks/real_steps.py). The time model's form and the calibration's
sizes were chosen on the cases that are not held back; nothing was looked at on the others. The machine must
do nothing else meanwhile.

    python -m benchmarks.planner_cpu                 all: 12 minutes; writes results and docs/planning.md
    python -m benchmarks.planner_cpu --only fsdp     cases with this text, without writing
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.real_steps import ROOT, run
from benchmarks.train_step import BENCH

RESULT = ROOT / "benchmarks" / "results" / "planner_cpu.json"

WIDE = [*BENCH, "model.dim=512", "model.num_layers=4", "model.moe.num_experts=16", "model.moe.hidden_dim=384"]
"""Fewer and wider layers than the bench shape, and more experts."""

LONG = [*BENCH, "model.num_layers=3", "model.attention.heads=8"]
"""Few layers and heads, for long sequences."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    overrides: list[str]
    ranks: int = 1
    held_back: bool = False


def _steps(rows: int, length: int, microbatch: int | None = None) -> list[str]:
    """Return the overrides of a step of `rows` sequences, in one microbatch unless it is given."""
    told = [f"train.global_batch_size={rows}", f"train.sequence_length={length}"]
    return [*told, f"train.microbatch_size={microbatch or rows}"]


def cases() -> list[Case]:
    """Return shapes, precisions, optimizers and recomputation on one process, and layouts on 2 and 4."""
    bf16, fp32 = "precision=bf16", "precision=fp32"
    return [
        Case("bench, fp32, 2 x 512", [*BENCH, fp32, *_steps(2, 512)]),
        Case("bench, bf16, 2 x 512", [*BENCH, bf16, *_steps(2, 512)], held_back=True),
        Case("bench, bf16, 1 x 1024, full recomputation", [*BENCH, bf16, "recompute=full", *_steps(1, 1024)]),
        Case(
            "bench, bf16, 4 x 256, selective recomputation",
            [*BENCH, bf16, "recompute=selective", *_steps(4, 256)],
            held_back=True,
        ),
        Case("bench, bf16, 4 microbatches of 1 x 512", [*BENCH, bf16, *_steps(4, 512, 1)], held_back=True),
        Case("debug, fp32, 8 x 256", ["model=debug", fp32, *_steps(8, 256)]),
        Case("debug, bf16, 4 x 512", ["model=debug", bf16, *_steps(4, 512)], held_back=True),
        Case("wide, bf16, 2 x 512", [*WIDE, bf16, *_steps(2, 512)]),
        Case("wide, bf16, 1 x 512, bf16 moments", [*WIDE, bf16, "precision.moments=bf16", *_steps(1, 512)]),
        Case("long, bf16, 1 x 2048", [*LONG, bf16, *_steps(1, 2048)], held_back=True),
        Case("long, fp32, 1 x 1024, SGD", [*LONG, fp32, "optimizer=sgd", *_steps(1, 1024)], held_back=True),
        Case("bench, bf16, fsdp on 2", [*BENCH, bf16, "parallel=fsdp", *_steps(4, 512, 2)], 2),
        Case(
            "bench, fp32, fsdp on 4", [*BENCH, fp32, "parallel=fsdp", *_steps(4, 512, 1)], 4, held_back=True
        ),
        Case("bench, fp32, cp on 2", [*BENCH, fp32, "parallel=cp", *_steps(1, 1024)], 2, held_back=True),
        Case("bench, bf16, pp on 2", [*BENCH, bf16, "parallel=pp", *_steps(8, 256, 1)], 2),
        Case("bench, bf16, tp_ep on 4", [*BENCH, bf16, "parallel=tp_ep", *_steps(4, 512, 2)], 4),
        Case("wide, bf16, hsdp on 4", [*WIDE, bf16, "parallel=hsdp", *_steps(4, 256, 1)], 4, held_back=True),
    ]


def calibrate(ranks: int, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Measure this machine for plans with so many ranks, as a user does."""
    command = [sys.executable, "train.py", "task=calibrate", "task.format=json", f"task.seconds={seconds}"]
    command += [f"launch.nproc={ranks}"] * (ranks > 1)
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    told: dict[str, Any] = json.loads(done.stdout)
    return told["hardware"]  # type: ignore[no-any-return]


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median and the worst error, and those of the rows held back."""
    errors = [abs(row["ratio"] - 1) for row in rows]
    held = [abs(row["ratio"] - 1) for row in rows if row["held_back"]]
    return {
        "median": median(errors),
        "worst": max(errors),
        **({"held_back_median": median(held), "held_back_worst": max(held)} if held else {}),
    }


HEAD = ["| case | held back | measured, s | predicted, s | ratio |", "|---|---|---|---|---|"]


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    figures = [f"{row[key]:.2f}" for key in ("measured", "predicted", "ratio")]
    return f"| {' | '.join([row['case'], 'yes' if row['held_back'] else '', *figures])} |"


def main() -> None:
    """Calibrate, measure every case, print the table, write JSON and docs/planning.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases that hold this text")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a case")
    parser.add_argument("--seconds", type=float, default=45.0, help="time of each calibration")
    parser.add_argument("--cache", type=Path, help="folder with calibrations, to use again")
    given = parser.parse_args()
    chosen = [case for case in cases() if given.only in case.name]
    with tempfile.TemporaryDirectory() as folder:
        environment = {"DSV3_CACHE": str(given.cache or folder), "DSV3_PROGRESS": "off"}
        hardware = {}
        if given.cache is None or not given.cache.exists():
            hardware = {
                n: calibrate(n, given.seconds, environment) for n in sorted({c.ranks for c in chosen})
            }
        rows = []
        print("\n".join(HEAD))
        for case in chosen:
            told = run(case.overrides, case.ranks, given.steps, memory=False, **environment)
            row = {
                "case": case.name,
                "ranks": case.ranks,
                "held_back": case.held_back,
                "overrides": " ".join(case.overrides),
                "measured": told["seconds"],
                "predicted": told["planned"],
                "ratio": told["planned"] / told["seconds"],
                "causes": told["causes"],
                "steps": told["steps"],
            }
            rows.append(row)
            print(line(row), flush=True)
    found = summary(rows)
    print(json.dumps(found))
    if not given.only:
        RESULT.write_text(json.dumps({"hardware": hardware, "rows": rows, "summary": found}, indent=1) + "\n")
        from benchmarks.pages import fill

        fill("planning.md", "cpu", [*HEAD, *map(line, rows), "", _told(found)])


def _told(found: dict[str, float]) -> str:
    return (
        f"Median error {found['median']:.0%}, worst {found['worst']:.0%}; of the cases held back "
        f"{found['held_back_median']:.0%} and {found['held_back_worst']:.0%}."
    )


if __name__ == "__main__":
    main()
