"""The cache can be listed and cleared; what is in use, and what the cache has not made, stays."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from dsv3.config.task import OutputFormat
from dsv3.errors import UserError
from dsv3.tokens import cache
from dsv3.tokens.cache import CacheEntryError, load_or_build, read_entry
from dsv3.tokens.cache_listing import choose_entries, list_entries, remove_entry
from tests.harness.commands import TrainCommand

DAY = 86400.0

SPAWN = multiprocessing.get_context("spawn")


def read(folder: Path) -> str:
    try:
        return (folder / "content").read_text()
    except OSError as error:
        raise CacheEntryError from error


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache of three entries, used 0, 10 and 40 days ago, of an older one, and of foreign files."""
    monkeypatch.setattr(cache, "_USED", {})
    root = tmp_path / "cache"
    for days, name in ((0, "tokens-new"), (10, "tokens-old"), (40, "corpus-oldest")):

        def build(folder: Path, name: str = name) -> None:
            (folder / "deep").mkdir()
            (folder / "deep" / "more").write_bytes(bytes(1000))
            (folder / "content").write_text(name)

        with pytest.MonkeyPatch.context() as quiet:
            quiet.setenv("LOCAL_RANK", "1")  # this process keeps none of them open
            load_or_build(root / name, read, build, f"text of {name}")
        os.utime(root / name / "entry.json", (0, time.time() - days * DAY))
    (root / "tokenizer-0123456789abcdef-300-1.0-3").mkdir()  # of an earlier version
    (root / "thesis").mkdir()
    (root / "thesis" / "chapter.txt").write_text("not of the cache")
    (root / ".git.work").mkdir()
    return root


def names(root: Path) -> list[str]:
    return [entry.name for entry in list_entries(root)]


def test_entries_are_listed_with_origin_size_and_last_use(root: Path) -> None:
    old = "tokenizer-0123456789abcdef-300-1.0-3"
    assert set(names(root)[:2]) == {"tokens-new", old}
    assert names(root)[2:] == ["tokens-old", "corpus-oldest"]
    entry = list_entries(root)[-1]
    files = (path for path in (root / "corpus-oldest").rglob("*") if path.is_file())
    assert entry.size == sum(path.stat().st_size for path in files) > 1000
    assert (entry.made_from, entry.finished) == ("text of corpus-oldest", True)
    assert entry.used == pytest.approx(time.time() - 40 * DAY, abs=60)
    assert list_entries(root / "nowhere") == []


def test_reading_an_entry_is_a_use(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process of the node notes it for all
    read_entry(root / "corpus-oldest", read)
    assert names(root)[-1] == "corpus-oldest"
    monkeypatch.delenv("LOCAL_RANK")
    read_entry(root / "corpus-oldest", read)
    assert names(root)[-1] == "tokens-old"


def test_all_unused_or_named_entries_are_chosen(root: Path) -> None:
    entries = list_entries(root)
    assert choose_entries(entries, "all", 30) == entries
    assert [entry.name for entry in choose_entries(entries, "unused", 30)] == ["corpus-oldest"]
    assert [entry.name for entry in choose_entries(entries, "unused", 5)] == ["tokens-old", "corpus-oldest"]
    assert [entry.name for entry in choose_entries(entries, "tokens-old", 30)] == ["tokens-old"]
    assert [entry.name for entry in choose_entries(entries, "tokens-*", 30)] == ["tokens-new", "tokens-old"]
    with pytest.raises(UserError, match=r"tokens-odl is no entry.*Did you mean 'task.clear=tokens-old'"):
        choose_entries(entries, "tokens-odl", 30)


def _use(entry: Path, used: "multiprocessing.synchronize.Event") -> None:
    read_entry(entry, read)
    used.set()
    time.sleep(600)


def test_what_a_process_has_open_or_builds_stays(root: Path) -> None:
    used = SPAWN.Event()
    user = SPAWN.Process(target=_use, args=(root / "tokens-new", used), daemon=True)
    user.start()
    assert used.wait(20)
    (root / ".tokens-next.work").mkdir()
    (root / ".tokens-next.work" / "shard").write_bytes(bytes(10))
    with FileLock(root / ".tokens-next.lock", is_singleton=False):
        entries = {entry.name: entry for entry in list_entries(root)}
        assert not entries["tokens-next"].finished
        kept = [name for name, entry in entries.items() if not remove_entry(entry)]
        assert sorted(kept) == ["tokens-new", "tokens-next"]
    user.kill()
    user.join(30)
    assert all(remove_entry(entry) for entry in list_entries(root))
    assert sorted(path.name for path in root.iterdir()) == [".git.work", "thesis"]


def test_the_task_prints_and_clears(commands: TrainCommand, root: Path) -> None:
    where = f"data.cache_dir={root}"
    listed = commands.must("task=cache", where)
    lines = listed.out.splitlines()
    assert lines[0].split() == ["entry", "size", "last", "use", "made", "from"]
    assert [line.split()[0] for line in lines[3:5]] == ["tokens-old", "corpus-oldest"]
    assert lines[4].endswith("text of corpus-oldest")
    assert lines[-1].startswith("4 entries, ")
    assert lines[-1].endswith(f" in {root}")
    cleared = commands.must("task=cache", where, "task.clear=unused", "task.unused_days=20")
    assert cleared.out.splitlines()[-1].startswith("1 entry, ")
    found = json.loads(commands.must("task=cache", where, f"task.format={OutputFormat.json.value}").out)
    assert [entry["name"] for entry in found["entries"]][2:] == ["tokens-old"]
    assert (found["folder"], found["cleared"], found["in_use"]) == (str(root), False, [])
    refused = commands.run("task=cache", where, "task.clear=nothing")
    assert (refused.code, refused.err.count("task.clear=nothing is no entry")) == (2, 1)
    commands.must("task=cache", where, "task.clear=all")
    assert sorted(path.name for path in root.iterdir()) == [".git.work", "thesis"]
