"""Detect the hardware: GPUs by nvidia-smi, host memory by /proc and cgroups; no torch.

Device memory is that of the data sheets, in GB of 10^9 bytes: about 6 % below what devices report, which
leaves room for the CUDA context, NCCL's buffers and fragmentation.
"""

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsv3.config.hardware import AUTO, CPU, NAMED, HardwareConfig
from dsv3.config.registry import CONF
from dsv3.errors import UserError
from dsv3.planning.calibrated import OFF, MeasuredOn, calibrated, hardware_of, merged, to_yaml_values

QUERY = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]

QUERY_SECONDS = 5.0


def query_nvidia_smi() -> str:
    """Return a line `name, MiB` per GPU, or an empty string if nvidia-smi does not answer."""
    try:
        return subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


@dataclass(frozen=True)
class Machine:
    """The sources that detect_hardware reads; tests put their own answers in."""

    nvidia_smi: Callable[[], str] = query_nvidia_smi
    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)


def detect_hardware(
    config: HardwareConfig, ranks_per_node: int, machine: Machine | None = None
) -> HardwareConfig:
    """Return `config` with what only this machine can tell.

    `auto` becomes the GPU of this machine or `cpu`; `cpu` without `memory_bytes` gets its rank's share of the
    host's. Everything else is returned unchanged: a plan for an h800 may be made on a laptop.
    """
    machine = machine or Machine()
    here, named = None, config.calibration
    if config.name == AUTO:
        gpu = _gpu_name(machine)
        found = _detect_gpu(machine) or preset_hardware(CPU)
        # Values given on the command line (hardware.memory_bytes=...) win over detected ones.
        config = replace(merged(config, HardwareConfig(name=AUTO), to_yaml_values(found)), name=found.name)
        here = MeasuredOn.here(gpu, ranks_per_node, machine.root, machine.environment)
    elif config.name == CPU:
        here = MeasuredOn.here(None, ranks_per_node, machine.root, machine.environment)
    if named != OFF and (named or here):
        path, preset = Path(named) if named else None, preset_hardware(config.name)
        config = calibrated(config, preset, path, here, machine.environment)
    if config.name == CPU and config.memory_bytes is None:
        total = host_memory(machine.root)
        return replace(config, memory_bytes=total and total // ranks_per_node)
    return config


def host_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that all ranks of this node share: the host's memory, or a smaller cgroup limit."""
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
    """Return a line `name, MiB` per GPU of this node that CUDA_VISIBLE_DEVICES leaves visible."""
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
    return lines[: len(chosen)]  # UUIDs: only their count is known here


def require_gpu(config: HardwareConfig, machine: Machine | None = None) -> None:
    """Raise UserError where `config` names a GPU, to run on it, and this machine has none.

    Some containers have a GPU and no nvidia-smi: there the driver's device file counts.
    """
    machine = machine or Machine()
    hidden = machine.environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    driver = not hidden and any((machine.root / "dev" / name).exists() for name in ("nvidiactl", "dxg"))
    if config.name not in (AUTO, CPU) and not driver and not visible_gpus(machine):
        raise UserError(
            f"hardware.name={config.name}, and nvidia-smi shows no GPU here: "
            f"run on what is here with hardware={AUTO}, or plan for it with task=plan"
        )


def other_gpu(config: HardwareConfig, machine: Machine | None = None) -> str | None:
    """Return a line for the user where this machine has another GPU than `config` names."""
    here = visible_gpus(machine) if config.name not in (AUTO, CPU) else []
    found = NAMED.search(here[0]) if here else None
    if not here or (found and found[1].lower() == config.name):
        return None
    name = here[0].rsplit(",", 1)[0].strip()
    return f"hardware.name={config.name}, but the GPU here is {name}: memory and MFU are of the one named"


def _gpu_name(machine: Machine) -> str | None:
    """Return the name of this machine's first GPU as its driver tells it."""
    return next((line.rsplit(",", 1)[0].strip() for line in visible_gpus(machine)), None)


def _detect_gpu(machine: Machine) -> HardwareConfig | None:
    rows = [line.rsplit(",", 1) for line in visible_gpus(machine)]
    if not rows:
        return None
    sizes = [int(mib) * 2**20 for _, mib in rows if mib.strip().isdigit()]
    named = NAMED.search(rows[0][0])
    found = preset_hardware(named[1].lower() if named else rows[0][0].strip())
    # The smaller of preset and report: an A100 may have 40 GB, and the smallest GPU limits a run.
    known = [*sizes, *([found.memory_bytes] if found.memory_bytes else [])]
    return replace(found, memory_bytes=min(known, default=None))


def named_hardware() -> list[HardwareConfig]:
    """Return the GPUs of conf/hardware, those with least memory first, of equal ones the fastest."""
    presets = [path for path in (CONF / "hardware").glob("*.yaml") if path.stem not in (AUTO, CPU)]
    known = map(_read_preset, sorted(presets))
    return sorted(known, key=lambda gpu: (gpu.memory_bytes or 0, -(gpu.peak_flops_bf16 or 0)))


def preset_hardware(name: str) -> HardwareConfig:
    """Return the hardware of a file of conf/hardware; of a name without one nothing else is known."""
    path = CONF / "hardware" / f"{name}.yaml"
    return _read_preset(path) if path.is_file() else HardwareConfig(name=name)


def _read_preset(path: Path) -> HardwareConfig:
    import yaml  # 15 ms that only a machine with a known GPU spends, or a plan that does not fit

    preset: dict[str, Any] = yaml.safe_load(path.read_text())
    del preset["defaults"]
    return hardware_of(preset)


def _limits(mount: Path, own: str, name: str) -> list[int]:
    """Return the memory limits of a cgroup and its parents; inside a container its own path may not exist."""
    path = mount / own.lstrip("/")
    texts = [_read(folder / name).strip() for folder in (path, *path.parents) if folder.is_relative_to(mount)]
    return [int(text) for text in texts if text.isdigit()]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
