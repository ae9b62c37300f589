"""A bit that flips in the cache is noticed at the next start, told, and mended before it is trained on."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.config.data import Packing
from dsv3.data import token_shards
from dsv3.data.sources import PreparedData, TextData
from dsv3.data.token_shards import ShardsData
from dsv3.errors import UserError
from dsv3.metrics.progress import phase
from dsv3.tokens import cache_seal, document_index, prepare_shards
from dsv3.tokens.background_check import BACKGROUND
from dsv3.tokens.cache import ENTRY_FILE
from dsv3.tokens.file_array import FileArray
from dsv3.tokens.shard_writer import ShardWriter
from dsv3.tokens.tokenizer import TrainedTokenizer
from tests.data import token_formats as formats


def flip(file: Path, place: int = -2) -> None:
    """Flip one bit of a file, which keeps its size and time."""
    told = file.stat()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))


def prepare(folder: Path) -> PreparedData:
    options: dict[str, Any] = {
        "cache_dir": str(folder.parent / "cache"),
        "held_out": 0.2,
        "packing": Packing.best_fit,
    }
    return TextData(path=str(folder), **options).prepare(TrainedTokenizer(300), 32, 1)


def rows(prepared: PreparedData) -> list[list[int]]:
    assert prepared.train is not None
    return [prepared.train.row(number).tokens.tolist() for number in range(len(prepared.train))]


def files_of(entry: Path) -> list[Path]:
    return sorted(file for file in entry.rglob("*") if file.is_file() and file.name != ENTRY_FILE)


def test_a_bit_in_any_file_of_any_entry_is_noticed_and_mended(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = rows(prepare(folder))
    entries = sorted(entry for entry in (folder.parent / "cache").iterdir() if entry.name[0] != ".")
    kinds = {entry.name.partition("-")[0] for entry in entries}
    assert kinds == {"corpus", "tokenizer", "tokens", "best"}
    files = {entry: files_of(entry) for entry in entries}
    assert {"scan.json", "sides.npy", "tokenizer.json", "index.json", "pieces.npy", "seal.json"} <= {
        file.name for listed in files.values() for file in listed
    }
    contents = {file: file.read_bytes() for listed in files.values() for file in listed}
    capsys.readouterr()
    for number in range(max(map(len, files.values()))):  # one file of each entry at a time
        flipped = [listed[number] for listed in files.values() if number < len(listed)]
        for file in flipped:
            flip(file)
        assert rows(prepare(folder)) == sound
        told = capsys.readouterr().err
        for entry, listed in files.items():
            assert (f"the cache's {entry.name} is damaged and is made anew" in told) == (number < len(listed))
        for file in flipped:
            assert file.read_bytes() == contents[file]
    assert rows(prepare(folder)) == sound
    assert "damaged" not in capsys.readouterr().err


def test_what_is_too_large_for_the_start_is_compared_while_the_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = rows(prepare(folder))
    (tokens,) = (folder.parent / "cache").glob("tokens-*-train/*.tokens.npy")
    flip(tokens)
    monkeypatch.setattr(cache_seal, "AT_START", tokens.stat().st_size - 1)
    BACKGROUND.reset()
    prepared = prepare(folder)
    rows(prepared)  # nothing has been found yet
    BACKGROUND.start()
    BACKGROUND.wait()
    with pytest.raises(UserError, match=r"tokens\.npy has the digest .* may have been trained on since"):
        rows(prepared)
    BACKGROUND.reset()  # the next start
    assert "is damaged and is made anew" not in capsys.readouterr().err
    assert rows(prepare(folder)) == sound
    assert "is damaged and is made anew" in capsys.readouterr().err
    BACKGROUND.start()
    BACKGROUND.wait()
    assert not BACKGROUND.damage
    BACKGROUND.reset()


@pytest.mark.parametrize("kind", ["tokens", "offsets"])
def test_a_bit_in_shards_with_digests_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    documents = [[*range(number, number + 40)] for number in range(20)]
    path = formats.with_digests(formats.shards(tmp_path / "own", documents, files=4))

    def opened() -> PreparedData:
        source = ShardsData(path=str(path), cache_dir=str(tmp_path / "cache"), held_out=0.1)
        return source.prepare(None, 16, 1)

    sound = rows(opened())
    opened().check_digests()
    content = (path / f"train-00002.{kind}.npy").read_bytes()
    flip(path / f"train-00002.{kind}.npy", -16)
    told = []
    for number in range(3):  # each rank compares its share
        try:
            opened().check_digests((number, 3))
        except UserError as error:
            told.append(str(error))
    assert len(told) == 1
    assert f"train-00002.{kind}.npy has the digest" in told[0]
    assert "copy it anew" in told[0]
    monkeypatch.setattr(token_shards, "AT_START", 0)
    BACKGROUND.reset()
    prepared = opened()
    prepared.check_digests()  # 0 bytes at start: the rest comes later
    BACKGROUND.start()
    BACKGROUND.wait()
    with pytest.raises(UserError, match=rf"{kind}\.npy has the digest .* may have been trained on"):
        rows(prepared)
    BACKGROUND.reset()
    (path / f"train-00002.{kind}.npy").write_bytes(content)
    assert rows(opened()) == sound


def test_copies_of_shards_are_told_from_shared_ones(tmp_path: Path) -> None:
    path = formats.with_digests(formats.shards(tmp_path / "here", [[*range(90)]] * 9))
    source = ShardsData(path=str(path), cache_dir=str(tmp_path / "cache"), held_out=0.1)
    recipe = source.prepare(None, 16, 1).recipe
    assert source.reopen(recipe, None, 16, 1).is_shared  # type: ignore[arg-type]
    first = next(iter(recipe.digests))  # type: ignore[attr-defined]
    content = np.load(first)
    Path(first).unlink()
    np.save(first, content)
    assert not source.reopen(recipe, None, 16, 1).is_shared  # type: ignore[arg-type]


def test_what_a_killed_build_has_left_is_compared_before_it_is_gone_on_with(tmp_path: Path) -> None:
    def writer(noted: dict[str, Any] | None = None) -> ShardWriter:
        return ShardWriter(tmp_path, "train-00000", np.dtype("<u2"), noted)

    begun = writer()
    for ids in ([5, 6, 7], [8]):
        begun.write(ids)
        begun.end_document()
    noted = begun.note()
    begun.abandon()
    writer(noted).abandon()
    for kind in ("tokens", "offsets"):
        file = tmp_path / f"train-00000-000.{kind}.npy"
        flip(file)
        with pytest.raises(ValueError, match="is not what was noted"):
            writer(noted)
        flip(file)
    finished = writer(noted)
    finished.write([9])
    finished.end_document()
    result = {"shards": {"train": [shard.to_json() for shard in finished.close()]}}
    assert prepare_shards._is_intact(result, tmp_path, 2, True)
    flip(tmp_path / "train-00000-000.tokens.npy")
    assert prepare_shards._is_intact(result, tmp_path, 2, False)
    assert not prepare_shards._is_intact(result, tmp_path, 2, True)


def test_ends_of_documents_that_a_killed_build_has_left_are_compared_too(tmp_path: Path) -> None:
    np.array([1, 2, 9, 3, 9, 4], "<u2").tofile(tmp_path / "ids.bin")
    array, ends = FileArray(str(tmp_path / "ids.bin"), np.dtype("<u2"), 0, 6), tmp_path / "000000.i8"
    spoils: list[Callable[[], object]] = [
        lambda: None,
        lambda: flip(ends, 8),
        (tmp_path / "000000.xxh3").unlink,
    ]
    for spoil in spoils:
        with phase("ends", 6) as work, ThreadPoolExecutor(1) as threads:
            document_index._write(ends, array, 9, threads, work)
        assert np.fromfile(ends, "<i8").tolist() == [0, 3, 5, 6]
        spoil()
