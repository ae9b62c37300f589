"""Documents of files of every kind: the same texts from each, in any ranges; what is none is counted."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from dsv3.documents import byte_blocks, document_files, input_units, table_files
from dsv3.documents.document_files import ReadOptions, read_documents
from dsv3.documents.input_files import FileKind, InputFile, Part, Unit, find_files
from dsv3.documents.input_units import plan_units
from dsv3.documents.skip_limit import BadDocument, Reason, Skipped
from dsv3.documents.table_files import choose_split, hub_dataset, saved_dataset
from dsv3.errors import UserError

TEXTS = [f"text {number} \u00e9\u6f22\U0001f600\n" * (1 + number % 5) + '"\\ud83d"' for number in range(40)]

OPTIONS = ReadOptions(field="body", separator="<|end|>")


def json_lines(texts: list[str]) -> bytes:
    lines = [json.dumps({"id": n, "body": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    return "".join(f"{line}\r\n" for line in lines).encode()


def objects(texts: list[str]) -> list[dict[str, object]]:
    return [{"body": text, "meta": {"tags": ["{", "[", '\\"'], "n": None}} for text in texts]


def write_parquet(path: Path, texts: list[str | None]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(texts))), "body": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=7)


def write_dataset(path: Path, texts: list[str]) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"body": texts}).save_to_disk(str(path))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.txt": lambda path: path.write_text("<|end|>".join(TEXTS)),
    "u16.txt": lambda path: path.write_text("<|end|>".join(TEXTS), "utf-16"),
    "a.txt.gz": lambda path: path.write_bytes(gzip.compress("<|end|>".join(TEXTS).encode())),
    "a.jsonl": lambda path: path.write_bytes(json_lines(TEXTS)),
    "mark.ndjson": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json_lines(TEXTS)),
    "a.json": lambda path: path.write_bytes(json_lines(TEXTS)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json_lines(TEXTS))),
    "array.json": lambda path: path.write_bytes(json.dumps(objects(TEXTS)).encode()),
    "lines.json": lambda path: path.write_text(
        "[\n" + ",\n".join(json.dumps(each) for each in objects(TEXTS)) + "\n]\n"
    ),
    "pretty.json": lambda path: path.write_bytes(
        "".join(json.dumps(each, indent=2, ensure_ascii=False) + "\n" for each in objects(TEXTS)).encode()
    ),
    "pretty.json.gz": lambda path: path.write_bytes(
        gzip.compress(json.dumps(objects(TEXTS), indent=2).encode())
    ),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.ZstdCompressor().compress(json_lines(TEXTS))),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(json_lines(TEXTS))),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(json_lines(TEXTS))),
    "a.parquet": lambda path: write_parquet(path, list(TEXTS)),
    "dataset": lambda path: write_dataset(path, TEXTS),
}


def find(path: Path, options: ReadOptions = OPTIONS) -> list[InputFile]:
    return [
        saved_dataset(file, None) if file.kind is FileKind.dataset else file
        for file in find_files([str(path)], options.field).files
    ]


def read(
    path: Path | list[InputFile], unit_bytes: int | None = None, options: ReadOptions = OPTIONS
) -> tuple[list[str], Skipped]:
    """The documents at a path, from units of so many bytes, and the counts."""
    skipped = Skipped()
    texts, reported = [], 0

    def report(nbytes: int) -> None:
        nonlocal reported
        reported += nbytes

    files = find(path, options) if isinstance(path, Path) else path
    units = plan_units(files, options, unit_bytes)
    for unit in units:
        for document in read_documents(unit, options, skipped, report):
            try:
                texts.append("".join(document.pieces()))
            except BadDocument:
                continue
    assert reported == sum(unit.nbytes for unit in units)
    assert skipped.documents == len(texts)
    return texts, skipped


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_documents(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == (TEXTS, Skipped(documents=len(TEXTS)))
    assert read(tmp_path / name, unit_bytes=300)[0] == TEXTS
    files = find(tmp_path / name)
    # Every record is a long one, in pieces of a few bytes.
    monkeypatch.setattr(byte_blocks, "BLOCK", 5)
    monkeypatch.setattr(byte_blocks, "LONG_RECORD", 3)
    monkeypatch.setattr(document_files, "FIRST_PIECE", 4)
    texts, skipped = read(files)
    assert texts == TEXTS
    assert not skipped.num_skipped


def test_large_files_are_cut_into_units_and_small_ones_joined(tmp_path: Path) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    WRITERS["a.parquet"](tmp_path / "b.parquet")
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("small")
    found = find_files([str(tmp_path)]).files
    units = plan_units(found, OPTIONS, 1000)
    assert [unit.number for unit in units] == list(range(len(units)))
    assert len(units[0].parts) == 9
    assert len([unit for unit in units if unit.name.endswith(".jsonl")]) > 3
    assert len([unit for unit in units if unit.name.endswith(".parquet")]) > 1
    huge = plan_units(found, OPTIONS, None)
    assert len(huge) == 1
    assert input_units.MOST_UNITS * input_units.UNIT_BYTES > 10**12


BAD_LINES = [
    (b'{"body": "fine"}', None),
    (b"", None),
    (b"\xff\xfe{}", Reason.NOT_UTF8),
    (b'{"body": "cut', Reason.NO_JSON),
    (b"[" * 100_000, Reason.NO_JSON),
    (b'["body"]', Reason.NO_OBJECT),
    (b'{"text": "x"}', Reason.NO_FIELD),
    (b'{"body": 7}', Reason.NO_TEXT),
    (b'{"body": null}', Reason.NO_TEXT),
    (b'{"body": "\\ud83d"}', Reason.LONE_SURROGATE),
    (b'{"body": "a\\u0000b"}', Reason.NUL),
    (b'{"body": "a\0b"}', Reason.NUL),
    (b'{"body": ""}', None),
]


@pytest.mark.parametrize("long", [False, True])
def test_lines_that_are_no_documents_are_counted_by_reason(
    long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if long:
        monkeypatch.setattr(byte_blocks, "BLOCK", 4)
        monkeypatch.setattr(byte_blocks, "LONG_RECORD", 2)
        monkeypatch.setattr(document_files, "FIRST_PIECE", 1)
    (tmp_path / "a.jsonl").write_bytes(b"".join(line + b"\n" for line, _ in BAD_LINES))
    texts, skipped = read(tmp_path / "a.jsonl")
    assert texts == ["fine"]
    assert skipped.empty == 1
    expected: dict[str, int] = {}
    for _, reason in BAD_LINES:
        if reason:
            expected[reason] = expected.get(reason, 0) + 1
    if long:  # what does not begin as an object is not read further
        expected[Reason.NO_JSON] += expected.pop(Reason.NO_OBJECT)
    assert skipped.counts == expected
    assert "line 7" in skipped.first[Reason.NO_FIELD]
    assert "'text'" in skipped.first[Reason.NO_FIELD]


def test_files_that_are_no_text_are_counted_by_reason(tmp_path: Path) -> None:
    texts = ["good", "\u6f22" * 10]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"a\0b")
    (tmp_path / "c.zip").write_bytes(b"PK\x03\x04....")
    (tmp_path / "d.txt").write_bytes(b"")
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"cut off" * 100)[:-9])
    (tmp_path / "f.parquet").write_bytes(b"PAR1 not really")
    write_parquet(tmp_path / "g.parquet", ["row", None])
    for leftover in (".hidden", "x.txt~", "#x#", "x.swp"):
        (tmp_path / leftover).write_text("left")
    found, skipped = read(tmp_path, options=ReadOptions())
    assert found == texts
    assert skipped.counts == {Reason.NOT_UTF8: 1, Reason.NUL: 1, Reason.NO_FIELD: 2}
    assert skipped.files == {Reason.ARCHIVE: 1, Reason.DAMAGED: 2}
    assert skipped.empty == 1
    assert "'id', 'body'" in skipped.first[Reason.NO_FIELD]
    assert len(find_files([str(tmp_path)]).left_out) == 4
    assert read(tmp_path / "g.parquet")[1].counts == {Reason.NO_TEXT: 1}
    write_parquet(tmp_path / "h.parquet", ["row", "a\0b"])
    assert read(tmp_path / "h.parquet")[1].counts == {Reason.NUL: 1}


def test_json_files_are_documents_where_the_first_object_has_the_field_and_else_told(tmp_path: Path) -> None:
    contents = {
        "array": '[{"body": "one"}, 7, ["x"], {"body": "two"}, {"id": 1}]',
        "one": '\n {\n "id": 1,\n "body": "three"}',
        "cut": '[{"body": "four"}, {"body": "fi',
        "open": '[{"body": "six"}',
        "behind": '[{"body": "seven"}] {"body": "eight"}',
        "other": '[{"name": "package"}]',
        "config": '{\n "name": "package"}',
        "number": "3",
        "nothing": "",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(content)
    found = find_files([str(tmp_path)], "body")
    as_text = {file.path.stem for file in found.files if file.kind is FileKind.text}
    assert as_text == {"other", "config", "number", "nothing"}
    [line] = found.told_json("body")
    assert "4 files named .json are read as text, first " in line
    assert "config.json: no object with data.field=body" in line
    texts, skipped = read([file for file in found.files if file.kind is not FileKind.text])
    assert sorted(texts) == ["four", "one", "seven", "six", "three", "two"]
    assert skipped.counts == {Reason.NO_OBJECT: 2, Reason.NO_FIELD: 1}
    assert skipped.files == {Reason.DAMAGED: 3}
    assert "array.json: document 2" in skipped.first[Reason.NO_OBJECT]
    assert find_files([str(tmp_path / "array.json")], "body").told_json("body") == []


def test_a_file_that_cannot_be_opened_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    form = byte_blocks.file_form

    def refused(path: Path) -> str:
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return form(path)

    monkeypatch.setattr(byte_blocks, "file_form", refused)
    texts, skipped = read(tmp_path, options=ReadOptions())
    assert texts == ["b.txt"]
    assert skipped.files == {Reason.UNREADABLE: 1}
    assert skipped.first[Reason.UNREADABLE] == f"{tmp_path}/a.txt (Permission denied)"


def test_what_turns_out_bad_late_is_given_up_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_blocks, "LONG_RECORD", 100)
    monkeypatch.setattr(byte_blocks, "BLOCK", 64)
    monkeypatch.setattr(document_files, "FIRST_PIECE", 50)
    (tmp_path / "a.txt").write_bytes(b"a" * 1000 + b"\xff")
    (tmp_path / "b.txt").write_bytes(b"b" * 1000 + b"\0")
    (tmp_path / "c.txt").write_bytes(b"c" * 1000)
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(bytes(range(1, 120)) * 20, 0)[:-9])
    (tmp_path / "e.jsonl").write_bytes(b'{"body": "' + b"e" * 1000 + b'", \n{"body": "next"}\n')
    found, skipped = read(tmp_path, options=ReadOptions("body"))
    assert found == ["c" * 1000, "next"]
    assert skipped.counts == {Reason.NOT_UTF8: 1, Reason.NUL: 1, Reason.NO_JSON: 1}
    assert skipped.files == {Reason.DAMAGED: 1}
    # The same where nobody reads the pieces.
    unread = Skipped()
    for unit in plan_units(find_files([str(tmp_path)], "body").files, ReadOptions("body")):
        for _ in read_documents(unit, ReadOptions("body"), unread):
            pass
    assert unread == skipped


def test_a_dataset_of_the_hub_is_read_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's calls are stood in for; the streaming is that of `datasets`."""
    import datasets
    from huggingface_hub import HfApi

    files = []
    for number in range(4):
        files.append(str(tmp_path / f"{number}.jsonl"))
        Path(files[-1]).write_bytes(json_lines(TEXTS[10 * number : 10 * number + 10]))
    asked: list[object] = []

    def load(name: str, subset: str | None, **how: object) -> object:
        asked.append((name, subset, how["split"], how["revision"], how["streaming"]))
        return datasets.load_dataset("json", data_files={"train": files}, split="train", streaming=True)

    stand_in = SimpleNamespace(
        load_dataset=load, get_dataset_split_names=lambda *args, **how: ["train", "test"]
    )
    monkeypatch.setattr(table_files, "_datasets", lambda: stand_in)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name: SimpleNamespace(sha="abc"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = hub_dataset("hf:owner/name", "en", None)
    assert len(plan_units([found], OPTIONS)) == 4
    assert read([found])[0] == TEXTS
    assert set(asked) == {("owner/name", "en", "train", "abc", True)}
    with pytest.raises(UserError, match=r"task.split=dev is none of the splits of hf:owner/name: train, t"):
        hub_dataset("hf:owner/name", None, "dev")

    def offline(self: HfApi, name: str) -> object:
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "dataset_info", offline)
    with pytest.raises(UserError, match=r"cannot be read from the hub: no route\nWithout a network"):
        hub_dataset("hf:owner/name", None, None)


