"""Null and auto values are filled in by one rule each, with the reason; what is typed or studied wins."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dsv3.config.precision import ComputeType
from dsv3.config.strict import to_yaml
from dsv3.launch.job import Job
from dsv3.planning import hardware
from dsv3.tokens.npy_file import NpyFile
from tests.harness.commands import PlannedCommand
from tests.harness.runs import StoredRun
from tests.hf.test_config_json import RELEASED_V3

KEY, SPEED = "precision.compute", "train.balance.bias_speed"
GPU = ["echo", "NVIDIA H100 80GB HBM3, 81559"]
NONE = ["false"]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "QUERY", NONE)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("found", "typed", "compute", "reason"),
    [
        (NONE, [], "fp32", "no GPU was found"),
        (GPU, [], "bf16", "h100 was found"),
        (GPU, ["hardware=cpu"], "fp32", "hardware=cpu"),
        (NONE, ["task=plan", "hardware=h100"], "bf16", "hardware=h100"),
        (NONE, ["launch=slurm", "launch.nproc=1", "hardware=h100"], "bf16", "hardware=h100"),
        (GPU, ["precision.moments=bf16"], "bf16", "h100 was found"),
        (GPU, ["precision=fp32"], "fp32", None),
        (NONE, ["precision=bf16"], "bf16", None),
        (GPU, ["experiments=learning_rate"], "bf16", "h100 was found"),
        (NONE, ["experiments=bf16_moments"], "bf16", None),
        (NONE, ["experiments=bf16_moments", "precision=fp32"], "fp32", None),
    ],
)
def test_the_precision_follows_the_hardware_unless_it_is_chosen(
    planned: PlannedCommand,
    monkeypatch: pytest.MonkeyPatch,
    found: list[str],
    typed: list[str],
    compute: str,
    reason: str | None,
) -> None:
    monkeypatch.setattr(hardware, "QUERY", found)
    job = planned.run(*typed).job
    assert job.config.precision.compute is ComputeType[compute]
    assert job.reasons.get(KEY) == reason
    assert (job.plan.precision, job.plan.precision_reason) == (compute, reason or "as configured")


def test_a_gpu_that_is_hidden_does_not_count(
    planned: PlannedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "QUERY", GPU)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert planned.run().job.config.precision.compute is ComputeType.fp32


@pytest.mark.parametrize("study", ["defaults: [override /hardware: h100]", "hardware: {name: my_gpu}"])
def test_the_hardware_of_a_study_counts_too(planned: PlannedCommand, tmp_path: Path, study: str) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(f"# @package _global_\n{study}\n")
    command = ("task=plan", f"--config-dir={tmp_path}", "experiments=mine")
    assert planned.run(*command).job.config.precision.compute is ComputeType.bf16


def test_the_plan_says_the_precision_and_why(
    planned: PlannedCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsv3.config.strict import build
    from dsv3.planning.report import format_plan

    job = planned.run("task=plan", "task.format=json", "hardware=h100").job
    build(job.config.task).run(job)
    told = json.loads(capsys.readouterr().out)
    assert (told["precision"], told["precision_reason"]) == ("bf16", "hardware=h100")
    lines = [line.split(maxsplit=1) for line in format_plan(job.plan).splitlines() if line]
    assert ["precision", "bf16: hardware=h100"] in lines


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A released model as far as a plan looks at it."""
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RELEASED_V3))
    return folder


def speed(job: Job) -> tuple[Any, str | None]:
    return job.config.train.balance.bias_speed, job.reasons.get(SPEED)


MAKES = ("hardware=h100", "hardware.memory_bytes=100000000000000", "train.steps=3", "schedule.warmup_steps=1")


def test_the_biases_of_a_released_model_stay_unless_they_are_typed_to_move(
    planned: PlannedCommand, released: Path, stored: StoredRun
) -> None:
    assert speed(planned.run().job) == (0.001, "the report's")
    load = [f"checkpoint.load=hf:{released}", "tokenizer=trained"]
    assert speed(planned.run(*load, *MAKES).job) == (0.0, f"hf:{released} is a released model")
    assert speed(planned.run(*load, *MAKES, f"{SPEED}=0.001").job) == (0.001, None)


def test_a_checkpoint_converted_from_a_release_counts_as_one_and_a_run_as_it_began(
    planned: PlannedCommand, tmp_path: Path
) -> None:
    model = yaml.safe_dump(to_yaml(planned.run().job.config.model))
    for name in ("converted", "fresh", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").touch()
        (tmp_path / name / "model.yaml").write_text(model)
    (tmp_path / "converted" / "hf").mkdir()
    record = {"convergence": "0", "data_fingerprint": None, "tokenizer_fingerprint": None, "step": 3}
    for name, was in (("fresh", 0.001), ("tuned", 0.0)):
        content = record | {"config": {"train": {"balance": {"bias_speed": was}}}}
        (tmp_path / name / "training.yaml").write_text(yaml.safe_dump(content))
    found = {
        name: speed(planned.run(f"checkpoint.load={tmp_path / name}", "tokenizer=trained").job)[0]
        for name in ("converted", "fresh", "tuned")
    }
    assert found == {"converted": 0.0, "fresh": 0.001, "tuned": 0.0}


def test_a_table_of_ids_is_opened_once_for_the_length_that_it_sets(
    planned: PlannedCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((9, 33), np.int32))
    opened: list[Any] = []
    read: Any = NpyFile.read

    def counted(*args: Any) -> Any:
        opened.append(args)
        return read(*args)

    monkeypatch.setattr(NpyFile, "read", counted)
    job = planned.run("data=tokens", f"data.path={tmp_path / 'ids.npy'}").job
    assert (job.config.train.length, job.reasons["train.sequence_length"]) == (
        32,
        "the width of the rows sets it",
    )
    assert len(opened) == 1


def test_a_microbatch_that_is_filled_in_splits_every_batch_of_a_ramp(planned: PlannedCommand) -> None:
    ramp = ["train.global_batch_size=24", "train.batch_ramp.start=4", "train.batch_ramp.tokens=1e4"]
    job = planned.run("train.sequence_length=64", "train.batch_ramp.increment=10", *ramp).job
    assert job.config.train.microbatch == 2  # of batches of 4, 14 and 24
    job = planned.run("train.sequence_length=64", *ramp).job
    assert (job.config.train.microbatch, job.config.train.batch_ramp.increment) == (4, 4)
    assert job.reasons["train.batch_ramp.increment"] == "train.batch_ramp.start"
    assert job.plan.shape.microbatches == 6  # of the largest batch, which needs most memory
    refused = planned.run("train.microbatch_size=8", *ramp)
    assert refused.code == 2
    assert "make a batch of 4 sequences, no multiple of 8 " in refused.err
    assert "nearest that work: train.batch_ramp.start=8 train.batch_ramp.increment=8" in refused.err
