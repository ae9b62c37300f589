"""The tensors of a directory, and the message for every way in which it can be wrong."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file
from torch import Tensor

from dsv3.errors import UserError
from dsv3.hf.safetensors_reader import INDEX, SafetensorsReader, read_headers
from tests.hf.raw_shards import entry, index, raw, same, tensors

A = {"a": entry(0, 8)}
DATA = b"12345678"
FILE = "model.safetensors"
WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty: download"),
    "too short": (b"1234567", "has only 7 bytes"),
    "absurd header": (b"\xff" * 8 + raw(A, DATA), "header of 18446744073709551615 bytes, at most 100000000"),
    "header beyond the file": (raw(A)[:-1], r"is cut off in its header of 61 bytes after 60"),
    "no header": (raw(b""), "no safetensors file: its header begins with b''"),
    "a pickle": (raw(b"\x80\x04}q\x00."), r"no safetensors file: its header begins with b'\\x80"),
    "leading space": (raw(b" {}"), "its header begins with b' {}'"),
    "not UTF-8": (raw(b'{"a\xff": 1}'), "its header is not UTF-8 at byte 3"),
    "not JSON": (raw(b'{"a": '), r"its header is not JSON: Expecting value"),
    "JSON twice": (raw(b"{}{}"), r"its header is not JSON: Extra data"),
    "endless number": (
        raw(b'{"a": ' + b"9" * 5000 + b"}"),
        "its header is not JSON: a number of 5,000 digits",
    ),
    "nested": (raw(b'{"a":' * 200_000), "its header is nested too deeply"),
    "a name twice": (raw(b'{"a": {"dtype": 1}, "b": 1, "a": 2}'), "its header has 'a' twice"),
    "a field twice": (raw(b'{"a": {"dtype": "F32", "dtype": "I32"}}'), "its header has 'dtype' twice"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), r"__metadata__ is \{'a': 1\} instead of texts"),
    "metadata is a list": (raw({"__metadata__": []}), r"__metadata__ is \[\] instead of texts"),
    "entry is a list": (raw({"a": [1]}), r"'a' is described by \[1\] instead of an object"),
    "no shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA), "'a' has no 'shape'"),
    "an unknown field": (raw({"a": {**A["a"], "zip": 1}}, DATA), "'a' with the field 'zip', which"),
    "unknown dtype": (
        raw({"a": entry(0, 8, "F8_E4M3FN")}, DATA),
        "'a' of dtype 'F8_E4M3FN'.* 'F8_E4M3FN?U?Z?'",
    ),
    "dtype is a number": (raw({"a": entry(0, 8, 32)}, DATA), "'a' of dtype 32, which"),
    "negative shape": (raw({"a": entry(0, 8, shape=[-2])}, DATA), r"'a' has shape \[-2\] instead of"),
    "float shape": (raw({"a": entry(0, 8, shape=[2.0])}, DATA), r"'a' has shape \[2\.0\] instead of"),
    "bool shape": (raw({"a": entry(0, 4, shape=[True])}, b"1234"), r"'a' has shape \[True\] instead of"),
    "shape is a number": (raw({"a": entry(0, 8, shape=2)}, DATA), "'a' has shape 2 instead of a list"),
    "endless shape": (raw({"a": entry(0, 0, shape=[0, 2**40, 2**40])}), "'a' has shape .*too large"),
    "odd F4": (raw({"a": entry(0, 3, "F4", [5])}, b"123"), r"'a' has shape \[5\], and F4 comes in pairs"),
    "negative offset": (raw({"a": entry(-8, 0, shape=[2])}, DATA), r"data_offsets \[-8, 0\] instead of"),
    "text offset": (raw({"a": {**A["a"], "data_offsets": ["0", "8"]}}), r"data_offsets \['0', '8'\] instead"),
    "three offsets": (
        raw({"a": {**A["a"], "data_offsets": [0, 4, 8]}}, DATA),
        "instead of a begin and an end",
    ),
    "offsets turned": (raw({"a": {**A["a"], "data_offsets": [8, 0]}}, DATA), r"\[8, 0\] instead of a begin"),
    "too few bytes": (
        raw({"a": entry(0, 8, shape=[3])}, DATA),
        r"'a' has 8 bytes, F32 of shape \[3\] needs 12",
    ),
    "too many bytes": (raw({"a": entry(0, 8, "BF16", [2])}, DATA), r"8 bytes, BF16 of shape \[2\] needs 4"),
    "overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, DATA + DATA), "'b' and 'a' overlap by 4 bytes"),
    "same place": (raw({"a": entry(0, 8), "b": entry(0, 8)}, DATA), "'b' and 'a' overlap by 8 bytes"),
    "gap": (raw({"a": entry(0, 4), "b": entry(8, 12)}, DATA + DATA), "4 bytes between 'a' and 'b' are of no"),
    "gap at the beginning": (raw({"a": entry(4, 8)}, DATA), "4 bytes between the header and 'a' are of no"),
    "cut off": (raw(A, DATA[:-1]), "is cut off: 'a' ends at byte 77, the file has 76"),
    "all data missing": (raw(A), "is cut off: 'a' ends at byte 77, the file has 69"),
    "far beyond": (
        raw({"a": entry(0, 2**60)}, DATA),
        "is cut off: 'a' ends at byte 1152921504606847[0-9]{3}, the file has",
    ),
    "longer": (raw(A, DATA + b"9"), "1 bytes behind 'a' are of no tensor"),
    "no tensors, but data": (raw({}, DATA), "8 bytes behind the header are of no tensor"),
    "lone surrogate": (raw(b'{"\\ud800": {}}'), r"the name '\\ud800' is not Unicode"),
    "steering name": (raw({"\x1b[2J\n\u202e\0": 1}), r"'\\x1b\[2J\\n\\u202e\\x00' is described by 1"),
    "endless name": (raw({"n" * 5000: 1}), r"'n{50,60}\.\.\.n{50,60}' is described"),
}


def refused(directory: Path) -> str:
    """Return the message of read_headers: always one printable line that begins with the path."""
    with pytest.raises(UserError) as caught:
        read_headers(directory)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(str(directory))
    assert len(message) < len(str(directory)) + 350
    return message


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_for_what_is_wrong(tmp_path: Path, case: str) -> None:
    content, words = WRONG[case]
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_headers(tmp_path)
    assert refused(tmp_path).startswith(f"{tmp_path / FILE} ")


def test_the_file_that_the_wrong_ones_are_made_of_is_right(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(raw(A, DATA))
    (stored,) = read_headers(tmp_path).values()
    assert (stored.name, stored.file, stored.dtype) == ("a", tmp_path / FILE, torch.float32)
    assert (stored.shape, stored.offset, stored.nbytes) == ((2,), 69, 8)


def test_tensors_come_as_they_lie_in_the_files(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(raw({"b": entry(4, 8), "c": entry(0, 4)}, DATA))
    (tmp_path / "two.safetensors").write_bytes(raw({"a": entry(0, 8), "empty": entry(0, 0)}, DATA))
    assert list(read_headers(tmp_path)) == ["c", "b", "empty", "a"]
    index(tmp_path, dict.fromkeys("bc", "one.safetensors") | dict.fromkeys(["a", "empty"], "two.safetensors"))
    assert list(read_headers(tmp_path)) == ["c", "b", "empty", "a"]


@settings(deadline=None)
@given(tensors())
def test_files_of_the_library_are_read_to_the_bit(expected: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as name, SafetensorsReader() as reader:
        save_file(expected, Path(name) / FILE)
        stored = read_headers(Path(name))
        assert stored.keys() == expected.keys()
        for key, tensor in stored.items():
            assert same(reader.read_rows(tensor, 0, tensor.rows), expected[key])


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """`a` and `b` in files of these names, with an index that is right."""
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(raw({name: entry(0, 8)}, DATA))
    index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    return tmp_path


def test_a_file_that_the_index_does_not_name_is_left_alone(two: Path) -> None:
    (two / "consolidated.safetensors").write_bytes(b"something else")
    assert set(read_headers(two)) == {"a", "b"}


def test_hidden_files_are_none_of_the_checkpoint(two: Path) -> None:
    """Other systems leave such files beside copies."""
    (two / INDEX).unlink()
    (two / "._a.safetensors").write_bytes(b"something else")
    assert set(read_headers(two)) == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "a.safetensors", "b": "a.safetensors"}, "maps 'b' to 'a.safetensors', which lacks it"),
        ({"a": "b.safetensors", "b": "a.safetensors"}, "maps 'a' to 'b.safetensors', but it is in 'a.safe"),
        ({"a": "a.safetensors", "b": "c.safetensors"}, "maps 'b' to 'c.safetensors', which is not there"),
        ({"a": "a.safetensors", "c": "b.safetensors"}, "maps 'c' to 'b.safetensors', which lacks it"),
        ({}, r"weight_map=\{\} instead"),
        ([["a", "a.safetensors"]], r"weight_map=\[\['a', 'a.safetensors'\]\] instead"),
        (None, "weight_map=None instead"),
        ({"a": 1}, "maps 'a' to 1 instead of a plain file name"),
        ({"a": None}, "maps 'a' to None instead"),
        ({"a": "a.bin"}, "maps 'a' to 'a.bin' instead .* ends with .safetensors"),
        ({"a": ""}, "maps 'a' to '' instead"),
        ({"a": ".."}, r"maps 'a' to '\.\.' instead"),
        ({"a": "/etc/a.safetensors"}, "maps 'a' to '/etc/a.safetensors' instead"),
        ({"a": "../a.safetensors"}, r"maps 'a' to '\.\./a.safetensors' instead"),
        ({"a": "sub/a.safetensors"}, "maps 'a' to 'sub/a.safetensors' instead"),
        ({"a": "..\\a.safetensors"}, "a.safetensors' instead"),
        ({"a": "a\0.safetensors"}, r"maps 'a' to 'a\\x00.safetensors' instead"),
        ({"a": "\ud800.safetensors"}, r"maps 'a' to '\\ud800.safetensors' instead"),
        ({"\x1b[2J": "\x1b[2J.safetensors"}, r"maps '\\x1b\[2J' to '\\x1b\[2J.safetensors' instead"),
    ],
)
def test_an_index_that_is_not_true_is_refused(two: Path, weight_map: Any, words: str) -> None:
    index(two, weight_map)
    with pytest.raises(UserError, match=words):
        read_headers(two)
    assert refused(two).startswith(f"{two / INDEX} ")


def test_a_tensor_that_the_index_leaves_out_is_named(two: Path) -> None:
    (two / "b.safetensors").write_bytes(raw({"b": entry(0, 4), "c": entry(4, 8)}, DATA))
    assert "leaves out 'c', which is in 'b.safetensors': take" in refused(two)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_files_is_refused(two: Path, indexed: bool) -> None:
    (two / "b.safetensors").write_bytes(raw({"b": entry(0, 4), "a": entry(4, 8)}, DATA))
    if not indexed:
        (two / INDEX).unlink()
    assert "b.safetensors has 'a', which 'a.safetensors' has as well" in refused(two)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "its index is not JSON"),
        (b"\xff", "its index is not UTF-8 at byte 0"),
        (b"[1]", r"its index is \[1\] instead of a JSON object"),
        (b'"weight_map"', "its index is 'weight_map' instead of"),
        (b"{}", "has no 'weight_map', which says"),
        (b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "its index has 'a' twice"),
        (b"[" * 200_000, "its index is nested too deeply"),
    ],
)
def test_an_index_of_another_form_is_refused(two: Path, content: bytes, words: str) -> None:
    (two / INDEX).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_headers(two)
    assert refused(two).startswith(f"{two / INDEX} ")


def test_an_index_longer_than_any_is_not_read(two: Path) -> None:
    os.truncate(two / INDEX, 100_000_001)
    assert f"{INDEX} has 100,000,001 bytes, at most 100,000,000" in refused(two)


def test_linked_files_are_followed_as_hub_caches_need_it(two: Path) -> None:
    (two / "blobs").mkdir()
    snapshot = two / "snapshots"
    snapshot.mkdir()
    for number, name in enumerate(["a.safetensors", "b.safetensors", INDEX]):
        (two / name).rename(two / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../blobs/{number}")
    assert {name: stored.file for name, stored in read_headers(snapshot).items()} == {
        name: snapshot / f"{name}.safetensors" for name in "ab"
    }
    (two / "blobs" / "1").unlink()
    assert "b.safetensors is a link to '../blobs/1', which is not there" in refused(snapshot)


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("name", ["a.safetensors", INDEX])
@pytest.mark.parametrize(
    ("put", "words"),
    [
        pytest.param(_folder, "is a directory, not a file", id="directory"),
        pytest.param(os.mkfifo, "is a pipe, not a file", id="pipe"),
        pytest.param(lambda path: path.symlink_to("/dev/null"), "is a device, not a file", id="device"),
        pytest.param(lambda path: path.symlink_to(path), "is a link that leads back to itself", id="loop"),
    ],
)
def test_what_is_no_file_is_refused(two: Path, name: str, put: Callable[[Path], None], words: str) -> None:
    (two / name).unlink()
    put(two / name)
    assert f"{two / name} {words}" in refused(two)


@pytest.mark.parametrize("name", ["a.safetensors", INDEX])
def test_a_file_that_may_not_be_read_is_told(two: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    actual = os.open

    def forbidding(path: Path, flags: int) -> int:
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return actual(path, flags)

    monkeypatch.setattr(os, "open", forbidding)  # permissions do not bind root, who runs many tests
    assert refused(two) == f"{two / name} cannot be opened: Permission denied"


def test_a_directory_without_files_is_told(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path} holds no .safetensors files"
    assert "cannot be read as a directory: No such file" in refused(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "cannot be read as a directory: Not a directory" in refused(tmp_path / "file")


def test_a_path_cannot_steer_the_terminal(tmp_path: Path) -> None:
    directory = tmp_path / "a\n\x1b[2Jb"
    directory.mkdir()
    (directory / FILE).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_headers(directory)
    assert str(caught.value).startswith(f"{tmp_path}/a\ufffd\ufffd[2Jb/{FILE} is empty")
