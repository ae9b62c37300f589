"""training.yaml goes wherever weights go, and the convergence hash with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.manifest import read_manifest
from dsv3.checkpoint.training_record import TRAINING_FILE, TrainingRecord, weights_identity
from dsv3.errors import UserError
from tests.harness.commands import ConvertCommand, TrainCommand
from tests.harness.runs import rows

RECORD = TrainingRecord("0123456789abcdef", "data", None, 0, {"optimizer": {"lr": 0.1}}, None, [])


def record(directory: Path) -> TrainingRecord:
    """Return the record in a directory, whose manifest covers it."""
    found = TrainingRecord.read(directory)
    assert found is not None
    assert TRAINING_FILE in (read_manifest(directory) or {})
    return found


def environment(run: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((run / "environment.json").read_text())
    return stored


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert TrainingRecord.read(tmp_path) is None
    RECORD.write(tmp_path, 7)
    assert TrainingRecord.read(tmp_path) == TrainingRecord(**vars(RECORD) | {"step": 7})


DAMAGES = ["{", "3", "[]", "convergence: 3", "!!python/object/apply:os.getcwd []", "step: [", ""]


@pytest.mark.parametrize("text", DAMAGES)
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / TRAINING_FILE).write_text(text)
    with pytest.raises(UserError, match=r"training\.yaml(:1:)? (cannot be read|is not YAML|has the tag)"):
        TrainingRecord.read(tmp_path)


def released(directory: Path, last: int = 0) -> str:
    """Write a HuggingFace checkpoint as far as its identity looks; return how it is named."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(3_000_000) + bytes([last]))
    return f"hf:{directory}"


def test_weights_are_known_by_their_content_wherever_they_lie(tmp_path: Path) -> None:
    one, copy = released(tmp_path / "one"), released(tmp_path / "copy")
    other = released(tmp_path / "other", last=1)
    assert weights_identity(one) == weights_identity(copy) != weights_identity(other)
    RECORD.write(tmp_path / "one", 7)
    RECORD.write(tmp_path / "other", 7)  # the same step in another format
    assert weights_identity(one) == weights_identity(other) == "0123456789abcdef, step 7"


class Recording:
    """Keeps what a logger is opened with."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    def open(self, run_dir: Path, config: Any, *_: Any) -> None:
        """Keep the config."""
        self.config = dict(config)


@pytest.mark.slow
def test_the_hash_stands_with_the_run_its_checkpoints_its_exports_and_its_conversions(
    commands: TrainCommand, convert: ConvertCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, logger = tmp_path / "run", Recording()
    monkeypatch.setattr("dsv3.metrics.loggers.NoLogger.open", logger.open)
    often = [
        "train.steps=4",
        "train.checkpoint_every=2",
        "train.export_hf_every=2",
        "schedule.warmup_steps=0",
    ]
    told = commands.train(run, *often, "train.stop_after=2").out
    first = record(run / "checkpoints" / "step-2")
    assert environment(run)["convergence"] == logger.config["convergence"] == first.convergence
    assert first.convergence in told
    assert first.config["data"]["path"] == str(commands.text.absolute())
    assert record(run / "hf" / "step-2") == first
    convert.must("dcp_to_hf", run, tmp_path / "exported")
    assert record(tmp_path / "exported") == first
    convert.must("hf_to_dcp", tmp_path / "exported", tmp_path / "dcp")
    assert record(tmp_path / "dcp") == first
    assert not list((tmp_path / "dcp" / "hf").glob(TRAINING_FILE))

    commands.must(f"resume={run}", "train.log_every=3", "train.microbatch_size=2")
    assert record(run / "checkpoints" / "step-4").convergence == first.convergence
    assert record(run / "checkpoints" / "step-4").history == []


@pytest.mark.slow
def test_a_learnt_change_on_resume_enters_the_history_and_the_hash(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run, twin = tmp_path / "run", tmp_path / "twin"
    short = ["train.steps=4", "train.evaluate_every=0", "schedule.warmup_steps=0"]
    commands.train(run, *short, "train.stop_after=2")
    before = record(run / "checkpoints" / "step-2").convergence
    commands.must(f"resume={run}", "optimizer.lr=1e-3")
    after = record(run / "checkpoints" / "step-4")
    assert after.history == [{"step": 2, "convergence": before}]
    assert environment(run)["convergence"] == after.convergence != before
    commands.train(twin, *short, "optimizer.lr=1e-3")
    assert record(twin / "checkpoints" / "step-4").convergence not in (before, after.convergence)
    assert rows(run)[3]["lr"] == rows(twin)[3]["lr"]


@pytest.mark.slow
def test_a_run_from_weights_knows_them_when_they_are_gone(commands: TrainCommand, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    short = ["train.steps=2", "train.evaluate_every=0", "schedule.warmup_steps=0"]
    commands.train(first, *short)
    start = record(first / "checkpoints" / "step-2")
    commands.train(second, *short, f"checkpoint.load={first}", "train.stop_after=1")
    begun = record(second / "checkpoints" / "step-1")
    assert begun.weights == f"{start.convergence}, step 2"
    assert begun.convergence != start.convergence
    shutil.rmtree(first)
    commands.must(f"resume={second}")
    assert record(second / "checkpoints" / "step-2").convergence == begun.convergence
