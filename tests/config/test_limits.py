"""Every number of every schema, at and beyond its limit: refused in a line, or planned for."""

import contextlib
import copy
import json
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import dsv3.config.root  # noqa: F401  # registers every schema
from dsv3.config.limits import EXPERTS, ITEMS, LARGEST, LIMITS, REAL, WHOLE, most, require_within
from dsv3.config.model import ModelConfig
from dsv3.config.registry import SCHEMAS
from dsv3.config.root import Config
from dsv3.config.strict import validate
from dsv3.errors import InvalidValue, UserError
from dsv3.hf.config_json import model_from_hf
from dsv3.hf.config_writer import config_json
from dsv3.launch.checkpoint_defaults import read_model
from dsv3.launch.job import plan_job
from tests.harness.commands import PlannedCommand
from tests.harness.composing import strict_config
from tests.harness.outcome import refused

HUGE = [0, -1, 10**9, 2**63, 10**30, math.nan, math.inf, -math.inf]

ALL = ("model", "parallel", "train", "launch", "hardware")

LAYOUTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "debug": (["task=plan"], ALL),
    "671b on 2,048 GPUs": (
        ["task=plan", "model=671b", "parallel=full", "hardware=h800", "launch.world_size=2048"],
        ("model",),
    ),
    "a pipeline": (
        ["parallel=pp", "model.num_layers=4", "task=plan", "launch.world_size=2"],
        ("train", "parallel"),
    ),
}
"""By name, overrides and the groups whose numbers are planned for."""


class NumberKey(NamedTuple):
    """A key that holds numbers: where it is, and how."""

    path: tuple[str, ...]
    """Names of fields from the root schema."""
    schema: type
    kinds: frozenset[type]
    """int, float or both."""
    many: Any
    """list, tuple or dict around the numbers, or None."""

    @property
    def limit(self) -> int | float:
        return most(self.schema, self.path[-1], int if int in self.kinds else float)

    def wrapped(self, value: Any, old: Any) -> Any:
        """Return `value` in the form that the key has, as long as the `old` one."""
        count = max(1, len(old)) if isinstance(old, list | tuple | dict) else 1
        if self.many is dict:
            return {"embedding": value}
        return self.many([value] * count) if self.many else value


def _inside(hint: Any) -> set[Any]:
    arguments = [each for each in get_args(hint) if each not in (type(None), Ellipsis)]
    return set().union(*map(_inside, arguments)) if arguments else {hint}


def number_keys(schema: type, path: tuple[str, ...] = ()) -> Iterator[NumberKey]:
    hints = get_type_hints(schema)
    for name in (field.name for field in fields(schema) if not field.name.startswith("_")):
        kinds = _inside(hints[name])
        nested: Any = next(filter(is_dataclass, kinds), None)
        if nested is not None:
            yield from number_keys(nested, (*path, name))
        elif kinds & {int, float}:
            origins = {get_origin(each) for each in (hints[name], *get_args(hints[name]))}
            many = next((each for each in (list, tuple, dict) if each in origins), None)
            yield NumberKey((*path, name), schema, frozenset(kinds & {int, float}), many)


@cache
def base(layout: str) -> Config:
    """Return a checked config, to be copied."""
    return strict_config(LAYOUTS[layout][0])


def _changed(config: Any, key: NumberKey, value: Any) -> Any:
    """Return a copy of a config in which a key has a value; None where this config has no such key."""
    node = config = copy.deepcopy(config)
    for name in key.path[:-1]:
        node = getattr(node, name, None)
    if not hasattr(node, key.path[-1]):
        return None
    setattr(node, key.path[-1], key.wrapped(value, getattr(node, key.path[-1])))
    return config


def _told(error: UserError) -> None:
    assert len(str(error)) < 500, error
    assert len(str(error).splitlines()) <= 2, error


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_of_a_config_is_refused_or_planned_for(layout: str) -> None:
    """Also the largest that is allowed, so that no limit is too wide: a hang here is a failure."""
    beyond, planned = 0, LAYOUTS[layout][1]
    for key in number_keys(Config):
        whole, large = float not in key.kinds, layout != "debug"
        largest = key.limit // 8 * 8 if whole else key.limit  # a width is a multiple of 8
        if large and key.path[0] not in planned:
            continue
        for value in [largest] if large else [*HUGE, largest]:
            if whole and isinstance(value, float):
                continue  # of another type, which OmegaConf refuses: the test of stored values
            config = _changed(base(layout), key, value)
            if config is None:
                continue
            is_beyond = not abs(value) <= key.limit
            beyond += is_beyond
            try:
                validate(config)
                if key.path[0] in planned:
                    plan_job(config, [])
                # A key may say that it has no bound: inf switches it off.
                assert not is_beyond or abs(value) == math.inf, (key, value)
            except UserError as error:
                _told(error)
    assert beyond > 200 or layout != "debug"


def test_every_stored_number_becomes_a_value_or_is_refused() -> None:
    """Of every schema, as YAML has it: OmegaConf converts it, and the strict check looks at the result."""
    for name, schema in SCHEMAS.items():
        stored: Any = OmegaConf.structured(schema)
        sound = None
        with contextlib.suppress(OmegaConfBaseException):  # without values it is no config
            sound = OmegaConf.to_object(stored)
        for key in number_keys(schema) if name != "config" else ():
            node = OmegaConf.select(stored, ".".join(key.path[:-1])) if key.path[1:] else stored
            for value in (*HUGE, 1e300, -1e300) if node is not None else ():
                found: Any = copy.copy(node)
                with contextlib.suppress(OmegaConfBaseException):
                    found[key.path[-1]] = key.wrapped(value, None)
                changed = None if sound is None else _changed(sound, key, value)
                try:
                    if changed is not None:
                        validate(changed)
                except UserError as error:
                    _told(error)


