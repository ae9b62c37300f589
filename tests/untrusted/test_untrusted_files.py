"""Files of strangers are opened, read and parsed under limits, and what is wrong is one line."""

import json
import math
import os
import pickle
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from dsv3.errors import UserError
from dsv3.untrusted_files import (
    LIMITS,
    BadFile,
    Limits,
    MissingFile,
    compose_yaml,
    open_descriptor,
    open_file,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
    refuse_lfs_pointer,
    require_bounded_yaml,
)
from tests.untrusted.special_files import KINDS, make

READERS: list[Callable[[Path], Any]] = [
    open_descriptor,
    open_file,
    read_bytes,
    read_text,
    read_json,
    read_yaml,
    compose_yaml,
    require_bounded_yaml,
    refuse_lfs_pointer,
]

# 811 bytes that stand for 4 x 10^10 values: each line names the one above ten times.
LAUGHS = "a: &a {x: 1, y: 2, z: 3, w: 4}\n" + "".join(
    f"{name}: &{name} {{{', '.join(f'k{n}: *{last}' for n in range(10))}}}\n"
    for last, name in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_a_regular_file_is_opened(
    tmp_path: Path, kind: str, reader: Callable[[Path], Any]
) -> None:
    path = make(tmp_path / "file", kind)
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(BadFile, match=KINDS[kind]) as caught:
        reader(path)
    assert str(caught.value).startswith(str(path))
    assert isinstance(caught.value, MissingFile) == (kind in ("nothing", "dangling link", "below a file"))
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # noqa: PTH208  # the listing's own


def test_a_file_that_becomes_a_pipe_between_stat_and_open_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plain = make(tmp_path / "pipe", "pipe"), tmp_path / "plain"
    plain.write_text("x")
    status = os.stat(plain)  # noqa: PTH116
    with monkeypatch.context() as patched:  # pytest asks for it as well, to report
        patched.setattr(os, "stat", lambda _: status)
        with pytest.raises(BadFile, match="is a pipe, not a file"):
            read_bytes(path)


def test_errors_are_those_that_readers_of_before_catch() -> None:
    with pytest.raises(FileNotFoundError):
        read_bytes("/nowhere/x")
    for kind in (UserError, ValueError):
        with pytest.raises(kind):
            read_bytes("/")
    found = pickle.loads(pickle.dumps(BadFile("a/b", "is odd")))
    assert (type(found), str(found), found.reason) == (BadFile, "a/b is odd", "is odd")


def test_a_name_cannot_steer_a_terminal_or_fill_a_screen() -> None:
    with pytest.raises(BadFile) as caught:
        read_bytes("/tmp/\x1b[2J\n\udcff")
    assert str(caught.value).isprintable()
    with pytest.raises(BadFile) as caught:
        read_bytes("/" + "long/" * 2000)
    assert len(str(caught.value)) < 300
    with pytest.raises(BadFile, match="cannot be opened"):
        read_bytes("a\0b")


def test_a_file_is_not_read_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "json", Limits(1000, 100))
    path = tmp_path / "file.json"
    path.write_bytes(b" " * 999 + b"1")
    assert read_json(path) == 1
    os.truncate(path, 2**40)  # a hole of 1 TiB
    tracemalloc.start()
    with pytest.raises(BadFile, match="has 1,099,511,627,776 bytes, at most 1,000 are read of its kind"):
        read_json(path)
    assert tracemalloc.get_traced_memory()[1] < 2**18
    tracemalloc.stop()
    # /proc says 0 of every file: what comes is counted.
    monkeypatch.setitem(LIMITS, "json", Limits(4, 100))
    with pytest.raises(BadFile, match="has 5 bytes, at most 4"):
        read_bytes("/proc/self/status")


GOOD_YAML = [
    "",
    "a: 1",
    "a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}",
    "- [1, 2.5, .inf, null, true, 0x10, 1_000, 1:30]",
    "- [! 1, !!str 1, !!int '1', !!float 1, !!bool 'yes', !!null x, !!seq [1], !!map {a: 1}]",
]


@pytest.mark.parametrize("text", GOOD_YAML)
def test_yaml_is_read_as_pyyaml_reads_it(text: str) -> None:
    assert parse_yaml(text, "f") == yaml.safe_load(text)


def test_a_date_is_a_text_as_hydra_reads_it() -> None:
    assert parse_yaml("a: 2001-02-03\nb: 2001-99-99", "f") == {"a": "2001-02-03", "b": "2001-99-99"}


ODD_VALUES = ["", '""', "'-'", "+", "x", "maybe", "1:x", "0x", "0b_", "._", "é", "9e999", ".inf", "abc="]
ODD_VALUES += ["2001-01-01", "2001-99-01", "[a]", "[[a]]", "[{a: 1}]", "{a: 1}", "{[a]: 1}", "{{a: 1}: 2}"]
ODD_VALUES += ["{<<: 3}", "<<", "="]


@pytest.mark.parametrize("tag", [tag for tag in yaml.SafeLoader.yaml_constructors if tag])
def test_a_tag_on_any_value_is_read_or_refused_with_its_line(tag: str, tmp_path: Path) -> None:
    """PyYAML's own constructors raise KeyError, IndexError, AttributeError and more."""
    path = tmp_path / "f.yaml"
    for value in [f"!<{tag}> {value}" for value in ODD_VALUES] + ODD_VALUES:
        path.write_text(f"b: 1\na: {value}\n")
        for read in (read_yaml, require_bounded_yaml):
            refused = ""
            try:
                read(path)
            except BadFile as error:
                refused = str(error)
            assert not refused or refused.startswith(f"{path}:2: "), value
        with suppress(BadFile, yaml.YAMLError):  # Hydra's reader behind it: its errors of YAML are explained
            require_bounded_yaml(path)
            OmegaConf.load(path)
        with suppress(BadFile):
            json.dumps(read_yaml(path))


