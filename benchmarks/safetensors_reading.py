"""Our reading and writing of safetensors files against the safetensors library's, each in a process of
its own.

    python -m benchmarks.safetensors_reading [--directory DIR] [--repeats 5]

Headers are those of a file of DeepSeek-V3 (560 tensors, its data a hole); values are 1 GiB in 16 tensors of
fp8; scale grids are 8,000 small tensors. Files are out of the page cache before each run. Memory is the
growth of the largest resident set of the process.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv3.hf.pread_file import DirectReader, PreadFile
from dsv3.hf.safetensors_header import read_header
from dsv3.hf.safetensors_reader import SafetensorsReader
from dsv3.hf.safetensors_writer import SafetensorsWriter, plan_files

ROOT = Path(__file__).resolve().parent.parent
ROWS, COLUMNS, TENSORS, SLICE = 8192, 8192, 16, 2048
GRIDS = 8000
HEADERS = 20
"""How often the header is read."""


def make_files(directory: Path) -> None:
    """Write the three inputs."""
    code = torch.randint(0, 0x7E, (ROWS, COLUMNS), dtype=torch.uint8).view(torch.float8_e4m3fn)
    save_file({f"layer.{n}.weight": code.clone() for n in range(TENSORS)}, directory / "values.safetensors")
    grids = {f"model.layers.{n}.weight_scale_inv": torch.rand(16, 56) for n in range(GRIDS)}
    save_file(grids, directory / "grids.safetensors")
    (plan,) = plan_files(
        [(f"model.layers.{n}.mlp.experts.weight", torch.float8_e4m3fn, (2048, 7168)) for n in range(560)],
        2**62,
    )
    with (directory / "header.safetensors").open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.nbytes)


def header_ours(directory: Path) -> None:
    for _ in range(HEADERS):
        assert len(read_header(PreadFile(directory / "header.safetensors"))) == 560


def header_library(directory: Path) -> None:
    for _ in range(HEADERS):
        with safe_open(directory / "header.safetensors", "pt") as file:
            found = {name: file.get_slice(name) for name in file.offset_keys()}
            assert len([(each.get_shape(), each.get_dtype()) for each in found.values()]) == 560


def grids_ours(directory: Path) -> None:
    with SafetensorsReader() as reader:
        for entry in read_header(PreadFile(directory / "grids.safetensors")):
            reader.read_rows(entry, 0, entry.rows).float()


def grids_library(directory: Path) -> None:
    with safe_open(directory / "grids.safetensors", "pt") as file:
        for name in file.offset_keys():
            file.get_tensor(name).float().sum()


def rows_ours(directory: Path) -> None:
    out = torch.empty(SLICE, COLUMNS, dtype=torch.float8_e4m3fn)
    with SafetensorsReader(kind=DirectReader) as reader:
        for entry in read_header(PreadFile(directory / "values.safetensors")):
            for first in range(0, ROWS, SLICE):
                reader.read_rows(entry, first, SLICE, out)


def rows_library(directory: Path) -> None:
    out = torch.empty(SLICE, COLUMNS, dtype=torch.float8_e4m3fn)
    with safe_open(directory / "values.safetensors", "pt") as file:
        for name in file.offset_keys():
            stored = file.get_slice(name)
            for first in range(0, ROWS, SLICE):
                out.copy_(stored[first : first + SLICE])


def columns_ours(directory: Path) -> None:
    out = torch.empty(ROWS, COLUMNS // 8, dtype=torch.float8_e4m3fn)
    with SafetensorsReader() as reader:
        for entry in read_header(PreadFile(directory / "values.safetensors")):
            reader.read_rectangle(entry, (0, ROWS), (0, COLUMNS // 8), out)


def columns_library(directory: Path) -> None:
    out = torch.empty(ROWS, COLUMNS // 8, dtype=torch.float8_e4m3fn)
    with safe_open(directory / "values.safetensors", "pt") as file:
        for name in file.offset_keys():
            out.copy_(file.get_slice(name)[:, : COLUMNS // 8])


def write_ours(directory: Path) -> None:
    out = torch.zeros(SLICE, COLUMNS, dtype=torch.float8_e4m3fn)
    entries = [(f"layer.{n}.weight", out.dtype, (ROWS, COLUMNS)) for n in range(TENSORS)]
    (plan,) = plan_files(entries, 2**62)
    with (directory / "written").open("wb") as file:
        with SafetensorsWriter(plan, file) as writer:
            for name, _, _ in entries:
                for _ in range(0, ROWS, SLICE):
                    writer.write(name, out)
        os.fsync(file.fileno())


def write_library(directory: Path) -> None:
    tensors = {}
    for n in range(TENSORS):
        tensors[f"layer.{n}.weight"] = (
            torch.zeros(ROWS, COLUMNS, dtype=torch.uint8).add_(1).view(torch.float8_e4m3fn)
        )
    save_file(tensors, directory / "written")
    with (directory / "written").open("rb") as file:
        os.fsync(file.fileno())


WORK: dict[str, Callable[[Path], None]] = {
    f"{what} {who}": globals()[f"{what}_{who}"]
    for what in ("header", "grids", "rows", "columns", "write")
    for who in ("ours", "library")
}


def measure_one(name: str, directory: Path) -> None:
    """Do one work in this process; print seconds, processor seconds and the growth of memory in MiB."""
    torch.set_num_threads(1)
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    resident = _status("VmRSS")
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.monotonic()
    WORK[name](directory)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps([seconds, processor, (_status("VmHWM") - resident) / 1024]))


def _status(key: str) -> int:
    """Return a line of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def count_messages() -> str:
    """Say what the library does with the damaged files of our tests."""
    from tests.hf.test_safetensors_files import WRONG

    accepted, named = [], 0
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        for case, (content, words) in WRONG.items():
            path.write_bytes(content)
            try:
                with safe_open(path, "pt"):
                    accepted.append(case)
            except (SafetensorError, OSError) as error:
                named += "'a'" in words and (
                    '"a"' in str(error) or "`a`" in str(error) or "'a'" in str(error)
                )
    tensor = sum("'a'" in words for _, words in WRONG.values())
    return f"of {len(WRONG)} damaged files it accepts {accepted}; it names the tensor in {named} of {tensor}"


