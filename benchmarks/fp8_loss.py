"""The losses of experiments=fp8_loss: how far FP8 is from bf16 and fp32, and how far chance is.

Prints the table of docs/precision.md and draws docs/images/fp8_loss.png from the runs of the sweep.

    python train.py -m experiments=fp8_loss
    python -m benchmarks.fp8_loss multirun/TIME
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.fp8_figures import new_figure
from dsv3.metrics.plot import HELD_OUT, QUIET, TRAINING, write_png
from dsv3.tasks.runs import RunSummary, find_runs

ROOT = Path(__file__).resolve().parents[1]
JSON, PICTURE = ROOT / "benchmarks/results/fp8_loss.json", ROOT / "docs/images/fp8_loss.png"
BOUND = 0.0025
"""The report's: FP8's loss stays within 0.25 % of bf16's (section 3.3)."""
LAST = 100
"""Steps whose mean training loss is compared at the end."""
WINDOW = 50
"""Steps of the moving means that are drawn."""
PAIRS = [("fp8", "bf16", TRAINING), ("fp8", "fp32", "#805ad5"), ("bf16", "fp32", HELD_OUT)]
Runs = dict[tuple[str, str], RunSummary]


def by_precision_and_seed(directory: Path) -> Runs:
    """The runs of a sweep over precision and train.seed."""
    runs = find_runs(directory)
    return {(run.overrides["precision"], run.overrides["train.seed"]): run for run in runs}


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
    """Relative differences of two precisions by seed: at the end, held out, and the largest on the way."""
    seeds = sorted({seed for precision, seed in runs if precision == one})
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


def draw(runs: Runs, path: Path) -> None:
    """Curves of every run, and the relative differences with the report's bound."""
    figure, (curves, apart) = new_figure(
        "Training in FP8, bf16 and fp32",
        f"debug model, a line a seed; right, relative differences of means over {WINDOW} steps",
        2,
    )
    colors = {"fp32": HELD_OUT, "bf16": QUIET, "fp8": TRAINING}
    for (precision, seed), run in sorted(runs.items()):
        smooth = [mean(losses(run)[max(0, n - 20) : n + 1]) for n in range(len(losses(run)))]
        label = precision if seed == min(s for _, s in runs) else None
        curves.plot(smooth, color=colors[precision], lw=1.0, label=label)
    for one, other, color in PAIRS:
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
    parser.add_argument("runs", type=Path)
    runs = by_precision_and_seed(parser.parse_args().runs)
    found = [compare(runs, one, other) for one, other, _ in PAIRS]
    print(f"| | last {LAST} steps | held out | largest over {WINDOW} steps |\n|---|---|---|---|")
    for line in found:
        largest = f"{100 * max(line['largest']):.2f}"
        print(f"| {line['pair']} | {told(line['last'])} | {told(line['held_out'])} | {largest} |")
    print("\n| | held-out loss, by seed |\n|---|---|")
    table = {
        p: [run.held_out for (q, _), run in sorted(runs.items()) if p == q] for p in ("fp8", "bf16", "fp32")
    }
    for precision, values in table.items():
        print(f"| {precision} | {', '.join(f'{value:.4f}' for value in values if value is not None)} |")
    JSON.write_text(json.dumps({"held_out": table, "differences": found}, indent=1) + "\n")
    draw(runs, PICTURE)


if __name__ == "__main__":
    main()
