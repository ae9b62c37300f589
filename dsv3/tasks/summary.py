"""What a finished training run tells its user."""

import math
import shlex
from pathlib import Path
from statistics import median

from dsv3.metrics import jsonl
from dsv3.metrics.console import Console
from dsv3.metrics.plot import loss_curve
from dsv3.metrics.row import MetricsRow


def conclude(console: Console, directory: Path, following: list[str]) -> None:
    """Draw loss.png, print the table of results and, as the command to try next, `following`."""
    rows = jsonl.read(directory / "metrics.jsonl")
    if rows:
        loss_curve(rows, directory / "loss.png", f"Loss of {directory.name}")
        console.table("Done", _results(rows, directory))
    console.next_command(shlex.join(["python", "train.py", *following]))


def _results(rows: list[MetricsRow], directory: Path) -> list[tuple[str, str]]:
    evaluations = [row.evaluation_loss for row in rows if row.evaluation_loss is not None]
    rates = [row.tokens_per_second for row in rows if row.tokens_per_second is not None]
    results = [
        ("steps", f"{rows[-1].step}, {rows[-1].tokens:,} tokens"),
        ("first loss", _loss(rows[0].loss)),
        ("last loss", _loss(rows[-1].loss)),
    ]
    if evaluations:
        results.append(("held-out loss", f"{_loss(evaluations[-1])} (first {_loss(evaluations[0])})"))
        results.append(("held-out perplexity", f"{math.exp(min(evaluations[-1], 700.0)):.2f}"))
    if rates:
        results.append(("tokens/s", f"{median(rates):,.0f}"))
    results.append(("peak memory", f"{max(row.memory_gib or 0.0 for row in rows):.2f} GiB"))
    results.append(("written to", f"{directory}"))
    results.append(("", "metrics.jsonl, loss.png, checkpoints/, config.yaml, plan.txt, log.txt"))
    return results


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
