"""task=calibrate at a tiny scale, and what plans make of its file; nothing here depends on how fast it is."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3.config.hardware import HardwareConfig
from dsv3.errors import UserError
from dsv3.planning import calibrated
from dsv3.planning.calibrated import MeasuredOn, read_calibration
from dsv3.planning.hardware import Machine, detect_hardware, preset_hardware
from dsv3.tasks import calibrate, probes
from dsv3.tasks.calibrate import require_writable, write_whole
from tests.harness.commands import PlannedCommand, TrainCommand

TINY = ("task=calibrate", "task.seconds=0.01", "task.size=64", "hardware=cpu")
HERE = MeasuredOn("a CPU (family 1, model 2, 2 cores)", 1, 2, "2.13.0")
VALUES: dict[str, Any] = {
    "name": "cpu",
    "memory_bandwidth": 2e10,
    "peak_flops_fp32": 1e11,
    "peak_flops_bf16": 3e11,
    "kernels": {"matmul": 0.9, "memory": 0.5},
    "kernels_fp32": {"matmul": 0.7},
    "source": "measured: here, today",
}


FASTER = {"memory_bandwidth": 2.9e12}


def numbers(values: object) -> Iterator[float]:
    if isinstance(values, dict):
        for value in values.values():
            yield from numbers(value)
    elif isinstance(values, int | float):
        yield values


def test_it_writes_a_file_that_plans_find(
    commands: TrainCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DSV3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrated, "FOLDER", Path("hardware"))
    before = json.loads(commands.must("task=plan", "task.format=json", "hardware=cpu").out)
    assert before["tokens_per_second_per_gpu"] is None
    told = json.loads(commands.must(*TINY, "task.format=json").out)
    (path,) = (tmp_path / "cache" / "hardware").iterdir()
    assert Path(told["path"]) == path
    assert all(math.isfinite(number) and number >= 0 for number in numbers(told["hardware"]))
    assert min(row["rate"] for row in told["measurements"]) > 0
    assert read_calibration(path).hardware == told["hardware"]
    plan = json.loads(commands.must("task=plan", "task.format=json", "hardware=cpu").out)
    assert plan["tokens_per_second_per_gpu"] > 0
    assert plan["time"]["source"].startswith("measured: ")
    off = "hardware.calibration=off"
    assumed = json.loads(commands.must("task=plan", "task.format=json", "hardware=cpu", off).out)
    assert assumed["tokens_per_second_per_gpu"] is None
    # A second time the file is replaced whole, and the text names it.
    path.write_text("half a file: [")
    text = commands.must(*TINY).out
    assert "the plan is within " in text
    assert str(path) in text
    assert read_calibration(path).measured_on.ranks == 1
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (
            "task.output=here.txt",
            "task.output=here.txt is not possible: must be a file name that ends in .yaml",
        ),
        ("task.size=8", "task.size=8 is not possible: must be at least 64"),
        ("task.seconds=0", "task.seconds=0.0 is not possible"),
        ("model.dim=64", "model.dim"),
    ],
)
def test_what_it_cannot_do_is_refused(planned: PlannedCommand, typed: str, told: str) -> None:
    outcome = planned.run(*TINY, typed)
    assert outcome.code == 2
    assert told in outcome.err


def test_a_place_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .* task.output=FILE"):
        require_writable(tmp_path / "file" / "a.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UserError, match="is a directory: give the name of a file in it"):
        require_writable(tmp_path / "folder.yaml")
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(tmp_path / "folder.yaml", "text")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder.yaml"]


def test_only_a_file_of_its_own_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {}\n")  # a run's
    with pytest.raises(UserError, match=r"config\.yaml is there, and no file of task=calibrate: name"):
        require_writable(tmp_path / "config.yaml")
    require_writable(tmp_path / "config.yaml", replaces_any=True)  # in the cache, a damaged one of its own


def test_a_half_written_file_takes_nothing_s_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpu.yaml"
    path.write_text("old")
    write = Path.write_text

    def fill_the_disk(self: Path, text: str, encoding: str | None = None) -> int:
        write(self, text[: len(text) // 2], encoding)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        write_whole(path, "a new file")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("cpu.yaml", "old")]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A CPU of two cores; the cache is tmp_path."""
    (tmp_path / "proc").mkdir()
    core = "processor\t: {}\ncpu family\t: 1\nmodel\t\t: 2\nmodel name\t: a CPU\n\n"
    (tmp_path / "proc/cpuinfo").write_text(core.format(0) + core.format(1))
    monkeypatch.setattr(calibrated, "FOLDER", Path("hardware"))
    monkeypatch.setattr(calibrated, "version", lambda _: HERE.torch)
    monkeypatch.setattr(calibrated, "cpu_threads", lambda ranks, _: 2 // ranks)
    return Machine(lambda: "", tmp_path, {"DSV3_CACHE": str(tmp_path)})


def stored(machine: Machine, measured_on: MeasuredOn = HERE, **changed: object) -> Path:
    path = HERE.path(machine.environment)
    path.parent.mkdir(exist_ok=True)
    content = {"measured_on": vars(measured_on), "hardware": VALUES | changed}
    path.write_text(yaml.safe_dump(content))
    return path


def test_measured_values_take_the_place_of_assumed_ones_but_not_of_typed_ones(machine: Machine) -> None:
    stored(machine)
    for name in ("auto", "cpu"):
        found = detect_hardware(HardwareConfig(name, peak_flops_bf16=7e11), 1, machine)
        assert (found.name, found.peak_flops_fp32, found.peak_flops_bf16) == ("cpu", 1e11, 7e11)
        assert (found.kernels.matmul, found.kernels.memory) == (0.9, 0.5)
        assert found.kernels.attention == HardwareConfig("cpu").kernels.attention
        assert found.kernels_fp32 is not None
        assert found.kernels_fp32.matmul == 0.7
        assert found.told_source == "measured: here, today"


def test_a_gpu_s_file_is_for_any_number_of_ranks(machine: Machine) -> None:
    gpu = MeasuredOn("NVIDIA H100 80GB HBM3", 0, 0, HERE.torch)
    path = gpu.path(machine.environment)
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({"measured_on": vars(gpu), "hardware": {"name": "h100", **FASTER}}))
    with_gpu = replace(machine, nvidia_smi=lambda: "NVIDIA H100 80GB HBM3, 81559\n" * 8)
    for ranks in (1, 8):
        found = detect_hardware(HardwareConfig("auto"), ranks, with_gpu)
        assert (found.name, found.memory_bandwidth) == ("h100", 2.9e12)


