"""A run tells how it compares with its plan: at first, after a resume, in a sweep, and in task=compare."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3.training import plan_check
from tests.harness.commands import TrainCommand
from tests.harness.runs import rows
from tests.harness.tiny import MODEL, TRAINING

SPEED = (
    *("hardware=cpu", "hardware.calibration=off", "hardware.peak_flops_fp32=1e15"),
    *("hardware.memory_bandwidth=1e15", "hardware.kernels.seconds=1"),
)
"""A CPU whose plan takes seconds per kernel, so that every run is faster than planned."""

OFTEN = ("train.log_every=2", "train.evaluate_every=0", "train.generate_every=0", "train.checkpoint_every=0")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare after few steps."""
    monkeypatch.setattr(plan_check, "WARM_UP", 1)
    monkeypatch.setattr(plan_check, "WINDOW", 2)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_and_its_resume_have_the_plan_beside_what_they_measure(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = commands.train(run, *SPEED, *OFTEN, "train.steps=12", "train.stop_after=6", "logger=tensorboard")
    told = first.out.splitlines()
    (compared,) = [line for line in told if line.startswith("measured against planned: ")]
    advice = told[told.index(compared) + 1]
    assert "times as fast as planned; the plan: " in advice
    assert advice.endswith("its speeds are assumed: conf/hardware/cpu.yaml; measure them: task=calibrate")
    assert told.index(compared) == told.index(next(line for line in told if line.startswith("step 4/"))) + 1
    assert any(line.startswith("  against plan ") and ", planned " in line for line in told)
    resumed = commands.must(f"resume={run}")
    assert len([line for line in resumed.out.splitlines() if line.startswith("measured against")]) == 1
    found = lines(run)
    assert len(found) == 12
    plan = json.loads(commands.must("task=plan", "task.format=json", *MODEL, *TRAINING, *SPEED).out)
    for line in found:
        assert line["planned_tokens_per_second"] == pytest.approx(plan["time"]["tokens_per_second"])
        assert 0 < line["planned_memory_gib"] < 2 * line["memory_gib"]
    assert all("planned_memory_gib" not in line for line in rows(run))  # it differs from run to run
    assert b"planned_tokens_per_second" in next((run / "tensorboard").iterdir()).read_bytes()


def test_without_a_known_speed_nothing_but_memory_is_told(commands: TrainCommand, tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = commands.train(run, "hardware=cpu", "hardware.calibration=off", *OFTEN, "train.steps=6").out
    (compared,) = [line for line in told.splitlines() if line.startswith("measured against planned: ")]
    assert "tokens/s" not in compared
    assert " GiB, planned " in compared
    assert {line["planned_tokens_per_second"] for line in lines(run)} == {None}


def test_a_sweep_and_its_comparison_have_a_column_of_planned_speeds(
    commands: TrainCommand, tmp_path: Path
) -> None:
    swept = commands.train(
        tmp_path / "swept", "-m", *SPEED, *OFTEN, "train.steps=4", "optimizer.lr=1e-3,2e-3"
    )
    assert "tokens/s  planned" in swept.out
    entries = json.loads(
        commands.must("task=compare", f"task.runs={tmp_path / 'swept'}", "task.format=json").out
    )["runs"]
    assert len(entries) == 2
    for entry in entries:
        assert entry["planned_tokens_per_second"] < entry["tokens_per_second"]
        assert 0 < entry["planned_memory_gib"] < 2 * entry["memory_gib"]
        metrics = tmp_path / "swept" / entry["job"] / "metrics.jsonl"
        older = [
            {key: value for key, value in json.loads(line).items() if not key.startswith("planned")}
            for line in metrics.read_text().splitlines()
        ]
        metrics.write_text("".join(json.dumps(line) + "\n" for line in older))
    compared = commands.must("task=compare", f"task.runs={tmp_path / 'swept'}").out
    assert "tokens/s" in compared
    assert "planned" not in compared  # rows of older code have no such values
