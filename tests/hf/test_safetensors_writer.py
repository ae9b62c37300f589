"""Written files: planned to the byte, equal to the tensors for every reader, and complete or an error."""

import io
import json
import struct
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.hf.safetensors_reader import INDEX, SafetensorsReader, read_headers
from dsv3.hf.safetensors_writer import Entry, SafetensorsPlan, SafetensorsWriter, index_json, plan_files
from tests.hf.pairs import pair
from tests.hf.raw_shards import noise, same, tensors

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


def entries(values: dict[str, Tensor]) -> list[Entry]:
    return [(name, value.dtype, tuple(value.shape)) for name, value in values.items()]


def store(directory: Path, values: dict[str, Tensor], limit: int, rows: int = 2) -> list[SafetensorsPlan]:
    """Plan and write tensors, some `rows` at a time, and the index where there are several files."""
    plans = plan_files(entries(values), limit)
    for plan in plans:
        with (directory / plan.name).open("xb") as sink, SafetensorsWriter(plan, sink) as writer:
            for tensor in plan.tensors:
                value = values[tensor.name]
                for piece in value.split(rows) if value.dim() else [value]:
                    writer.write(tensor.name, piece)
    if len(plans) != 1:
        (directory / INDEX).write_text(index_json(plans))
    return plans


@settings(deadline=None)
@given(tensors(), st.integers(1, 3), st.sampled_from([1, 60, 2**30]))
def test_what_is_written_is_read_to_the_bit_by_the_library_and_by_us(
    values: dict[str, Tensor], rows: int, limit: int
) -> None:
    with tempfile.TemporaryDirectory() as name, SafetensorsReader() as reader:
        directory = Path(name)
        plans = store(directory, values, limit, rows)
        found: dict[str, Tensor] = {}
        for plan in plans:
            assert (directory / plan.name).stat().st_size == plan.nbytes
            found |= load_file(directory / plan.name)
        assert found.keys() == values.keys()
        assert all(same(found[key], values[key]) for key in values)
        stored = read_headers(directory) if plans else {}
        assert {key: tensor.shape for key, tensor in stored.items()} == {
            key: tuple(value.shape) for key, value in values.items()
        }
        for plan in plans:
            for tensor in plan.tensors:
                assert stored[tensor.name].offset == tensor.offset
        for key, tensor in stored.items():
            assert same(reader.read_rows(tensor, 0, tensor.rows), values[key])


def test_the_header_is_that_of_the_library(tmp_path: Path) -> None:
    """If the tensors come in the library's order (wide dtypes first, then by name), the files are equal."""
    values = {"b": noise(F32, (3,)), "a": noise(BF16, (2, 3)), "é": noise(BF16, (1,)), "s": noise(FP8, ())}
    save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    store(tmp_path, values, 2**30)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@given(tensors())
def test_headers_end_where_any_type_may_begin(values: dict[str, Tensor]) -> None:
    for plan in plan_files(entries(values), 50):
        assert len(plan.header) % 8 == 0
        (length,) = struct.unpack("<Q", plan.header[:8])
        assert length == len(plan.header) - 8
        header = json.loads(plan.header[8:])
        assert list(header) == ["__metadata__", *(tensor.name for tensor in plan.tensors)]
        assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize(
    ("bytes_of", "files"),
    [
        ({"a": 10}, ["a"]),
        ({"a": 5, "b": 5}, ["ab"]),
        ({"a": 5, "b": 6}, ["a", "b"]),
        ({"a": 5, "b": 5, "c": 1}, ["ab", "c"]),
        ({"a": 5, "b": 6, "c": 4, "d": 0}, ["a", "bcd"]),
        ({"a": 5, "b": 11, "c": 5}, ["a", "b", "c"]),
        ({"a": 30, "b": 1}, ["a", "b"]),
        ({"a": 0}, ["a"]),
        ({}, []),
    ],
)
def test_a_file_ends_before_it_would_be_too_large(bytes_of: dict[str, int], files: list[str]) -> None:
    planned = plan_files([(name, FP8, (size,)) for name, size in bytes_of.items()], 10)
    assert ["".join(tensor.name for tensor in plan.tensors) for plan in planned] == files
    assert all(plan.data_nbytes <= 10 or len(plan.tensors) == 1 for plan in planned)
    count = len(planned)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert [plan.name for plan in planned] == (["model.safetensors"] if count == 1 else names)


