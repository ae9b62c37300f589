"""task=calibrate: measure what this machine reaches of its peaks, for the plans that are made on it.

All ranks of launch.nproc measure at the same time. The result is a hardware file: the peaks, bandwidths,
shares and latencies of conf/hardware, measured instead of assumed. It goes to the user's cache, where a plan
for as many ranks on this machine finds it (planning/calibrated.py), or to task.output. tasks/probes.py times,
planning/calibration_fit.py makes values of it.
"""

import json
import os
import platform
import tempfile
from contextlib import suppress
from datetime import date
from pathlib import Path

import torch
import yaml

from dsv3.config.hardware import CPU
from dsv3.config.task import OutputFormat
from dsv3.errors import UserError
from dsv3.launch.job import Job, ranks_per_node
from dsv3.metrics.console import format_table
from dsv3.metrics.progress import amount, duration, phase
from dsv3.planning.calibrated import MeasuredOn, read_calibration, to_yaml_values
from dsv3.planning.calibration_fit import Fitted, Measurements, fit
from dsv3.tasks.probes import measure
from dsv3.tasks.setup import join_ranks
from dsv3.untrusted_files import BadFile

SIZES = {"cpu": 1024, "cuda": 8192}
"""Width of the largest matmul by kind of device."""

DISTURBED = 0.05
"""Share of the time that other work may take from a rank before the file says so."""

FAR = 0.15
"""Error of the plan for a measured pass from which the measurement is in doubt."""

HEAD = """\
# Measured by task=calibrate. Plans on this machine take it where they are for as many ranks; remove it, or
# give hardware.calibration=off, to plan with what conf/hardware assumes (docs/planning.md).
"""


class CalibrateTask:
    """Measures, writes the hardware file, and prints what was measured.

    Args:
        output: the file; None is the one that plans on this machine look for.
        seconds: about how long to measure.
        size: width of the largest matmul; None goes by the device.
        format: of what is printed.
    """

    def __init__(self, output: str | None, seconds: float, size: int | None, format: OutputFormat) -> None:
        self.output = None if output is None else Path(output)
        self.seconds = seconds
        self.size = size
        self.format = format

    def run(self, job: Job) -> None:
        """Measure on all ranks; rank 0 writes the file and prints; UserError where it cannot be written."""
        with join_ranks(job) as ranks:
            gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None
            on_node = ranks_per_node(job.config, ranks.world)
            measured_on = MeasuredOn.here(gpu, on_node, Path("/"), os.environ)
            path = self.output or measured_on.path(os.environ)
            if ranks.is_main:
                require_writable(path, replaces_any=self.output is None)
            ranks.meet()
            size = self.size or SIZES[ranks.device.type]
            with phase(f"measuring for {duration(self.seconds)}"):
                found = measure(job.config, ranks, size, self.seconds)
        if not ranks.is_main:
            return
        name = job.hardware.name if gpu else CPU
        fitted = fit(name, found)
        today = date.today().isoformat()
        source = f"measured: {platform.node()}, {measured_on}, {today}"
        if is_disturbed(found.waiting, measured_on.ranks, measured_on.threads):
            source += f", beside other work ({found.waiting:.0%} of the time without a core)"
        values = fitted.values | {"source": source}
        content = {"measured_on": to_yaml_values(measured_on), "hardware": values}
        write_whole(path, HEAD + yaml.safe_dump(content, sort_keys=False, width=100))
        if self.format is OutputFormat.json:
            rows = [dict(zip(("name", "seconds", "rate", "unit"), row, strict=True)) for row in rates(found)]
            fits = [dict(zip(("name", "measured", "fitted"), row, strict=True)) for row in fitted.passes]
            print(json.dumps({"path": str(path), **content, "measurements": rows, "passes": fits}, indent=1))
        else:
            print(report(found, fitted))
            print(
                f"{source}\n{path}: plans on this machine use it, with hardware=auto"
                if self.output is None
                else f"{source}\n{path}: use it by hardware.calibration={path}"
            )


def is_disturbed(waiting: float, ranks: int, threads: int) -> bool:
    """Return True if other work had cores of the ranks; ranks that share cores wait for each other."""
    return waiting > DISTURBED and ranks * threads <= len(os.sched_getaffinity(0))


def require_writable(path: Path, replaces_any: bool = False) -> None:
    """Make the file's folder; UserError where no file can be written there.

    A file that is there is one of task=calibrate, unless it `replaces_any`, as in the cache, where a damaged
    one may lie: the YAML of a run or a checkpoint stays as it is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None
    if path.is_dir():
        raise UserError(f"task.output={path} is a directory: give the name of a file in it")
    if os.path.lexists(path) and not replaces_any:
        try:
            read_calibration(path)
        except BadFile:
            raise UserError(
                f"task.output={path} is there, and no file of task=calibrate: name another"
            ) from None


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: a plan that reads it meanwhile finds the old one or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written ({error.strerror or error}): give another place, task.output=FILE"
    )


def rates(found: Measurements) -> list[tuple[str, float, float, str]]:
    """Return name, seconds, rate and its unit of everything that was timed."""
    rows = [
        (
            f"{one.name}, {'bf16' if one.compute == 2 else 'fp32'}",
            one.seconds,
            one.flops / one.seconds,
            "FLOP/s",
        )
        for one in found.operators
    ]
    rows += [
        (f"copy of {amount(int(size / 2), 'bytes')}", t, size / t, "bytes/s") for size, t in found.copies
    ]
    rows += [("clipping and AdamW", t, moved / t, "bytes/s") for moved, t in found.updates]
    for one in found.collectives:
        where = " between nodes" if one.crosses else ""
        told = f"{one.kind} over {one.ranks} ranks{where}, {amount(int(one.sent), 'bytes')} sent"
        rows.append((told, one.seconds, one.sent / one.seconds, "bytes/s"))
    return rows


def report(found: Measurements, fitted: Fitted) -> str:
    """Return tables of what was timed, of the passes as they are told again, and the values of the file."""
    rows = [(name, f"{1e3 * t:,.3f}", f"{rate / 1e9:,.2f} G{unit}") for name, t, rate, unit in rates(found)]
    told = [(name, f"{1e3 * t:,.1f}", f"{1e3 * again:,.1f}") for name, t, again in fitted.passes]
    values = [(key, f"{value:.4g}") for key, value in flat(fitted.values)]
    worst = max(abs(again / t - 1) for _, t, again in fitted.passes)
    return "\n\n".join(
        (
            format_table(rows, ("measured", "ms", "rate"), ("measured",)),
            format_table(told, ("model", "measured, ms", "as planned, ms"), ("model",)),
            f"the plan is within {worst:.0%} of what these passes took"
            + ("; on a quiet machine it comes nearer" if worst > FAR else ""),
            format_table(values, ("key of hardware", "value"), ("key of hardware",)),
        )
    )


def flat(values: dict[str, object], path: str = "") -> list[tuple[str, float]]:
    """Return the numbers of nested values by dotted key."""
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += flat(value, f"{path}{key}.")
        elif isinstance(value, int | float):
            found.append((f"{path}{key}", float(value)))
    return found
