"""Every optimizer of torch.optim is a choice with PyTorch's keys and defaults, or refused with a reason."""

import inspect
from dataclasses import MISSING, Field, fields, replace
from typing import Any

import pytest
import torch

from dsv3.config.optimizer import (
    ADAMW,
    TORCH,
    AdafactorConfig,
    AdamConfig,
    MuonConfig,
    OptimizerConfig,
    RMSpropConfig,
    RpropConfig,
    SGDConfig,
    refuse_without_schema,
)
from dsv3.config.registry import SCHEMAS
from dsv3.config.strict import is_argument
from dsv3.errors import InvalidValue, UserError
from tests.harness.commands import PlannedCommand

CHOICES = {name.partition("/")[2]: node for name, node in SCHEMAS.items() if name.startswith("optimizer/")}
OF_TORCH = {node._target_.removeprefix(TORCH): node for node in CHOICES.values() if node._target_ != ADAMW}
del OF_TORCH["dsv3.training.muon.Muon"]
# How PyTorch computes, and `maximize`: a loss is minimised.
LEFT_OUT = {"params", "foreach", "fused", "capturable", "differentiable", "maximize"}


def default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def test_every_class_of_torch_optim_is_a_choice_or_refused_with_its_reason() -> None:
    kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    classes = {name for name, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer)}
    assert classes - {"Optimizer"} == set(OF_TORCH) | {"AdamW", "LBFGS", "SparseAdam", "Muon"}
    for name in ("LBFGS", "SparseAdam", "Muon"):
        with pytest.raises(UserError, match=f"optimizer._target_=torch.optim.{name} is not possible: it "):
            refuse_without_schema(f"{TORCH}{name}")


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_schema_has_pytorchs_keys_and_defaults(name: str) -> None:
    schema = {f.name: default(f) for f in fields(OF_TORCH[name]) if is_argument(f) and f.name[0] != "_"}
    taken = inspect.signature(getattr(torch.optim, name)).parameters
    assert schema == {key: value.default for key, value in taken.items() if key not in LEFT_OUT}


@pytest.mark.parametrize(
    ("node", "key", "value"),
    [
        (AdamConfig(), "betas", (0.9, 1.0)),
        (AdamConfig(), "eps", 0.0),
        (SGDConfig(), "momentum", -0.1),
        (SGDConfig(), "nesterov", True),
        (SGDConfig(), "lr_scale", {"*": -1.0}),
        (RMSpropConfig(), "alpha", 1.5),
        (RpropConfig(), "etas", (1.5, 0.5)),
        (RpropConfig(), "no_decay", ["embedding.*"]),
        (AdafactorConfig(), "eps", (1e-3, None)),
        (AdafactorConfig(), "d", 0.5),
        (AdafactorConfig(), "beta2_decay", 0.1),
        (MuonConfig(), "momentum", 1.0),
        (MuonConfig(), "ns_steps", 0),
        (MuonConfig(), "ns_coefficients", (1.0, 2.0)),
        (MuonConfig(), "adamw_betas", (0.9, 1.0)),
        (MuonConfig(), "adamw_lr_scale", -1.0),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_training(
    node: OptimizerConfig, key: str, value: Any
) -> None:
    node.validate()
    changes: dict[str, Any] = {key: value}
    changed = replace(node, **changes)
    with pytest.raises(InvalidValue) as error:
        changed.validate()
    assert error.value.key.partition(".")[0] == key


@pytest.mark.parametrize(
    ("arguments", "choice", "values"),
    [
        (["optimizer._target_=torch.optim.SGD", "optimizer.momentum=0.9"], "sgd", {"momentum": 0.9}),
        (["optimizer._target_=torch.optim.AdamW", "optimizer.lr=1"], "adamw", {"lr": 1.0}),
        (
            ["optimizer=muon", "optimizer.lr_scale={embedding.*:0.1}"],
            "muon",
            {"lr_scale": {"embedding.*": 0.1}},
        ),
        (["optimizer=adafactor", "optimizer.eps=[1e-20,0.1]"], "adafactor", {"eps": [1e-20, 0.1]}),
    ],
)
def test_a_typed_target_is_the_choice_that_has_it(
    planned: PlannedCommand, arguments: list[str], choice: str, values: dict[str, Any]
) -> None:
    optimizer = planned.run(*arguments, "logger=none").job.config.optimizer
    assert type(optimizer) is CHOICES[choice]
    found = {key: getattr(optimizer, key) for key in values}
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()} == values


def test_a_typed_target_is_a_choice_of_any_group_and_a_class_without_one_is_told(
    planned: PlannedCommand,
) -> None:
    target = "schedule._target_=dsv3.training.schedule.WarmupStableDecay"
    schedule: Any = planned.run(target, "schedule.decay=0.5", "logger=none").job.config.schedule
    assert schedule.decay == 0.5
    refused = planned.run("optimizer._target_=torch.optim.LBFGS")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "LBFGS is not possible: it calls the loss several times per step" in refused.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "optimizer.no_decay=[layers.*.atention.*]",
            "matches 'layers.*.atention.*'. Did you mean 'layers.*.attention.*'?",
        ),
        ("optimizer.frozen=[embeding.weight]", "matches 'embeding.weight'. Did you mean 'embedding.weight'?"),
        (
            "optimizer.lr_scale={mtp.7.*:0.5}",
            "optimizer.lr_scale: no parameter of the model matches 'mtp.7.*'.",
        ),
        ("optimizer.frozen=[*]", "leaves no parameter to train"),
        (
            "optimizer=sgd precision.moments=bf16",
            "precision.moments=bf16 is not possible: only AdamW has them",
        ),
    ],
)
def test_a_pattern_is_checked_against_the_model_before_a_process_starts(
    planned: PlannedCommand, arguments: str, words: str
) -> None:
    outcome = planned.run(*arguments.split(), "logger=none")
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.splitlines()) <= 2
