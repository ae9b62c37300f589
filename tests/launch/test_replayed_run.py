"""The way to a step of a run: its checkpoint, the config of its time, and what the run skipped or undid."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3.checkpoint.directory import Progress, step_directory
from dsv3.config.data import ROW_ORDER
from dsv3.errors import UserError
from dsv3.launch.replayed_run import ReplayedRun, Timeline, read_rows
from tests.harness.runs import StoredRun
from tests.harness.tiny import MODEL, TRAINING

SIZE = 4
"""Sequences per step."""


class Run:
    """A run directory with checkpoints that hold no tensors."""

    def __init__(self, stored: StoredRun, *overrides: str) -> None:
        self.directory = stored.store(*MODEL, *TRAINING, *overrides)
        self.config: dict[str, Any] = yaml.safe_load((self.directory / "config.yaml").read_text())
        self.environment(world_size=2)

    def environment(self, **values: Any) -> None:
        """Write environment.json."""
        content = {"data": {"fingerprint": "now", "row_order": ROW_ORDER}, **values}
        (self.directory / "environment.json").write_text(json.dumps(content))

    def save(self, step: int, lr: float | None = None, samples: int | None = None, **record: Any) -> Path:
        """Write what describes a checkpoint; `lr` is the learning rate of its time."""
        config = json.loads(json.dumps(self.config))
        if lr is not None:
            config["optimizer"]["lr"] = lr
        directory = step_directory(self.directory, step)
        directory.mkdir(parents=True)
        Progress(step, SIZE * step if samples is None else samples).write(directory)
        known = {"convergence": "c", "data_fingerprint": "now", "tokenizer_fingerprint": None, "step": step}
        content = {**known, "config": config, "row_order": ROW_ORDER, **record}
        (directory / "training.yaml").write_text(yaml.safe_dump(content))
        state = json.loads((directory / "state.json").read_text())
        state.pop("manifest")
        (directory / "state.json").write_text(json.dumps(state))
        return directory

    def at(self, step: int) -> ReplayedRun:
        """Return the way to a step."""
        return ReplayedRun.read(self.directory, step)


@pytest.fixture
def run(stored: StoredRun) -> Run:
    """A run without checkpoints."""
    return Run(stored)


def test_the_way_begins_at_the_newest_checkpoint_before_the_step(run: Run) -> None:
    assert (run.at(3).checkpoint, run.at(3).first_step) == (None, 1)
    three, six = run.save(3), run.save(6)
    assert [run.at(step).checkpoint for step in (3, 4, 6, 7)] == [None, three, three, six]
    assert [run.at(step).first_step for step in (3, 4, 6, 7)] == [1, 4, 4, 7]


def test_the_config_is_that_of_the_time_of_the_step(run: Run) -> None:
    changed = [{"step": 6, "convergence": "a"}]
    run.save(3, lr=0.5)
    run.save(6, lr=0.5)
    run.save(9, lr=0.25, history=changed)
    rates = [run.at(step).stored.config["optimizer"]["lr"] for step in (2, 3, 5, 6, 7, 9)]
    assert rates == [0.5, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert run.at(10).stored.config["optimizer"]["lr"] == run.config["optimizer"]["lr"]


def test_a_step_whose_config_or_way_is_gone_is_refused_and_what_is_left_told(run: Run) -> None:
    run.save(9, history=[{"step": 6, "convergence": "a"}])
    with pytest.raises(
        UserError, match="changed its config or its data after step 6, and no checkpoint from step 5"
    ):
        run.at(5)
    with pytest.raises(
        UserError, match=r"after step 6, and no checkpoint from there to step 7 is left; .*: step-9"
    ):
        run.at(8)
    assert run.at(10).checkpoint == step_directory(run.directory, 9)
    older = {"what": "w", "effect": "e", "from": "before", "to": "now", "step": 9}
    run.save(12, history=[{"step": 6, "convergence": "a"}], data_changes=[older])
    assert run.at(11).data_fingerprint == "now"
    assert run.at(10).data_fingerprint == "now"


def test_data_that_changed_later_is_not_that_of_the_step(run: Run) -> None:
    change = {"what": "w", "effect": "e", "from": "before", "to": "now", "step": 6}
    run.save(3, data_fingerprint="before")
    run.save(6, data_fingerprint="before")
    run.save(9, data_changes=[change])
    assert [run.at(step).data_fingerprint for step in (3, 6, 7)] == ["before", "before", "now"]
    shutil.rmtree(step_directory(run.directory, 6))  # a later checkpoint tells of the change
    assert run.at(5).data_fingerprint == "before"


def test_rows_of_older_code_come_in_an_order_that_is_not_known(run: Run) -> None:
    run.save(3, row_order=ROW_ORDER - 1)
    with pytest.raises(UserError, match="older code trained"):
        run.at(2)


def test_the_weights_that_a_run_began_with_must_be_the_same(stored: StoredRun, tmp_path: Path) -> None:
    run = Run(stored)
    first = Run(StoredRun(tmp_path / "first")).save(8)
    (first / ".metadata").write_bytes(b"")
    run.config["checkpoint"]["load"] = str(first)
    (run.directory / "config.yaml").write_text(yaml.safe_dump(run.config))
    run.environment(weights="c, step 8")
    assert run.at(2).checkpoint is None
    run.environment(weights="c, step 7")
    with pytest.raises(
        UserError, match=r"no checkpoint comes before it, .* holds other weights now; no checkpoint"
    ):
        run.at(2)
    run.config["checkpoint"]["load"] = str(tmp_path / "gone")
    (run.directory / "config.yaml").write_text(yaml.safe_dump(run.config))
    with pytest.raises(UserError, match="which is not there"):
        run.at(2)
    run.save(1)
    assert run.at(2).first_step == 2


@pytest.mark.parametrize(
    ("typed", "ranks", "microbatch"),
    [
        ([], 2, 7),
        (["precision=fp32"], 2, 7),
        (["launch.timeout=9"], 2, 7),
        (["parallel=none"], None, None),
        (["parallel.degrees.tp=1"], None, None),
        (["launch.nproc=4"], None, None),
    ],
)
def test_the_layout_is_the_run_s_unless_one_is_typed(
    run: Run, typed: list[str], ranks: int | None, microbatch: int | None
) -> None:
    run.config["train"] |= {"microbatch_size": 7, "callbacks": {"mine": {"_target_": "mine.Mine"}}}
    run.config["launch"] = {"_target_": "", "nproc": None, "timeout": 77, "max_restarts": 3, "nnodes": 2}
    (run.directory / "config.yaml").write_text(yaml.safe_dump(run.config))
    defaults = run.at(1).defaults(typed, [])
    launch = defaults.defaults["launch"]
    assert (launch.nproc, launch.nnodes, launch.timeout, launch.max_restarts) == (ranks, 1, 77, 0)
    assert defaults.values["train"].get("microbatch_size") == microbatch
    assert "callbacks" not in defaults.values["train"]
    assert defaults.values["checkpoint"]["async_save"] is False
    assert "train.callbacks.mine" in run.at(1).notes[0]


def test_ranks_of_another_layout_are_not_those_of_the_step(run: Run) -> None:
    run.save(3)
    assert run.at(3).world_size == 2
    run.config["parallel"]["degrees"]["dp_shard"] = 4
    (run.directory / "config.yaml").write_text(yaml.safe_dump(run.config))
    assert run.at(3).world_size is None
    assert run.at(4).world_size == 2


REWIND = {"kind": "rewind", "step": 6, "from_step": 9, "samples": [24, 36]}


def skip(step: int, first: int) -> dict[str, Any]:
    """Return the entry of a step that was skipped."""
    return {"kind": "nonfinite", "step": step, "skipped": True, "samples": [first, first + SIZE]}


def test_what_a_rewind_has_undone_is_no_part_of_the_history() -> None:
    found = Timeline.of([skip(2, 4), skip(8, 28), {"kind": "alarm", "step": 9}, REWIND, skip(7, 36)])
    assert sorted(found.skipped) == [2, 7]
    assert found.skipped[7]["samples"] == [36, 40]
    assert found.jumps == {6: (24, 36)}
    # From a checkpoint of before the rewind and one of after it the same sequences come.
    assert [found.first_sample(Progress(6, samples)) for samples in (24, 36)] == [36, 36]
    assert found.first_sample(Progress(5, 20)) == 20
    assert found.first_sample(Progress(7, 40)) == 40
    again = Timeline.of([REWIND, skip(8, 40), {**REWIND, "samples": [24, 48]}])
    assert (again.skipped, again.jumps) == ({}, {6: (24, 48)})
    deeper = Timeline.of([REWIND, {**REWIND, "step": 3, "samples": [12, 52]}])
    assert deeper.jumps == {3: (12, 52)}


def test_a_checkpoint_of_undone_steps_is_not_on_the_way(run: Run) -> None:
    six = run.save(6)
    run.save(9)
    (run.directory / "accidents.jsonl").write_text(json.dumps(REWIND) + "\n")
    assert run.at(10).checkpoint == six
    twelve = run.save(12, samples=60)
    assert run.at(13).checkpoint == twelve


def test_rows_are_read_from_a_file_that_is_being_written(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "tokens": step, "loss": step / 2}) for step in (1, 2, 3, 2)]
    lines[3] = lines[3].replace("1.0", "9.0")
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "tok']))
    rows, span = read_rows(tmp_path, 2, 3)
    assert ({step: row.loss for step, row in rows.items()}, span) == ({2: 9.0, 3: 1.5}, (1, 3))
    assert read_rows(tmp_path / "none", 1, 9) == ({}, None)
