"""A conversion that was stopped, by whatever means, resumes; another conversion does not."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dsv3.config.convert import ConvertConfig
from dsv3.convert import convert as conversion
from dsv3.convert.destination import Destination
from dsv3.convert.output_file import HashingWriter
from dsv3.convert.request import prepare_conversion
from dsv3.distributed.directory_lock import LOCK_FILE, NOTE_FILE
from dsv3.launch.checkpoint_defaults import Composition
from tests.harness.commands import ConvertCommand
from tests.harness.composing import compose
from tests.harness.outcome import refused
from tests.harness.processes import environment
from tests.harness.runs import contents

FILES: dict[str, tuple[str, ...]] = {"hf_to_dcp": (), "hf_to_hf": ("max_shard_size=20KB",)}
"""What makes each direction write many files."""
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.usefixtures("many_files"), pytest.mark.slow]


class Crash(BaseException):
    """Ends a conversion as a kill would, without any cleanup."""


def start(*arguments: str) -> "subprocess.Popen[str]":
    """Start the command on a slow disk, in a process of its own."""
    command = [sys.executable, "-m", "tests.convert.killed", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_files(process: "subprocess.Popen[str]", count: int) -> None:
    """Wait until so many files have been written."""
    assert process.stderr is not None
    for _ in range(count):
        line = process.stderr.readline()
        assert line.startswith("finishing "), line


def asked(source: Path, output: Path) -> list[str]:
    return ["direction=hf_to_dcp", f"input={source}", f"output={output}", "workers=2"]


def kept(partial: Path) -> dict[str, object]:
    """Return the contents of an unfinished conversion, without who was at it last."""
    return {name: content for name, content in contents(partial).items() if name != NOTE_FILE}


def crash(
    convert: ConvertCommand,
    source: Path,
    output: Path,
    calls: int,
    whole: bool,
    command: Sequence[str] = ("hf_to_dcp",),
) -> bool:
    """Leave what a kill at this write (`whole`: this end of a file) leaves; return whether it came so far."""
    left = output.with_name("left")
    count = 0
    name = "finish" if whole else "_append"
    original = getattr(HashingWriter, name)

    def dying(self: HashingWriter, *data: bytes) -> object:
        nonlocal count
        count += 1
        if count == calls:
            if data:
                self._file.write(data[0][: len(data[0]) // 2])
            # Before anything is tidied up; the other lane goes on, and a journal that was copied last would
            # know of files that were not there yet.
            journal = (self.path.parent / ".journal.jsonl").read_bytes()
            shutil.copytree(self.path.parent, left)
            (left / ".journal.jsonl").write_bytes(journal)
            raise OSError(5, "killed")
        return original(self, *data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HashingWriter, name, dying)
        convert(command[0], source, output, *command[1:], "workers=2")
    partial = output.with_name(f".{output.name}.partial")
    if not left.exists():
        return False
    shutil.rmtree(partial, ignore_errors=True)
    left.rename(partial)
    return True


def test_killed_at_ten_points_and_gone_on_with_gives_the_same_bytes(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path
) -> None:
    """Three are real kills, the others inside of writes in which a kill would rarely catch a process."""
    convert.must("hf_to_dcp", fp8_release, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert len(whole) > 30
    output, points = tmp_path / "out", random.Random(0)
    for number in range(3):
        process = start(*asked(fp8_release, output))
        wait_for_files(process, points.randrange(3 + 4 * number, 6 + 4 * number))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
    for number in range(7):
        assert crash(convert, fp8_release, output, points.randrange(1, 5 + 3 * number), whole=number % 2 == 0)
        assert not output.exists()
    convert.must("hf_to_dcp", fp8_release, output)
    assert contents(output) == whole
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("direction", ["hf_to_dcp", "hf_to_hf"])
@pytest.mark.parametrize("at", ["manifest", "rename"])
def test_killed_while_it_gets_its_name(
    convert: ConvertCommand,
    fp8_release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
    at: str,
) -> None:
    convert.must(direction, fp8_release, tmp_path / "whole", *FILES[direction])
    name = {"manifest": "dsv3.convert.destination.write_manifest", "rename": "pathlib.Path.rename"}[at]
    original = Path.rename

    def dying(path: Path, *target: object) -> object:
        if at == "manifest":  # half-written, as write_text leaves it
            (path / ".partial-manifest.json").write_text("{")
        elif path.name == ".partial-manifest.json":
            return original(path, *target)  # type: ignore[arg-type]
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(name, dying)
        patch.setattr(Destination, "__exit__", lambda self, *error: self._unlock())
        with pytest.raises(Crash):
            conversion.convert(_config(direction, fp8_release, tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(HashingWriter, "finish", lambda self: pytest.fail(f"{self.path} is written again"))
        convert.must(direction, fp8_release, tmp_path / "out", *FILES[direction], "verify=true")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _config(direction: str, source: Path, output: Path) -> ConvertConfig:
    typed = [f"direction={direction}", f"input={source}", f"output={output}", *FILES[direction]]
    return prepare_conversion(compose(typed, "convert"), Composition(typed, root="convert"))


@pytest.fixture
def stopped(convert: ConvertCommand, fp8_release: Path, tmp_path: Path) -> Path:
    """Return the remains of a conversion that was killed after a few files."""
    assert crash(convert, fp8_release, tmp_path / "out", 12, whole=True)
    return tmp_path / ".out.partial"


def finished(partial: Path) -> list[str]:
    lines = (partial / ".journal.jsonl").read_text().splitlines()
    return [json.loads(line)["name"] for line in lines[1:]]


def test_finished_files_are_kept_unless_they_are_damaged(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path, stopped: Path
) -> None:
    kept = finished(stopped)
    assert len(kept) >= 5
    flipped, short, gone, *others = kept
    raw = bytearray((stopped / flipped).read_bytes())
    raw[100] ^= 1
    (stopped / flipped).write_bytes(raw)
    os.truncate(stopped / short, 10)
    (stopped / gone).unlink()
    before = {name: (stopped / name).stat().st_mtime_ns for name in others}
    convert.must("hf_to_dcp", fp8_release, tmp_path / "out", "verify=true")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in others} == before
    convert.must("hf_to_dcp", fp8_release, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "line", "first", "bytes", "empty", "gone", "fields"])
def test_a_damaged_journal_costs_no_more_than_work(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path, stopped: Path, damage: str
) -> None:
    journal = stopped / ".journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    damaged = {
        "cut": "".join(lines)[:-30],
        "line": "".join([*lines[:2], lines[2][:20], *lines[3:]]),
        "first": "".join(['{"direction": \n', *lines[1:]]),
        "bytes": "".join([*lines[:2], "\0\0\0\n[1]\nnull\n", *lines[2:]]),
        "empty": "",
        "gone": None,
        "fields": "".join([*lines[:2], '{"name": "__0_0.distcp", "size": "x"}\n', *lines[2:]]),
    }[damage]
    journal.unlink()
    if damaged is not None:
        journal.write_text(damaged)
    convert.must("hf_to_dcp", fp8_release, tmp_path / "out", "verify=true")
    convert.must("hf_to_dcp", fp8_release, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_leftovers_do_not_get_into_the_output(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path, stopped: Path
) -> None:
    (stopped / ".partial-manifest.json").write_text("{")
    (stopped / "__99_0.distcp").write_text("of before")
    (stopped / "hf").mkdir(exist_ok=True)
    (stopped / "hf" / "stale.json").write_text("{}")
    convert.must("hf_to_dcp", fp8_release, tmp_path / "out", "verify=true")
    convert.must("hf_to_dcp", fp8_release, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_conversion_is_refused_by_what_differs(
    convert: ConvertCommand, fp8_release: Path, bf16_release: Path, tmp_path: Path, stopped: Path
) -> None:
    before = kept(stopped)
    cases = {
        (fp8_release, "dtype=fp32"): "dtype=bf16 instead of fp32",
        (bf16_release, "workers=1"): f"another {bf16_release / 'model-00001-of-00003.safetensors'}",
        (fp8_release, "model.norm_eps=1e-5"): "another model",
    }
    for (source, more), said in cases.items():
        outcome = convert("hf_to_dcp", source, tmp_path / "out", more)
        refused(outcome, str(stopped), said, "repeat its command")
        assert kept(stopped) == before
    refused(convert("hf_to_hf", fp8_release, tmp_path / "out"), "direction=hf_to_dcp instead of hf_to_hf")
    convert.must("hf_to_dcp", fp8_release, tmp_path / "out", "workers=1")


def test_another_export_is_refused_by_what_differs(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path
) -> None:
    typed = ("dtype=fp8", "max_shard_size=20KB")
    assert crash(convert, fp8_release, tmp_path / "out", 3, whole=True, command=("hf_to_hf", *typed))
    stopped = tmp_path / ".out.partial"
    before = kept(stopped)
    cases = {
        ("max_shard_size=20KB", "dtype=bf16"): "dtype=fp8 instead of bf16",
        (*typed, "scale_fmt=ue8m0"): "scale_fmt=null instead of ue8m0",
        ("dtype=fp8", "max_shard_size=1GB"): "max_shard_size=20KB instead of 1GB",
    }
    for more, said in cases.items():
        outcome = convert("hf_to_hf", fp8_release, tmp_path / "out", *more)
        refused(outcome, str(stopped), said, "repeat its command")
        assert kept(stopped) == before
    convert.must("hf_to_hf", fp8_release, tmp_path / "out", *typed)


def test_an_input_that_has_changed_is_refused(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(fp8_release, tmp_path / "in"))
    assert crash(convert, source, tmp_path / "out", 12, whole=True)
    file = source / "model-00002-of-00003.safetensors"
    os.utime(file, ns=(1, 1))
    outcome = convert("hf_to_dcp", source, tmp_path / "out")
    refused(outcome, f"another {file}")
    assert "repeat its command" not in outcome.err
    _, removal = outcome.err.strip().split(": remove it, ")
    subprocess.run(shlex.split(removal), check=True)
    assert crash(convert, source, tmp_path / "out", 12, whole=True)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["fmt"] = None
    (source / "config.json").write_text(json.dumps(config))
    refused(convert("hf_to_dcp", source, tmp_path / "out"), "another quantization_config")


def test_the_same_input_from_another_directory_is_the_same(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fp8_release.parent)
    kept = finished(stopped)
    before = (stopped / kept[0]).stat().st_mtime_ns
    convert.must("hf_to_dcp", fp8_release.name, os.path.relpath(tmp_path / "out"))
    assert (tmp_path / "out" / kept[0]).stat().st_mtime_ns == before


def test_ctrl_c_and_sigterm_keep_what_is_finished_and_two_at_once_are_refused(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path
) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(*asked(fp8_release, output))
        wait_for_files(process, 4)
        if number is signal.SIGTERM:
            told = f"{output} is being written by process {process.pid}"
            refused(convert("hf_to_dcp", fp8_release, output), told)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75, err
        assert err.splitlines()[-1] == (
            f"stopped: finished files are kept in {partial}, the same command goes on"
        )
        assert "Traceback" not in err
        assert not output.exists()
        names = {path.name for path in partial.rglob("*") if path.is_file()} - {LOCK_FILE, ".journal.jsonl"}
        assert names == set(finished(partial))
        assert len(names) >= 3
    convert.must("hf_to_dcp", fp8_release, output, "verify=true")
    convert.must("hf_to_dcp", fp8_release, tmp_path / "whole")
    assert contents(output) == contents(tmp_path / "whole")


def test_a_second_signal_ends_it_at_once(fp8_release: Path, tmp_path: Path) -> None:
    process = start(*asked(fp8_release, tmp_path / "out"))
    wait_for_files(process, 1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not (tmp_path / "out").exists()


def test_stopped_before_a_file_is_finished_nothing_is_left(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = HashingWriter._append, list[bool]()

    def stopping(self: HashingWriter, data: bytes) -> int:
        if not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        self._stop.wait(10)
        return original(self, data)

    monkeypatch.setattr(HashingWriter, "_append", stopping)
    outcome = convert("hf_to_dcp", fp8_release, tmp_path / "out")
    assert outcome.code == 75
    assert outcome.err.splitlines() == ["stopped: no file was finished, nothing is kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
