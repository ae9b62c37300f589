"""Every long part of a run is a phase that moves: it says how far it is, and a stop ends it."""

import json
import os
import signal
from collections import defaultdict
from pathlib import Path

import pytest

from dsv3.checkpoint.directory import complete_steps
from dsv3.distributed.heartbeat import HEARTBEAT
from dsv3.metrics import progress
from tests.harness.commands import TrainCommand
from tests.harness.tiny import MODEL, TRAINING

MOVING = [
    "reading ",
    "tokenizing the held-out text",
    "tokenizing the training text",
    "initializing weights",
    "computing the held-out loss",
    "sampling",
    "exporting ",
    "saving step 2",
    "computing digests of ",
    "verifying ",
    "loading ",
]
"""Beginnings of the titles of phases that tell how far they are."""

SAID = [
    "setting up device and process group",
    "training the tokenizer on ",
    "building the model",
    "making the run directory",
    "starting the logger",
    "taking step 1",
    "waiting for the checkpoint before to be written",
    "making room for the optimizer's state",
    "finishing the logger",
    "drawing loss.png",
]
"""Those that are one call; the slowest have a bound of their own."""


def test_all_that_may_take_long_is_a_phase_and_a_phase_with_a_total_gets_there(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[progress.Phase] = []
    beats: dict[str, int] = defaultdict(int)
    created, advance = progress.Phase.__init__, progress.Phase.advance

    def create(phase: progress.Phase, *arguments: object, **named: object) -> None:
        created(phase, *arguments, **named)  # type: ignore[arg-type]
        phases.append(phase)

    def beat(phase: progress.Phase, count: int = 1) -> None:
        before = HEARTBEAT.count
        advance(phase, count)
        beats[phase.title] += HEARTBEAT.count - before

    monkeypatch.setattr(progress.Phase, "__init__", create)
    monkeypatch.setattr(progress.Phase, "advance", beat)
    often = [f"train.{name}_every=1" for name in ("evaluate", "generate", "export_hf")]
    commands.train(
        tmp_path / "run",
        "train.steps=4",
        "train.stop_after=2",
        "data.cache_dir=cache",
        *often,
    )
    commands.must(f"resume={tmp_path / 'run'}", "train.stop_after=3")
    titles = [phase.title for phase in phases]
    for title in [*MOVING, *SAID]:
        assert any(each.startswith(title) for each in titles), title
    for title in MOVING:
        found = [phase for phase in phases if phase.title.startswith(title)]
        assert sum(beats[phase.title] for phase in found) > 0, title
    whole = {phase.title for phase in phases if phase.total is not None and phase.done >= phase.total}
    assert {phase.title for phase in phases if phase.total is not None} == whole  # a cache may spare it later


def test_a_stop_during_an_evaluation_ends_it_saves_and_exits_75(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    advance = progress.Phase.advance

    def interrupted(phase: progress.Phase, count: int = 1) -> None:
        if phase.title == "computing the held-out loss" and json.loads(rows()[-1])["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(phase, count)

    def rows() -> list[str]:
        return (run / "metrics.jsonl").read_text().splitlines() or ['{"step": 0}']

    monkeypatch.setattr(progress.Phase, "advance", interrupted)
    settings = [*MODEL, *TRAINING, "train.evaluate_every=3", "train.log_every=1", "train.microbatch_size=1"]
    stopped = commands.run(
        *settings, "train.steps=9", "data=text", f"data.path={commands.text}", f"run.dir={run}"
    )
    assert (stopped.code, stopped.err.count("stopped after step 3 and saved; go on: ")) == (75, 1), (
        stopped.err
    )
    found = [json.loads(line) for line in rows()]
    assert [row["step"] for row in found] == [1, 2, 3]
    assert found[-1]["evaluation_loss"] is None
    assert [step.name for step in complete_steps(run)] == ["step-3"]
