"""What each rank sends in a training step, counted at its calls on gloo, against the plan's closed forms.

A tiny model (tests/parallel/tiny_training.py, with every mechanism on) takes a step in each layout. The
bytes of every call are added up by axis as docs/parallelism.md counts them: collectives as rings,
exchanges and what goes from stage to stage as it leaves the rank. Every rank is compared with its plan.

    python -m benchmarks.traffic
    python -m benchmarks.traffic --only pp
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.harness.pool import Pool
from tests.parallel.traffic_counter import OTHER, StepTraffic, count_step, planned_job

RESULT = Path(__file__).resolve().parent / "results" / "traffic.json"
RANKS = 4
ROUTED = "ep, as routed"
CASES = [
    "2 fsdp",
    "4 fsdp",
    "4 fsdp parallel.reshard_after_forward=false",
    "4 fsdp precision=bf16",
    "2 hsdp parallel.degrees.dp_shard=1",
    "4 hsdp parallel.degrees.dp_shard=2",
    "2 fsdp parallel.degrees.tp=2",
    "4 fsdp parallel.degrees.tp=4",
    "2 fsdp parallel.degrees.tp=2 recompute=full",
    "2 fsdp parallel.degrees.cp=2",
    "4 fsdp parallel.degrees.cp=4",
    "2 fsdp parallel.degrees.cp=2 recompute=full",
    "2 fsdp parallel.degrees.ep=2",
    "4 fsdp parallel.degrees.ep=4",
    "2 pp parallel.degrees.pp=2",
    "4 pp parallel.degrees.pp=4",
    "4 pp parallel.degrees.pp=2 parallel.degrees.dp_shard=2",
]


def measure(pool: Pool, case: str) -> list[dict[str, Any]]:
    """By axis the bytes of the rank that sends most, its plan, and the largest difference of any rank."""
    world, layout, *overrides = case.split()
    chosen = [f"parallel={layout}", "train.microbatch_size=1", *overrides]
    steps = [step for step in pool.run(count_step, planned_job(chosen, int(world))) if step is not None]
    found = []
    for axis in [*steps[0].planned, OTHER]:
        sent = [step.sent.get(axis, 0) for step in steps]
        planned = [step.planned.get(axis, 0) for step in steps]
        if axis != "total" and any(sent + planned):
            found.append(_compare(case, axis, steps[0], sent, planned))
            if axis == "ep":
                found.append(_compare(case, ROUTED, steps[0], sent, routed(steps)))
    return found


def routed(steps: list[StepTraffic]) -> list[int]:
    """What the ranks of one ep group send for the rows their routers chose, and for those they receive."""
    found = []
    for rank, step in enumerate(steps):
        leaving = sum(step.rows) - step.rows[rank]
        arriving = sum(other.rows[rank] for other in steps) - step.rows[rank]
        found.append((leaving + arriving) * step.row_bytes)
    return found


def _compare(case: str, axis: str, step: StepTraffic, sent: list[int], planned: list[int]) -> dict[str, Any]:
    most = sent.index(max(sent))
    apart = [abs(a - b) / max(b, 1) for a, b in zip(sent, planned, strict=True)]
    return {
        "case": case,
        "degrees": step.degrees.to_json(),
        "axis": axis,
        "sent": sent[most],
        "mean": sum(sent) / len(sent),
        "planned": planned[most],
        "apart": None if axis == OTHER else max(apart),
    }


def row(line: dict[str, Any]) -> str:
    """Return one row of the printed table; docs/parallelism.md has one layout per axis."""
    world, _, *overrides = line["case"].split()
    words = [f"{axis} {ranks}" for axis, ranks in line["degrees"].items() if ranks > 1]
    layout = " ".join(words + [word for word in overrides if ".degrees." not in word])
    apart = "left out" if line["apart"] is None else f"{line['apart']:.1%}" if line["apart"] else "0"
    figures = f"{line['sent']:,} | {line['mean']:,.0f} | {line['planned']:,} | {apart}"
    return f"| {layout} | {world} | {line['axis']} | {figures} |"


def main() -> int:
    """Count every case, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases that hold this text")
    options = parser.parse_args()
    pool = Pool(RANKS)
    print("| layout | ranks | axis | sent, most | mean of ranks | planned | apart, most |")
    print("|" + "---|" * 7)
    lines: list[dict[str, Any]] = []
    for case in (case for case in CASES if options.only in case):
        lines += (found := measure(pool, case))
        print("\n".join(map(row, found)), flush=True)
    pool.close()
    if not options.only:
        RESULT.write_text(json.dumps(lines, indent=1) + "\n")
    # Routing is by chance; everything else is exact.
    return 0 if all(not line["apart"] for line in lines if line["axis"] != "ep") else 1


if __name__ == "__main__":
    sys.exit(main())
