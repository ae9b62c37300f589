"""Every axis, pair, triple and schedule against one process: how far figures, gradients and weights differ.

Each layout trains a tiny model with every mechanism on (documents in rows, MTP, balance and z-loss, bias
updates that start from biases that are not zero, two microbatches and more) for two steps of SGD and is
compared with one process: losses and all other figures, every gradient of every step, every parameter, the
held-out loss. `full` runs on 16 ranks, and on 32 with two replicas.

    python -m benchmarks.parity_matrix
    python -m benchmarks.parity_matrix --only full
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import fill, largest
from dsv3.planning.layout import ParallelDims
from tests.harness.pool import Pool, WorkerError
from tests.parallel.parity_layouts import PAIRS, SCHEDULES, SINGLES, TRIPLES
from tests.parallel.tiny_training import GLOBAL_BATCH, Trace, configured, train
from tests.parallel.trace_comparison import relative_error, train_on

ROOT = Path(__file__).resolve().parents[1]
JSON = ROOT / "benchmarks" / "results" / "parity_matrix.json"
STEPS = 2
FULL = ParallelDims(pp=2, dp_shard=2, cp=2, tp=2, ep=4)
FULL_32 = ParallelDims(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2, ep=4)
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


def group(name: str) -> str:
    """Return the line of docs/parity.md that a row of the matrix belongs to."""
    if name.startswith("full on"):
        return "all axes at once"
    if ", recompute=" in name:
        return "activation checkpointing, full and selective"
    if ", compile=on" in name:
        return "torch.compile"
    if name.rpartition(", ")[2] in SCHEDULES:
        return "pp x dp_shard under every schedule"
    return "one axis" if name in SINGLES else "two axes" if name in PAIRS else "three axes and more"


def cases() -> Iterator[tuple[str, ParallelDims, list[str]]]:
    """Name, layout and overrides of every row of the matrix."""
    for name, degrees in {**SINGLES, **PAIRS, **TRIPLES}.items():
        yield name, degrees, []
    for schedule in SCHEDULES:
        yield f"pp x dp_shard, {schedule}", ParallelDims(pp=2, dp_shard=2), [f"parallel.schedule={schedule}"]
    for mode in ("full", "selective"):
        yield (
            f"dp_shard x cp x tp, ep 4, recompute={mode}",
            TRIPLES["dp_shard x cp x tp, ep 4"],
            [f"recompute={mode}"],
        )
    for name in ("dp_shard", "tp x cp", "pp x ep"):
        yield f"{name}, compile=on", {**SINGLES, **PAIRS}[name], ["compile=on"]
    yield "full on 16 ranks", FULL, []
    yield "full on 32 ranks, dp_replicate 2", FULL_32, []


def compare(pool: Pool, single: Trace, degrees: ParallelDims, overrides: list[str]) -> dict[str, Any]:
    """The largest relative differences of one layout."""
    microbatch = 1 if degrees.pp > 1 else GLOBAL_BATCH // degrees.data_parallel // 2
    config = configured(["parallel=fsdp", *overrides], microbatch)
    started = time.perf_counter()
    traces = train_on(pool, config, degrees, STEPS, microbatch)
    figures = [
        abs(mine[name] - theirs[name]) / max(abs(theirs[name]), 1e-12)
        for trace in traces
        for mine, theirs in zip(trace.metrics, single.metrics, strict=True)
        for name in theirs
    ]
    gradients = [
        relative_error(tensor, whole[name])
        for trace in traces
        for mine, whole in zip(trace.gradients, single.gradients, strict=True)
        for name, tensor in mine.items()
    ]
    weights = [relative_error(t, single.state[name]) for trace in traces for name, t in trace.state.items()]
    evaluation = [abs(trace.evaluation - single.evaluation) / single.evaluation for trace in traces]
    return {
        "ranks": degrees.world_size,
        "figures": max(figures),
        "gradients": max(gradients),
        "weights": max(weights),
        "evaluation": max(evaluation),
        "tensors": len(set().union(*(trace.gradients[0] for trace in traces))),
        "seconds": time.perf_counter() - started,
    }


def run(only: str) -> None:
    """Every case whose name holds `only`, on pools of the size it needs; each is written at once."""
    single = train([], None, STEPS, 2)
    assert single is not None
    results: dict[str, dict[str, Any]] = {}
    pool, size = None, 0
    for name, degrees, overrides in cases():
        if only not in name:
            continue
        wanted = max(8, degrees.world_size)
        if pool is None or wanted != size:
            if pool is not None:
                pool.close()
            pool, size = Pool(wanted), wanted
        try:
            results[name] = compare(pool, single, degrees, overrides)
        except WorkerError as error:
            results[name] = {"ranks": degrees.world_size, "error": str(error).splitlines()[-1][:200]}
        print(row(name, results[name]), flush=True)
        write({name: results[name]})
    if pool is not None:
        pool.close()


def row(name: str, found: dict[str, Any]) -> str:
    """Return one row of the printed table."""
    if "error" in found:
        return f"| {name} | {found['ranks']} | failed: {found['error']} | | | |"
    parts = (f"{found[key]:.1e}" for key in ("figures", "gradients", "weights", "evaluation"))
    return f"| {name} | {found['ranks']} | {' | '.join(parts)} |"


def write(results: dict[str, dict[str, Any]]) -> None:
    """Merge results into the JSON, and write the largest of each group into docs/parity.md."""
    known = json.loads(JSON.read_text())["rows"] if JSON.exists() else {}
    known |= results
    ordered = {name: known[name] for name, _, _ in cases() if name in known}
    JSON.write_text(
        json.dumps({"torch": torch.__version__, "steps": STEPS, "rows": ordered}, indent=1) + "\n"
    )
    head = "| layouts | number | ranks | figures | gradients | weights | held-out loss |"
    groups = {name: group(name) for name in ordered}
    lines = largest(ordered, groups, ("figures", "gradients", "weights", "evaluation"))
    fill("parity.md", "parity matrix", [head, "|---|---|---|---|---|---|---|", *lines])


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    run(parser.parse_args().only)


if __name__ == "__main__":
    main()
