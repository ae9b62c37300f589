"""Arrays and files of an object store: the same values as from a disk, in few requests, within a bound."""

import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.data.token_shards import ShardsData
from dsv3.errors import RunFailed, UserError
from dsv3.tokens import remote_files
from dsv3.tokens.block_cache import BLOCK, WAYS, BlockCache
from dsv3.tokens.remote_files import RemoteArray, RemoteFolder, is_remote
from tests.data import token_formats
from tests.harness.pool import Pool
from tests.tokens.object_store import ObjectStore, object_store
from tests.tokens.worker_remote_files import read_slices

ROOM = 64 * BLOCK


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setattr(remote_files, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote_files, "ATTEMPTS", 3)
    server.objects.clear()
    server.refuse.clear()
    server.asked.clear()
    server.drop = server.failing = 0
    return server


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


IDS = np.random.default_rng(0).integers(0, 60000, 300_000).astype(np.uint16)


def array(store: ObjectStore, cache: Path, version: str | None = "v", room: int = ROOM) -> RemoteArray:
    store.objects.setdefault("data/a.npy", npy(IDS))
    folder = RemoteFolder(f"{store.address}/data", str(cache), room)
    return folder.array("a.npy", IDS.dtype, len(IDS), version)


def s3_folder(store: ObjectStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteFolder:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.address)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(cache / "none"))
    return RemoteFolder("s3://bucket/data", str(cache), ROOM)


