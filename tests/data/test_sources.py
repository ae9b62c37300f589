"""From a data source to rows: nothing held out leaks, nothing is prepared twice, mistakes are named."""

import gzip
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.data import corpus_scan, document_scan
from dsv3.data.packing import PackedDataset
from dsv3.data.sources import PreparedData, StdlibData, TextData
from dsv3.documents import document_files
from dsv3.documents.input_units import plan_units
from dsv3.errors import UserError
from dsv3.tokens.shard_index import HELD_OUT, TRAIN, ShardIndex
from dsv3.tokens.tokenizer import Tokenizer, TrainedTokenizer
from tests.data.texts import sentence


def source(folder: Path, **options: object) -> TextData:
    options = {"path": str(folder), "cache_dir": str(folder.parent / "cache"), "held_out": 0.2} | options
    return TextData(**options)  # type: ignore[arg-type]


def prepare(folder: Path, **options: object) -> PreparedData:
    return source(folder, **options).prepare(TrainedTokenizer(300), 32, 1)


def texts(prepared: PreparedData, folder: Path, side: str) -> list[str]:
    """Return the documents of a side, decoded: numpy reads the shards, not the code under test."""
    (entry,) = (folder.parent / "cache").glob(f"tokens-*-{side}")
    tokenizer, found = prepared.tokenizer, []
    assert tokenizer is not None
    for shard in ShardIndex.read(entry).splits[side]:
        tokens, offsets = np.load(entry / shard.tokens), np.load(entry / shard.offsets)
        for begin, end in itertools.pairwise(offsets):
            assert (tokens[begin], tokens[end - 1]) == (tokenizer.bos, tokenizer.eos)
            found.append(tokenizer.decode(tokens[begin:end].tolist()))
    return found


def sides(prepared: PreparedData, folder: Path) -> tuple[list[str], list[str]]:
    return texts(prepared, folder, TRAIN), texts(prepared, folder, HELD_OUT)


def test_nothing_held_out_is_in_the_training_side(folder: Path) -> None:
    train, held_out = sides(prepare(folder), folder)
    assert len(set(train)) == len(train)  # no content twice
    assert not any(text in "".join(train) for text in held_out)
    assert sorted(train + held_out) == sorted(sentence(number) for number in range(120))


def test_a_link_to_nowhere_counts_as_a_file_that_cannot_be_read(folder: Path) -> None:
    for name in ("a-link.txt", "b-link.txt"):
        (folder / name).symlink_to("nowhere")
    for _ in range(2):  # the second from the cache
        with pytest.raises(UserError, match=r"2 of \d+ files cannot be read.*a-link.txt \(a link that leads"):
            prepare(folder)
    assert "skipped 2 files: unreadable files, first" in "".join(prepare(folder, max_skipped=1.0).told)


def test_the_tokenizer_learns_from_the_training_side_only(folder: Path) -> None:
    prepared = prepare(folder)
    train, held_out = sides(prepared, folder)
    alone, both = (TrainedTokenizer(300).prepare(each) for each in (train, train + held_out))
    assert prepared.tokenizer is not None
    assert prepared.tokenizer.fingerprint() == alone.fingerprint() != both.fingerprint()
    given, fingerprint, characters = source(folder).training_texts()
    assert "".join(given) == "".join(train)
    assert characters == sum(map(len, train))
    assert fingerprint == f"{prepared.fingerprint} 0.2"


