"""Token shards: the library's own ids, the same bytes however they are made, nothing half-written read."""

import errno
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.distributed.directory_lock import DirectoryLock
from dsv3.documents import unit_pool
from dsv3.documents.document_files import FIRST_PIECE, Document, ReadOptions
from dsv3.documents.input_files import Unit, find_files
from dsv3.documents.input_units import plan_units
from dsv3.documents.skip_limit import BadDocument, Skipped
from dsv3.documents.unit_pool import JOURNAL_FILE, run_units
from dsv3.errors import RunFailed, UserError
from dsv3.tokens import document_encoder, prepare_shards, shard_writer, tokenize_unit
from dsv3.tokens.prepare_shards import UNFINISHED, HashedSides, claimed_output
from dsv3.tokens.shard_index import HELD_OUT, TRAIN, Shard, ShardIndex, dtype_for
from dsv3.tokens.shard_writer import NpyFile, ShardWriter
from dsv3.tokens.token_inputs import open_side
from dsv3.tokens.tokenize_unit import TokenizeUnit
from dsv3.tokens.tokenizer import Tokenizer, TrainedTokenizer
from tests.data.texts import sentence
from tests.harness.processes import ROOT
from tests.tokens.killed_prepare import DyingSides, FullSides, prepare


def long_text(seed: int) -> str:
    return "".join(sentence(1000 * seed + number) for number in range(40))


