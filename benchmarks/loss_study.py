"""The losses of a sweep over a precision and seeds: how far its arms are apart, and how far chance is.

Prints the table of docs/precision.md and draws its picture from the runs of experiments=STUDY.

    python train.py -m experiments=fp8_loss
    python -m benchmarks.loss_study fp8_loss multirun/TIME
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.fp8_figures import new_figure
from dsv3.launch.run_results import RunSummary, find_runs
from dsv3.metrics.plots import HELD_OUT, QUIET, TRAINING, write_png

ROOT = Path(__file__).resolve().parents[1]
BOUND = 0.0025
"""The report's: FP8's loss stays within 0.25 % of bf16's (section 3.3)."""
LAST = 100
"""Steps whose mean training loss is compared at the end."""
WINDOW = 50
"""Steps of the moving means that are drawn."""
Runs = dict[tuple[str, str], RunSummary]


@dataclass(frozen=True)
class Study:
    """A sweep over `key` and train.seed."""

    title: str
    key: str
    colors: dict[str, str]
    """Of the curves, an arm each."""
    pairs: list[tuple[str, str, str]]
    """One arm against another, and its color."""

    def runs(self, directory: Path) -> Runs:
        """The runs of the sweep by arm and seed."""
        runs = find_runs(directory)
        return {(run.overrides[self.key], run.overrides["train.seed"]): run for run in runs}


STUDIES = {
    "fp8_loss": Study(
        "Training in FP8, bf16 and fp32",
        "precision",
        {"fp32": HELD_OUT, "bf16": QUIET, "fp8": TRAINING},
        [("fp8", "bf16", TRAINING), ("fp8", "fp32", "#805ad5"), ("bf16", "fp32", HELD_OUT)],
    ),
    "bf16_moments": Study(
        "AdamW's moments in bf16 and fp32",
        "precision.moments",
        {"fp32": HELD_OUT, "bf16": TRAINING},
        [("bf16", "fp32", TRAINING)],
    ),
}


def losses(run: RunSummary) -> list[float]:
    """Training losses step by step."""
    return [row.loss for row in run.rows if row.loss is not None]


def relative(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """The relative difference of two means."""
    return mean(mine) / mean(theirs) - 1


def moving(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Relative differences of the means over WINDOW steps, from the first whole window on."""
    ends = range(WINDOW, min(len(mine), len(theirs)) + 1)
    return [relative(mine[end - WINDOW : end], theirs[end - WINDOW : end]) for end in ends]


def compare(runs: Runs, one: str, other: str) -> dict[str, Any]:
    """Relative differences of two arms by seed: at the end, held out, and the largest on the way."""
    seeds = sorted({seed for arm, seed in runs if arm == one})
    pairs = [(runs[one, seed], runs[other, seed]) for seed in seeds]
    return {
        "pair": f"{one} against {other}",
        "last": [relative(losses(a)[-LAST:], losses(b)[-LAST:]) for a, b in pairs],
        "held_out": [(a.held_out or 0) / (b.held_out or 1) - 1 for a, b in pairs],
        "largest": [max(map(abs, moving(losses(a), losses(b)))) for a, b in pairs],
    }


def told(values: Sequence[float]) -> str:
    """Mean and, for several, their standard deviation, in per cent."""
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):+.2f}{spread}"


def draw(study: Study, runs: Runs, path: Path) -> None:
    """Curves of every run, and the relative differences with the report's bound."""
    figure, (curves, apart) = new_figure(
        study.title,
        f"debug model, a line a seed; right, relative differences of means over {WINDOW} steps",
        2,
    )
    for (arm, seed), run in sorted(runs.items()):
        smooth = [mean(losses(run)[max(0, n - 20) : n + 1]) for n in range(len(losses(run)))]
        label = arm if seed == min(s for _, s in runs) else None
        curves.plot(smooth, color=study.colors[arm], lw=1.0, label=label)
    for one, other, color in study.pairs:
        for n, seed in enumerate(sorted({s for p, s in runs if p == one})):
            line = moving(losses(runs[one, seed]), losses(runs[other, seed]))
            steps = range(WINDOW, WINDOW + len(line))
            apart.plot(
                steps,
                [100 * x for x in line],
                color=color,
                lw=1.2,
                label=None if n else f"{one} against {other}",
            )
    for side in (-1, 1):
        apart.axhline(side * 100 * BOUND, color=QUIET, lw=0.8, ls=":")
    for axes in (curves, apart):
        axes.set_xlabel("step", color=QUIET)
        axes.legend(fontsize=9, edgecolor="none")
    apart.set_ylabel("per cent; dotted: 0.25", color=QUIET)
    write_png(figure, path)


def main() -> None:
    """Print, write, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("runs", type=Path)
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    runs = study.runs(arguments.runs)
    found = [compare(runs, one, other) for one, other, _ in study.pairs]
    print(f"| | last {LAST} steps | held out | largest over {WINDOW} steps |\n|---|---|---|---|")
    for line in found:
        largest = f"{100 * max(line['largest']):.2f}"
        print(f"| {line['pair']} | {told(line['last'])} | {told(line['held_out'])} | {largest} |")
    print("\n| | held-out loss, by seed |\n|---|---|")
    table = {arm: [run.held_out for (a, _), run in sorted(runs.items()) if a == arm] for arm in study.colors}
    for arm, values in table.items():
        print(f"| {arm} | {', '.join(f'{value:.4f}' for value in values if value is not None)} |")
    results = ROOT / "benchmarks" / "results" / f"{arguments.study}.json"
    results.write_text(json.dumps({"held_out": table, "differences": found}, indent=1) + "\n")
    draw(study, runs, ROOT / "docs" / "images" / f"{arguments.study}.png")


if __name__ == "__main__":
    main()
