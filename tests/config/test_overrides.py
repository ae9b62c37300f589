"""Prompts and paths reach the code as they were typed."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dsv3.cli.arguments import prepare
from dsv3.config.overrides import absolute_paths, quote_texts, typed_text
from dsv3.config.strict import build, strict
from dsv3.config.task import GenerateTaskConfig

PARTS = [
    "$",
    "{",
    "}",
    "${",
    "${x}",
    "${run.dir}",
    "\\",
    "'",
    '"',
    ",",
    " ",
    "(",
    ")",
    "=",
    "[",
    "]",
    ":",
    "#",
]
PARTS += ["\n", "\t", "~", "+", "é", "字", "🙂", "null", "true", "1e3", "a", "???", "choice(a,b)"]
TEXTS = st.one_of(st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("".join), st.text(min_size=1))


def completely_quoted(value: str) -> bool:
    """Values that the user has quoted for Hydra, which takes the quotes off."""
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def as_typed(value: str) -> bool:
    return value not in ("null", "???") and not completely_quoted(value)


@given(TEXTS.filter(as_typed))
@example("it's")
@example("\\${x}")
@example("a\\")
@example("\\\\'")
@example("Hello, world")
@example("def f(x=1): return '${x}'")
@settings(max_examples=200, deadline=None)
def test_a_text_comes_through_every_reader_unchanged(value: str) -> None:
    (argument,) = quote_texts([f"task.prompt={value}"])
    parsed = OverridesParser.create().parse_override(argument)
    node = OmegaConf.structured(GenerateTaskConfig)
    OmegaConf.update(node, "prompt", parsed.value())
    typed = strict(node)
    assert typed.prompt == value
    assert build(typed).prompt == value


@pytest.mark.parametrize(
    "key", ["task.prompt", "run.dir", "checkpoint.load", "+checkpoint.load", "++run.dir"]
)
def test_the_whole_way_through_hydra_keeps_a_text(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    value = 'a, b\'s = "${x}" \\${y} (1) [2] {3}\\'
    arguments = prepare(["task=generate", f"{key}={value}"])
    assert strict_value(arguments, key.lstrip("+")) == value


def strict_value(arguments: list[str], key: str) -> Any:
    from dsv3.config.registry import CONF, register

    register()
    with initialize_config_dir(str(CONF), version_base=None):
        config = strict(compose("config", arguments))
    node, _, name = key.partition(".")
    return getattr(getattr(config, node), name)


@pytest.mark.parametrize(
    ("typed", "swept"),
    [
        ("a,b", ["a", "b"]),
        ("'a,b'", ["a,b"]),
        ("'a,b',c", ["a,b", "c"]),
        ('c,"a, b"', ["c", "a, b"]),
        ("it's,that's", ["it's", "that's"]),
        ("/x (1),/y=$2", ["/x (1)", "/y=$2"]),
    ],
)
def test_an_unquoted_comma_sweeps_and_a_quoted_one_does_not(typed: str, swept: list[str]) -> None:
    flag, argument = quote_texts(["-m", f"task.prompt={typed}"])
    parsed = OverridesParser.create().parse_override(argument)
    values = (
        list(parsed.sweep_string_iterator())
        if parsed.is_sweep_override()
        else [parsed.get_value_element_as_str()]
    )
    assert [OverridesParser.create().parse_override(f"x={value}").value() for value in values] == swept
    assert flag == "-m"


def test_without_a_sweep_a_comma_is_a_comma() -> None:
    (argument,) = quote_texts(["task.prompt=a,b"])
    assert OverridesParser.create().parse_override(argument).value() == "a,b"


@pytest.mark.parametrize(
    "argument", ["checkpoint.load=null", "run.dir=", "train.steps=3", "model=16b", "-m", "x,y"]
)
def test_other_arguments_are_left_alone(argument: str) -> None:
    assert quote_texts([argument]) == [argument]


def test_null_stays_null_in_a_sweep() -> None:
    assert quote_texts(["-m", "checkpoint.load=null,/x y"])[1] == "checkpoint.load=null,'/x y'"


def test_a_stored_path_is_absolute_and_keeps_what_says_how_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["checkpoint.load=hf:x", "checkpoint.load=hf:/y z", "checkpoint.load=x", "data.path=hf:x", "a=b"]
    stored = absolute_paths(quote_texts(typed))
    wanted = [f"hf:{tmp_path}/x", "hf:/y z", f"{tmp_path}/x", f"{tmp_path}/hf:x"]
    assert [typed_text(argument) for argument in stored[:4]] == wanted
    assert stored[4] == "a=b"


@pytest.mark.parametrize("typed", ["'/a,b'", "/a b", '"/a, (b)"'])
def test_a_sweep_has_one_directory_whatever_its_name(typed: str) -> None:
    assert prepare(["-m", f"run.dir={typed}", "train.steps=1,2"])
