"""Conversion against the disk and against the plain loop, on synthetic checkpoints in V3's fp8 format.

    python -m benchmarks.convert                     1.2 GB and 6 GB, in a temporary directory of this disk
    python -m benchmarks.convert --gigabytes 1.2 --directory DIR

Every run begins with the input out of the page cache and ends with the output on the disk. In one run are
measured: reading the input cold, writing the output's size, the plain single-thread loop (the arithmetic
of DeepSeek's fp8_cast_bf16: load a file, multiply each block by its scale, save), and convert.py in both
directions. Memory is the largest sum of anonymous and shared pages over the whole process tree.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.pages import fill
from dsv3.checkpoint.load import parameter_shapes
from dsv3.config.model import ModelConfig
from dsv3.config.strict import strict
from dsv3.convert.output_file import DirectWriter, row_slices
from dsv3.hf.config_writer import config_json
from dsv3.hf.names import SCALE_SUFFIX, hf_layout, is_fp8_weight, mtp_duplicates
from dsv3.hf.safetensors_writer import Entry, SafetensorsWriter, index_json, plan_files
from tests.fp8.plain import dequantize_reference
from tests.harness.composing import compose

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).resolve().parent / "results" / "convert.json"
# One stack of gate and up projections is 2.1 GB in bf16: more than the memory that a conversion may take.
SHAPE = [
    "model.vocab_size=16384",
    "model.dim=2048",
    "model.num_dense_layers=1",
    "model.dense_hidden_dim=4096",
    "model.attention.heads=16",
    "model.attention.q_lora_rank=768",
    "model.attention.kv_lora_rank=512",
    "model.attention.qk_nope_head_dim=128",
    "model.attention.qk_rope_head_dim=64",
    "model.attention.v_head_dim=128",
    "model.moe.hidden_dim=1024",
    "model.mtp_depths=0",
]
EXPERTS = 256


def model_of(gigabytes: float) -> ModelConfig:
    """A V3 of about so many GB in fp8; the small one has fewer experts instead of less than a layer."""
    expert = 3 * 2048 * 1024 / 1e9
    experts = min(EXPERTS, int(gigabytes / expert / 2) // 8 * 8)
    layers = max(1, round(gigabytes / (experts * expert)))
    chosen = [f"model.num_layers={1 + layers}", f"model.moe.num_experts={experts}"]
    model: ModelConfig = strict(compose([*SHAPE, *chosen])).model
    return model


def generate(directory: Path, model: ModelConfig) -> None:
    """Write the checkpoint with random codes and scales, in files of 1 GB, piece by piece."""
    directory.mkdir(parents=True)
    config = config_json(model, "bfloat16")
    style = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config["quantization_config"] = style | {"weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(config))
    entries: list[Entry] = []
    for tensor in hf_layout(model, parameter_shapes(model)):
        if not is_fp8_weight(tensor.name):
            kind = torch.float32 if tensor.name.endswith("bias") else torch.bfloat16
            entries.append((tensor.name, kind, tensor.shape))
            continue
        grid = tuple(-(-length // 128) for length in tensor.shape)
        entries += [
            (tensor.name, torch.float8_e4m3fn, tensor.shape),
            (tensor.name + SCALE_SUFFIX, torch.float32, grid),
        ]
    assert not mtp_duplicates(model)
    plans = plan_files(entries, 10**9)
    random = torch.randint(0, 0x7E, (16 * 2**20,), dtype=torch.uint8)
    random |= torch.randint(0, 2, random.shape, dtype=torch.uint8) << 7
    for plan in plans:
        with (directory / plan.name).open("wb") as file, SafetensorsWriter(plan, file) as writer:
            for stored in plan.tensors:
                for _, count in row_slices(stored.shape, stored.dtype.itemsize):
                    shape = (count, *stored.shape[1:])
                    writer.write(stored.name, _rows(random, stored.dtype, shape))
            os.fsync(file.fileno())
    (directory / "model.safetensors.index.json").write_text(index_json(plans))


def _rows(random: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    if dtype is torch.float8_e4m3fn:
        return random[:count].view(dtype).view(shape)
    return (torch.rand(shape) * 1e-3 + 1e-4).to(dtype)


def plain_loop(source: Path, target: Path) -> None:
    """What the released script does, on one thread of the CPU."""
    torch.set_num_threads(1)
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        tensors = load_file(file)
        out = {}
        for name, value in tensors.items():
            if name.endswith(SCALE_SUFFIX):
                continue
            scales = tensors.get(name + SCALE_SUFFIX)
            out[name] = value if scales is None else dequantize_reference(value, scales, dtype=torch.bfloat16)
        save_file(out, target / file.name)
        with (target / file.name).open("rb") as written:
            os.fsync(written.fileno())


def read_cold(directory: Path) -> float:
    """Seconds to read all files, out of the page cache."""
    forget(directory)
    buffer = bytearray(16 * 2**20)
    started = time.monotonic()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return time.monotonic() - started


def write_synced(path: Path, size: int) -> float:
    """Seconds to write a file of `size` bytes and wait for the disk."""
    block = os.urandom(16 * 2**20)
    started = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    path.unlink()
    return seconds


def write_past_cache(path: Path, size: int) -> float:
    """The same in the way that a conversion writes, past the page cache."""
    block = memoryview(os.urandom(16 * 2**20))
    started = time.monotonic()
    file = DirectWriter(path)
    for _ in range(-(-size // len(block))):
        file.write(block)
    file.sync()
    file.close()
    seconds = time.monotonic() - started
    path.unlink()
    return seconds


def forget(directory: Path) -> None:
    """Take the files of a directory out of the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Memory(threading.Thread):
    """Samples a process tree until it is told to stop; `peak` in bytes of anonymous and shared pages."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.ended = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.03):
            self.peak = max(self.peak, sum(map(_pages, _tree(self.pid))))


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(found for child in children for found in _tree(int(child)))]


def _pages(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(found) * 1024 for found in re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", text, re.M))


def run_convert(*arguments: str) -> dict[str, float]:
    """Seconds with and without start-up, those of the processors, and the peak memory, of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "convert.py"), *arguments], stdout=subprocess.PIPE, text=True
    )
    memory = Memory(process.pid)
    memory.start()
    told, _ = process.communicate()
    seconds = time.monotonic() - started
    memory.ended.set()
    memory.join()
    found = re.search(r"GB in ([\d.]+) s", told)
    if process.returncode or not found:
        raise SystemExit(f"convert.py ended with {process.returncode}: {told}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = memory.peak / 2**30
    return {"seconds": seconds, "conversion": float(found[1]), "cpu_seconds": cpu, "peak_gib": peak}


def timed(work: Callable[[], Any]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def measure(gigabytes: float, directory: Path, repeats: int) -> dict[str, Any]:
    """All figures of one size, medians over the repeats."""
    source, dcp, hf, plain = (directory / name for name in ("hf-fp8", "dcp", "hf-bf16", "plain"))
    generate(source, model_of(gigabytes))
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    for _ in range(repeats):
        note("read_input_cold", read_cold(source))
        forget(source)
        result = run_convert("direction=hf_to_dcp", f"input={source}", f"output={dcp}")
        for name, value in result.items():
            note(f"hf_to_dcp_{name}", value)
        size = sum(path.stat().st_size for path in dcp.rglob("*") if path.is_file())
        note("write_output", write_synced(directory / "written", size))
        note("write_output_past_cache", write_past_cache(directory / "written", size))
        note("read_dcp_cold", read_cold(dcp))
        forget(dcp)
        result = run_convert("direction=dcp_to_hf", f"input={dcp}", f"output={hf}", "dtype=bf16")
        for name, value in result.items():
            note(f"dcp_to_hf_{name}", value)
        for path in (dcp, hf):
            shutil.rmtree(path)
        forget(source)
        # A process of its own, with PyTorch's start-up counted, as convert.py has it.
        command = [sys.executable, "-m", "benchmarks.convert", "--plain", str(source), str(plain)]
        note("plain_loop", timed(lambda: subprocess.run(command, check=True, cwd=ROOT)))  # noqa: B023
        shutil.rmtree(plain)
    shutil.rmtree(source)
    return {name: round(median(values), 3) for name, values in figures.items()}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as lines of Markdown; the limit is the longer of reading cold and writing."""
    lines = [
        "| fp8 input | direction | disk: read cold / write / write past the cache (s) | convert.py (s) | "
        "of the longer | with start-up (s) | CPU (s) | plain loop (s) | faster than it | peak memory (GiB) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size, found in results.items():
        for direction, read in (("hf_to_dcp", "read_input_cold"), ("dcp_to_hf", "read_dcp_cold")):
            seconds, whole = found[f"{direction}_conversion"], found[f"{direction}_seconds"]
            longer = max(found[read], found["write_output"])
            plain = found["plain_loop"] if direction == "hf_to_dcp" else None
            cells = [
                f"{size} GB",
                direction,
                f"{found[read]:.1f} / {found['write_output']:.1f} / {found['write_output_past_cache']:.1f}",
                f"{seconds:.1f}",
                f"{seconds / longer:.2f}x",
                f"{whole:.1f}",
                f"{found[f'{direction}_cpu_seconds']:.1f}",
                f"{plain:.1f}" if plain else "",
                f"{plain / seconds:.2f}x ({plain / whole:.2f}x with start-up)" if plain else "",
                f"{found[f'{direction}_peak_gib']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, store the figures, write the table into docs/checkpoints.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[1.2, 6.5])
    parser.add_argument("--directory", type=Path, default=None, help="where, on which disk, it writes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", type=Path, nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.plain:
        plain_loop(*chosen.plain)
        return
    results = {}
    for gigabytes in chosen.gigabytes:
        with tempfile.TemporaryDirectory(dir=chosen.directory) as folder:
            results[str(gigabytes)] = measure(gigabytes, Path(folder), chosen.repeats)
        print(table(results), flush=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    fill("checkpoints.md", "conversion figures", [table(results)])


if __name__ == "__main__":
    main()
