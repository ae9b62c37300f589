"""The tiny model with a past and a checkpoint of it."""

from pathlib import Path

import pytest

from tests.harness.trained import Trained


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return a run directory with a tokenizer in it."""
    tokenizer = tmp_path / "run" / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    return tmp_path / "run"


@pytest.fixture
def trained() -> Trained:
    """Return the tiny model after a step."""
    return Trained(seed=0)


@pytest.fixture
def step(run_dir: Path, trained: Trained) -> Path:
    """Return a checkpoint of `trained`."""
    return trained.save(run_dir)
