"""What it takes to build one rank of a world that is not there: seconds and peak memory, layout by layout.

Each line is a process of its own, from the start of Python: it plans, builds the model on the meta
device over PyTorch's fake process group and wraps it with everything that the layout has, without
giving it memory. The shards of the rank are held to the plan's arithmetic, shape by shape.

    python -m benchmarks.scale
    python -m benchmarks.scale --only kimi_k2
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parent / "results" / "scale.json"
LAYOUTS = ["fsdp", "hsdp", "tp_ep", "pp", "cp", "full"]
SMALLEST = {"tp_ep": 256, "hsdp": 1024, "pp": 1024}
MIB = 2**20


def cases() -> list[list[str]]:
    """Model, layout, world, end of the world, and further overrides, as words of a command line."""
    worlds = [("671b", layout, world) for layout in LAYOUTS for world in (SMALLEST.get(layout, 512), 2048)]
    worlds += [("kimi_k2", layout, 4096) for layout in LAYOUTS]
    found = [[model, layout, str(world), end] for model, layout, world in worlds for end in _ends(layout)]
    return [*found, ["671b", "pp", "2048", "first", "parallel.schedule=DualPipeV"]]


def _ends(layout: str) -> list[str]:
    """Without a pipeline the ranks of both ends hold the same layers."""
    return ["first", "last"] if layout in ("pp", "full") else ["first"]


def measure(model: str, layout: str, world: int, end: str, overrides: list[str]) -> dict[str, Any]:
    """Build one rank in this process; times in seconds, sizes in bytes."""
    from tests.parallel.fake_world import build_shards, mesh_as, plan_world, planned_shapes, shapes

    job = plan_world(model, layout, world, *overrides)
    rank = world - 1 if end == "last" else 0
    begin = time.perf_counter()
    with mesh_as(rank, job.plan.degrees) as mesh:
        meshed = time.perf_counter()
        shards = build_shards(job, mesh)
    return {
        "degrees": job.plan.degrees.to_json(),
        "parameters": sum(shard.nbytes for shard in shards),
        "as_planned": shapes(shards) == planned_shapes(job, rank),
        "mesh_s": round(meshed - begin, 2),
        "build_s": round(time.perf_counter() - meshed, 2),
        "cpu_s": round(time.process_time(), 1),
        "peak": _peak(),
    }


def _peak() -> int:
    """The most memory that this process ever held; ru_maxrss would count its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def run(case: list[str]) -> dict[str, Any]:
    """Measure a case in a process of its own."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.scale", "--case", *case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(case)}\n{done.stderr[-3000:]}")
    model, layout, world, end, *overrides = case
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    named = {"model": model, "layout": " ".join([layout, *overrides]), "world": int(world), "rank": end}
    return named | told | {"total_s": round(time.perf_counter() - begin, 1)}


def row(result: dict[str, Any]) -> str:
    """Return one row of the printed table; docs/parallelism.md has one row per preset."""
    cells = [result[name] for name in ("model", "layout", "world")]
    cells.append(" ".join(f"{axis} {ranks}" for axis, ranks in result["degrees"].items() if ranks > 1))
    cells += [result["rank"], f"{result['parameters'] / MIB:,.0f}", "yes" if result["as_planned"] else "NO"]
    cells += [f"{result['cpu_s']:.1f}", f"{result['total_s']:.1f}", f"{result['peak'] / MIB:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Measure every case, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases that hold this text")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        model, layout, world, end, *overrides = options.case
        print(json.dumps(measure(model, layout, int(world), end, overrides)))
        return 0
    print("| model | layout | world | degrees | rank | MiB of parameters | planned | CPU s | s | peak MiB |")
    print("|" + "---|" * 10)
    results = []
    for case in (case for case in cases() if options.only in " ".join(case)):
        results.append(run(case))
        print(row(results[-1]), flush=True)
    if not options.only:
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(result["as_planned"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