def test_the_table_names_fields_that_exist() -> None:
    keys = {(key.schema, key.path[-1]) for schema in SCHEMAS.values() for key in number_keys(schema)}
    known = {(base.__name__, field) for schema, field in keys for base in schema.__mro__}
    assert {(name, field) for name, values in LIMITS.items() for field in values} <= known


def test_limits_count_both_ways_in_lists_and_below_zero() -> None:
    value: Any
    for value in (LARGEST + 1, -LARGEST - 1, [1, 10**30], (1e19, 0.0)):
        with pytest.raises(InvalidValue, match="must be at most"):
            require_within(ModelConfig, "anything", "key", value)
    with pytest.raises(InvalidValue, match="at least -9,007,199,254,740,992"):
        require_within(ModelConfig, "anything", "key", -(10**30))
    with pytest.raises(InvalidValue, match="must have at most 10,000"):
        require_within(ModelConfig, "anything", "key", [0] * (ITEMS + 1))
    for value in (WHOLE, -WHOLE, REAL, True, None, "word", [1, 2], "9" * 99):
        require_within(ModelConfig, "anything", "key", value)


def test_layers_and_experts_are_bounded_together() -> None:
    config = _changed(
        base("debug"), NumberKey(("model", "num_layers"), ModelConfig, frozenset({int}), None), 1024
    )
    config.model.moe.num_experts = 2**16
    with pytest.raises(InvalidValue, match=rf"moe.num_experts=65536 .* at most {EXPERTS // 1024:,} with"):
        validate(config)


TYPED = {
    "model.num_layers=1e9": ("model.num_layers=1000000000", "at most 1,024"),
    f"model.moe.num_experts={10**30}": ("model.moe.num_experts", "at most 65,536"),
    "model.mtp_depths=1e9": ("model.mtp_depths=1000000000", "at most 64"),
    "train.steps=.inf": ("train.steps", "whole number"),
    "schedule.total_steps=nan": ("schedule.total_steps", "whole number"),
    f"train.global_batch_size={2**63}": ("train.global_batch_size", "at most 131,072"),
    "optimizer.lr=inf": ("optimizer.lr=inf", "must be a finite number"),
    "optimizer.lr=1e300": ("optimizer.lr=1e+300", "at most"),
    "parallel.degrees.tp=1e12": ("parallel.degrees.tp", "at most 1,048,576"),
    "launch.nproc=1e9": ("launch.nproc=1000000000", "at most 4,096"),
    "train.seed=1e999999999": ("train.seed", "whole number"),
}


@pytest.mark.parametrize("typed", TYPED)
def test_typed_numbers_are_refused_with_their_limit(
    typed: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    refused(PlannedCommand(capsys).run("task=plan", typed), *TYPED[typed])


STORED = {
    "num_layers: 1000000000": "num_layers=1000000000 is not possible: must be at most 1,024",
    f"num_layers: {10**30}": "must be at most 1,024",
    "num_layers: 1e30": "Value '1e+30' of type 'float' could not be converted to Integer",
    "num_layers: .inf": "could not be converted to Integer",
    "mtp_depths: 1000000000": "must be at most 64",
    "moe: {num_experts: 1000000000}": "moe.num_experts=1000000000 is not possible: must be at most 65,536",
    "norm_eps: .nan": "norm_eps=nan is not possible: must be a finite number",
    "rope: {theta: 1.0e+300}": "rope.theta",
}


@pytest.mark.parametrize("line", STORED)
def test_a_stored_model_is_refused_with_its_limit(line: str, tmp_path: Path) -> None:
    file, changed = tmp_path / "model.yaml", OmegaConf.create(line)
    file.write_text(OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.structured(base("debug").model))))
    read_model(file)
    text = OmegaConf.to_yaml(OmegaConf.unsafe_merge(OmegaConf.load(file), changed))
    file.write_text(text)
    with pytest.raises(UserError, match=r"model.yaml") as caught:
        read_model(file)
    assert STORED[line] in str(caught.value)
    _told(caught.value)


RELEASED: dict[str, tuple[Any, str]] = {
    "n_routed_experts": (10**9, "at most 65,536"),
    "num_nextn_predict_layers": (10**9, "at most 64"),
    "num_hidden_layers": (10**9, "at most 1,024"),
    "vocab_size": (2**31, "at most 16,777,216"),
    "hidden_size": (10**30, "at most 1,048,576"),
    "num_attention_heads": (2**63, "at most 65,536"),
    "kv_lora_rank": (10**30, "at most 1,048,576"),
    "max_position_embeddings": (10**30, "at most 1,073,741,824"),
    "rms_norm_eps": (math.inf, "must be a finite number"),
    "routed_scaling_factor": (1e300, "at most"),
    "rope_theta": (10**400, "a number of 401 digits"),
}


@pytest.mark.parametrize("key", RELEASED)
def test_a_release_is_refused_with_its_limit(key: str, tmp_path: Path) -> None:
    value, words = RELEASED[key]
    content = config_json(base("debug").model, "bfloat16")
    content.pop("rope_parameters", None)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content | {"rope_theta": 10000.0}))
    model_from_hf(tmp_path)
    file.write_text(json.dumps(content | {"rope_theta": 10000.0, key: value}))
    with pytest.raises(UserError, match=r"config\.json") as caught:
        model_from_hf(tmp_path)
    assert words in str(caught.value)
    _told(caught.value)
