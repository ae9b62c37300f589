"""Every key of text, of both programs, keeps what is typed; every whole number is one however it is typed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dsv3.config.key_types import KeyType, key_types
from dsv3.config.overrides import compose, quote_texts
from dsv3.config.registry import SCHEMAS, Buildable
from dsv3.config.strict import escape_interpolation

NASTY = [
    *(
        "1e10",
        "1e-3",
        "1_000",
        "0x1F",
        "007",
        "1.",
        "-1",
        "+1",
        "true",
        "False",
        "NULL",
        "Null",
        "None",
        "nan",
    ),
    *("inf", "on", "no", "a=b", "run (2)", "it's", "lr 1e-3, wd 0", "/data/(old)/x", "[::1]:29500", "{x}"),
    *(
        'a"b',
        "$HOME",
        "\\",
        "a\\",
        "\\n",
        "\\'",
        " x ",
        "\tx",
        "a,b",
        "[a",
        "a]",
        "[a,b]",
        "{a:1}",
        "#x",
        "x: y",
    ),
    *(
        "*",
        "choice(a,b)",
        "range(1,3)",
        "@x",
        "-",
        "--x",
        "a b",
        "é 字 🙂",
        "%",
        "a\nb",
        "'a",
        "1-12:00:00",
        "?",
    ),
]
"""Values that Hydra's grammar would refuse, or read as something else."""

LITERAL = ["${x}", "${run.dir}/x", "\\${x}", "${now:%Y}", "$${x}"]
"""Texts that OmegaConf would fill in."""


def keys(kind: KeyType) -> list[str]:
    """Return every key of a kind."""
    return [key for key, types in key_types().items() if kind in types]


@cache
def places() -> dict[str, list[tuple[str, str]]]:
    """Return the schemas that have each key, by name, with its path below them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, schema in SCHEMAS.items():
        group = "" if name in ("config", "convert") else name.partition("/")[0] + "."
        for path in paths(OmegaConf.structured(schema)):
            found.setdefault(group + path, []).append((name, path))
    return found


def paths(node: Any) -> Iterator[str]:
    """Yield the dotted paths of the values below `node`, missing ones too."""
    for key in node:
        nested: Any = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if OmegaConf.is_dict(nested) and not nested._is_none():
            yield from (f"{key}.{path}" for path in paths(nested))
        else:
            yield str(key)


@cache
def node_of(name: str) -> Any:
    """Return the node of a schema, which the tests of one value after another share."""
    return OmegaConf.structured(SCHEMAS[name])


@cache
def parsed(value: str) -> Any:
    """Return what Hydra's parser makes of the value of an override."""
    return OverridesParser.create().parse_override(f"key={value}").value()


def arrived(key: str, quoted: str) -> Any:
    """Return what a schema holds after a quoted argument was set, as Hydra sets it."""
    name, path = places()[key][0]
    OmegaConf.update(node_of(name), path, parsed(quoted.partition("=")[2]))
    return OmegaConf.select(node_of(name), path)


def all_arrive(key: str, values: dict[str, Any]) -> None:
    """Assert that every typed value arrives at `key` as the one that it stands for."""
    for quoted, value in zip(
        quote_texts([f"{key}={typed}" for typed in values]), values.values(), strict=True
    ):
        read = arrived(key, quoted)
        assert (read, type(read)) == (value, type(value)) or list(read) == value, f"{key}: {quoted}"


def test_the_texts_are_the_fields_of_type_str() -> None:
    found = key_types()
    assert found["logger.name"] == found["launch.sbatch"] == KeyType.text
    assert found["input"] == found["run.dir"] == found["resume"] == KeyType.text | KeyType.path
    assert found["logger.tags"] == found["run.allow_targets"] == KeyType.texts
    assert found["train.steps"] == found["parallel.degrees.tp"] == KeyType.integer
    assert not {"optimizer.lr", "train.callbacks", "model.rope.scaling", "logger.mode"} & set(found)


def test_every_text_arrives_as_it_was_typed() -> None:
    texts = [key for key in keys(KeyType.text) if key != "resume"]
    assert len(texts) > 20
    for key in texts:
        all_arrive(key, {value: value for value in NASTY + LITERAL})


