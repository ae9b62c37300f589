"""What it takes to start one rank of a world that is not there: seconds and peak host memory, phase by phase.

Each case is a process of its own, from the start of Python. It goes the way of a task with nothing replaced
but the network, which is PyTorch's fake process group (tests/parallel/fake_world.py): compose, plan, mesh,
build, wrap and draw the initial weights of its shards; then build anew and load a release in FP8. The release
has the names, shapes and number of files of the real one, and holes for weights
(tests/convert/sparse_release.py). One more case takes an optimizer step, which computes on the CPU.

    python -m benchmarks.scale
    python -m benchmarks.scale --only kimi_k2
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import fill

RESULT = Path(__file__).resolve().parent / "results" / "scale.json"
WORLDS = {"671b": 2048, "kimi_k2": 4096}
LAYOUTS = ["fsdp", "hsdp", "tp_ep", "pp", "cp", "full"]
ENDS = {"pp": ["first", "last"], "full": ["first", "last"]}
"""Without a pipeline the ranks of both ends hold the same layers."""
STEPS = ["train.sequence_length=64", "precision=bf16"]
"""Of the first rank under tp_ep: all 61 layers and the MTP layer, 64 tokens."""
MIB = 2**20


def cases() -> list[list[str]]:
    """Return model, layout, rank and further overrides of each case, as words of a command line."""
    found = [[m, layout, end] for m in WORLDS for layout in LAYOUTS for end in ENDS.get(layout, ["first"])]
    found.append(["671b", "pp", "first", "parallel.schedule=DualPipeV"])
    return [*found, ["671b", "tp_ep", "first", *STEPS]]


class Phases:
    """CPU seconds, wall seconds and peak memory in bytes of what was done between two calls of `done`."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.cpu = 0.0
        self.wall = time.perf_counter() - _age()

    def done(self, name: str) -> None:
        """End a phase, and begin the next."""
        cpu, wall = time.process_time(), time.perf_counter()
        figures = {"cpu_s": round(cpu - self.cpu, 2), "s": round(wall - self.wall, 2)}
        self.found[name] = figures | {"peak": _status("VmHWM"), "left": _status("VmRSS")}
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
        self.cpu, self.wall = time.process_time(), time.perf_counter()


def _status(key: str) -> int:
    """Return a size of this process in bytes; ru_maxrss would count its parent's."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def _age() -> float:
    """Return the seconds since this process started."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def measure(model: str, world: int, rank: int, command: Sequence[str], load: str | None) -> dict[str, Any]:
    """Go the whole way in this process; sizes in bytes."""
    import torch

    from tests.parallel.fake_world import fake_rank, local_shards, start, take_step

    torch.set_num_threads(1)
    phases = Phases()
    phases.done("start Python and import")
    overrides = [f"model={model}", *command]
    with fake_rank(rank, world) as ranks:
        built = start(overrides, ranks, phases.done)
        degrees = built.mesh.degrees.to_json() if built.mesh else {}
        held = sum(shard.nbytes for shard in local_shards(built))
        if load is None:
            take_step(overrides, ranks, built)
            phases.done("one step")
        else:
            del built
            gc.collect()
            phases.done("free")
            start([*overrides, f"checkpoint.load=hf:{load}"], ranks, phases.done)
    return {"degrees": degrees, "parameters": held, "phases": phases.found}


def run(case: list[str], releases: Path) -> dict[str, Any]:
    """Measure a case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--case", *case, "--releases", str(releases)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DSV3_PROGRESS": "off"}
    if case[3:] == STEPS:  # else malloc keeps freed tensors in gaps that it does not fill again
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(case)}\n{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    model, layout, end, *overrides = case
    named = {"model": model, "layout": " ".join([layout, *overrides]), "world": WORLDS[model], "rank": end}
    return named | told


def measure_case(case: list[str], releases: Path) -> dict[str, Any]:
    """Measure a case in this process."""
    model, layout, end, *overrides = case
    world = WORLDS[model]
    load = None if overrides == STEPS else str(releases / model)
    rank = world - 1 if end == "last" else 0
    return measure(model, world, rank, [f"parallel={layout}", *overrides], load)


PHASES = ["compose and plan", "mesh", "build and draw", "build and load"]


def row(result: dict[str, Any]) -> str:
    """Return one row of the printed table: CPU seconds and the peak above the shards by phase, in MiB."""
    phases, held = result["phases"], result["parameters"]
    degrees = " ".join(f"{axis} {ranks}" for axis, ranks in result["degrees"].items() if ranks > 1)
    cells = [f"`{result['layout']}`, {result['rank']}", degrees, f"{held / MIB:,.0f}"]
    begun = sum(phases[name]["cpu_s"] for name in ["start Python and import", *PHASES[:2]])
    cells.append(f"{begun:.1f}")
    for name in PHASES[2:]:
        figures = phases.get(name)
        above = figures and (figures["peak"] - held) / MIB
        cells += [f"{figures['cpu_s']:.1f}", f"{above:,.0f}"] if figures else ["", ""]
    return f"| {' | '.join(cells)} |"


HEAD = [
    "| layout, rank | degrees | shards, MiB | start, plan, mesh, s | build and draw, s | above shards, MiB "
    "| build and load, s | above shards, MiB |",
    f"|{'---|' * 8}",
]


def main() -> None:
    """Measure every case, print the table, write JSON and docs/scale.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases that hold this text")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--releases", type=Path, help="folder to keep the empty releases in (900 MB)")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure_case(options.case, options.releases)))
        return
    with tempfile.TemporaryDirectory() as folder:
        releases = options.releases or Path(folder)
        results = []
        print("\n".join(HEAD))
        for case in (case for case in cases() if options.only in " ".join(case)):
            _write_release(releases / case[0], case[0])
            results.append(run(case, releases))
            print(row(results[-1]), flush=True)
    if not options.only:
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
        for model in WORLDS:
            fill("scale.md", model, [*HEAD, *(row(each) for each in results if each["model"] == model)])


def _write_release(directory: Path, model: str) -> None:
    """Write the release of a preset, unless it is there."""
    from dsv3.library import compose
    from tests.convert.sparse_release import write_sparse_release

    if not (directory / "model.safetensors.index.json").is_file():
        write_sparse_release(directory, compose([f"model={model}"]).model)


if __name__ == "__main__":
    main()
