"""The schemas: what they build, and what they refuse."""

import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from inspect import signature

import pytest

from dsv3.config import data
from dsv3.data.rows import RowOptions
from dsv3.errors import InvalidValue

CHOICES = [
    data.StdlibDataConfig,
    data.TextDataConfig,
    data.TokensDataConfig,
    data.ShardsDataConfig,
    data.TrainedTokenizerConfig,
    data.LocalTokenizerConfig,
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_target_takes_exactly_the_fields_of_its_schema(choice: type) -> None:
    node = choice()
    module, name = node._target_.rsplit(".", 1)
    names = [field.name for field in fields(node)]
    assert names[:3] == ["_target_", "_recursive_", "_convert_"]
    assert (node._recursive_, node._convert_) == (False, "object")
    parameters = list(signature(getattr(import_module(module), name)).parameters)
    common = {field.name for field in fields(RowOptions)} if "common" in parameters else set()
    own = {field.name for field in fields(node)[3:] if field.metadata.get("argument", True)} - common
    assert {*parameters} - {"common"} == own


def test_the_defaults_of_the_classes_are_those_of_the_schemas() -> None:
    for choice in CHOICES[:4]:
        node = choice()
        module, name = node._target_.rsplit(".", 1)
        for key, parameter in signature(getattr(import_module(module), name)).parameters.items():
            assert key == "common" or parameter.default == getattr(node, key)
        for option in fields(RowOptions):
            assert option.default == getattr(node, option.name)


@pytest.mark.parametrize(
    ("node", "key"),
    [
        (data.StdlibDataConfig(held_out=0.0), "held_out"),
        (data.StdlibDataConfig(held_out=0.5), "held_out"),
        (data.TextDataConfig(held_out=0.7, path="x"), "held_out"),
        (data.TextDataConfig(), "path"),
        (data.TokensDataConfig(path=""), "path"),
        (data.TrainedTokenizerConfig(vocab_size=263), "vocab_size"),
        (data.LocalTokenizerConfig(), "path"),
    ],
)
def test_impossible_values_are_refused_by_name(
    node: data.DataConfig | data.TrainedTokenizerConfig | data.LocalTokenizerConfig, key: str
) -> None:
    with pytest.raises(InvalidValue) as caught:
        node.validate()
    assert caught.value.key == key


def test_possible_values_pass() -> None:
    data.StdlibDataConfig(held_out=0.49).validate()
    data.TextDataConfig(path="x").validate()
    data.TokensDataConfig(path="x").validate()
    data.TrainedTokenizerConfig(vocab_size=264).validate()
    data.LocalTokenizerConfig(path="x").validate()


def test_planning_needs_neither_torch_nor_numpy_and_the_sources_need_no_torch() -> None:
    program = (
        "import sys, dsv3.config.data; "
        "assert not {'torch', 'numpy', 'hydra', 'tokenizers'} & set(sys.modules); "
        "import dsv3.data.sources, dsv3.data.token_table; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
