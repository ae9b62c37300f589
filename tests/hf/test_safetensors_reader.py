"""Rows and rectangles of stored tensors: every boundary, into given memory, from many threads."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv3.errors import UserError
from dsv3.hf.safetensors_header import TensorInfo
from dsv3.hf.safetensors_reader import SafetensorsReader, read_headers
from tests.hf.raw_shards import noise, same

VALUES = {
    "before": noise(torch.float32, (3,), 1),
    "cube": noise(torch.bfloat16, (4, 3, 2), 2),
    "matrix": noise(torch.float8_e4m3fn, (6, 5), 3),
    "wide": noise(torch.float32, (5, 7), 4),
    "line": noise(torch.int64, (5,), 5),
    "scalar": noise(torch.float32, (), 6),
    "empty": noise(torch.float32, (0, 4), 7),
    "thin": noise(torch.float32, (3, 0), 8),
}
RANGES = [(first, end) for end in range(6) for first in range(end + 1)]


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file with VALUES that the library wrote."""
    save_file(VALUES, tmp_path / "model.safetensors")
    return read_headers(tmp_path)


@pytest.fixture
def reader() -> Iterator[SafetensorsReader]:
    with SafetensorsReader() as reader:
        yield reader


@pytest.mark.parametrize("name", sorted(VALUES))
def test_all_ranges_of_rows_are_read(
    stored: dict[str, TensorInfo], reader: SafetensorsReader, name: str
) -> None:
    tensor, value = stored[name], VALUES[name]
    assert same(reader.read_rows(tensor, 0, tensor.rows), value)
    if not value.dim():
        return
    for first in range(tensor.rows + 1):
        for end in range(first, tensor.rows + 1):
            assert same(reader.read_rows(tensor, first, end - first), value[first:end])


@pytest.mark.parametrize("piece", [1, 5, 11, 28, 60, 2**24])
@pytest.mark.parametrize("name", ["matrix", "wide", "thin"])
def test_all_rectangles_are_cut_out(
    stored: dict[str, TensorInfo], reader: SafetensorsReader, name: str, piece: int
) -> None:
    tensor, value = stored[name], VALUES[name]
    for rows in [each for each in RANGES if each[1] <= value.shape[0]]:
        for columns in [each for each in [*RANGES, (0, 7), (6, 7)] if each[1] <= value.shape[1]]:
            expected = value[slice(*rows), slice(*columns)]
            assert same(reader.read_rectangle(tensor, rows, columns, window=piece), expected)