TEXTS = [long_text(number) if number % 25 == 7 else sentence(number) for number in range(150)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 150 documents in two files of JSON lines, one bad line, and a tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:100]) + "no JSON\n")
    (folder / "b.jsonl").write_text("".join(lines[100:]))
    TrainedTokenizer(300).prepare(TEXTS[:20]).save(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let documents have several windows, and batches few documents."""
    monkeypatch.setattr(document_encoder, "WINDOW", 2000)
    monkeypatch.setattr(tokenize_unit, "BATCH_CHARACTERS", 1500)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of an undisturbed run in this process, with the usual sizes of batches."""
    output = tmp_path_factory.mktemp("expected") / "out"
    prepare(source, output)
    return contents(output)


def documents(folder: Path, split: str) -> list[list[int]]:
    store = open_side(folder, split)
    offsets = store.offsets(0, store.num_documents)
    return [store.read(int(a), int(b - a)).tolist() for a, b in pairwise(offsets)]


def test_ids_are_the_library_s_own(source: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library

    made = prepare(source, tmp_path)
    library = Library.from_file(str(source / "tokenizer" / "tokenizer.json"))
    bos, eos = made.index.bos, made.index.eos
    wanted = {(bos, *library.encode(text, add_special_tokens=False).ids, eos) for text in TEXTS}
    train, held_out = documents(tmp_path, TRAIN), documents(tmp_path, HELD_OUT)
    assert len(train) + len(held_out) == len(TEXTS)
    assert {*map(tuple, train), *map(tuple, held_out)} == wanted
    assert 10 < len(held_out) < 60
    assert made.skipped.counts == {"no JSON": 1}
    assert made.counts.characters == sum(map(len, TEXTS))
    assert made.counts.largest == max(map(len, wanted))
    # In the order of the files.
    first = [bos, *library.encode(TEXTS[0], add_special_tokens=False).ids, eos]
    assert first in (train[0], held_out[0])
    assert made.index.dtype_name == "uint16"
    assert {path.name for path in tmp_path.glob("*") if path.is_dir()} == {"tokenizer"}


def test_equal_texts_are_on_one_side_wherever_they_lie() -> None:
    sides = HashedSides(ReadOptions(), 0.3)
    held_out = 0
    for number in range(60):
        text = sentence(number) * (1 + 600 * (number % 5 == 0))
        assert len(text) > FIRST_PIECE or number % 5
        whole, piece = (
            Document("a.txt", text),
            Document("b.jsonl: line 7", text[: FIRST_PIECE + number], iter(())),
        )
        assert sides.side(whole) == sides.side(piece)
        assert HashedSides(ReadOptions(), 0).side(whole) == TRAIN
        held_out += sides.side(whole) == HELD_OUT
    assert 8 < held_out < 30


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_processes_changes_no_byte(
    workers: int, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    prepare(source, tmp_path / "out", workers=workers)
    assert contents(tmp_path / "out") == expected
    assert len([name for name in expected if name.startswith("train")]) > 6


def test_a_stop_at_any_moment_changes_no_byte(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at any write, note or move of a file, and go on, until nothing stops any more."""
    output = tmp_path / "out"
    draw, stops = random.Random(3), 0

    class Stop(Exception):
        pass

    left = [0]

    def stopping(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Stop
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(NpyFile, "write", stopping(NpyFile.write))
    monkeypatch.setattr(ShardWriter, "note", stopping(ShardWriter.note))
    monkeypatch.setattr(unit_pool.Journal, "add", stopping(unit_pool.Journal.add))
    monkeypatch.setattr(Path, "replace", stopping(Path.replace))
    while True:
        left[0] = draw.randrange(2, 60)
        try:
            prepare(source, output)
            break
        except Stop:
            stops += 1
            assert not (output / "index.json").exists()
            with pytest.raises(UserError, match="is not finished"):
                open_side(output)
    assert contents(output) == expected
    assert stops > 10


def test_work_that_is_done_is_not_done_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document that is longer than what is noted at once goes on within itself."""
    encoded: list[str] = []
    encode = document_encoder.DocumentEncoder.encode

    def counting(self: Any, windows: Any) -> Any:
        if len(encoded) > 20 and stop:
            raise KeyboardInterrupt
        encoded.extend(window.text for window in windows)
        return encode(self, windows)

    monkeypatch.setattr(document_encoder.DocumentEncoder, "encode", counting)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path)
    stop = False
    prepare(source, tmp_path)
    assert "".join(encoded) == "".join(TEXTS)


@pytest.mark.slow
def test_kill_9_changes_no_byte_and_leaves_no_process(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "tests.tokens.killed_prepare", str(source), str(output)]
    journal = output / UNFINISHED / JOURNAL_FILE
    lines = 2
    while True:
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > lines):
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        assert not (output / "index.json").exists()
        lines += 3
        if lines > 6:
            prepare(source, output, workers=2)  # at once: the lock is free, and nobody else writes
            break
    assert contents(output) == expected


def test_a_process_that_dies_and_a_mistake_in_one_are_told(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"read .*\.jsonl was killed by signal 9.*goes on where it was"):
        prepare(source, tmp_path / "out", workers=2, kind=DyingSides)
    with pytest.raises(UserError, match="does not exist"):
        run_units(
            plan_units(find_files([f"{source}/*.jsonl"]).files, ReadOptions(), 12_000),
            TokenizeUnit(HashedSides(ReadOptions(), 0), tmp_path / "nowhere", "uint16"),
            tmp_path / "work",
            {},
            workers=2,
            in_process_below=0,
        )


def test_a_torn_line_of_the_journal_is_forgotten(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    def stop(skipped: Skipped, at_end: bool) -> None:
        if skipped.documents > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", check=stop)
    journal = tmp_path / "out" / UNFINISHED / JOURNAL_FILE
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-7])
    (tmp_path / "out" / UNFINISHED / "train-00000-000.tokens.npy").write_bytes(b"cut")
    prepare(source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_told_and_gone_on_from(
    code: int, source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = NpyFile.write, [0]

    def full(self: NpyFile, values: bytes) -> None:
        count[0] += 1
        if count[0] > 20:
            raise OSError(code, "the reason")
        write(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(NpyFile, "write", full)
        told = "it goes on where it was" if code == errno.ENOSPC else "give a folder that can be written"
        with pytest.raises(UserError, match=f"task.output=.*the reason.*{told}"):
            prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_a_full_disk_of_a_process_is_told_as_one(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task.output=.* cannot be written \(No space left.*make room"):
        prepare(source, tmp_path / "out", workers=2, kind=FullSides)


@pytest.mark.parametrize("is_large", [False, True])
def test_refused_work_stays_where_it_is_large_and_can_be_gone_on_with(
    is_large: bool, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    def refuse(skipped: Skipped, at_end: bool) -> None:
        if skipped.documents > 60:
            raise UserError("too many are skipped")

    bound = 1 if is_large else 64 << 20
    with pytest.raises(UserError, match=r"skipped \(what is done stays" if is_large else "skipped$"):
        prepare(source, tmp_path / "out", check=refuse, in_process_below=bound)
    assert (tmp_path / "out" / UNFINISHED).exists() is is_large
    if is_large:  # of no use once a file has another time
        file = source / "b.jsonl"
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        units = plan_units(find_files([f"{source}/*.jsonl"]).files, ReadOptions(), 12_000)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        journal = tmp_path / "out" / UNFINISHED / JOURNAL_FILE
        identity = json.loads(journal.read_text().splitlines()[0])
        assert prepare_shards._bytes_done(journal, identity, units) == 0
        assert prepare_shards._bytes_done(journal, {}, units) is None
    prepare(source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_unfinished_work_of_something_else_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(
            source, tmp_path / "out", check=lambda skipped, at_end: (_ for _ in ()).throw(KeyboardInterrupt)
        )
    other = tmp_path / "other"
    other.mkdir()
    for file in source.glob("*.jsonl"):
        (other / file.name).write_bytes(file.read_bytes())
    TrainedTokenizer(310).prepare(TEXTS[:20]).save(other / "tokenizer")
    with pytest.raises(UserError, match=r"another command \(ids: .* there, .* now\)"):
        prepare(other, tmp_path / "out")
    lock = DirectoryLock(tmp_path / "out" / UNFINISHED, "test", "being prepared")
    with lock, pytest.raises(UserError, match="is being prepared by process"):
        prepare(source, tmp_path / "out")


def test_shards_end_with_the_document_that_fills_them(source: Path, tmp_path: Path) -> None:
    made = prepare(source, tmp_path / "small", shard_tokens=2000)
    usual = prepare(source, tmp_path / "usual")
    shards = made.index.splits[TRAIN]
    assert len(shards) > len(usual.index.splits[TRAIN])
    for shard in shards:
        assert np.load(tmp_path / "small" / shard.offsets)[-2] < 2000
    for side in (TRAIN, HELD_OUT):
        assert documents(tmp_path / "small", side) == documents(tmp_path / "usual", side)


def test_offsets_count_beyond_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard whose one document goes on for 4 GiB of ids, of which the file has a hole in place."""
    huge = 2**31 + 5
    noted = {"done": [], "tokens": huge, "documents": 0, "begin": 0}
    ShardWriter(tmp_path, "train-00000", np.dtype("<u2")).abandon()
    with (tmp_path / "train-00000-000.tokens.npy").open("wb") as file:
        file.truncate(128 + 2 * huge)
    with (tmp_path / "train-00000-000.offsets.npy").open("wb") as file:
        file.truncate(128 + 8)

    def close(self: NpyFile, length: int) -> str:
        self._begin(length)
        self.sync()
        return ""

    monkeypatch.setattr(NpyFile, "close", close)
    writer = ShardWriter(tmp_path, "train-00000", np.dtype("<u2"), noted)
    writer.write([7, 8])
    writer.end_document()
    writer.write([9])
    writer.end_document()
    [first, *rest] = writer.close()
    assert (first.num_tokens, first.num_documents) == (huge + 2, 1)
    assert [shard.num_tokens for shard in rest] == [1]
    tokens = np.load(tmp_path / first.tokens, mmap_mode="r")
    assert tokens.shape == (huge + 2,)
    assert tokens[-3:].tolist() == [0, 7, 8]
    assert np.load(tmp_path / first.offsets).tolist() == [0, huge + 2]


def test_a_document_that_is_dropped_leaves_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "_IDS_AT_ONCE", 3)
    for dropped in ([1], [1, 2], [1, 2, 3, 4, 5, 6, 7]):
        writer = ShardWriter(tmp_path, f"train-{len(dropped)}", np.dtype("<u4"))
        for ids in ([5], dropped, dropped, [6, 7], dropped):
            for index in ids:
                writer.write([index])
            if ids is dropped:
                writer.drop_document()
            else:
                writer.end_document()
        [shard] = writer.close()
        assert np.load(tmp_path / shard.tokens).tolist() == [5, 6, 7]
        assert (tmp_path / shard.tokens).stat().st_size == 128 + 3 * 4
        assert np.load(tmp_path / shard.offsets).tolist() == [0, 1, 3]


def test_a_document_that_turns_out_bad_is_in_no_shard(source: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class SometimesBad:
        def documents(
            self, unit: Unit, skipped: Skipped, report: object
        ) -> Iterator[tuple[str, Iterable[str]]]:
            for text in TEXTS[:10]:
                yield TRAIN, self.pieces(text, bad=text in TEXTS[7:9])

        def pieces(self, text: str, bad: bool) -> Iterator[str]:
            yield text
            if bad:
                yield long_text(1)
                raise BadDocument

    units = plan_units(find_files([f"{source}/a.jsonl"]).files, ReadOptions())
    tokenizer = Tokenizer.from_file(source / "tokenizer")
    good = [*TEXTS[:7], TEXTS[9]]
    made = prepare_shards.prepare_shards(tmp_path, units, SometimesBad(), tokenizer, {})
    wanted = [[made.index.bos, *tokenizer.encode(text), made.index.eos] for text in good]
    assert documents(tmp_path, TRAIN) == wanted
    assert made.counts.characters == sum(map(len, good))


def test_shards_of_another_tool_are_read(tmp_path: Path) -> None:
    """Write shards as docs/data.md says, with numpy and json alone."""
    given = {"train": [[3, 1, 2], [], [5]], "held_out": [[4, 4]]}

    splits = {}
    for split, texts in given.items():
        ends = np.cumsum([0, *map(len, texts)])
        np.save(tmp_path / f"{split}.tokens.npy", np.concatenate(texts).astype("<u2"))
        np.save(tmp_path / f"{split}.offsets.npy", ends.astype("<i8"))
        shard: dict[str, Any] = {"tokens": f"{split}.tokens.npy", "offsets": f"{split}.offsets.npy"}
        shard |= {"num_tokens": int(ends[-1]), "num_documents": len(texts)}
        splits[split] = [shard]
    index = {"format": "dsv3-token-shards", "version": 1, "dtype": "uint16", "splits": splits}
    (tmp_path / "index.json").write_text(json.dumps(index))

    for split, texts in given.items():
        assert documents(tmp_path, split) == texts


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "other"}, "no index of token shards"),
        ({"version": 2}, "version 2"),
        ({"dtype": "int8"}, "must be uint16 or uint32"),
        ({"splits": {}}, "neither train nor held_out"),
        ({"splits": {"train": [{"tokens": "a"}]}}, "num_tokens is missing"),
        ({"splits": {"train": [Shard("../a", "b", 1, 1).to_json()]}}, "no path within the directory"),
        ({"splits": {"train": [Shard("a", "a", 1, 1).to_json()]}}, "named twice"),
        ({"splits": {"train": [Shard("a", "b", -1, 1).to_json()]}}, "whole numbers"),
        ({"bos": -3}, "bos=-3"),
    ],
)
def test_an_index_that_cannot_be_is_refused(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    index = ShardIndex("uint16", {TRAIN: [Shard("a", "b", 1, 1)]})
    index.write(tmp_path)
    assert ShardIndex.read(tmp_path) == index
    (tmp_path / "index.json").write_text(json.dumps(index.to_json() | change))
    with pytest.raises(UserError, match=told):
        ShardIndex.read(tmp_path)


def test_the_dtype_is_the_smaller_one_that_holds_the_ids() -> None:
    assert [dtype_for(size) for size in (300, 65536, 65537)] == ["uint16", "uint16", "uint32"]


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints", ".metadata", "tokenizer", "a.txt"])
def test_shards_are_not_mixed_with_what_another_command_has_written(tmp_path: Path, name: str) -> None:
    output = tmp_path / "output"
    for file in (output / name, output / "__0_0.distcp") if name == ".metadata" else (output / name,):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    before = {path.name for path in output.iterdir()}
    held = "holds a run" if name == "config.yaml" else "is not empty, '.*' is in it"
    told = rf"^task\.output={output} {held}, and .*: give a new folder, task\.output=.*$"
    with pytest.raises(UserError, match=told) as error, claimed_output(output, "task.output"):
        pass
    assert {path.name for path in output.iterdir()} == before
    with claimed_output(Path(str(error.value).rpartition("task.output=")[2]), "task.output"):
        assert (output / "shards" / UNFINISHED).is_dir()


def test_the_own_work_of_prepare_is_gone_on_with(tmp_path: Path) -> None:
    """Also where it was killed while the finished shards moved to their place."""
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / ".DS_Store").touch()
    with claimed_output(tmp_path, "task.output"):
        pass
    (tmp_path / UNFINISHED).mkdir(exist_ok=True)
    (tmp_path / UNFINISHED / JOURNAL_FILE).touch()
    for name in ("train-00000.tokens.npy", "train-00000.offsets.npy", "tokenizer"):
        (tmp_path / name).touch()
    with claimed_output(tmp_path, "task.output"):
        pass
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="holds a run"), claimed_output(tmp_path, "task.output"):
        pass
