"""A run that was interrupted is, bit for bit, the run that was not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.checkpoint.directory import Progress, complete_steps
from dsv3.checkpoint.manager import CheckpointManager
from tests.harness.checkpoints import last_tensors
from tests.harness.commands import TrainCommand
from tests.harness.runs import rows
from tests.harness.trained import killed_in_step

pytestmark = pytest.mark.slow

VARIANTS = {
    "plain": [],
    "microbatches": ["train.microbatch_size=2"],
    "document mask": ["data.document_mask=true"],
    "bf16": ["precision=bf16"],
    "bf16 moments": ["precision.moments=bf16"],
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    commands: TrainCommand, tmp_path: Path, settings: list[str]
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    commands.train(straight, *settings)
    commands.train(stopped, *settings, "train.stop_after=5")
    assert [row["step"] for row in rows(stopped)] == [1, 2, 3, 4, 5]
    commands.must(f"resume={stopped}")
    assert rows(stopped) == rows(straight)
    assert [row["step"] for row in rows(stopped)] == list(range(1, 9))
    assert last_tensors(stopped) == last_tensors(straight)


def test_the_variants_do_not_train_the_same(commands: TrainCommand, tmp_path: Path) -> None:
    """A setting without effect would make its test above show nothing; microbatches may round alike."""
    finals = set()
    for name in ("plain", "document mask", "bf16", "bf16 moments"):
        commands.train(tmp_path / name, *VARIANTS[name], "train.steps=3")
        finals.add(last_tensors(tmp_path / name)["model.embedding.weight"])
    assert len(finals) == 4


def test_a_kill_between_checkpoints_leaves_each_step_once(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    settings = ["train.checkpoint_every=3", "train.log_every=1"]
    commands.train(straight, *settings)
    with killed_in_step(monkeypatch, 6):
        commands.train(killed, *settings)
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4, 5]
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    assert [path.name for path in complete_steps(killed)] == ["step-3"]
    commands.must(f"resume={killed}")
    assert rows(killed) == rows(straight)
    assert last_tensors(killed) == last_tensors(straight)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(commands: TrainCommand, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    commands.train(straight, "train.steps=3")
    commands.train(killed, "train.steps=3", "train.stop_after=2")
    for path in complete_steps(killed):
        path.rename(path.with_name(f".partial-{path.name}"))
    commands.must(f"resume={killed}")
    assert rows(killed) == rows(straight)
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {"step-3", "latest"}
    assert last_tensors(killed) == last_tensors(straight)


def test_resuming_a_finished_run_changes_no_row_and_no_checkpoint(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    commands.train(run, "train.steps=2")
    before = (run / "metrics.jsonl").read_bytes(), _listing(run / "checkpoints")
    commands.must(f"resume={run}")
    assert ((run / "metrics.jsonl").read_bytes(), _listing(run / "checkpoints")) == before


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every path below with its size and the time of its last change."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


def test_evaluating_a_run_writes_nothing_there_and_gives_its_held_out_loss(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    commands.train(run)
    before = _listing(run)
    outcome = commands.must("task=evaluate", f"checkpoint.load={run}")
    assert _listing(run) == before
    result = json.loads(outcome.out.splitlines()[-1])
    assert result["loss"] == rows(run)[-1]["evaluation_loss"]
    assert result["perplexity"] == pytest.approx(np.exp(result["loss"]))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_given_ids_train_and_are_scored_once_each(
    commands: TrainCommand, tmp_path: Path, dtype: type
) -> None:
    run, file = tmp_path / "run", tmp_path / "ids, of mine.npy"
    count, width = 24, 17
    np.save(file, np.random.default_rng(0).integers(0, 300, (count, width)).astype(dtype))
    data = ["data=tokens", f"data.path={file}"]
    commands.train(run, *data, "train.steps=3", "train.sequence_length=null")
    tokens = [row["tokens"] for row in rows(run)]
    assert tokens == [4 * (width - 1) * step for step in (1, 2, 3)]
    result = json.loads(commands.must("task=evaluate", f"checkpoint.load={run}", *data).out.splitlines()[-1])
    assert result["tokens"] == count * (width - 1)
    assert 0 < result["loss"] < 10


def test_the_rows_up_to_a_checkpoint_are_on_the_disk_before_it_is(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill right after a checkpoint would otherwise leave a gap: the console is told every 100 steps."""
    save, seen = CheckpointManager.save, []

    def watched(self: CheckpointManager, model: Any, optimizer: Any, progress: Progress, wait: bool) -> Path:
        seen.append((progress.step, len(rows(tmp_path / "run"))))
        return save(self, model, optimizer, progress, wait)

    monkeypatch.setattr(CheckpointManager, "save", watched)
    commands.train(tmp_path / "run", "train.steps=4", "train.checkpoint_every=3", "train.log_every=100")
    assert seen == [(3, 3), (4, 4)]