def test_memory_does_not_grow_with_a_line_or_a_document(tmp_path: Path) -> None:
    size = 48 << 20
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1, "body": "' + b"word and " * (size // 9) + b'"}\n')
    (tmp_path / "b.txt").write_bytes(b"word and " * (size // 9))
    for name in ("a.jsonl", "b.txt"):
        [unit] = plan_units(find_files([str(tmp_path / name)]).files, ReadOptions("body"))
        tracemalloc.start()
        [document] = read_documents(unit, ReadOptions("body"), Skipped())
        del document
        skipped = Skipped()
        count = sum(
            len(piece)
            for each in read_documents(unit, ReadOptions("body"), skipped)
            for piece in each.pieces()
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == size // 9 * 9
        assert peak < 24 << 20


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    [unit] = plan_units(find_files([str(tmp_path)]).files, ReadOptions())
    (tmp_path / "a.txt").write_text("one, and more")
    with pytest.raises(UserError, match="has changed while it was read"):
        list(read_documents(unit, ReadOptions(), Skipped()))


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("{}/missing.txt", "does not exist"),
        ("{}/*.jsonl", "matches no file"),
        ("{}/empty", "holds no file to read"),
        ("allenai/c4", "a dataset of the hub is named hf:allenai/c4"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(path: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=told):
        find_files([path.format(tmp_path)])


def test_a_saved_dataset_among_files_is_named_and_its_files_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    saved = tmp_path / "deep" / "saved"
    from datasets import Dataset

    Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(saved))
    with pytest.raises(UserError, match=f"{saved} is a dataset of save_to_disk among other files"):
        find_files([str(tmp_path)])
    assert [file.kind for file in find_files([str(saved)]).files] == [FileKind.dataset]


def test_a_pipe_is_refused_where_it_is_named_and_left_out_where_it_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    skipped = Skipped()  # one that has taken a file's place meanwhile
    replaced = InputFile(tmp_path / "pipe.txt", "pipe.txt", FileKind.text, 4, 0)
    with pytest.raises(UserError, match="has changed while it was read"):
        list(read_documents(Unit(0, (Part(replaced, 0, None, 4),)), ReadOptions(), skipped))
    assert "is a pipe" in skipped.first[Reason.UNREADABLE]
    with pytest.raises(UserError, match=r"pipe\.txt is a pipe or a device"):
        find_files([str(tmp_path / "pipe.txt")])
    for path in (str(tmp_path), f"{tmp_path}/*.txt"):
        found = find_files([path])
        assert [file.path.name for file in found.files] == ["a.txt"]
        assert "pipe.txt (no file" in found.left_out[0]


def test_the_split_that_is_chosen_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_split(["test", "train"], None, "DIR") == "train"
    assert "DIR: reads train of its splits test, train; task.split=NAME" in capsys.readouterr().err
    assert choose_split(["test", "train"], "test", "DIR") == "test"
    assert capsys.readouterr().err == ""


def test_patterns_and_folders_give_each_file_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    found = find_files([f"{tmp_path}/**/*.txt", str(tmp_path)]).files
    names = [file.path.resolve().relative_to(tmp_path).as_posix() for file in found]
    assert sorted(names) == ["a.txt", "b/1.txt", "b/2.txt", "c.txt"]
    assert [file.path.name for file in find_files([str(tmp_path)]).files] == [
        "a.txt",
        "1.txt",
        "2.txt",
        "c.txt",
    ]
