"""Disks that are full, read-only or elsewhere: the messages, and the files that stay."""

import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3.convert.output_file import HashingWriter
from dsv3.tokens.file_digests import FileEntry
from tests.harness.commands import ConvertCommand
from tests.harness.outcome import refused
from tests.harness.processes import run_program
from tests.harness.runs import contents

pytestmark = pytest.mark.slow

SIZE = 3 * 2**20
FILES: dict[str, tuple[str, ...]] = {"hf_to_dcp": (), "hf_to_hf": ("max_shard_size=50KB",)}
"""What makes each direction write many files, beside the fixture of that name."""


def mount(path: Path, options: str) -> None:
    """Mount a file system in memory; skip where that is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    done = (
        subprocess.run(command, capture_output=True, text=True, check=False)
        if shutil.which("mount")
        else None
    )
    if done is None or done.returncode:
        pytest.skip("mounting is not allowed here")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 3 MiB."""
    path = tmp_path / "disk"
    mount(path, f"size={SIZE}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def boundless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a disk say that it has room, as when others write to it meanwhile."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**60, 0, 2**60))


@pytest.mark.usefixtures("boundless", "many_files")
@pytest.mark.parametrize("direction", ["hf_to_dcp", "hf_to_hf"])
def test_a_disk_that_fills_up_keeps_what_is_finished_and_the_same_command_goes_on(
    convert: ConvertCommand, fp8_release: Path, disk: Path, tmp_path: Path, direction: str
) -> None:
    filler = disk / "filler"
    filler.write_bytes(bytes(SIZE - 450_000))
    outcome = convert(direction, fp8_release, disk / "out", *FILES[direction])
    refused(outcome, "No space left on device", "kept in", "the same command goes on", code=1)
    partial = disk / ".out.partial"
    assert sorted(path.name for path in disk.iterdir()) == [".out.partial", "filler"]
    lines = (partial / ".journal.jsonl").read_text().splitlines()
    kept = contents(partial)
    assert 1 < len(lines) == len(kept) - 1  # the conversion and a line a file; the journal and the lock
    filler.unlink()
    convert.must(direction, fp8_release, disk / "out", *FILES[direction])
    convert.must(direction, fp8_release, tmp_path / "whole", *FILES[direction])
    assert contents(disk / "out") == contents(tmp_path / "whole")
    assert kept.items() - {(n, c) for n, c in kept.items() if n[0] == "."} <= contents(disk / "out").items()
    assert not partial.exists()


@pytest.mark.usefixtures("boundless")
def test_a_disk_that_is_full_before_anything_is_finished_is_left_as_it_was(
    convert: ConvertCommand, fp8_release: Path, disk: Path
) -> None:
    (disk / "filler").write_bytes(bytes(SIZE - 150_000))
    outcome = convert("hf_to_dcp", fp8_release, disk / "a" / "out", "workers=1")
    refused(outcome, "No space left on device", "nothing is kept", code=1)
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_too_little_room_is_told_first(convert: ConvertCommand, fp8_release: Path, disk: Path) -> None:
    (disk / "filler").write_bytes(bytes(SIZE - 150_000))
    outcome = convert("hf_to_dcp", fp8_release, disk / "new" / "out")
    refused(outcome, f"output={disk / 'new' / 'out'} needs 0.00 GB", "free some or take another disk")
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_the_real_command_on_a_disk_that_is_full(fp8_release: Path, disk: Path) -> None:
    (disk / "filler").write_bytes(bytes(SIZE - 4096))
    outcome = run_program(
        "convert.py", "direction=hf_to_dcp", f"input={fp8_release}", f"output={disk / 'out'}"
    )
    refused(outcome, f"output={disk / 'out'}")
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("call", ["write", "finish"])
@pytest.mark.parametrize("direction", ["hf_to_dcp", "hf_to_hf"])
def test_a_disk_that_fails_leaves_finished_files_alone(
    convert: ConvertCommand,
    fp8_release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
    call: str,
) -> None:
    """Wherever it fails: in the middle of an entry that torch.save writes, or where a file is to last."""
    original = getattr(HashingWriter, "_append" if call == "write" else call)
    calls = 0

    def failing(self: HashingWriter, *data: bytes) -> object:
        nonlocal calls
        calls += 1
        if calls > (100 if call == "write" else 5):
            raise OSError(5, "Input/output error")
        return original(self, *data)

    with monkeypatch.context() as patch:
        patch.setattr(HashingWriter, "_append" if call == "write" else call, failing)
        outcome = convert(direction, fp8_release, tmp_path / "out", *FILES[direction], "workers=1")
    refused(outcome, "Input/output error", ".out.partial", "the same command goes on", code=1)
    partial = tmp_path / ".out.partial"
    lines = (partial / ".journal.jsonl").read_text().splitlines()
    assert len(contents(partial)) == len(lines) + 1
    convert.must(direction, fp8_release, tmp_path / "out", *FILES[direction], "verify=true")


def test_an_output_that_cannot_be_is_refused(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path
) -> None:
    file, full, link = tmp_path / "file", tmp_path / "full", tmp_path / "link"
    file.write_text("mine")
    full.mkdir()
    (full / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    link.symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = contents(tmp_path)
    cases = {
        file: "is not a directory",
        full: "is not empty",
        link: "is not a directory",
        tmp_path / "dangling": "is not a directory",
        file / "below": "cannot be written: Not a directory",
        Path("/"): "a disk's own directory",
        Path("/proc/new"): "cannot be written",
        tmp_path / ("x" * 250): "cannot be written: File name too long",
        tmp_path / ("x" * 300): "cannot be written: File name too long",
        fp8_release: "is not empty",
    }
    for output, said in cases.items():
        refused(convert("hf_to_dcp", fp8_release, output), f"output={output}", said)
    assert contents(tmp_path) == before


def test_a_mount_point_is_refused(convert: ConvertCommand, fp8_release: Path, disk: Path) -> None:
    refused(convert("hf_to_dcp", fp8_release, disk), f"output={disk}", "name a new one in it")
    assert not any(disk.iterdir())


def test_a_read_only_disk_is_refused(convert: ConvertCommand, fp8_release: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    refused(convert("hf_to_dcp", fp8_release, disk / "out"), "cannot be written: Read-only file system")


def test_an_empty_directory_and_missing_parents_will_do(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    convert.must("hf_to_dcp", fp8_release, tmp_path / "empty")
    convert.must("hf_to_dcp", fp8_release, tmp_path / "a" / "b" / "out")
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b" / "out")
    names = {path.name for path in (tmp_path / "empty").iterdir()}
    assert names == {"__0_0.distcp", ".metadata", "model.yaml", "hf", "manifest.json"}
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]
    assert os.listdir(tmp_path / "here") == []  # noqa: PTH208


def test_an_output_in_the_input_is_no_part_of_it(
    convert: ConvertCommand, bf16_release: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(bf16_release, tmp_path / "in"))
    convert.must("hf_to_hf", source, source / "out")
    convert.must("hf_to_hf", bf16_release, tmp_path / "out")
    assert contents(source / "out") == contents(tmp_path / "out")


@pytest.mark.usefixtures("many_files")
def test_what_was_written_is_not_read_again(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, actual = list[str](), FileEntry.of

    def noting(path: Path) -> FileEntry:
        read.append(path.name)
        return actual(path)

    monkeypatch.setattr(FileEntry, "of", noting)
    convert.must("hf_to_dcp", fp8_release, tmp_path / "out")
    assert read
    assert not [name for name in read if name.endswith((".distcp", ".safetensors"))]