@pytest.mark.parametrize("program", ["config", "convert"])
def test_every_text_of_a_whole_command_line_arrives(program: str) -> None:
    """Type all keys that may be typed together at once, each with another value."""
    texts = keys(KeyType.text)
    groups: dict[str, dict[str, None]] = {}
    for group, _, choice in (name.partition("/") for key in texts for name, _ in places().get(key, [])):
        if choice and (program == "config" or group == "model"):
            groups.setdefault(group, {})[choice] = None
    seen: set[str] = set()
    for number in range(max(map(len, groups.values()))):
        chosen = {group: list(choices)[number % len(choices)] for group, choices in groups.items()}
        of_choices = {*(f"{group}/{choice}" for group, choice in chosen.items()), program}
        there = [key for key in texts if any(name in of_choices for name, _ in places().get(key, []))]
        typed = {key: NASTY[(11 * number + 7 * n) % len(NASTY)] for n, key in enumerate(there)}
        arguments = [f"{key}={value}" for key, value in {**chosen, **typed}.items()]
        composed = compose(quote_texts(arguments), root=program)
        for key, value in typed.items():
            assert OmegaConf.select(composed, key) == value, key
        seen |= set(typed)
    # No field, and fields of a group whose choices are files of conf/.
    alone = {"resume", "hardware.name", "hardware.source", "hardware.calibration"}
    roots = {key for key in texts if "." not in key}
    assert seen >= ({*texts} - roots - alone if program == "config" else roots - alone)


def test_every_element_of_a_list_of_texts_arrives() -> None:
    whole = [value for value in NASTY if value == value.strip() and not set(value) & set("[](){},'\"\\")]
    listed = ",".join(whole)
    for key in keys(KeyType.texts):
        quoted = {"['a,b', \"it's\",c d]": ["a,b", "it's", "c d"], "gpu": ["gpu"], "[]": []}
        all_arrive(key, {f"[{listed}]": whole, listed: whole, **quoted})


def test_every_whole_number_may_be_typed_with_an_exponent() -> None:
    numbers = keys(KeyType.integer)
    assert len(numbers) > 50
    for key in numbers:
        typed = {"1e3": 1000, "2.0": 2, "1_0e2": 1000, "1.5e1": 15, "3": 3}
        if key == "parallel.pipeline.split":
            typed = {f"[{number}]": [value] for number, value in typed.items()}  # type: ignore[misc]
        all_arrive(key, typed)


def test_every_fraction_may_be_typed_as_a_whole_number() -> None:
    count = 0
    for schema in SCHEMAS.values():
        node = OmegaConf.structured(schema)
        for name in node:
            if OmegaConf.is_missing(node, name) or not isinstance(node[name], float):
                continue
            OmegaConf.update(node, str(name), parsed("1"))
            assert (node[name], type(node[name])) == (1.0, float)
            count += 1
    assert count > 10


def test_in_a_sweep_every_part_is_read_by_itself() -> None:
    typed = ["-m", "train.steps=1e3,2e3,1_5e2", "train.seed=range(1e1,3e1,1e1)", "logger.name=1e10,true,a b"]
    typed += ["logger.tags=[1e3,b],[c]", "run.allow_targets=a,b", "train.log_every=interval(1,1e2)"]
    assert quote_texts(typed)[1:] == [
        "train.steps=1000,2000,1500",
        "train.seed=range(10,30,10)",
        "logger.name='1e10','true','a b'",
        "logger.tags=['1e3','b'],['c']",
        "run.allow_targets=['a'],['b']",
        "train.log_every=int(interval(1,100))",
    ]


def test_the_values_of_a_whole_node_are_read_by_their_keys() -> None:
    typed = [
        "logger={name: 1e10, tags: [1, it's], mode: offline}",
        "train={steps:1e3,balance:{bias_until:1e0}}",
    ]
    assert quote_texts(typed) == [
        "logger={name:'1e10',tags:['1','it\\'s'],mode:offline}",
        "train={steps:1000,balance:{bias_until:1e0}}",
    ]


def test_schemas_that_differ_on_a_key_are_told_apart_by_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Words(Buildable):
        size: str = ""

    @dataclass
    class Counts(Buildable):
        size: int = 0
        names: list[str] = field(default_factory=list)

    monkeypatch.setitem(SCHEMAS, "data/words", Words)
    monkeypatch.setitem(SCHEMAS, "data/counts", Counts)
    assert "data.size" not in key_types()
    assert quote_texts(["data=words", "data.size=1e3"])[1] == "data.size='1e3'"
    assert quote_texts(["data=counts", "data.size=1e3", "data.names=1"])[1:] == [
        "data.size=1000",
        "data.names=['1']",
    ]


def test_a_literal_text_is_escaped_once() -> None:
    for value in LITERAL:
        (argument,) = quote_texts([f"logger.name={value}"])
        assert OmegaConf.create({"x": parsed(argument.partition("=")[2])}).x == value
        assert OmegaConf.create({"x": escape_interpolation(value)}).x == value
