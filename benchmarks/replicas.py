"""Replicas: that they stay equal on every layout, that every flipped bit is found, and what comparing costs.

Equal: the tiny model trains 20 steps on every layout of the parity matrix, and on layouts with replicas under
every optimizer with state of its own kind; all replicas are compared after each step. Flips: one bit of a
tensor of each kind on one rank, one after another. Cost: seconds per byte of the checksum and per tensor, on
one core, and the bytes that a rank of 671b compares.

    python -m benchmarks.replicas
    python -m benchmarks.replicas --only flips
    python -m benchmarks.replicas --only equal --layouts muon
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import fill
from dsv3.checkpoint.bit_sums import checksum, words_of
from dsv3.checkpoint.replicas import GROUPS_PER_PART, ReplicaGroup
from dsv3.planning.layout import ParallelDims
from tests.harness.pool import Pool, WorkerError
from tests.parallel.parity_layouts import PAIRS, SCHEDULES, SINGLES, TRIPLES
from tests.parallel.tiny_training import GLOBAL_BATCH, configured
from tests.parallel.worker_replicas import BIT, Flip, compare_while_training, flip_bits

JSON = Path(__file__).resolve().parent / "results" / "replicas.json"
STEPS = 20
HSDP = ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=2)
FULL = ParallelDims(pp=2, dp_shard=2, cp=2, tp=2, ep=4)
FLIPPED = {
    "fsdp": (ParallelDims(dp_shard=4), "1F1B"),
    "hsdp": (ParallelDims(dp_replicate=2, dp_shard=2), "1F1B"),
    "hsdp of 4 replicas": (ParallelDims(dp_replicate=4, dp_shard=2), "1F1B"),
    "tp_ep": (ParallelDims(dp_shard=2, tp=2, ep=4), "1F1B"),
    "hsdp, tp_ep": (HSDP, "1F1B"),
    "cp": (ParallelDims(dp_shard=2, cp=2), "1F1B"),
    "pp": (ParallelDims(pp=2, dp_shard=2), "1F1B"),
    "pp, DualPipeV": (ParallelDims(pp=2, dp_shard=2), "DualPipeV"),
    "full": (FULL, "1F1B"),
}
OPTIMIZERS = ("adamw", "muon", "adafactor", "sgd", "asgd", "rprop", "nadam")


def microbatch_of(degrees: ParallelDims) -> int:
    """Return the sequences per microbatch that give every rank two microbatches or more."""
    return 1 if degrees.pp > 1 else max(1, GLOBAL_BATCH // degrees.data_parallel // 2)


def layouts() -> Iterator[tuple[str, ParallelDims, list[str], str]]:
    """Name, layout, overrides and optimizer of every run that must stay equal."""
    for name, degrees in {**SINGLES, **PAIRS, **TRIPLES}.items():
        yield name, degrees, [], "adamw"
    for schedule in SCHEDULES:
        overrides = [f"parallel.schedule={schedule}"]
        yield f"dp_replicate x pp, {schedule}", PAIRS["dp_replicate x pp"], overrides, "adamw"
    yield "dp_replicate x dp_shard x tp, bf16 moments", HSDP, [], "bf16 moments"
    yield "dp_replicate x dp_shard x tp, bf16", HSDP, ["precision=bf16"], "adamw"
    for name in OPTIMIZERS:
        yield f"dp_replicate x dp_shard x tp, {name}", HSDP, [f"optimizer={name}"], "configured"
        yield f"pp x dp_shard, {name}", PAIRS["dp_shard x pp"], [f"optimizer={name}"], "configured"
    yield "full on 16 ranks", FULL, [], "adamw"


class Pools:
    """One pool at a time, of the size that a layout needs."""

    def __init__(self) -> None:
        self.pool: Pool | None = None

    def run(self, function: Callable[..., Any], config: Any, degrees: ParallelDims, *more: Any) -> list[Any]:
        """Call a worker's function on every rank of a layout."""
        size = max(8, degrees.world_size)
        if self.pool is None or self.pool.size != size:
            self.close()
            self.pool = Pool(size)
        found: list[Any] = self.pool.run(function, config, degrees, microbatch_of(degrees), *more)
        return found[: degrees.world_size]

    def close(self) -> None:
        """End the workers."""
        if self.pool is not None:
            self.pool.close()
        self.pool = None