SMALL = Limits(2**20, 1_000)
"""PyYAML takes seconds for as many values as are allowed."""

BAD_YAML = {
    "laughs": (LAUGHS, "^f:[0-9]+: holds aliases of aliases without end"),
    "laughs by merging": (
        "a: &a {x: 1}\n"
        + "".join(
            f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 40)}]}}\n"
            for a, b in zip("abcdefg", "bcdefgh", strict=True)
        ),
        "aliases of aliases",
    ),
    "an alias of itself": ("a: &a [*a]", "aliases"),
    "deep flow": ("[" * 100_000, "^f:1: is nested more than 64 deep"),
    "deep block": ("- " * 100_000 + "x", "nested more than 64 deep"),
    "deep keys": ("? " * 100_000 + "x", "nested more than 64 deep"),
    "many values": ("[" + "1," * 1_000 + "]", "holds: more than 1,000 values"),
    "a long number": ("a: " + "9" * 5000, "number of 5,000 characters"),
    "a long number of base 16": ("a: 0x" + "f" * 5000, "number of 5,002 characters"),
    "a long number by its tag": ("a: !!int '" + "9" * 5000 + "'", "number of 5,000 characters"),
    "no number": ("a: !!int x", "^f:1: is not YAML: 'x' is no !!int"),
    "a number without digits": ("b: 1\na: 0x_", "^f:2: is not YAML: '0x_' is no !!int"),
    "code": ("a: !!python/object/apply:os.system [x]", "has the tag .*os.system': write the value without"),
    "a tag of one's own": ("b: 1\na: !mine x", "^f:2: has the tag '!mine'"),
    "a key without hash": ("? [a]\n: 1", "unhashable key"),
    "two documents": ("a: 1\n---\nb: 2", "found another document"),
    "a control character": ("a: \x01", "is not YAML"),
    "an open bracket": ("a: [1", "^f:1: is not YAML"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_yaml_beyond_the_limits_is_refused_in_a_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "yaml", SMALL)
    text, words = BAD_YAML[case]
    with pytest.raises(BadFile, match=words) as caught:
        parse_yaml(text, "f")
    assert len(str(caught.value)) < 350
    assert "\n" not in str(caught.value)


def test_another_reader_gets_no_yaml_beyond_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIMITS, "yaml", SMALL)
    path = tmp_path / "preset.yaml"
    for case in ("laughs", "deep flow", "deep block", "many values", "an alias of itself", "a long number"):
        path.write_text(BAD_YAML[case][0])
        with pytest.raises(BadFile):
            require_bounded_yaml(path)
    for text in ("a: [1", "a: \x01", "a: 2001-99-99"):  # that reader tells itself what is wrong
        path.write_text(text)
        require_bounded_yaml(path)
    path.write_bytes(b"a: \xff")
    require_bounded_yaml(path)
    with pytest.raises(BadFile, match="is not UTF-8 at byte 3"):
        compose_yaml(path)


GOOD_JSON = [
    '{"a": [1, -2.5e3, "\\ud800", null, true]}',
    "1",
    '"x"',
    "[]",
    "{}",
    "1" * 100,
    '{"a": 1, "a": 2}',
]


@pytest.mark.parametrize("text", GOOD_JSON)
def test_json_is_read_as_python_reads_it(text: str) -> None:
    assert parse_json(text, "f") == parse_json(text.encode(), "f") == json.loads(text)


def test_json_numbers_that_are_none_are_left_to_the_reader() -> None:
    first, second, third = parse_json("[NaN, 1e999, -Infinity]", "f")
    assert math.isnan(first)
    assert (second, third) == (math.inf, -math.inf)


BAD_JSON: dict[str, tuple[str | bytes, str]] = {
    "deep": ("[" * 100_000, "nested too deeply"),
    "a little deep": ("[" * 65 + "]" * 65, "nested more than 64 deep"),
    "deep in turns": ('{"a":[' * 40 + "]}" * 40, "nested more than 64 deep"),
    "many values": ("[" + "1," * 1_000_000 + "1]", "holds more than 1,000,000 values"),
    "a long number": ("9" * 5000, "a number of 5,000 digits"),
    "a long negative number": ("-" + "9" * 100, "a number of 101 digits"),
    "half": ('{"a": ', "^f is not JSON"),
    "two": ("[][]", "is not JSON: Extra data"),
    "no text": (b"\xff", "is not UTF-8 at byte 0"),
    "wide characters": ("{}".encode("utf-16"), "is not UTF-8 at byte 0"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_beyond_the_limits_is_refused_in_a_line(case: str) -> None:
    text, words = BAD_JSON[case]
    with pytest.raises(BadFile, match=words) as caught:
        parse_json(text, "f")
    assert len(str(caught.value)) < 300


def test_a_key_that_comes_twice_is_refused_where_it_matters() -> None:
    with pytest.raises(BadFile, match="has 'a' twice"):
        parse_json('{"b": {"a": 1, "a": 1}}', "f", unique_keys=True)
    assert parse_json('{"a": 1, "b": 2}', "f", unique_keys=True) == {"a": 1, "b": 2}


def test_the_depth_that_passes_is_the_same_for_both() -> None:
    depth = LIMITS["yaml"].depth
    text = "[" * depth + "]" * depth
    assert parse_json(text, "f") == parse_yaml(text, "f")
    for parse in (parse_json, parse_yaml):
        with pytest.raises(BadFile):
            parse(f"[{text}]", "f")
