"""Cache entries appear complete or not at all, however many processes want them."""

import contextlib
import errno
import fcntl
import functools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from dsv3.distributed.heartbeat import HEARTBEAT
from dsv3.errors import UserError
from dsv3.metrics.progress import Phase, phase
from dsv3.tokens import cache
from dsv3.tokens.cache import CacheEntryError, cache_root, load_or_build
from dsv3.tokens.cache_seal import write_seal

SPAWN = multiprocessing.get_context("spawn")


def read(directory: Path) -> str:
    try:
        text = (directory / "content").read_text()
    except OSError as error:
        raise CacheEntryError from error
    if text == "damaged":
        raise CacheEntryError
    return text


def build(directory: Path) -> None:
    (directory / "content").write_text("sound")


def test_the_place_is_the_option_else_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("DSV3_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root(None) == Path("/home/someone/.cache/dsv3")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root(None) == Path("/xdg/dsv3")
    monkeypatch.setenv("DSV3_CACHE", "/cache")
    assert cache_root(None) == Path("/cache")
    assert cache_root("~/mine") == Path("/home/someone/mine")


def test_an_entry_is_built_once_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "entry"
    assert load_or_build(target, read, build) == "sound"
    assert load_or_build(target, read, lambda _: pytest.fail("built twice")) == "sound"
    assert sorted(p.name for p in target.parent.iterdir()) == [".entry.lock", "entry"]


def test_a_damaged_entry_is_told_of_and_built_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "entry"
    target.mkdir()
    assert load_or_build(target, read, build) == "sound"
    (target / "content").write_text("damaged")
    assert load_or_build(target, read, build, "some text") == "sound"
    assert load_or_build(target, read, lambda _: pytest.fail("built again")) == "sound"
    assert capsys.readouterr().err.count("the cache's entry is damaged and is made anew") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [".entry.lock", "entry"]
    assert json.loads((target / "entry.json").read_text())["made_from"] == "some text"


def test_a_build_that_fails_leaves_no_entry(tmp_path: Path) -> None:
    def fails(directory: Path) -> None:
        build(directory)
        raise UserError("the corpus cannot be read")

    with pytest.raises(UserError, match="corpus"):
        load_or_build(tmp_path / "entry", read, fails)
    assert [p.name for p in tmp_path.iterdir()] == [".entry.lock"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_leaves_what_is_done_for_the_next_try(tmp_path: Path, wrapped: bool) -> None:
    def fills(directory: Path) -> None:
        (directory / "half").touch()
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if wrapped:
                raise UserError("shard 3 cannot be written: No space left on device") from error
            raise

    def goes_on(directory: Path) -> None:
        (directory / "half").unlink()
        build(directory)

    told = "shard 3" if wrapped else r"data\.cache_dir=.*cannot be written \(No space left.*task=cache"
    with pytest.raises(UserError, match=told):
        load_or_build(tmp_path / "entry", read, fills)
    assert load_or_build(tmp_path / "entry", read, goes_on) == "sound"


def test_whoever_finishes_second_takes_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "entry"

    def overtaken(directory: Path) -> None:
        target.mkdir()
        (target / "content").write_text("the other's")
        write_seal(target)
        build(directory)

    assert load_or_build(target, read, overtaken) == "the other's"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file.*cannot be written"):
        load_or_build(tmp_path / "file" / "entry", read, build)


def test_an_entry_in_a_folder_that_cannot_be_written_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_or_build(tmp_path / "entry", read, build)
    monkeypatch.setattr(cache, "FileLock", lambda *_, **__: pytest.fail("nothing is to be written"))
    assert load_or_build(tmp_path / "entry", read, build) == "sound"


def _race(target: Path, barrier: "multiprocessing.synchronize.Barrier", code: int | None) -> None:
    if code is not None:

        def no_locks(*_: object) -> None:
            raise OSError(code, "no locks available")

        fcntl.flock = no_locks

    def slow(directory: Path) -> None:
        (target.parent / f"built-{os.getpid()}").touch()
        build(directory)
        if code is not None:
            barrier.wait(20)  # both have built before either publishes

    barrier.wait(20)
    assert load_or_build(target, read, slow) == "sound"


@pytest.mark.parametrize("code", [None, errno.ENOLCK, errno.ENOSYS], ids=["locks", "nfs", "no flock"])
def test_two_processes_at_once_both_succeed(tmp_path: Path, code: int | None) -> None:
    barrier = SPAWN.Barrier(2)
    workers = [SPAWN.Process(target=_race, args=(tmp_path / "entry", barrier, code)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert read(tmp_path / "entry") == "sound"
    assert len(list(tmp_path.glob("built-*"))) == (1 if code is None else 2)
    assert not list(tmp_path.glob(".entry-*"))


def _hold(target: Path, building: "multiprocessing.synchronize.Event") -> None:
    def forever(directory: Path) -> None:
        (directory / "half").touch()
        building.set()
        time.sleep(600)

    load_or_build(target, read, forever)


def test_after_a_kill_the_next_process_goes_on(tmp_path: Path) -> None:
    building = SPAWN.Event()
    holder = SPAWN.Process(target=_hold, args=(tmp_path / "entry", building), daemon=True)
    holder.start()
    assert building.wait(20)
    lock = FileLock(tmp_path / ".entry.lock")
    with pytest.raises(Timeout):
        lock.acquire(timeout=0)
    holder.kill()
    holder.join(30)

    def goes_on(directory: Path) -> None:
        (directory / "half").unlink()
        build(directory)

    assert load_or_build(tmp_path / "entry", read, goes_on) == "sound"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".entry.lock", "entry"]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def has_moved(count: int) -> bool:
    return HEARTBEAT.count > count


def test_others_wait_as_long_as_it_takes_and_show_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"TELL": 0.01, "LOOK": 0.02, "SILENCE": 0.2}.items():
        monkeypatch.setattr(cache, name, seconds)
    phases: list[Phase] = []

    @contextlib.contextmanager
    def watched(title: str, **options: bool) -> Iterator[Phase]:
        with phase(title, **options) as current:  # type: ignore[arg-type]
            phases.append(current)
            yield current

    monkeypatch.setattr(cache, "phase", watched)
    note = tmp_path / ".entry.progress"
    waiter = threading.Thread(target=load_or_build, args=(tmp_path / "entry", read, build))
    with FileLock(tmp_path / ".entry.lock", is_singleton=False):
        note.write_text("{ half a note")
        waiter.start()
        wait_until(lambda: phases)
        for beats in (1, 2):  # while the other one moves, so does this one; when it is silent, that is said
            note.write_text(json.dumps({"process": "7 on host", "doing": "reading: 50 %", "beats": beats}))
            before = HEARTBEAT.count
            wait_until(functools.partial(has_moved, before))
            wait_until(lambda: "which has not moved for" in phases[0].title)
            assert phases[0].title.startswith(
                "waiting for process 7 on host, which makes entry (reading: 50 %), which has not moved for "
            )
        silent = HEARTBEAT.count
        wait_until(lambda: "for 1 s" in phases[0].title)
        assert HEARTBEAT.count == silent
        note.write_text(json.dumps({"beats": 2, "patience": 1e9}))  # one call that may take long
        wait_until(functools.partial(has_moved, silent))
    waiter.join()
    assert read(tmp_path / "entry") == "sound"


def test_a_builder_notes_its_progress_for_those_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "TELL", 0.01)
    monkeypatch.setenv("DSV3_PROGRESS", "lines")
    note = tmp_path / ".entry.progress"

    def slow(directory: Path) -> None:
        with phase("reading", 4) as work:
            work.advance(2)
            wait_until(lambda: note.exists() and "reading: 50 %" in note.read_text())
            assert json.loads(note.read_text())["process"].startswith(f"{os.getpid()} on ")
        build(directory)

    assert load_or_build(tmp_path / "entry", read, slow) == "sound"
    assert not note.exists()
