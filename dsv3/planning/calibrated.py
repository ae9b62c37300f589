"""What task=calibrate has measured on this machine: where its file lies, and when a plan may use it.

A file is of one kind of device, so many ranks and threads on a node, and one version of torch. In the user's
cache it has a name made from these, and a plan takes it where it plans for the same. One that lies there and
is not, because it was copied or edited, is left out with a line for the user; so is one that cannot be read.
A file that is named (hardware.calibration=PATH) is another matter: it is used, or the command is refused.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from dsv3.config.data import cache_root
from dsv3.config.hardware import HardwareConfig, calibrate_command
from dsv3.config.strict import validate
from dsv3.distributed.device import cpu_threads
from dsv3.errors import UserError, quoted
from dsv3.untrusted_files import BadFile, MissingFile, read_yaml

FOLDER = Path("hardware")
"""Place of the files in the user's cache."""

OFF = "off"
"""hardware.calibration=off plans with what is assumed."""

T = TypeVar("T")


@dataclass(frozen=True)
class MeasuredOn:
    """Device, ranks and version that a measurement is of: it says nothing about others."""

    device: str
    """Name of the GPU, or model and cores of the CPU."""
    ranks: int
    """Ranks that share the cores and the memory of a node; 0 on GPUs, which do not."""
    threads: int
    """Threads of each rank on a CPU; 0 on GPUs."""
    torch: str

    @classmethod
    def here(cls, gpu: str | None, ranks: int, root: Path, environment: Mapping[str, str]) -> "MeasuredOn":
        """Return what would be measured now with `ranks` ranks on this node."""
        if gpu:
            return cls(gpu, 0, 0, version("torch"))
        return cls(cpu_name(root), ranks, cpu_threads(ranks, environment), version("torch"))

    def __str__(self) -> str:
        shared = f", ranks {self.ranks} x threads {self.threads}" if self.ranks else ""
        return f"{self.device}{shared}, torch {self.torch}"

    def path(self, environment: Mapping[str, str]) -> Path:
        """Return where a plan looks for the measurements."""
        kind = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")[:40]
        digest = hashlib.sha256(str(self).encode()).hexdigest()[:8]
        name = f"{kind}-{self.ranks}x{self.threads}-{digest}.yaml"
        return cache_root(None, environment) / FOLDER / name


def cpu_name(root: Path = Path("/")) -> str:
    """Return a CPU's name, its family and model, and its cores: virtual machines leave most of a name out."""
    try:
        told = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        told = ""
    found = {
        key: re.search(rf"^{key}\s*: (.*)$", told, re.MULTILINE)
        for key in ("model name", "cpu family", "model")
    }
    name, family, model = (match[1].strip() if (match := found[key]) else "?" for key in found)
    return (
        f"{name} (family {family}, model {model}, {len(re.findall('^processor', told, re.MULTILINE))} cores)"
    )


@dataclass(frozen=True)
class Calibration:
    """The content of a file of task=calibrate."""

    measured_on: MeasuredOn
    hardware: dict[str, Any]
    """Values of a HardwareConfig; what was not measured is left out."""


def read_calibration(path: Path) -> Calibration:
    """Return the content of a file; BadFile for what task=calibrate has not written."""
    told = read_yaml(path)
    if not isinstance(told, dict) or not {"measured_on", "hardware"} <= told.keys():
        raise BadFile(path, "is no file of task=calibrate: it needs the keys measured_on and hardware")
    try:
        measured_on: MeasuredOn = _typed(MeasuredOn, told["measured_on"])
        validate(hardware_of(told["hardware"]))
    except (TypeError, ValueError, UserError) as error:
        raise BadFile(path, f"does not hold what task=calibrate writes: {error}") from None
    return Calibration(measured_on, told["hardware"])


def calibrated(
    config: HardwareConfig,
    preset: HardwareConfig,
    named: Path | None,
    here: MeasuredOn | None,
    environment: Mapping[str, str],
) -> HardwareConfig:
    """Return `config` with what was measured on this machine; its `source` says what came of it.

    `preset` is what `config` is where the user types nothing, `named` the file of hardware.calibration.
    Without one it is the file of the device `here`, which is None for a plan of another machine.

    Raises:
        UserError: the named file cannot be used.
    """
    path = named
    if path is None:
        assert here is not None
        path = here.path(environment)
    try:
        found = read_calibration(path)
    except MissingFile:
        if named is not None:
            raise
        return config
    except BadFile as error:
        if named is not None:
            raise
        return _left_out(config, str(error))
    kind, fix = found.hardware.get("name"), ""
    if here is not None and found.measured_on != here:
        told = f"{path} was measured on {found.measured_on}, not on {here}"
        fix = f"measure here: {calibrate_command(here.ranks)}"
    elif kind != config.name:
        told = f"{path} is of hardware={kind}, and this plan is for hardware={config.name}"
        fix = f"give hardware={kind}"
    if fix and named is None:
        return _left_out(config, told)
    if fix:
        raise UserError(f"hardware.calibration={told}\n{fix}, or leave it out: hardware.calibration={OFF}")
    return merged(config, preset, found.hardware)


def _left_out(config: HardwareConfig, why: str) -> HardwareConfig:
    return replace(config, source=f"{config.told_source}; {why}")


def merged(typed: HardwareConfig, preset: HardwareConfig, measured: Mapping[str, Any]) -> HardwareConfig:
    """Return `typed` with what was measured, except where it differs from the preset: that was typed."""
    found: HardwareConfig = _merged(typed, preset, measured)
    return found


def _merged(typed: Any, preset: Any, measured: Mapping[str, Any]) -> Any:
    values: dict[str, Any] = {}
    hints = get_type_hints(type(typed))
    for key, value in measured.items():
        own, given = getattr(typed, key), getattr(preset, key)
        if is_dataclass(own) and is_dataclass(given):
            values[key] = _merged(own, given, value)
        elif own == given:
            values[key] = _value(hints[key], key, value)
    return replace(typed, **values)


def to_yaml_values(node: Any) -> dict[str, Any]:
    """Return a dataclass as a file holds it, without what is null."""
    return {key: _shown(value) for key, value in asdict(node).items() if value is not None}


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shown(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def hardware_of(values: Mapping[str, Any]) -> HardwareConfig:
    """Return the hardware whose `values` a file holds; TypeError for a key or a type that is none."""
    return _typed(HardwareConfig, values)


def _typed(kind: type[T], told: Any) -> T:
    """Return a dataclass of `kind` with the values that a file tells; TypeError for any other shape."""
    if not isinstance(told, Mapping):
        raise TypeError(f"{kind.__name__} is no mapping")
    hints = get_type_hints(kind)
    if unknown := sorted(map(str, told.keys() - hints.keys())):
        raise TypeError(f"unknown key {quoted(unknown[0])}")
    return kind(**{key: _value(hints[key], key, value) for key, value in told.items()})


def _value(hint: Any, key: str, value: Any) -> Any:
    """Return one value of a file as its field's type has it."""
    allowed = get_args(hint) or (hint,)
    node = next((one for one in allowed if is_dataclass(one)), None)
    if node is not None and isinstance(value, dict):
        return _typed(node, value)  # type: ignore[arg-type]
    number = isinstance(value, int) and float in allowed
    if isinstance(value, bool) or not (isinstance(value, allowed) or number):
        raise TypeError(f"{key} has a value of another type: {quoted(str(value))}")
    return float(value) if number else value
