"""Cache entries appear complete or not at all, however many processes want them."""

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from dsv3.data import cache
from dsv3.data.cache import CacheEntryError, cache_root, load_or_build
from dsv3.errors import UserError

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


def test_a_damaged_entry_is_built_anew(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    target.mkdir()
    (target / "content").write_text("damaged")
    assert load_or_build(target, read, build) == "sound"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".entry.lock", "entry"]


def test_a_build_that_fails_leaves_no_entry(tmp_path: Path) -> None:
    def fails(directory: Path) -> None:
        build(directory)
        raise UserError("the corpus cannot be read")

    with pytest.raises(UserError, match="corpus"):
        load_or_build(tmp_path / "entry", read, fails)
    assert [p.name for p in tmp_path.iterdir()] == [".entry.lock"]


def test_whoever_finishes_second_takes_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "entry"

    def overtaken(directory: Path) -> None:
        target.mkdir()
        (target / "content").write_text("the other's")
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
        building.set()
        time.sleep(600)

    load_or_build(target, read, forever)


def test_a_process_that_is_killed_while_it_builds_leaves_no_lock(tmp_path: Path) -> None:
    building = SPAWN.Event()
    holder = SPAWN.Process(target=_hold, args=(tmp_path / "entry", building))
    holder.start()
    assert building.wait(20)
    lock = FileLock(tmp_path / ".entry.lock")
    with pytest.raises(Timeout):
        lock.acquire(timeout=0)
    holder.kill()
    holder.join(30)
    assert load_or_build(tmp_path / "entry", read, build) == "sound"


def test_a_lock_that_is_held_too_long_does_not_stop_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LOCK_TIMEOUT", 0.0)
    with FileLock(tmp_path / ".entry.lock", is_singleton=False):
        assert load_or_build(tmp_path / "entry", read, build) == "sound"
