"""The optimizer's state on a resume: taken up, begun anew where there is none, refused of another one."""

from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.optimizer import AdagradConfig, AdamConfig, AdamWConfig, OptimizerConfig, SGDConfig
from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.training.optimizer import build_optimizer, freeze
from tests.harness.trained import ALONE
from tests.reference import tiny_model


def optimizer_of(node: OptimizerConfig, seed: int = 0) -> tuple[Transformer, torch.optim.Optimizer]:
    model = tiny_model(seed=seed)
    freeze(model, node.frozen)
    return model, build_optimizer(node, [model])


def step(model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()


def save(run_dir: Path, node: OptimizerConfig) -> None:
    model, optimizer = optimizer_of(node)
    step(model, optimizer)
    CheckpointManager(run_dir, CheckpointConfig(async_save=False), ALONE).save(
        [model], optimizer, Progress(1)
    )


def resume(run_dir: Path, node: OptimizerConfig) -> tuple[Transformer, torch.optim.Optimizer, list[str]]:
    model, optimizer = optimizer_of(node, seed=1)
    manager = CheckpointManager(run_dir, CheckpointConfig(), ALONE)
    assert manager.restore([model], optimizer) == Progress(1)
    return model, optimizer, manager.notes


@pytest.mark.parametrize("node", [AdamWConfig, AdagradConfig])
def test_what_was_frozen_begins_with_new_state_and_the_run_says_so(
    run_dir: Path, node: type[OptimizerConfig]
) -> None:
    save(run_dir, node(frozen=["embedding.*", "layers.0.*"]))
    model, optimizer, (note,) = resume(run_dir, node(frozen=["layers.0.*"]))
    assert note == "step-1 has no optimizer state of 1 parameters, it begins anew: embedding.weight"
    start = optimizer_of(node())[1].state
    assert not any(value.any() for state in start.values() for value in state.values())
    assert all(not value.any() for value in optimizer.state[model.embedding.weight].values())
    assert all(bool(value.any()) for value in optimizer.state[model.head.weight].values())
    step(model, optimizer)
    assert optimizer.state[model.embedding.weight]["step"] == 1
    assert optimizer.state[model.head.weight]["step"] == 2


def test_what_is_frozen_from_now_on_loses_its_state_without_a_word(run_dir: Path) -> None:
    save(run_dir, AdamWConfig())
    model, optimizer, notes = resume(run_dir, AdamWConfig(frozen=["embedding.*"]))
    assert notes == []
    assert model.embedding.weight not in optimizer.state
    assert torch.equal(model.embedding.weight, tiny_after_a_step().embedding.weight)


def tiny_after_a_step() -> Transformer:
    model, optimizer = optimizer_of(AdamWConfig())
    step(model, optimizer)
    return model


@pytest.mark.parametrize(
    ("saved", "resumed", "kinds"),
    [
        (AdamWConfig(), SGDConfig(momentum=0.9), "momentum_buffer"),
        (AdamConfig(), AdamConfig(amsgrad=True), "max_exp_avg_sq"),
    ],
)
def test_state_of_another_optimizer_is_refused_with_the_way_to_start_anew(
    run_dir: Path, saved: OptimizerConfig, resumed: OptimizerConfig, kinds: str
) -> None:
    save(run_dir, saved)
    with pytest.raises(UserError) as error:
        resume(run_dir, resumed)
    assert f"step-1 was saved by another optimizer: it has no {kinds}\n" in str(error.value)
    assert f"checkpoint.load={run_dir}" in str(error.value)


def test_an_optimizer_without_state_is_resumed_by_one_with_and_the_other_way_round(run_dir: Path) -> None:
    save(run_dir, SGDConfig())
    notes = resume(run_dir, SGDConfig(momentum=0.9))[2]
    assert [note.partition(":")[0].endswith("it begins anew") for note in notes] == [True]
    assert resume(run_dir, SGDConfig())[2] == []