def read_cut_off(directory: Path) -> None:
    """Read a tensor of a file that was cut off after it was opened: a signal ends the process."""
    path = directory / "cut.safetensors"
    save_file({"a": torch.zeros(2**22)}, path)
    with safe_open(path, "pt") as file:
        os.truncate(path, 2**20)
        file.get_tensor("a").sum()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one == "cut":
        read_cut_off(asked.directory)
        return
    if asked.one:
        measure_one(asked.one, asked.directory)
        return
    with tempfile.TemporaryDirectory(dir=asked.directory) as name:
        directory = Path(name)
        make_files(directory)
        os.sync()
        command = [sys.executable, "-m", "benchmarks.safetensors_reading", "--directory", name, "--one"]
        found: dict[str, list[list[float]]] = {work: [] for work in WORK}
        for _ in range(asked.repeats):
            for work in WORK:
                done = subprocess.run([*command, work], capture_output=True, text=True, check=True, cwd=ROOT)
                found[work].append(json.loads(done.stdout))
        cut = subprocess.run([*command, "cut"], check=False, cwd=ROOT).returncode
    print("| | seconds (CPU) ours | library | peak memory ours | library |\n|---|---|---|---|---|")
    for what in ("header", "grids", "rows", "columns", "write"):
        ours, library = (
            [median(run[n] for run in found[f"{what} {who}"]) for n in range(3)]
            for who in ("ours", "library")
        )
        print(
            f"| {what} | {ours[0]:.2f} ({ours[1]:.2f}) | {library[0]:.2f} ({library[1]:.2f}) "
            f"| {ours[2]:.0f} MiB | {library[2]:.0f} MiB |"
        )
    print(count_messages())
    print(f"a file that is cut off while the library reads it ends the process with {cut}")


if __name__ == "__main__":
    main()
