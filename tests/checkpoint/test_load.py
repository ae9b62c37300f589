"""Loading: a checkpoint of another model is told before memory is taken, and nothing is left to chance."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from dsv3.checkpoint.load import load_weights, require_weights
from dsv3.errors import UserError
from dsv3.library import compose, load_model
from dsv3.model.initialization import NormalValues
from dsv3.parallel.parallelize import build_model
from tests.convert.releases import write_release
from tests.harness.commands import TrainCommand
from tests.harness.composing import strict_config
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


def test_a_load_takes_no_memory_for_another_model_and_draws_no_weight(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    commands.train(run, "train.steps=2", "train.stop_after=1", "train.evaluate_every=0")

    def never(*arguments: object) -> None:
        raise AssertionError("memory was taken for a model that the checkpoint is not of, or weights drawn")

    with monkeypatch.context() as patch:
        patch.setattr("dsv3.tasks.setup.build_parallel_model", never)
        other = [*(item for item in MODEL if "model.dim=" not in item), "model=debug", "model.dim=64"]
        outcome = commands.run("task=generate", f"checkpoint.load={run}", *other)
        assert outcome.code == 2, outcome.err
        assert "'model.embedding.weight' has shape [300, 32], the model needs [300, 64]" in outcome.err
    monkeypatch.setattr(NormalValues, "fill", never)
    text = ["data=text", f"data.path={commands.text}"]
    commands.must("task=evaluate", f"checkpoint.load={run}", *text)
    commands.must("task=generate", f"checkpoint.load={run}", "task.prompt=a", "task.max_tokens=2")
    commands.must(f"resume={run}")
    commands.train(tmp_path / "tuned", f"checkpoint.load={run}", "train.steps=1", "train.evaluate_every=0")
    assert all(
        tensor.isfinite().all() for tensor in load_model(compose([f"checkpoint.load={run}"])).buffers()
    )
    with pytest.raises(AssertionError):
        commands.train(tmp_path / "fresh")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function after which DCP no longer plans one read into tensors whose names hold a text."""
    plan = DefaultLoadPlanner.create_local_plan

    def leave_out(part: str) -> None:
        def shorter(planner: DefaultLoadPlanner) -> Any:
            planned = plan(planner)
            planned.items.remove([item for item in planned.items if part in item.dest_index.fqn][-1])
            return planned

        monkeypatch.setattr(DefaultLoadPlanner, "create_local_plan", shorter)

    return leave_out


def test_weights_that_nothing_fills_are_refused(
    without: Callable[[str], None], trained: Trained, run_dir: Path, tmp_path: Path
) -> None:
    config = strict_config(MODEL)
    write_release(tmp_path / "hf", config.model)
    stored = [trained.save(run_dir), tmp_path / "hf"]
    model = build_model(config, None, torch.device("cpu"), initial=False)
    for directory in stored:
        state = model.state_dict()
        for tensor in state.values():
            assert tensor.isnan().all() or directory is not stored[0]  # nothing was drawn
            tensor.fill_(torch.nan)
        load_weights([model], directory)
        assert not any(tensor.isnan().any() for tensor in state.values())
    for part in ("embedding.weight", "experts.down_proj", "selection_bias", "1.ffn_norm"):
        without(part)
        for directory in stored:
            with pytest.raises(UserError, match=rf"leaves values of 'model\..*{part}.*' unset"):
                load_weights([model], directory)  # the values of the load before are no answer


def test_optimizer_state_that_nothing_fills_is_refused(
    without: Callable[[str], None], trained: Trained, run_dir: Path
) -> None:
    trained.save(run_dir)
    without("exp_avg_sq")
    with pytest.raises(UserError, match=r"leaves values of 'optimizer\.state\..*exp_avg_sq' unset"):
        Trained(seed=1).restore(run_dir)
