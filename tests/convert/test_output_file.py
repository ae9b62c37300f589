"""Files written and read in blocks past the page cache: the same bytes on every kind of disk."""

import errno
import fcntl
import os
import random
from pathlib import Path

import pytest

from dsv3.convert import output_file
from dsv3.convert.output_file import DirectWriter
from dsv3.errors import UserError
from dsv3.hf import pread_file
from dsv3.hf.pread_file import DirectReader

PAGE = 4096
LENGTHS = [0, 1, PAGE - 1, PAGE, 2 * PAGE, 2 * PAGE + 1, 5 * PAGE - 3, 100_000]


@pytest.fixture(params=["as it is", "no such flag", "refused at open", "refused later"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use blocks of two pages, on disks with and without direct I/O."""
    for module in (output_file, pread_file):
        monkeypatch.setattr(module, "DISK_BLOCK", 2 * PAGE)
    monkeypatch.setattr(pread_file, "_SHORTEST_DIRECT", 1)
    if request.param == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
        monkeypatch.setattr(output_file, "_DIRECT", 0)
    elif request.param == "refused at open":
        refuse(monkeypatch, "open", lambda path, flags, *rest: flags & os.O_DIRECT)
    elif request.param == "refused later":
        refuse(monkeypatch, "write", lambda fd, data: is_direct(fd))
        refuse(monkeypatch, "preadv", lambda fd, views, offset: is_direct(fd))


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, when: object) -> None:
    actual = getattr(os, name)

    def call(*arguments: object) -> object:
        if when(*arguments):  # type: ignore[operator]
            raise OSError(errno.EINVAL, "Invalid argument")
        return actual(*arguments)

    monkeypatch.setattr(os, name, call)


def written(path: Path, content: bytes, cuts: list[int]) -> None:
    file = DirectWriter(path)
    for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        file.write(memoryview(content)[begin:end])
    file.sync()
    file.close()
    file.close()


@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize("length", LENGTHS)
def test_bytes_come_out_as_they_went_in_however_they_were_cut(tmp_path: Path, length: int) -> None:
    draw = random.Random(length)
    content = draw.randbytes(length)
    for number in range(5):
        path = tmp_path / str(number)
        path.write_bytes(bytes(200_000))  # an older file of that name goes
        written(path, content, sorted(draw.randrange(length + 1) for _ in range(number)))
        assert path.read_bytes() == content
        file = DirectReader(path)
        for _ in range(20):
            begin, end = sorted(draw.randrange(length + 1) for _ in range(2))
            target = bytearray(end - begin)
            file.read(memoryview(target), begin, "a range")
            assert target == content[begin:end]


@pytest.mark.usefixtures("disk")
def test_a_file_that_was_cut_off_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PAGE + 10))
    for begin in (0, 2 * PAGE + 1, 3 * PAGE, 4 * PAGE):
        with pytest.raises(UserError, match="bytes before 'a' does: it was cut off"):
            DirectReader(path).read(memoryview(bytearray(5 * PAGE)), begin, "'a'")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_what_the_disk_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def failing(descriptor: int, data: object) -> int:
        raise OSError(error, os.strerror(error))

    file = DirectWriter(tmp_path / "file")
    file.write(memoryview(bytes(10)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing)
        with pytest.raises(OSError, match=os.strerror(error)):
            file.sync()
    file.close()


def test_a_write_that_took_a_part_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actual = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: actual(fd, data[: max(1, len(data) // 2)]))
    content = random.Random(0).randbytes(3 * PAGE + 5)
    written(tmp_path / "file", content, [])
    assert (tmp_path / "file").read_bytes() == content
