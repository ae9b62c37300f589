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
from dsv3.config.key_types import KeyType, key_types
from dsv3.config.overrides import absolute_paths, literal_notes, quote_texts, split_commas, typed_text
from dsv3.config.strict import build, strict
from dsv3.config.task import GenerateTaskConfig
from dsv3.errors import UserError

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
    "argument", ["checkpoint.load=null", "run.dir=", "train.steps=3", "model=16b", "-m", "x,y", "+foo=1e3"]
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
    (tmp_path / "set").mkdir()
    places = ["data=shards", "data.path=s3://b/k", "data=hf", "data.dataset=o/n", "data.dataset=set"]
    assert [typed_text(argument) for argument in absolute_paths(places[:2])[1:]] == ["s3://b/k"]
    assert [typed_text(a) for a in absolute_paths(places[2:])[1:]] == ["o/n", f"{tmp_path}/set"]


@pytest.mark.parametrize("typed", ["'/a,b'", "/a b", '"/a, (b)"'])
def test_a_sweep_has_one_directory_whatever_its_name(typed: str) -> None:
    assert prepare(["-m", f"run.dir={typed}", "train.steps=1,2"])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, which $SCRATCH is as well."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", f"{tmp_path}/s, c")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


PATHS = [key for key, types in key_types().items() if KeyType.path in types]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("~/x y", "HOME/x y"),
        ("~", "HOME"),
        ("a/~/x", "a/~/x"),
        ("${oc.env:SCRATCH}/x", "HOME/s, c/x"),
        ("/a/${ oc.env:SCRATCH }", "/a/HOME/s, c"),
        ("${oc.env:NOWHERE,/d}/x", "/d/x"),
        ("${oc.env:NOWHERE,'/d e'}", "/d e"),
        ("${oc.env:NOWHERE,~}/x", "HOME/x"),
        ("hf:~/x", "hf:HOME/x"),
        ("hf:${oc.env:SCRATCH}/x", "hf:HOME/s, c/x"),
        ("${run.dir}/x", "${run.dir}/x"),
        ("'~/x'", "~/x"),
    ],
)
def test_home_and_variables_are_filled_in_for_every_path(home: Path, typed: str, meant: str) -> None:
    assert len(PATHS) > 10
    for key in PATHS:
        assert typed_text(f"{key}={typed}") == meant.replace("HOME", str(home)), key


def test_home_and_variables_are_filled_in_in_each_part_of_a_sweep(home: Path) -> None:
    typed = "data.path=~/a,${oc.env:NOWHERE,/d}/x,null,'~',${oc.env:SCRATCH}"
    quoted = quote_texts(["-m", typed])[1]
    assert quoted == f"data.path='{home}/a','/d/x',null,'~','{home}/s, c'"


@pytest.mark.parametrize("key", ["task.prompt", "logger.name"])
def test_nothing_is_filled_in_for_other_texts(home: Path, key: str) -> None:
    for text in ("~/x", "${oc.env:SCRATCH}/x", "hf:~/x"):
        assert typed_text(f"{key}={text}") == text


@pytest.mark.parametrize("key", ["data.path", "run.dir", "checkpoint.load", "input"])
def test_a_variable_that_is_not_set_is_named(home: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}=\$\{{oc.env:NOWHERE\}}/x: .* variable NOWHERE is not set"):
        quote_texts([f"{key}=${{oc.env:NOWHERE}}/x"])


def test_a_run_stores_what_was_filled_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    typed = [
        "data.path=${oc.env:SCRATCH}/x",
        "checkpoint.load=hf:~/y",
        "data.cache_dir=z",
        "logger.name=1e10",
    ]
    stored = absolute_paths(quote_texts(typed))
    monkeypatch.delenv("SCRATCH")
    monkeypatch.setenv("HOME", "/gone")
    again = [typed_text(argument) for argument in quote_texts(stored)]
    assert again == [f"{home}/s, c/x", f"hf:{home}/y", f"{home}/z", "1e10"]


def test_what_is_taken_literally_is_told_for_all_texts_but_prompts(home: Path) -> None:
    told = ["data.path=${x}/y", "logger.name=${model.dim}", "run.dir=${oc.env:SCRATCH}/${x}"]
    silent = ["task.prompt=${x}", "data.path=${oc.env:SCRATCH}", "logger.name='${x}'", "train.steps=${x}"]
    notes = literal_notes([*told, *silent])
    assert len(notes) == len(told)
    for argument, note in zip(told, notes, strict=True):
        assert note.startswith(f"{argument}: ${{...}} is taken literally")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("a", ["a"]),
        ("a, b", ["a", " b"]),
        ("a,", ["a", ""]),
        (",a", ["", "a"]),
        ("f(a,b),c", ["f(a,b)", "c"]),
        ("(a,b", ["(a", "b"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("'a,b'c,d", ["'a", "b'c", "d"]),
        ("{a:[1,2]},b", ["{a:[1,2]}", "b"]),
        ("${x:a,b},c", ["${x:a,b}", "c"]),
    ],
)
def test_commas_in_brackets_and_quotes_do_not_split(text: str, parts: list[str]) -> None:
    assert split_commas(text) == parts


def test_a_choice_of_a_search_is_a_sweep_over_texts() -> None:
    assert quote_texts(["-m", "logger.name=choice(1e3, a b)"])[1] == "logger.name=choice('1e3',' a b')"
    assert quote_texts(["logger.name=choice(1e3,b)"]) == ["logger.name='choice(1e3,b)'"]
