"""Every file of conf/ composes, passes the strict check, and names classes that can be built."""

import json
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf

from dsv3.cli.help import train_help
from dsv3.config.registry import (
    CONF,
    LAYOUTS,
    RECIPES,
    SCHEMAS,
    choice_schema,
    config_groups,
    default_choices,
)
from dsv3.config.strict import build
from dsv3.errors import UserError
from tests.harness.composing import strict_config
from tests.hf.test_config_json import RELEASED_V3

MODELS = ("16b", "moonlight_16b", "236b", "671b", "kimi_k2")
PRESETS = ("fsdp", "hsdp", "tp_ep", "pp", "cp", "full")
CHOICES = [(group, choice) for group, choices in config_groups().items() for choice in choices]
# What a choice cannot do without, and what building it asks of the code that calls it.
NEEDED = {
    ("data", "text"): ["data.path=somewhere"],
    ("data", "tokens"): ["data.path=somewhere.npy"],
    ("data", "hf"): ["data.dataset=somewhere"],
    ("data", "shards"): ["data.path=somewhere"],
    ("data", "mixture"): ["+data.sources={{one:{{source:stdlib,weight:1}}}}"],
    ("tokenizer", "local"): ["tokenizer.path=somewhere"],
    ("model", "hf"): ["model.path={hf}"],
    ("task", "verify"): ["model=hf", "model.path={hf}"],
    ("task", "compare"): ["task.runs=somewhere"],
    ("task", "replay"): ["task.run=somewhere", "task.step=1"],
    ("task", "prepare"): ["task.input=[somewhere]", "task.output=somewhere"],
}


@pytest.fixture
def hf_directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_V3))
    return tmp_path


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_the_choice_composes_and_can_be_built(group: str, choice: str, hf_directory: Path) -> None:
    needed = [override.format(hf=hf_directory) for override in NEEDED.get((group, choice), [])]
    config = strict_config([f"{group}={choice}", *needed])
    node: Any = getattr(config, group, config)
    for target in targets(node):
        get_class(target)
    if group == "model":
        with torch.device("meta"):
            model = build(node, compute_dtype=torch.float32)
        assert model.head.weight.shape == (config.model.vocab_size, config.model.dim)
    elif group == "optimizer":
        optimizer = build(node, _partial_=True)(params=[torch.zeros(1, requires_grad=True)])
        assert optimizer.param_groups[0]["lr"] == config.optimizer.lr
    elif group == "parallel":
        assert (config.parallel.fsdp is None) is (choice == "none")
        if config.parallel.fsdp is not None:
            build(config.parallel.fsdp, reshard_after_forward=True)
    elif group == "schedule":
        config.schedule.total_steps = 100_000
        assert type(build(node)).__name__ == node._target_.rpartition(".")[2]
    elif (group, choice) == ("data", "tokens"):
        with pytest.raises(UserError, match=r"data\.path=somewhere\.npy does not exist"):
            build(node)
    elif hasattr(node, "_target_"):
        assert type(build(node)).__name__ == node._target_.rpartition(".")[2]


def targets(node: Any) -> list[str]:
    """Every `_target_` at and below a config dataclass."""
    found = [node._target_] if hasattr(node, "_target_") else []
    return found + [
        target for value in vars(node).values() if is_dataclass(value) for target in targets(value)
    ]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_class_that_a_schema_names_is_there(name: str) -> None:
    target = getattr(SCHEMAS[name], "_target_", None)
    if target is not None:
        assert get_class(target).__name__ == target.rpartition(".")[2]


def test_every_file_is_the_root_of_a_command_or_a_choice_that_help_lists() -> None:
    files = {path.relative_to(CONF) for path in CONF.rglob("*.yaml")}
    files |= {path.relative_to(CONF) for path in (CONF / "experiments").glob("*.yaml")}
    reachable = {Path(group, f"{choice}.yaml") for group, choice in CHOICES}
    roots = {Path(f"{name}.yaml") for name in ("config", "convert", LAYOUTS, RECIPES)}
    assert files <= reachable | roots
    assert {Path(group, f"{choice}.yaml") for group, choice in CHOICES if choice_schema(group, choice)} == (
        reachable - files
    )


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}={path.stem}"
)
def test_a_file_of_conf_says_more_than_the_schema_it_extends(path: Path) -> None:
    assert set(yaml.safe_load(path.read_text())) - {"defaults"}, (
        "the schema alone is the choice: delete the file"
    )


def test_every_group_is_in_the_defaults_of_the_root() -> None:
    assert set(default_choices()) == set(config_groups())


def test_help_lists_every_choice_and_marks_the_default() -> None:
    lines = train_help("train.py").splitlines()
    # A group's line says what it is for, the next one lists the choices.
    listed = {
        line.split()[0]: below.split()
        for line, below in pairwise(lines)
        if line.startswith("  ") and line.split()
    }
    for group, choices in config_groups().items():
        default = default_choices()[group]
        marked = [f"{choice}*" if choice == default else choice for choice in choices]
        assert listed[group] == marked
        assert default is None or f"{default}*" in marked


def test_numbers_of_conf_are_keys_of_the_schema_they_extend() -> None:
    for group, choice in CHOICES:
        if choice_schema(group, choice):
            continue
        text = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
        if group == "experiments":
            continue
        schema = text.pop("defaults")[0]
        name = next(iter(schema)) if isinstance(schema, dict) else schema
        node = SCHEMAS[name.removeprefix("/schema/").removesuffix("@_here_")]
        OmegaConf.merge(OmegaConf.structured(node), text)
