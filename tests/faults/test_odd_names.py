"""Names of files that are no UTF-8 go through a whole run: messages, logs, records, the next start."""

import os
from pathlib import Path

import pytest

from tests.data.texts import sentence
from tests.harness.commands import TrainCommand
from tests.harness.outcome import refused

ODD = os.fsdecode(b"r\xe9sum\xe9 \xff\xfe")
"""Bytes of Latin-1, which Python holds as lone surrogates."""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Write texts into a folder, of which the folder and a file have names that are no UTF-8."""
    folder = tmp_path / ODD
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(sentence(number))
    (folder / f"{ODD}.txt").write_text(sentence(99, words=200))  # the largest, which a run names
    (folder / f"{ODD}.bin").write_bytes(b"\xff\0")  # skipped, and named
    return folder


def test_a_run_on_such_files_in_such_a_folder(commands: TrainCommand, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / f"runs {ODD}" / ODD
    settings = [f"data.path={corpus}", "data.max_skipped=0.5", "train.steps=2", "train.stop_after=1"]
    commands.train(run, *settings, "train.checkpoint_every=1")
    resumed = commands.must(f"resume={run}")
    assert "Done" in resumed.out
    table = commands.must("task=compare", f"task.runs={run.parent}")
    assert "done" in table.out
    wrong = commands.run(f"checkpoint.load={run}/{ODD}", "task=generate")
    refused(wrong, "checkpoint.load=")
