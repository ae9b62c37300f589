"""One owner of a directory: told by the kernel, between real processes."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsv3.distributed import directory_lock
from dsv3.distributed.directory_lock import LOCK_FILE, NOTE_FILE, DirectoryLock
from dsv3.distributed.signals import before_leaving
from dsv3.errors import UserError
from tests.harness.processes import ROOT, environment, gone, until

HOLD = """
import multiprocessing, os, sys, time
from pathlib import Path
from dsv3.distributed.directory_lock import DirectoryLock

def sleep(lock):
    time.sleep(600)

if __name__ == "__main__":
    lock = DirectoryLock(Path(sys.argv[1]), "run.dir=x")
    lock.take()
    if sys.argv[2:]:
        multiprocessing.get_context("spawn").Process(target=sleep, args=(lock,)).start()
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that owns tmp_path/place; with `worker` a process that it has spawned as well."""
    script, processes, children = tmp_path / "hold.py", list[subprocess.Popen[str]](), list[psutil.Process]()
    script.write_text(HOLD)

    def start(*worker: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(tmp_path / "place"), *worker]
        process = subprocess.Popen(command, env=environment(PYTHONPATH=str(ROOT)), stdout=-1, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        children.extend(psutil.Process(process.pid).children())
        return process

    yield start
    for each in (
        *children,
        *(psutil.Process(process.pid) for process in processes if process.poll() is None),
    ):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    for process in processes:
        process.communicate()


def refusal(directory: Path) -> str:
    """Return why a directory cannot be taken."""
    with pytest.raises(UserError) as error:
        DirectoryLock(directory, f"resume={directory}").take(patience=0.2)
    return str(error.value)


def test_the_second_comer_learns_who_holds_it_and_what_to_type(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process, place = hold(), tmp_path / "place"
    told = refusal(place)
    host = os.uname().nodename
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    who = rf"process {process.pid} on {re.escape(host)} since {since} \(hold.py /.*place\)"
    pattern = rf"resume={re.escape(str(place))} is in use by {who}\nwait for it, or stop it: (kill \d+)"
    found = re.fullmatch(pattern, told)
    assert found is not None, told
    assert len(told) < 500
    subprocess.run(shlex.split(found[1]), check=True)
    process.wait(20)
    with DirectoryLock(place, "run.dir=y"):
        pass


def test_the_message_says_what_the_holder_does(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path, "resume=x"), pytest.raises(UserError, match="output=x is in use by process"):
        DirectoryLock(tmp_path, "output=x", "being prepared").take(patience=0)
    with DirectoryLock(tmp_path, "output=x", "being written"):
        assert "is being written by process" in refusal(tmp_path)
        note = tmp_path / NOTE_FILE
        note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "doing"}))
        assert "is in use by process" in refusal(tmp_path)  # the note of older code


def test_a_note_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / NOTE_FILE).mkdir()
    with DirectoryLock(tmp_path, "run.dir=x"):
        assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE, NOTE_FILE}
        assert "which has not said who it is" in refusal(tmp_path)


def test_kill_9_frees_it_and_the_old_note_misleads_nobody(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process, place = hold(), tmp_path / "place"
    process.kill()
    process.wait(20)
    assert json.loads((place / NOTE_FILE).read_text())["pid"] == process.pid
    lock = DirectoryLock(place, "run.dir=y")
    lock.take(patience=0)
    assert f"process {os.getpid()} " in refusal(place)
    lock.release()
    assert {path.name for path in place.iterdir()} == {LOCK_FILE}


def test_it_is_free_only_when_the_workers_of_a_killed_command_are_gone(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process, place = hold("with a worker"), tmp_path / "place"
    until(lambda: len(psutil.Process(process.pid).children()) == 2)  # and multiprocessing's cleaner
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait(20)
    assert re.search(
        rf"is in use by workers of process {process.pid} .*, which has ended: wait", refusal(place)
    )
    for child in children:
        child.kill()
    assert gone(children, 20)
    DirectoryLock(place, "run.dir=y").take(patience=0)


def test_who_waits_for_the_workers_gets_it_as_soon_as_they_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, looks = DirectoryLock(tmp_path, "a"), list[float]()
    first.take()

    def look(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            first.release()

    monkeypatch.setattr(directory_lock, "read_holder", lambda directory: {"alive": None})
    monkeypatch.setattr("dsv3.distributed.directory_lock.time.sleep", look)
    with DirectoryLock(tmp_path, "b"):
        assert len(looks) == 3


NOTES: dict[str, Any] = {
    "none": None,
    "empty": "",
    "no object": "[1, 2]",
    "no numbers": json.dumps({"host": 1, "pid": "x", "started": [], "since": {}, "command": None}),
    "a number without end": json.dumps(
        {"host": os.uname().nodename, "pid": 10**99, "started": 1.0, "since": 1, "command": 2}
    ),
    "binary": "\udcff\udcfe",
    "a pipe": os.mkfifo,
    "a directory": os.mkdir,
}


@pytest.mark.parametrize("name", NOTES)
def test_a_note_that_says_nothing_does_not_let_anybody_in(tmp_path: Path, name: str) -> None:
    with DirectoryLock(tmp_path, "a"):
        file, note = tmp_path / NOTE_FILE, NOTES[name]
        file.unlink()
        if callable(note):
            note(file)
        elif note is not None:
            file.write_text(note, errors="surrogateescape")
        assert refusal(tmp_path).endswith("by another process, which has not said who it is: wait for it")


def test_a_message_is_short_and_in_two_lines_whatever_the_note_says(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path, "a"):
        texts = dict.fromkeys(("host", "since", "command"), "\n\x1b" + "x" * 10_000)
        (tmp_path / NOTE_FILE).write_text(json.dumps({"pid": 2**31 - 1, "started": 1.0, **texts}))
        told = refusal(tmp_path)
    assert len(told) < 500
    assert len(told.splitlines()) == 2
    assert "\x1b" not in told


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_that_is_told_and_the_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(code, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with DirectoryLock(tmp_path / "place", "a"):
        assert not (tmp_path / "place" / NOTE_FILE).exists()
    said = "this file system has no locks, so nothing keeps a second command out"
    assert capfd.readouterr().err == f"{tmp_path / 'place'}: {said}\n"


def test_a_directory_that_was_made_for_nothing_goes_again_and_another_stays(tmp_path: Path) -> None:
    before = list(before_leaving)
    for leaves in (False, True):
        lock = DirectoryLock(tmp_path / "a" / "b", "a")
        lock.take()
        assert (tmp_path / "a" / "b" / NOTE_FILE).is_file()
        if leaves:  # as a process that ends at once does
            before_leaving[-1]()
        lock.release()
        assert list(tmp_path.iterdir()) == []
        assert before_leaving == before
    with DirectoryLock(tmp_path / "a" / "b", "a"):
        (tmp_path / "a" / "b" / "file").touch()
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {LOCK_FILE, "file"}
    with DirectoryLock(tmp_path / "a", "a", stays=False):
        assert (tmp_path / "a" / LOCK_FILE).exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
