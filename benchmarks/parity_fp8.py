"""Layouts in FP8 against one process in FP8, and both against fp32: loss and gradients of the first step.

The model and the rows are those of the parity matrix, but that tokens take turns at the experts and weights
are smaller, so that no rounding sends a token elsewhere. Everything beside the FP8 products is fp32.

    python -m benchmarks.parity_fp8
    python -m benchmarks.parity_fp8 --only pp
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.pages import fill, largest
from dsv3.planning.layout import ParallelDims
from tests.harness.pool import Pool
from tests.parallel.parity_layouts import PAIRS, SCHEDULES, SINGLES, TRIPLES
from tests.parallel.test_fp8 import FP8, FP32, GATHERED, WIDE, errors, one_process
from tests.parallel.tiny_training import GLOBAL_BATCH, configured
from tests.parallel.trace_comparison import train_on

ROOT = Path(__file__).resolve().parents[1]
JSON = ROOT / "benchmarks" / "results" / "parity_fp8.json"
LAYOUTS = {**SINGLES, **PAIRS, **TRIPLES}
DISPATCH = "precision.fp8.dispatch=true"


def group(name: str) -> str:
    """Return the line of docs/parity.md that a layout belongs to."""
    if "travel" in name:
        return "ep, rows dispatched in FP8"
    if "gathered" in name:
        return "weights gathered in FP8"
    if ", recompute=" in name or ", compile=on" in name:
        return "activation checkpointing; torch.compile"
    if name.rpartition(", ")[2] in SCHEDULES:
        return "pp x dp_shard under every schedule"
    axes = set(name.partition(",")[0].split(" x "))
    if axes & {"tp", "cp"}:
        return "other tiles: tp, cp and with them"
    return "ep, and with pp" if "ep" in axes else "the same tiles: dp_shard, dp_replicate, pp"


def cases() -> Iterator[tuple[str, ParallelDims, list[str]]]:
    """Name, layout and overrides of every row."""
    for name in ("dp_shard", "dp_replicate", "pp", "tp", "cp", "ep", "dp_shard x pp", "tp x cp", "pp x ep"):
        yield name, LAYOUTS[name], []
    yield "dp_shard x cp x tp, ep 4", TRIPLES["dp_shard x cp x tp, ep 4"], []
    for schedule in SCHEDULES:
        yield f"pp x dp_shard, {schedule}", ParallelDims(pp=2, dp_shard=2), [f"parallel.schedule={schedule}"]
    yield "dp_shard, recompute=full", LAYOUTS["dp_shard"], ["recompute=full"]
    yield "dp_shard, recompute=selective", LAYOUTS["dp_shard"], ["recompute=selective"]
    yield "dp_shard, compile=on", LAYOUTS["dp_shard"], ["compile=on"]
    split = ["parallel.schedule=ZBVZeroBubble", "compile=on"]
    yield "pp x dp_shard, ZBVZeroBubble, compile=on", ParallelDims(pp=2, dp_shard=2), split
    yield "ep, rows travel in FP8", LAYOUTS["ep"], [DISPATCH]
    yield "ep over two nodes, rows travel in FP8", ParallelDims(dp_shard=4, ep=4), [
        DISPATCH,
        "parallel.expert.ranks_per_node=2",
    ]  # fmt: skip
    yield "dp_shard, weights gathered in FP8", LAYOUTS["dp_shard"], [*WIDE, GATHERED]
    yield "pp x dp_shard, ZBVZeroBubble, weights gathered in FP8", ParallelDims(pp=2, dp_shard=2), [
        *WIDE,
        GATHERED,
        split[0],
    ]  # fmt: skip


def compare(pool: Pool, degrees: ParallelDims, overrides: list[str]) -> dict[str, Any]:
    """Distances of one layout; the reference has the same model and precision, and no layout."""
    own = [override for override in overrides if override in WIDE]
    single, exact = one_process([*FP8, *own]), one_process([*FP32, *own])
    microbatch = 1 if degrees.pp > 1 else GLOBAL_BATCH // degrees.data_parallel // 2
    if microbatch != 2:
        single = one_process([*FP8, *own], microbatch)
    config = configured(["parallel=fsdp", *FP8, *overrides], microbatch)
    traces = train_on(pool, config, degrees, 1, microbatch)
    between = [e for trace in traces for e in errors(trace, single).values()]
    loss = single.metrics[0]["loss"]
    return {
        "ranks": degrees.world_size,
        "loss": max(abs(trace.metrics[0]["loss"] - loss) / loss for trace in traces),
        "largest": max(between),
        "median": median(between),
        "from_fp32": median(e for trace in traces for e in errors(trace, exact).values()),
        "one_from_fp32": median(errors(single, exact).values()),
    }


def row(name: str, found: dict[str, Any]) -> str:
    """Return one row of the printed table."""
    parts = (f"{found[key]:.1e}" for key in ("loss", "median", "largest", "from_fp32", "one_from_fp32"))
    return f"| {name} | {found['ranks']} | {' | '.join(parts)} |"


def write(results: dict[str, dict[str, Any]]) -> None:
    """Merge results into the JSON, and write the largest of each group into docs/parity.md."""
    known = (json.loads(JSON.read_text())["rows"] if JSON.exists() else {}) | results
    ordered = {name: known[name] for name, _, _ in cases() if name in known}
    JSON.write_text(json.dumps({"torch": torch.__version__, "rows": ordered}, indent=1) + "\n")
    head = (
        "| layouts | number | ranks | loss | gradients, median | gradients, largest "
        "| from fp32, median | one process from fp32, median |"
    )
    groups = {name: group(name) for name in ordered}
    lines = largest(ordered, groups, ("loss", "median", "largest", "from_fp32", "one_from_fp32"))
    fill("parity.md", "fp8", [head, "|---|---|---|---|---|---|---|---|", *lines])


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    only, pool = parser.parse_args().only, Pool(8)
    for name, degrees, overrides in cases():
        if only in name:
            found = compare(pool, degrees, overrides)
            print(row(name, found), flush=True)
            write({name: found})
    pool.close()


if __name__ == "__main__":
    main()