def test_the_summary_counts_what_is_there(folder: Path) -> None:
    (folder / "picture").write_bytes(b"\xff")
    (folder / "nothing.txt").touch()
    prepared = prepare(folder)
    assert isinstance(prepared.train, PackedDataset)
    counts = prepared.summary
    assert counts["files_read"] == 125
    assert (counts["documents_read"], counts["documents_skipped"], counts["documents_empty"]) == (123, 1, 1)
    assert (counts["duplicates_dropped"], counts["files_skipped"], counts["vocabulary"]) == (3, 0, 300)
    assert counts["documents_train"] + counts["documents_held_out"] == 120
    assert counts["rows_per_epoch"] == len(prepared.train) == (counts["tokens_train"] - 1) // 32
    assert len(prepared.held_out) == -(-(counts["tokens_held_out"] - 1) // 32)
    assert prepared.sequence_length == 32
    assert prepared.record is not None
    assert len(prepared.record.entries) == 123
    assert prepared.record.layout is not None


def test_what_was_read_and_skipped_is_told(folder: Path) -> None:
    (folder / "b.txt").write_text(sentence(7) * 1000)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "zeros.bin").write_bytes(b"a\0b")
    (folder / "notes.txt~").write_text("an older version")
    for name, encoding in (("u.txt", "utf-16"), ("v.txt", "utf-8-sig"), ("w.txt", "utf-8-sig")):
        (folder / name).write_text(f"na\u00efve text in {name}", encoding)
    prepared = prepare(folder, max_skipped=0.02)
    told = prepared.told
    total = 1000 * len(sentence(7)) + sum(len(sentence(number)) for number in [*range(120), 0, 0, 0]) + 3 * 19
    assert told == [
        "127 documents of 129 files of text (a file is a document), 3 duplicates dropped, "
        f"the largest, b.txt, has {1000 * len(sentence(7)) / total:.1%} of the text",
        "skipped 1 document: not UTF-8, first latin.txt",
        "skipped 1 document: NUL characters (no text), first zeros.bin",
        "1 file begins with a byte order mark of UTF-16-LE, and is read as that, first u.txt",
        "2 files begin with a byte order mark of UTF-8, which is left out, first v.txt",
        "left out 1 file: hidden, left behind by an editor or a download, or a pipe or the like, "
        f"first {folder}/notes.txt~",
    ]
    texts_of = "".join(sides(prepared, folder)[0] + sides(prepared, folder)[1])
    assert all(f"na\u00efve text in {name}" in texts_of for name in ("u.txt", "v.txt"))
    assert "\ufeff" not in texts_of
    with pytest.raises(UserError, match=r"2 of 129 documents cannot be read, more than data\.max_skipped="):
        prepare(folder)  # from the cache as well
    with pytest.raises(UserError, match=r"first latin\.txt.*first zeros\.bin.*\n.*data\.max_skipped=0\.02"):
        prepare(folder)