@pytest.mark.parametrize(
    ("before", "weight", "scale", "files"),
    [
        (4, 4, 2, ["x w w_scale_inv", "y"]),
        (5, 4, 2, ["x", "w w_scale_inv y"]),
        (7, 4, 2, ["x", "w w_scale_inv y"]),
        (1, 8, 4, ["x", "w w_scale_inv", "y"]),
        (1, 12, 4, ["x", "w w_scale_inv", "y"]),
    ],
)
def test_scales_are_in_the_file_of_their_weight(
    before: int, weight: int, scale: int, files: list[str]
) -> None:
    """Even if both are larger than a file should be: they are known once the weight is written."""
    given: list[Entry] = [
        ("x", FP8, (before,)),
        ("w", FP8, (weight,)),
        ("w_scale_inv", FP8, (scale,)),
        ("y", FP8, (3,)),
    ]
    planned = plan_files(given, 10)
    assert [" ".join(tensor.name for tensor in plan.tensors) for plan in planned] == files


def test_no_name_is_planned_twice() -> None:
    with pytest.raises(RuntimeError, match="'a' is planned twice"):
        plan_files([("a", F32, (2,)), ("b", F32, (2,)), ("a", F32, (2,))], 8)
    with pytest.raises(RuntimeError, match="'__metadata__' is planned twice"):
        plan_files([("__metadata__", F32, (2,))], 8)


def test_the_index_tells_sizes_and_files() -> None:
    plans = plan_files([("b", F32, (2, 3)), ("a", BF16, (5,))], 24)
    index = json.loads(index_json(plans))
    assert index == {
        "metadata": {"total_size": 34},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }
    assert list(index["weight_map"]) == ["a", "b"]


@pytest.mark.parametrize("limit", [100_000, 2**30])
def test_transformers_reads_what_is_written(tmp_path: Path, limit: int) -> None:
    """Its own checkpoint, written anew in one file and in several, makes the same model."""
    pytest.importorskip("transformers")
    theirs: Any = pair("deepseek_v3", tmp_path)[0]
    theirs.save_pretrained(tmp_path / "saved")
    values = load_file(tmp_path / "saved" / "model.safetensors")
    (tmp_path / "written").mkdir()
    plans = store(tmp_path / "written", values, limit, rows=7)
    assert (len(plans) > 2) is (limit < 2**30)
    theirs.config.save_pretrained(tmp_path / "written")
    loaded, report = type(theirs).from_pretrained(
        tmp_path / "written", dtype=theirs.dtype, output_loading_info=True
    )
    assert not any(report.values())
    for name, value in theirs.state_dict().items():
        assert same(loaded.state_dict()[name], value), name


def test_the_metadata_says_pytorch(tmp_path: Path) -> None:
    """transformers looks at it."""
    store(tmp_path, {"a": noise(F32, (2,))}, 100)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


class Grudging(io.BytesIO):
    """Takes at most 5 bytes per call, as an unbuffered file may."""

    def write(self, data: Any) -> int:
        return super().write(bytes(data[:5]))


def test_short_writes_go_on_where_they_stopped() -> None:
    values = {"a": noise(F32, (3, 4)), "e": noise(F32, (0,)), "s": noise(BF16, ())}
    (plan,) = plan_files(entries(values), 2**30)
    sinks: list[BinaryIO] = [io.BytesIO(), Grudging()]
    for sink in sinks:
        with SafetensorsWriter(plan, sink) as writer:
            writer.write("a", values["a"])
            writer.write("s", values["s"])
        assert sink.tell() == plan.nbytes
    assert cast(Any, sinks[0]).getvalue() == cast(Any, sinks[1]).getvalue()