def test_a_file_of_other_ranks_is_not_found(machine: Machine) -> None:
    stored(machine)
    found = detect_hardware(HardwareConfig("cpu"), 2, machine)
    assert found.peak_flops_fp32 is None
    assert found.told_source.startswith("assumed: ")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"device": "another CPU"}, "was measured on another CPU, ranks 1 x threads 2, torch 2.13.0, not on"),
        ({"torch": "2.12.0"}, "torch 2.12.0, not on"),
        ({"threads": 1}, "ranks 1 x threads 1, torch 2.13.0, not on"),
    ],
)
def test_a_stale_or_foreign_file_is_left_out_and_told(
    machine: Machine, changes: dict[str, Any], why: str
) -> None:
    path = stored(machine, MeasuredOn(**(vars(HERE) | changes)))
    found = detect_hardware(HardwareConfig("cpu"), 1, machine)
    assert found.peak_flops_fp32 is None
    assert found.told_source.startswith("assumed: ")
    assert f"{path} " in found.told_source
    assert why in found.told_source
    with pytest.raises(UserError, match=r"measure here: python train\.py task=calibrate, or leave it out"):
        detect_hardware(HardwareConfig("cpu", calibration=str(path)), 1, machine)


@pytest.mark.parametrize(
    "changed",
    [{"peak_flops_bf16": "fast"}, {"peak_flops_bf16": True}, {"speed": 1.0}, {"kernels": {"matmul": 2.0}}],
)
def test_a_file_that_is_damaged_is_left_out_or_refused(machine: Machine, changed: dict[str, Any]) -> None:
    path = stored(machine, **changed)
    found = detect_hardware(HardwareConfig("cpu"), 1, machine)
    assert found.peak_flops_bf16 is None
    assert "does not hold what task=calibrate writes" in found.told_source
    with pytest.raises(UserError, match="does not hold what task=calibrate writes"):
        detect_hardware(HardwareConfig("cpu", calibration=str(path)), 1, machine)


def test_a_named_file_must_be_there_and_of_the_hardware(machine: Machine) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml"):
        detect_hardware(HardwareConfig("cpu", calibration="missing.yaml"), 1, machine)
    path = stored(machine)
    with pytest.raises(UserError, match="is of hardware=cpu, and this plan is for hardware=h100"):
        detect_hardware(HardwareConfig("h100", calibration=str(path)), 1, machine)
    gpu = MeasuredOn("NVIDIA H100 80GB HBM3", 0, 0, HERE.torch)
    path = stored(machine, gpu, name="h100")
    found = detect_hardware(replace(preset_hardware("h100"), calibration=str(path)), 8, machine)
    assert found.kernels.matmul == 0.9


def test_a_measurement_beside_other_work_says_so(
    commands: TrainCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = iter((0.0, 1e6))
    monkeypatch.setattr(probes, "waited_seconds", lambda: next(clock))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {*range(64)})
    path = tmp_path / "busy.yaml"
    assert "% of the time without a core)" in commands.must(*TINY, f"task.output={path}").out
    told = commands.must("task=plan", "hardware=cpu", f"hardware.calibration={path}").out
    assert ", beside other work (" in told


@pytest.mark.parametrize(
    ("waiting", "ranks", "threads", "told"),
    [(0.04, 1, 2, False), (0.06, 1, 2, True), (0.06, 2, 1, True), (0.5, 4, 1, False)],
)
def test_ranks_that_share_cores_disturb_each_other_alone(
    waiting: float, ranks: int, threads: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert calibrate.is_disturbed(waiting, ranks, threads) is told


def test_the_kernel_tells_how_long_a_process_has_waited() -> None:
    assert 0 <= probes.waited_seconds() < 1e6