@pytest.mark.parametrize(
    ("piece", "reads"), [(2**24, [140]), (59, [56, 56, 28]), (55, [28] * 5), (27, [8] * 5)]
)
def test_a_rectangle_takes_no_more_memory_than_a_piece(
    stored: dict[str, TensorInfo],
    reader: SafetensorsReader,
    piece: int,
    reads: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many rows of 28 bytes are read at once as fit; if none fits, only the 8 bytes that are wanted."""
    reader.read_rows(stored["wide"], 0, 5)
    lengths, actual = [], os.preadv

    def noting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        lengths.append(len(buffers[0]))
        return actual(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", noting)
    reader.read_rectangle(stored["wide"], (0, 5), (2, 4), window=piece)
    assert lengths == reads


def test_given_memory_is_filled_and_nothing_beside_it(
    stored: dict[str, TensorInfo], reader: SafetensorsReader
) -> None:
    memory = torch.full((7, 7), 3.0)
    out = memory[1:4]
    assert reader.read_rows(stored["wide"], 2, 3, out) is out
    assert same(out, VALUES["wide"][2:])
    assert (memory[[0, 4, 5, 6]] == 3).all()
    memory = torch.full((4, 2), 3.0)
    out = memory[1:3]
    assert reader.read_rectangle(stored["wide"], (1, 3), (4, 6), out) is out
    assert same(out, VALUES["wide"][1:3, 4:6])
    assert (memory[[0, 3]] == 3).all()
    scalar = torch.zeros(())
    assert same(reader.read_rows(stored["scalar"], 0, 1, scalar), VALUES["scalar"])
    parameter = torch.nn.Parameter(torch.zeros(3))
    assert same(reader.read_rows(stored["before"], 0, 3, parameter), VALUES["before"])


def test_new_memory_is_on_the_cpu_whatever_the_default(
    stored: dict[str, TensorInfo], reader: SafetensorsReader
) -> None:
    with torch.device("meta"):
        assert same(reader.read_rectangle(stored["wide"], (0, 5), (0, 3)), VALUES["wide"][:, :3])


@pytest.mark.parametrize(
    ("name", "method", "arguments"),
    [
        ("line", "read_rows", (-1, 2)),
        ("line", "read_rows", (0, 6)),
        ("line", "read_rows", (6, 0)),
        ("line", "read_rows", (3, -1)),
        ("scalar", "read_rows", (0, 0)),
        ("line", "read_rows", (0, 2, torch.zeros(2, dtype=torch.int32))),
        ("line", "read_rows", (0, 2, torch.zeros(3, dtype=torch.int64))),
        ("line", "read_rows", (0, 2, torch.zeros(4, dtype=torch.int64)[::2])),
        ("line", "read_rows", (0, 2, torch.zeros(2, dtype=torch.int64, device="meta"))),
        ("wide", "read_rows", (0, 2, torch.zeros(7, 2).T)),
        ("wide", "read_rectangle", ((0, 6), (0, 2))),
        ("wide", "read_rectangle", ((0, 5), (2, 8))),
        ("wide", "read_rectangle", ((0, 5), (3, 2))),
        ("wide", "read_rectangle", ((0, 5), (0, 2), torch.zeros(5, 3))),
        ("line", "read_rectangle", ((0, 5), (0, 1))),
        ("cube", "read_rectangle", ((0, 4), (0, 3))),
    ],
)
def test_what_cannot_be_meant_is_refused(
    stored: dict[str, TensorInfo],
    reader: SafetensorsReader,
    name: str,
    method: str,
    arguments: tuple[Any, ...],
) -> None:
    with pytest.raises(RuntimeError, match=f"'{name}'"):
        getattr(reader, method)(stored[name], *arguments)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_a_file_that_was_cut_off_meanwhile_is_told(
    stored: dict[str, TensorInfo], reader: SafetensorsReader
) -> None:
    tensor = stored["wide"]
    os.truncate(tensor.file, tensor.offset + 100)
    assert same(reader.read_rows(tensor, 0, 3), VALUES["wide"][:3])
    message = refusal(lambda: reader.read_rows(tensor, 3, 2))
    assert message == f"{tensor.file} ends 40 bytes before 'wide' does: it was cut off meanwhile"
    assert "before 'wide' does" in refusal(lambda: reader.read_rectangle(tensor, (0, 5), (0, 1)))
    tensor.file.unlink()
    assert "does not exist" in refusal(lambda: SafetensorsReader().read_rows(tensor, 0, 1))


def test_a_disk_that_fails_is_told_with_file_and_tensor(
    stored: dict[str, TensorInfo], reader: SafetensorsReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    for call in (
        lambda: reader.read_rows(stored["line"], 0, 1),
        lambda: reader.read_rectangle(replace(stored["wide"], name="line"), (0, 1), (0, 1)),
    ):
        assert refusal(call) == f"{stored['line'].file} cannot be read at 'line': Input/output error"


def test_short_reads_go_on_where_they_stopped(
    stored: dict[str, TensorInfo], reader: SafetensorsReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return actual(descriptor, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", short)
    for name, value in VALUES.items():
        assert same(reader.read_rows(stored[name], 0, stored[name].rows), value)


def _many(directory: Path, files: int) -> dict[str, Tensor]:
    """Write several files with a tensor each."""
    values = {str(number): noise(torch.bfloat16, (64, 33), number) for number in range(files)}
    for name, value in values.items():
        save_file({name: value}, directory / f"{name}.safetensors")
    return values


@pytest.fixture
def restless() -> Iterator[None]:
    """Python changes threads all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("limit", [1, 3, 64])
@pytest.mark.usefixtures("restless")
def test_threads_read_at_once_what_one_would(tmp_path: Path, limit: int) -> None:
    """With a limit below the number of files, threads close each other's files all the time."""
    values, stored = _many(tmp_path, 6), read_headers(tmp_path)
    start, shared = threading.Barrier(8), SafetensorsReader(limit)

    def work(seed: int) -> int:
        start.wait()
        wrong = 0
        for step in range(150):
            name, first = str((seed + step) % 6), (7 * seed + step) % 60
            got = shared.read_rows(stored[name], first, 4)
            cut = shared.read_rectangle(stored[name], (first, first + 3), (seed, 30), window=100)
            value = values[name][first : first + 4]
            wrong += not (same(got, value) and same(cut, value[:3, seed:30]))
        return wrong

    with shared, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [0] * 8


def test_threads_that_need_a_file_open_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, stored = _many(tmp_path, 1), read_headers(tmp_path)
    opened, actual, start = [], os.open, threading.Barrier(4)

    def slow(path: Path, flags: int) -> int:
        opened.append(path)
        time.sleep(0.1)  # time for the others to come and open it too
        return actual(path, flags)

    def work(first: int) -> bool:
        start.wait()
        return same(shared.read_rows(stored["0"], first, 2), values["0"][first : first + 2])

    monkeypatch.setattr(os, "open", slow)
    with SafetensorsReader() as shared, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert opened == [stored["0"].file]


def descriptors(directory: Path) -> list[str]:
    """Return the files of a directory that this process has open."""
    links = Path("/proc/self/fd")
    if not links.is_dir():
        pytest.skip("needs /proc")
    found = []
    for number in os.listdir(links):  # noqa: PTH208
        try:
            found.append(str((links / number).readlink()))
        except FileNotFoundError:  # the one that listed them
            continue
    return sorted(name for name in found if name.startswith(f"{directory}/"))


def test_files_are_opened_once_kept_to_the_limit_and_closed(tmp_path: Path) -> None:
    _many(tmp_path, 4)
    stored = read_headers(tmp_path)
    assert descriptors(tmp_path) == []
    with SafetensorsReader(limit=2) as reader:
        for name in "012020302":
            reader.read_rows(stored[name], 0, 1)
            reader.read_rows(stored[name], 1, 1)
        assert descriptors(tmp_path) == [str(tmp_path / f"{name}.safetensors") for name in "02"]
        reader.read_rows(stored["0"], 0, 1)
        reader.read_rows(stored["3"], 0, 1)
        assert descriptors(tmp_path) == [str(tmp_path / f"{name}.safetensors") for name in "03"]
    assert descriptors(tmp_path) == []
    with pytest.raises(RuntimeError, match="closed"):
        reader.read_rows(stored["0"], 0, 1)


def test_closing_waits_for_a_read_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor closed under a read could by then be another file's."""
    values, stored = _many(tmp_path, 1), read_headers(tmp_path)
    reading, go_on, actual = threading.Event(), threading.Event(), os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reading.set()
        assert go_on.wait(60)
        return actual(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    reader = SafetensorsReader()
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(reader.read_rows, stored["0"], 0, 64)
        assert reading.wait(60)
        reader.close()
        go_on.set()
        assert same(result.result(), values["0"])
    assert descriptors(tmp_path) == []


def test_a_file_that_does_not_open_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(UserError):
        read_headers(tmp_path)
    assert descriptors(tmp_path) == []
