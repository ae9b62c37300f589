"""A checkpoint of another model is told before memory is taken."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsv3.checkpoint.load import require_weights
from dsv3.errors import UserError
from tests.harness.commands import TrainCommand
from tests.harness.tiny import MODEL
from tests.harness.trained import Trained


def test_names_and_shapes_are_the_models(step: Path, trained: Trained) -> None:
    config = trained.model.config
    require_weights(config, step)
    require_weights(replace(config, mtp_depths=0), step)
    with pytest.raises(UserError, match=r"no tensor 'model\.layers\.2\."):
        require_weights(replace(config, num_layers=3), step)
    with pytest.raises(UserError, match=r"'model\.embedding\.weight' has shape \[300, 32\]"):
        require_weights(replace(config, vocab_size=24), step)


def test_generating_with_another_model_takes_no_memory(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.train(tmp_path / "run", "train.steps=1", "train.evaluate_every=0")

    def never(*arguments: object) -> None:
        raise AssertionError("memory was taken for a model that the checkpoint is not of")

    monkeypatch.setattr("dsv3.tasks.setup.build_parallel_model", never)
    other = [*(item for item in MODEL if "model.dim=" not in item), "model=debug", "model.dim=64"]
    outcome = commands.run("task=generate", f"checkpoint.load={tmp_path / 'run'}", *other)
    assert outcome.code == 2, outcome.err
    assert "'model.embedding.weight' has shape [300, 32], the model needs [300, 64]" in outcome.err
