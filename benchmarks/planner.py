"""Back-test of the planner: published speeds of the family against what the plan predicts for them.

    python -m benchmarks.planner

The points, their sources and the split into `set` and `held back` are in published_points.py. Writes
benchmarks/results/planner.json and the tables of docs/planning.md. Nothing is measured: it takes seconds.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import pages
from benchmarks.published_points import Point, points
from dsv3.planning.hardware import preset_hardware
from dsv3.planning.memory import rank_memory
from dsv3.planning.step_time import Cause, StepTime, step_time

RESULTS = Path(__file__).resolve().parent / "results" / "planner.json"

GIB = 2**30


def main() -> None:
    """Predict every point, print the errors and write them into the documentation."""
    rows = [predict(point) for point in points()]
    found = errors(rows)
    told = {"points": rows, "errors": found}
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    table, summary, memory = speed_table(rows), error_table(found), memory_table(rows)
    for lines in (table, summary, memory):
        print("\n".join(lines), end="\n\n")
    pages.fill("planning.md", "speed", table)
    pages.fill("planning.md", "errors", summary)
    pages.fill("planning.md", "memory", memory)


def predict(point: Point) -> dict[str, Any]:
    """Return the published and the predicted speed of a point, and their ratio: above 1 is too fast."""
    hardware = point.on(preset_hardware(point.hardware))
    time = step_time(point.model_config, point.degrees, point.shape, hardware)
    assert time is not None
    seconds = _seconds(point, time)
    rate = time.tokens * point.accumulates / seconds / time.ranks
    published = point.rate
    if published is None:
        assert point.seconds is not None
        published = time.tokens / point.seconds / time.ranks
    memory = rank_memory(point.model_config, point.degrees, point.shape).total / GIB
    return {
        "name": point.name,
        "configuration": point.configuration,
        "held_back": point.held_back,
        "hardware": point.hardware,
        "source": point.source,
        "published": published,
        "predicted": rate,
        "ratio": rate / published,
        "published_seconds": point.seconds,
        "predicted_seconds": seconds,
        "published_memory_gib": point.memory,
        "planned_memory_gib": memory if point.memory else None,
        "causes": {cause.name: spent / time.seconds for cause, spent in time.causes.items()},
    }


def _seconds(point: Point, time: StepTime) -> float:
    """Return the seconds of an optimizer step of a pipeline that runs several times before it."""
    return time.seconds + (point.accumulates - 1) * (time.seconds - time.causes[Cause.optimizer])


def errors(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return number, median and worst error of the points that were set, held back, and of all.

    Points of one configuration differ in the batch size alone; `by_configuration` is the median of the
    configurations' own medians.
    """
    split = {
        "set": [row for row in rows if not row["held_back"]],
        "held back": [row for row in rows if row["held_back"]],
        "all": list(rows),
    }
    return {name: _summary(each) for name, each in split.items()}


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    by_configuration: dict[int, list[float]] = {}
    for row in rows:
        by_configuration.setdefault(row["configuration"], []).append(abs(row["ratio"] - 1))
    every = [error for each in by_configuration.values() for error in each]
    return {
        "points": len(every),
        "configurations": len(by_configuration),
        "median": median(every),
        "by_configuration": median(map(median, by_configuration.values())),
        "worst": max(every),
        "within_a_quarter": sum(error <= 0.25 for error in every),
    }


def speed_table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return a row per point: published and predicted tokens/s and GPU, their ratio, the largest causes."""
    lines = [
        "| point | | published | predicted | ratio | spent on |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        largest = sorted(row["causes"].items(), key=lambda each: -each[1])[:3]
        spent = ", ".join(f"{Cause[name].value} {share:.0%}" for name, share in largest)
        kind = "held back" if row["held_back"] else "set"
        numbers = f"{row['published']:,.0f} | {row['predicted']:,.0f} | {row['ratio']:.2f}"
        lines.append(f"| {row['name']} | {kind} | {numbers} | {spent} |")
    return lines


def error_table(found: dict[str, dict[str, float]]) -> list[str]:
    """Return a row per kind of points with median and worst error."""
    return [
        "| points | number | median error | by configuration | worst error | within 25 % |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {each['points']} ({each['configurations']} configurations) | {each['median']:.0%} | "
            f"{each['by_configuration']:.0%} | {each['worst']:.0%} | {each['within_a_quarter']} |"
            for name, each in found.items()
        ),
    ]


def memory_table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return a row per configuration whose publication tells its memory."""
    lines = ["| point | published GiB | planned GiB | ratio |", "|---|---|---|---|"]
    seen: set[int] = set()
    for row in rows:
        if row["published_memory_gib"] and row["configuration"] not in seen:
            seen.add(row["configuration"])
            told, planned = row["published_memory_gib"], row["planned_memory_gib"]
            name = row["name"].rpartition(", ")[0] if "microbatches" in row["name"] else row["name"]
            lines.append(f"| {name} | {told:.2f} | {planned:.2f} | {planned / told:.2f} |")
    return lines


if __name__ == "__main__":
    main()