def stay_equal(
    pools: Pools, chosen: str, known: dict[str, Any], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Return per layout what is compared on a rank, or what differed; `save` gets the results so far.

    Of the layouts whose name does not match `chosen` the results stay those that are `known`.
    """
    results = dict(known)
    for name, degrees, overrides, optimizer in layouts():
        if not re.search(chosen, name):
            continue
        config = configured(["parallel=fsdp", *overrides], microbatch_of(degrees))
        try:
            ranks = pools.run(compare_while_training, config, degrees, optimizer, STEPS)
            results[name] = {"ranks": degrees.world_size, "compared": max(map(len, ranks))}
        except WorkerError as error:
            results[name] = {"ranks": degrees.world_size, "differed": str(error).strip().splitlines()[-1]}
        print(name, results[name], flush=True)
        save(results)
    return results


def flips(pools: Pools) -> dict[str, Any]:
    """Return per layout how many changes to the last rank there were, and how many were found and named."""
    results: dict[str, Any] = {}
    for name, (degrees, schedule) in FLIPPED.items():
        config = configured(["parallel=fsdp", f"parallel.schedule={schedule}"], microbatch_of(degrees))
        victim = 0 if schedule == "DualPipeV" else degrees.world_size - 1
        told: list[Flip] = pools.run(flip_bits, config, degrees, "adamw", victim)[0]
        tensors = [flip for flip in told if flip.is_tensor]
        results[name] = {
            "ranks": degrees.world_size,
            "changed": len(told),
            "found": sum(bool(flip.told) for flip in told),
            "named": sum(f"rank {victim} (" in flip.told and flip.name in flip.told for flip in told),
            "tensors": len(tensors),
            "bits named": sum(f" bit {BIT}" in flip.told for flip in tensors),
            "longest message": max(len(flip.told) for flip in told),
        }
        print(name, results[name], flush=True)
    return results


def cost() -> dict[str, Any]:
    """Return what a comparison costs on one core, and what a rank of 671b compares."""
    torch.set_num_threads(1)
    large = torch.randn(2**26)
    seconds = _time(lambda: checksum(words_of(large)))
    scalars = {f"optimizer.state.layers.{n}.weight.step": torch.zeros(()) for n in range(1500)}
    of_scalars = _time(ReplicaGroup(scalars).checksum)
    return {
        "checksum_bytes_per_second": large.nbytes / seconds,
        "seconds_of_1500_step_counts": of_scalars,
        "exchanged_bytes_per_rank": 16 * (1 + GROUPS_PER_PART),
        "received_bytes_of_2048_ranks": 2048 * 16 * (1 + GROUPS_PER_PART),
    }


def _time(function: Callable[[], Any], repeats: int = 5) -> float:
    function()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return min(times)


def page(results: dict[str, Any]) -> list[str]:
    """Return the table of docs/reliability.md."""
    lines = [
        "| layout | ranks | changes | found | rank and tensor named | bit named |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.get("flips", {}).items():
        named = f"{row['bits named']} of {row['tensors']} tensors"
        lines.append(
            f"| {name} | {row['ranks']} | {row['changed']} | {row['found']} | {row['named']} | {named} |"
        )
    return lines


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", choices=["", "equal", "flips", "cost"])
    parser.add_argument("--layouts", default="", help="of `equal`, names that match (regular expression)")
    options, pools = parser.parse_args(), Pools()
    results = json.loads(JSON.read_text()) if JSON.exists() else {}
    results |= {"torch": torch.__version__, "steps": STEPS}

    def save(name: str, found: dict[str, Any]) -> None:
        results[name] = found
        JSON.write_text(json.dumps(results, indent=1) + "\n")

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "cost": cost,
        "flips": lambda: flips(pools),
        "equal": lambda: stay_equal(
            pools, options.layouts, results.get("equal", {}), lambda found: save("equal", found)
        ),
    }
    for name, measure in parts.items():
        if options.only in ("", name):
            save(name, measure())
    pools.close()
    fill("reliability.md", "flipped bits", page(results))


if __name__ == "__main__":
    main()
