"""What the ranks run on: the `hardware` group's dataclass, and what `auto` finds out.

Memory is that of the data sheets, in GB of 10^9 bytes: about 6 % under what the devices report, which
leaves room for the CUDA context, NCCL's buffers and fragmentation.
"""

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsv3.config.hardware import NAMED, HardwareConfig
from dsv3.config.root import CONF

QUERY = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]

QUERY_SECONDS = 5.0


def ask_nvidia_smi() -> str:
    """A line `name, MiB` for each GPU, or an empty string where there is none to ask."""
    try:
        return subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


@dataclass(frozen=True)
class Machine:
    """Where `detect` looks; tests put their own answers in."""

    nvidia_smi: Callable[[], str] = ask_nvidia_smi
    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)


def detect(config: HardwareConfig, ranks_per_node: int, machine: Machine | None = None) -> HardwareConfig:
    """`config` with what only the machine knows filled in.

    `auto` becomes the GPU here or `cpu`; `cpu` without `memory_bytes` gets its rank's share of the
    host's. Everything else is returned as it is: a plan for an h800 is made on a laptop.
    """
    machine = machine or Machine()
    if config.name == "auto":
        found = _detect_gpu(machine)
        # Numbers given on the command line (hardware.memory_bytes=...) win over those found.
        given = {key: value for key, value in vars(config).items() if value is not None and key != "name"}
        config = replace(found or HardwareConfig(name="cpu"), **given)
    if config.name == "cpu" and config.memory_bytes is None:
        total = host_memory(machine.root)
        return replace(config, memory_bytes=total and total // ranks_per_node)
    return config


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that all ranks of this node share: the host's memory or the cgroup's limit, the smaller."""
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    limits = [int(total[1]) * 1024] if total else []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            limits += _limits(root / "sys/fs/cgroup", own, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits(root / "sys/fs/cgroup/memory", own, "memory.limit_in_bytes")
    return min(limits, default=None)


def visible_gpus(machine: Machine | None = None) -> list[str]:
    """A line `name, MiB` for each GPU of this node that CUDA_VISIBLE_DEVICES leaves to be seen."""
    machine = machine or Machine()
    visible = machine.environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    lines = [line for line in machine.nvidia_smi().splitlines() if "," in line]
    if visible is None:
        return lines
    chosen = [entry.strip() for entry in visible.split(",")]
    if all(entry.isdigit() for entry in chosen):
        return [lines[int(entry)] for entry in chosen if int(entry) < len(lines)]
    return lines[: len(chosen)]  # of UUIDs only their count is known here


def _detect_gpu(machine: Machine) -> HardwareConfig | None:
    rows = [line.rsplit(",", 1) for line in visible_gpus(machine)]
    if not rows:
        return None
    sizes = [int(mib) * 2**20 for _, mib in rows if mib.strip().isdigit()]
    named = NAMED.search(rows[0][0])
    found = _from_table(named[1].lower()) if named else HardwareConfig(name=rows[0][0].strip())
    # The smaller of table and report: an A100 may have 40 GB, and one small GPU is what limits a run.
    known = [*sizes, *([found.memory_bytes] if found.memory_bytes else [])]
    return replace(found, memory_bytes=min(known, default=None))


def _from_table(name: str) -> HardwareConfig:
    import yaml  # 15 ms that only a machine with a known GPU spends

    numbers: dict[str, Any] = yaml.safe_load((CONF / "hardware" / f"{name}.yaml").read_text())
    del numbers["defaults"]
    return HardwareConfig(**numbers)


def _limits(mount: Path, own: str, name: str) -> list[int]:
    """The limits of a cgroup and all above it; inside a container the own path may not exist."""
    path = mount / own.lstrip("/")
    texts = [_read(folder / name).strip() for folder in (path, *path.parents) if folder.is_relative_to(mount)]
    return [int(text) for text in texts if text.isdigit()]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