def test_contiguous_rows_are_not_copied() -> None:
    """The sink gets the tensor's own memory."""
    value, addresses = noise(BF16, (4, 2)), []

    class Noting(io.BytesIO):
        def write(self, data: Any) -> int:
            addresses.append(np.frombuffer(data, dtype=np.uint8).ctypes.data)
            return super().write(data)

    (plan,) = plan_files([("a", BF16, (4, 2))], 100)
    with SafetensorsWriter(plan, cast(BinaryIO, Noting())) as writer:
        writer.write("a", value[1:3])
        writer.write("a", value[:2])
    assert addresses[1:] == [value[1:].data_ptr(), value.data_ptr()]


def test_rows_of_any_strides_and_parameters_are_written() -> None:
    value, sink = noise(F32, (4, 6)), io.BytesIO()
    (plan,) = plan_files([("a", F32, (6, 4)), ("b", F32, (3, 6)), ("c", F32, (4, 6))], 2**20)
    with SafetensorsWriter(plan, sink) as writer:
        writer.write("a", value.T)
        writer.write("b", value[::2])
        writer.write("b", value[3:])
        writer.write("c", torch.nn.Parameter(value))
    expected = [value.T.contiguous(), value[[0, 2, 3]], value]
    assert sink.getvalue()[len(plan.header) :] == b"".join(each.numpy().tobytes() for each in expected)


@pytest.fixture
def writer() -> SafetensorsWriter:
    """For `a` [3, 2], `e` [0, 2] and `s` []."""
    (plan,) = plan_files([("a", F32, (3, 2)), ("e", F32, (0, 2)), ("s", F32, ())], 2**20)
    return SafetensorsWriter(plan, io.BytesIO())


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([("s", ())], "cannot take 's' now: 'a' has 0 of 24 bytes"),
        ([("a", (2, 2)), ("s", ())], "cannot take 's' now: 'a' has 16 of 24 bytes"),
        ([("a", (2, 2)), ("a", (2, 2))], r"'a' has 24 bytes, got 16 \+ 16"),
        ([("a", (3, 2)), ("a", (1, 2))], r"'a' has 24 bytes, got 24 \+ 8"),
        ([("a", (3, 2)), ("e", (1, 2))], r"'e' has 0 bytes, got 0 \+ 8"),
        ([("a", (3, 2)), ("s", ()), ("a", (3, 2))], "cannot take 'a' now: all is written"),
        ([("a", (3, 2)), ("s", ()), ("x", (3, 2))], "cannot take 'x' now: all is written"),
        ([("a", (2, 3))], r"'a' is planned as torch.float32 of shape \(3, 2\), got .* \(2, 3\)"),
        ([("a", (6,))], r"'a' is planned .* \(6,\)"),
        ([("a", (3, 2)), ("s", (1,))], r"'s' is planned .* \(1,\)"),
        ([], "model.safetensors is not complete: 'a' has 0 of 24 bytes"),
        ([("a", (2, 2))], "is not complete: 'a' has 16 of 24 bytes"),
        ([("a", (3, 2)), ("e", (0, 2))], "is not complete: 's' has 0 of 4 bytes"),
    ],
)
def test_what_is_not_planned_cannot_be_written(
    writer: SafetensorsWriter, calls: list[tuple[str, tuple[int, ...]]], words: str
) -> None:
    def carry_out() -> None:
        with writer:
            for name, shape in calls:
                writer.write(name, torch.zeros(shape))

    with pytest.raises(RuntimeError, match=words):
        carry_out()


def test_another_type_is_refused(writer: SafetensorsWriter) -> None:
    with pytest.raises(RuntimeError, match=r"'a' is planned as torch\.float32 .* got torch\.int32"):
        writer.write("a", torch.zeros(3, 2, dtype=torch.int32))


def test_an_error_while_writing_is_not_hidden_by_what_is_missing(writer: SafetensorsWriter) -> None:
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