def test_any_slice_equals_that_of_the_file_and_is_asked_for_once(store: ObjectStore, tmp_path: Path) -> None:
    read = array(store, tmp_path)
    draw = np.random.default_rng(1)
    ends = [0, 1, 32704, 32705, BLOCK, len(IDS) - 1, len(IDS)]
    slices = [(0, len(IDS)), *(sorted(draw.choice(ends, 2)) for _ in range(8))]
    slices += [sorted(draw.integers(0, len(IDS), 2)) for _ in range(20)]
    for first, end in slices[::-1]:
        assert np.array_equal(read[first:end], IDS[first:end]), (first, end)
    blocks = -(-len(store.objects["data/a.npy"]) // BLOCK)
    assert sum(count for _, _, count in store.asked) < 1.5 * blocks * BLOCK
    asked = len(store.asked)
    again = pickle.loads(pickle.dumps(read))
    assert np.array_equal(again[0 : len(IDS)], IDS)
    assert len(store.asked) == asked


def test_a_random_row_takes_a_block_and_not_the_file(store: ObjectStore, tmp_path: Path) -> None:
    read = array(store, tmp_path)
    read[200_000:204_097]
    # The header, a look at the file's version, and the row.
    assert [(method, count) for method, _, count in store.asked] == [
        ("GET", BLOCK),
        ("HEAD", 0),
        ("GET", BLOCK),
    ]
    read[200_000:204_097]
    assert len(store.asked) == 3


def test_known_ends_take_no_request_and_are_compared(store: ObjectStore, tmp_path: Path) -> None:
    offsets = np.array([0, 5, 9, 12])
    store.objects["data/o.npy"] = npy(offsets)
    folder = RemoteFolder(f"{store.address}/data", str(tmp_path), ROOM)
    known = folder.array("o.npy", np.int64, 4, "v", (0, 12))
    assert (known[0:1].tolist(), known[3:4].tolist()) == ([0], [12])
    assert not store.asked
    assert known[0:4].tolist() == offsets.tolist()
    with pytest.raises(UserError, match=r"o.npy: value 3 is 12, the index says 13"):
        folder.array("o.npy", np.int64, 4, "v", (0, 13))[0:4]


def test_a_replaced_file_is_read_anew(store: ObjectStore, tmp_path: Path) -> None:
    assert np.array_equal(array(store, tmp_path, None)[0:9], IDS[:9])
    store.objects["data/a.npy"] = npy(IDS[::-1].copy())
    assert np.array_equal(array(store, tmp_path, None)[0:9], IDS[::-1][:9])
    assert np.array_equal(array(store, tmp_path, "another digest")[0:9], IDS[::-1][:9])


def test_a_file_that_changes_while_it_is_read_is_told(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks in the cache would be mixed with those of another file of the same size."""
    read = array(store, tmp_path)
    read[0:9]
    store.objects["data/a.npy"] = npy(IDS[::-1].copy())
    asked = len(store.asked)
    read[100_000:100_009]
    assert len(store.asked) == asked + 1  # the last look was a moment ago
    monkeypatch.setattr(remote_files, "LOOK_EVERY", 0.0)
    with pytest.raises(UserError, match=rf"{store.address}/data/a.npy has changed while it was read"):
        read[200_000:200_009]
    assert np.array_equal(read[0:9], IDS[:9])  # from the cache


@pytest.mark.parametrize("trouble", ["drop", "failing"])
def test_what_fails_in_passing_is_tried_again(store: ObjectStore, tmp_path: Path, trouble: str) -> None:
    read = array(store, tmp_path)
    setattr(store, trouble, 2)
    assert np.array_equal(read[0:9], IDS[:9])
    setattr(store, trouble, 10)
    with pytest.raises(RunFailed, match=rf"{store.address}/data/a.npy cannot be read, 3 attempts"):
        read[200_000:200_009]


def test_errors_name_the_url(store: ObjectStore, tmp_path: Path) -> None:
    read, url = array(store, tmp_path), f"{store.address}/data/a.npy"
    whole = store.objects["data/a.npy"]
    store.objects["data/a.npy"] = whole[:400_000]
    with pytest.raises(UserError, match=rf"{url} is truncated: it ends at byte 400,000"):
        read[0 : len(IDS)]
    with pytest.raises(UserError, match=rf"{url} is truncated"):
        read[299_000:299_100]
    store.objects["data/a.npy"] = b"no array" * 100
    with pytest.raises(UserError, match=rf"{url} is no .npy file"):
        array(store, tmp_path, "b")[0:1]
    store.objects["data/a.npy"] = npy(IDS[:-1])
    with pytest.raises(UserError, match=rf"{url} holds uint16 \[299999\], the index says uint16 \[300000\]"):
        array(store, tmp_path, "c")[0:1]
    store.refuse["data/a.npy"] = 403
    with pytest.raises(UserError, match=rf"{url} cannot be read .*403.*credentials"):
        array(store, tmp_path, "d")[0:1]
    asked = len(store.asked)
    del store.objects["data/a.npy"], store.refuse["data/a.npy"]
    read.folder.array("a.npy", IDS.dtype, 9, "e")
    with pytest.raises(UserError, match=rf"{url} does not exist"):
        read.folder.array("a.npy", IDS.dtype, 9, "e")[0:1]
    assert len(store.asked) == asked + 1  # no second attempt
    with pytest.raises(UserError, match=r"nosuch://x cannot be read"):
        RemoteFolder("nosuch://x", str(tmp_path), ROOM).fetch("y")


def test_whole_files_are_fetched_once_per_version(
    store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.objects |= {"data/index.json": b"one", "data/tokenizer/tokenizer.json": b"{}"}
    folder = RemoteFolder(f"{store.address}/data", str(tmp_path), ROOM)
    first = folder.fetch("index.json")
    assert (first.name, first.read_bytes()) == ("index.json", b"one")
    folder.fetch("index.json")
    assert store.requests()["data/index.json"] == 1
    store.objects["data/index.json"] = b"two"
    assert folder.fetch("index.json").read_bytes() == b"two"
    assert first.read_bytes() == b"one"  # another process may be reading it
    kept = folder.fetch_folder("tokenizer", ["tokenizer.json", "tokenizer_config.json"])
    assert sorted(path.name for path in kept.iterdir()) == ["seal.json", "tokenizer.json"]
    # A copy whose bits have flipped is fetched again, told, and so is the folder of such copies made anew.
    for copy in (first, kept / "tokenizer.json"):
        copy.write_bytes(b"x" * copy.stat().st_size)
    store.objects["data/index.json"] = b"one"
    assert folder.fetch("index.json").read_bytes() == b"one"
    told = f"the cache's copy of {store.address}/data/index.json is damaged, and is fetched again"
    assert told in capsys.readouterr().err
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert (folder.fetch_folder("tokenizer", names) / "tokenizer.json").read_bytes() == b"{}"


def test_the_same_from_an_s3_bucket(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = s3_folder(store, tmp_path, monkeypatch)
    store.objects |= {"bucket/data/a.npy": npy(IDS), "bucket/data/index.json": b"{}"}
    assert folder.fetch("index.json").read_bytes() == b"{}"
    read = folder.array("a.npy", IDS.dtype, len(IDS))
    assert np.array_equal(read[123:290_000], IDS[123:290_000])
    with pytest.raises(UserError, match=r"s3://bucket/data/b.npy does not exist"):
        folder.array("b.npy", IDS.dtype, 9)[0:1]
    store.objects["bucket/data/a.npy"] = npy(IDS)[:1000]
    with pytest.raises(UserError, match=r"s3://bucket/data/a.npy is truncated"):
        folder.array("a.npy", IDS.dtype, len(IDS), "w")[100_000:100_001]


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://b/d cannot be read .*pip install 'dsv3\[remote\]'"):
        RemoteFolder("gs://b/d", str(tmp_path), ROOM).fetch("x")


def test_the_cache_keeps_its_bound_and_what_was_used_last(tmp_path: Path) -> None:
    BlockCache.make(tmp_path, 8 * WAYS * BLOCK)
    cache = BlockCache(tmp_path)
    keys = [number.to_bytes(16, "little") for number in range(1000)]
    for number, key in enumerate(keys):
        assert cache.get(key) is None
        cache.put(key, bytes([number % 256]) * 100)
        assert cache.get(key) == bytes([number % 256]) * 100
    kept = [number for number, key in enumerate(keys) if cache.get(key) is not None]
    assert len(kept) == 8 * WAYS
    assert (tmp_path / "blocks").stat().st_size == 8 * WAYS * BLOCK


def test_the_block_used_longest_ago_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1, 10_000))
    monkeypatch.setattr("dsv3.tokens.block_cache._now", lambda: next(clock))
    BlockCache.make(tmp_path, WAYS * BLOCK)
    cache = BlockCache(tmp_path)
    keys = [number.to_bytes(16, "little") for number in range(WAYS + 3)]
    for key in keys[:WAYS]:
        cache.put(key, b"x")
    assert cache.get(keys[0])
    for key in keys[WAYS:]:
        cache.put(key, b"y")
    assert [bool(cache.get(key)) for key in keys] == [True, *[False] * 3, *[True] * (WAYS - 1)]


def test_half_written_blocks_are_missing(tmp_path: Path) -> None:
    BlockCache.make(tmp_path, WAYS * BLOCK)
    cache, key = BlockCache(tmp_path), b"k" * 16
    cache.put(key, b"a" * 1000)
    with (tmp_path / "blocks").open("r+b") as file:
        content = file.read()
        file.seek(content.index(b"a") + 500)
        file.write(b"b")
    assert cache.get(key) is None
    cache.put(key, b"c" * 1000)
    assert BlockCache(tmp_path).get(key) == b"c" * 1000


def test_what_is_remote() -> None:
    urls = ("s3://b/k", "gs://b", "https://x/y", "file:///x", "/x", "x.npy")
    assert [is_remote(url) for url in urls] == [True, True, True, False, False, False]


def test_the_processes_of_a_node_ask_for_a_block_once(store: ObjectStore, tmp_path: Path, pool: Pool) -> None:
    store.objects["data/a.npy"] = npy(IDS)
    slices = [(place, place + 100) for place in range(0, len(IDS) - 100, 20_000)]
    how = (f"{store.address}/data", str(tmp_path), ROOM, len(IDS), slices)
    ranks = pool.run(read_slices, *how)
    assert ranks == [[IDS[first:end].tobytes().hex()[:64] for first, end in slices]] * pool.size
    sent = sum(count for _, _, count in store.asked)
    assert sent < 1.5 * len(store.objects["data/a.npy"])  # and not by each of the ranks


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_rows_of_remote_shards_are_those_of_the_directory(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    draw = np.random.default_rng(3)
    documents = [draw.integers(0, 500, size).tolist() for size in draw.integers(1, 4000, 300)]
    folder = token_formats.shards(tmp_path / "shards", documents, files=3)
    for path in folder.iterdir():
        store.objects[f"bucket/{path.name}"] = path.read_bytes()
    monkeypatch.setenv("DSV3_CACHE", str(tmp_path / "cache"))
    if kind == "s3":
        s3_folder(store, tmp_path, monkeypatch)
    url = "s3://bucket" if kind == "s3" else f"{store.address}/bucket"
    how: dict[str, Any] = {"held_out": 0.1, "cache_bytes": ROOM}
    here, there = (ShardsData(path=path, **how).prepare(None, 64, 5) for path in (str(folder), url))
    assert here.train is not None
    assert there.train is not None
    assert here.summary == there.summary
    before = len(store.asked)
    for index in draw.integers(0, len(here.train), 60).tolist():
        left, right = here.train.row(index), there.train.row(index)
        assert np.array_equal(left.tokens, right.tokens)
        assert np.array_equal(left.documents, right.documents)
    sent = sum(count for _, _, count in store.asked[before:])
    # Blocks, and each about once: a request that the machine is too slow for is repeated.
    assert sent < 1.5 * sum(map(len, store.objects.values()))
