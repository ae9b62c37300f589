"""Entries appear whole or not at all, however many processes want them."""

import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from dsv3.data import cache
from dsv3.data.cache import StaleError, cache_root, cached
from dsv3.errors import UserError


def read(directory: Path) -> str:
    try:
        text = (directory / "content").read_text()
    except OSError as error:
        raise StaleError from error
    if text == "damaged":
        raise StaleError
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
    assert cached(target, read, build) == "sound"
    assert cached(target, read, lambda _: pytest.fail("built twice")) == "sound"
    assert sorted(p.name for p in target.parent.iterdir()) == [".entry.lock", "entry"]


def test_a_damaged_entry_is_built_anew(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    target.mkdir()
    (target / "content").write_text("damaged")
    assert cached(target, read, build) == "sound"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".entry.lock", "entry"]


def test_a_build_that_fails_leaves_no_entry(tmp_path: Path) -> None:
    def fails(directory: Path) -> None:
        build(directory)
        raise UserError("the corpus cannot be read")

    with pytest.raises(UserError, match="corpus"):
        cached(tmp_path / "entry", read, fails)
    assert [p.name for p in tmp_path.iterdir()] == [".entry.lock"]


def test_whoever_finishes_second_takes_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "entry"

    def overtaken(directory: Path) -> None:
        target.mkdir()
        (target / "content").write_text("the other's")
        build(directory)

    assert cached(target, read, overtaken) == "the other's"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file.*cannot be written"):
        cached(tmp_path / "file" / "entry", read, build)


def test_an_entry_in_a_folder_that_cannot_be_written_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(tmp_path / "entry", read, build)
    monkeypatch.setattr(cache, "_lock", lambda _: pytest.fail("nothing is to be written"))
    assert cached(tmp_path / "entry", read, build) == "sound"


def _race(target: Path, barrier: "multiprocessing.synchronize.Barrier", locks: bool) -> None:
    if not locks:
        fcntl.flock = _no_locks

    def slow(directory: Path) -> None:
        (target.parent / f"built-{os.getpid()}").touch()
        build(directory)
        if not locks:
            barrier.wait(20)  # both have built before either publishes

    barrier.wait(20)
    assert cached(target, read, slow) == "sound"


def _no_locks(*_: object) -> None:
    raise OSError("no locks available")


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_at_once_both_succeed(tmp_path: Path, locks: bool) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    workers = [spawn.Process(target=_race, args=(tmp_path / "entry", barrier, locks)) for _ in range(2)]
    for ranks in workers:
        ranks.start()
    for ranks in workers:
        ranks.join(30)
    assert [ranks.exitcode for ranks in workers] == [0, 0]
    assert read(tmp_path / "entry") == "sound"
    assert len(list(tmp_path.glob("built-*"))) == (1 if locks else 2)
    assert not list(tmp_path.glob(".entry-*"))