def lines(count: int, **more: object) -> str:
    return "".join(json.dumps({"text": sentence(number)} | more) + "\n" for number in range(count))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_json_lines_are_documents(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    content = lines(100) + '{"text": "", "body": ""}\n'
    open_file: Callable[..., Any] = gzip.open if suffix.endswith("gz") else open
    with open_file(folder / f"all{suffix}", "wt") as file:
        file.write(content)
    prepared = prepare(folder)
    train, held_out = sides(prepared, folder)
    assert sorted(train + held_out) == sorted(sentence(number) for number in range(100))
    assert prepared.told[0].startswith("100 documents of 1 file of JSON lines (data.field=text), 1 empty, ")
    if suffix == ".json":  # may as well be a text that is JSON
        told = prepare(folder, field="body").told
        assert "1 file looks like JSON lines and is read as text, first all.json: give .jsonl" in told[1]
        return
    with pytest.raises(
        UserError, match=r"no text \(skipped 100 documents: the field is missing, .*it has 't"
    ):
        prepare(folder, field="body")


def test_a_separator_ends_documents(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "all.txt").write_text("<end>".join(sentence(number) for number in range(60)))
    prepared = prepare(folder, separator="<end>")
    train, held_out = sides(prepared, folder)
    assert sorted(train + held_out) == sorted(sentence(number) for number in range(60))
    assert "60 documents of 1 file of text (documents end at data.separator='<end>')" in prepared.told[0]
    assert prepare(folder).summary["documents_read"] == 1


def test_a_second_time_comes_from_the_cache_and_a_change_does_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = folder.parent / "cache"
    first = prepare(folder)
    entries = sorted(cache.iterdir())
    with monkeypatch.context() as patched:
        for module in (corpus_scan, document_scan):
            patched.setattr(module, "read_documents", lambda *_: pytest.fail("a text is read"))
        again = prepare(folder)
    assert sorted(cache.iterdir()) == entries
    assert (again.summary, again.told, again.record) == (first.summary, first.told, first.record)
    (folder / "new.txt").write_text("something new")
    assert prepare(folder).fingerprint != first.fingerprint
    assert len(list(cache.glob("tokens-*"))) == 4
    prepare(folder, held_out=0.3)
    assert len(list(cache.glob("tokens-*"))) == 6
    source(folder).prepare(TrainedTokenizer(290), 32, 1)
    assert len(list(cache.glob("tokens-*"))) == 8


def test_moved_and_touched_files_are_scanned_but_not_tokenized_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(folder)
    monkeypatch.setattr("dsv3.data.sources.prepare_shards", lambda *_, **__: pytest.fail("encoded again"))
    os.utime(folder / "001.txt" if (folder / "001.txt").exists() else folder / "000.txt")
    assert prepare(folder).fingerprint == first.fingerprint
    moved = folder.rename(folder.with_name("moved"))
    assert prepare(moved).fingerprint == first.fingerprint
    (moved / "000.txt").rename(moved / "renamed.txt")
    monkeypatch.undo()
    assert prepare(moved).fingerprint != first.fingerprint


def test_the_fingerprint_is_that_of_names_and_contents(folder: Path) -> None:
    """Runs of before have it."""
    (folder / "all.jsonl").write_text(lines(3))
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.*"), key=lambda path: path.relative_to(folder).as_posix()):
        if file.suffix == ".jsonl":
            parts = [hashlib.sha256(sentence(number).encode()).digest() for number in range(3)]
            digest = hashlib.sha256(b"".join(parts)).hexdigest()
        else:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\0{digest}\n".encode())
    assert prepare(folder).fingerprint == total.hexdigest()[:16]


def test_options_reach_the_rows(folder: Path, tokenizer: Tokenizer) -> None:
    def first_row(seed: int, shuffle: bool) -> list[int]:
        train = source(folder, shuffle=shuffle).prepare(tokenizer, 32, seed).train
        assert train is not None
        return train.row(0).tokens.tolist()  # type: ignore[no-any-return]

    assert first_row(1, True) == first_row(1, True) != first_row(2, True)
    assert first_row(1, False) == first_row(2, False)
    assert source(folder, document_mask=True).options.document_mask


def test_evaluation_prepares_the_held_out_side_alone_with_the_given_tokenizer(
    folder: Path, tokenizer: Tokenizer
) -> None:
    prepared = source(folder).prepare(tokenizer, 32, 1, evaluate=True)
    assert prepared.train is None
    assert prepared.tokenizer is tokenizer
    assert [path.name.split("-")[-1] for path in (folder.parent / "cache").glob("tokens-*")] == ["held_out"]
    trained = source(folder).prepare(tokenizer, 32, 2)
    assert len(trained.held_out) == len(prepared.held_out)
    assert trained.held_out.row(0).tokens.tolist() == prepared.held_out.row(0).tokens.tolist()


@pytest.mark.parametrize("piece", [64, 1 << 16])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_single_text_is_cut_in_two(
    tmp_path: Path, piece: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_files, "FIRST_PIECE", piece)
    folder = tmp_path / "corpus"
    folder.mkdir()
    book = "".join(f"line {number}\r\n" for number in range(400))
    for copy in range(copies):
        (folder / f"book-{copy}.txt").write_text(book, newline="")
    prepared = prepare(folder)
    assert sides(prepared, folder) == (
        ["".join(f"line {number}\r\n" for number in range(320))],
        ["".join(f"line {number}\r\n" for number in range(320, 400))],
    )
    assert prepared.summary["duplicates_dropped"] == copies - 1


@pytest.mark.parametrize("damage", ["tokens", "offsets", "index.json", "truncated", "scan.json", "sides.npy"])
def test_a_damaged_entry_is_told_of_and_made_anew(
    folder: Path, damage: str, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    first = source(folder).prepare(tokenizer, 32, 1).train
    pattern = "corpus-*" if damage in ("scan.json", "sides.npy") else "tokens-*-train"
    (entry,) = (folder.parent / "cache").glob(pattern)
    if damage == "truncated":
        os.truncate(next(entry.glob("*.tokens.npy")), 200)
    elif damage == "sides.npy":
        os.truncate(entry / damage, 100)
    elif damage.endswith(".json"):
        (entry / damage).write_text("{")
    else:
        next(entry.glob(f"*.{damage}.npy")).unlink()
    again = source(folder).prepare(tokenizer, 32, 1).train
    assert first is not None
    assert again is not None
    assert [again.row(n).tokens.tolist() for n in range(9)] == [
        first.row(n).tokens.tolist() for n in range(9)
    ]
    assert capsys.readouterr().err.count(f"the cache's {entry.name} is damaged and is made anew: ") == 1


def test_a_killed_scan_and_a_killed_tokenizing_go_on_where_they_were(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dsv3.data.corpus.plan_units", lambda files, options: plan_units(files, options, 1000)
    )
    read = document_files.read_documents
    begun: list[int] = []
    limit = 5

    def interrupted(unit: Any, *arguments: Any) -> Any:
        if not begun or begun[-1] != unit.number:
            begun.append(unit.number)
        if len(begun) > limit:
            raise KeyboardInterrupt
        return read(unit, *arguments)

    for module in (corpus_scan, document_scan):
        monkeypatch.setattr(module, "read_documents", interrupted)
    everything: list[int] = []
    first: tuple[list[str], list[str]] = ([], [])
    for _ in range(40):
        try:
            first = sides(source(folder).prepare(tokenizer, 32, 1), folder)
            break
        except KeyboardInterrupt:
            everything += begun[:-1]
            begun.clear()
    everything += begun
    units = max(everything) + 1
    assert units > 4 * limit
    assert everything == [*range(units)] * 3  # the scan, and each side, once
    assert sorted(first[0] + first[1]) == sorted(sentence(number) for number in range(120))


def test_a_vocabulary_larger_than_the_models_is_refused(folder: Path) -> None:
    prepared = prepare(folder)
    prepared.check_vocabulary(300)
    with pytest.raises(UserError, match=r"300 ids, model\.vocab_size=299"):
        prepared.check_vocabulary(299)


def test_mistakes_are_named(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.path is not set"):
        TextData()
    with pytest.raises(UserError, match=r"data\.cache_dir="):
        prepare(folder, cache_dir=str(folder / "000.txt"))
    with pytest.raises(UserError, match=r"train\.sequence_length=100000"):
        source(folder).prepare(tokenizer, 100_000, 1)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"x"])
def test_nothing_to_read_is_the_users_mistake(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "file").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.path=.* holds no text \(|file holds a single character"):
        prepare(folder)
    assert not list((tmp_path / "cache").glob(".*.work"))


@pytest.mark.slow
def test_the_standard_library_trains_a_model_of_4096_ids(tmp_path: Path) -> None:
    data = StdlibData(cache_dir=str(tmp_path))
    prepared = data.prepare(TrainedTokenizer(4096), 512, 1)
    assert prepared.summary["vocabulary"] == 4096
    assert prepared.summary["tokens_train"] > 1e6
    assert 0.005 < prepared.summary["tokens_held_out"] / prepared.summary["tokens_train"] < 0.1
