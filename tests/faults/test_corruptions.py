"""Whatever is done to an input, its reader reads it or refuses it in a line or two."""

import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from dsv3.data.token_table import TokensData
from dsv3.errors import LONGEST_MESSAGE, InvalidValue, UserError
from dsv3.tokens.tokenizer import Tokenizer
from tests.faults.corruptions import Case, Verdict, corruptions, judge, judge_read
from tests.faults.data_readers import READERS, read_rows, read_tokenizer
from tests.faults.run_readers import RUNS

COUNTS = {"texts": 6, "tiktoken": 15, "runs": 25}
"""Cases of readers that take milliseconds each; of the others there are 30."""


@pytest.mark.parametrize("name", [*READERS, "runs"])
def test_no_corrupted_input_ends_in_a_traceback(name: str, tmp_path: Path) -> None:
    reader = READERS.get(name, RUNS)
    (tmp_path / "sound").mkdir()
    sound = reader.write(tmp_path / "sound")
    assert judge_read(lambda: reader.read(sound)) == Verdict("read")
    (tmp_path / "spoilt").mkdir()
    for case in corruptions(reader, 16, COUNTS.get(name, 30)):
        verdict = judge(case, tmp_path / "spoilt")
        assert verdict.outcome != "fault", f"{case.name}: {verdict.message}"


def test_a_fault_is_told_from_a_refusal(tmp_path: Path) -> None:
    reader = READERS["table"]

    def ending(error: BaseException) -> Verdict:
        def fails(folder: Path) -> None:
            raise error

        return judge(
            Case(type(reader)("x", lambda folder: folder, fails), "x", lambda folder: None), tmp_path
        )

    assert ending(UserError("no")).outcome == "refused"
    assert ending(ValueError("no")).outcome == "fault"
    assert ending(type("PanicException", (BaseException,), {})("no")).outcome == "fault"
    assert ending(UserError("no\nno\nno")).outcome == "fault"


def _header(file: Path, text: bytes, version: tuple[int, int] = (1, 0)) -> None:
    """Write a file of 2,000 zeros with a header of this text."""
    kind = "<H" if version == (1, 0) else "<I"
    head = b"\x93NUMPY" + bytes(version) + struct.pack(kind, len(text)) + text
    file.write_bytes(head + bytes(2000))


def _shaped(shape: bytes, descr: bytes = b"'<i4'", more: bytes = b"") -> bytes:
    return b"{'descr':%s,'fortran_order':False,'shape':%s,%s}\n" % (descr, shape, more)


def _archive(file: Path, size: int | None = None) -> None:
    content = io.BytesIO()
    np.savez(content, ids=np.zeros((4, 9), np.int32))
    file.write_bytes(content.getvalue()[:size])


ARRAYS: dict[str, Callable[[Path], object]] = {
    "one dimension": lambda file: np.save(file, np.arange(20)),
    "three dimensions": lambda file: np.save(file, np.zeros((2, 3, 4), np.int32)),
    "no dimension": lambda file: np.save(file, np.int32(3)),
    "column by column": lambda file: np.save(file, np.asfortranarray(np.zeros((4, 9), np.int32))),
    "objects": lambda file: np.save(file, np.array([[1, None]] * 3, object), allow_pickle=True),
    "a structure": lambda file: np.save(file, np.zeros((3, 9), [("a", "<i4"), ("b", "<u2")])),
    "big-endian": lambda file: np.save(file, np.zeros((4, 9), ">i4")),
    "floats": lambda file: np.save(file, np.zeros((4, 9))),
    "text": lambda file: np.save(file, np.array([["a", "b"]] * 4)),
    "dates": lambda file: np.save(file, np.zeros((4, 9), "datetime64[s]")),
    "no rows": lambda file: np.save(file, np.zeros((0, 9), np.int32)),
    "no columns": lambda file: np.save(file, np.zeros((4, 0), np.int32)),
    "an archive": _archive,
    "a cut archive": lambda file: _archive(file, 60),
    "lines of JSON": lambda file: file.write_text('{"ids": [1, 2]}\n' * 9),
    "raw numbers": lambda file: np.zeros((9, 9), np.uint16).tofile(file),
    "a huge header": lambda file: _header(file, _shaped(b"(4,9)", more=b" " * 20000), (2, 0)),
    "a huge shape": lambda file: _header(file, _shaped(b"(99999999999999999999,9)")),
    "a negative shape": lambda file: _header(file, _shaped(b"(-4,9)")),
    "a shape of truths": lambda file: _header(file, _shaped(b"(True,9)")),
    "an expression": lambda file: _header(file, b"__import__('os').getcwd()\n"),
    "deep brackets": lambda file: _header(file, b"(" * 9000 + b")" * 9000, (2, 0)),
    "an odd dtype": lambda file: _header(file, _shaped(b"(4,9)", b"'|O999'")),
    "a dtype of a list": lambda file: _header(file, _shaped(b"(4,9)", b"[('a',)]")),
    "another version": lambda file: _header(file, _shaped(b"(4,9)"), (9, 7)),
    "no header": lambda file: file.write_bytes(b"\x93NUMPY"),
    "nothing": lambda file: file.write_bytes(b""),
    "a list of numbers": lambda file: file.write_text("1 2 3\n4 5 6\n"),
    "a pipe": os.mkfifo,
    "a folder of nothing": lambda file: file.mkdir(),
}


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".bin", ".jsonl"])
@pytest.mark.parametrize("name", ARRAYS)
def test_odd_arrays_are_refused_in_our_own_words(name: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"ids{suffix}"
    ARRAYS[name](file)
    verdict = judge_read(lambda: read_rows(TokensData(path=str(file)).prepare()))
    assert verdict.outcome == "refused", verdict
    assert str(file) in verdict.message
    for advice in ("allow_pickle", "max_header_size", "trust", "set_int_max_str_digits", "fix_imports"):
        assert advice not in verdict.message


def _tokenizer(folder: Path, settings: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    backend = Backend(models.BPE({"a": 0, "b": 1, "ab": 2, "<s>": 3}, [("a", "b")], unk_token="a"))
    found = json.loads(backend.to_str())
    change(found)
    (folder / "tokenizer.json").write_text(json.dumps(found))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


_SPLIT = {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}

_WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}

REFUSED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], object]]] = {
    "no unk token": ({}, lambda found: found.update(model=_WORDS)),
    "a bad pattern": ({}, lambda found: found.update(pre_tokenizer=_SPLIT)),
    "no merges": ({}, lambda found: found["model"].pop("merges")),
    "merges of nothing": ({}, lambda found: found["model"].update(merges=[["x", "y"]])),
    "no vocabulary": ({}, lambda found: found["model"].pop("vocab")),
    "a huge id": ({}, lambda found: found["model"]["vocab"].update(b=2**31)),
    "a negative id": ({}, lambda found: found["model"]["vocab"].update(b=-1)),
    "ids of text": ({}, lambda found: found["model"].update(vocab={"a": "b"})),
    "a list": ({}, lambda found: found.update(model=[])),
    "half a character": ({"bos_token": "\ud800"}, lambda found: None),
    "names of numbers": ({"added_tokens_decoder": {"x": 3}}, lambda found: None),
    "ids of two tokenizers": ({"added_tokens_decoder": {"9": {"content": "<s>"}}}, lambda found: None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_cannot_be_used_is_refused_with_its_file(name: str, tmp_path: Path) -> None:
    _tokenizer(tmp_path, *REFUSED[name])
    verdict = judge_read(lambda: read_tokenizer(tmp_path))
    assert verdict.outcome == "refused", verdict
    assert str(tmp_path) in verdict.message


def test_a_mistyped_special_token_is_told_and_does_without(tmp_path: Path) -> None:
    _tokenizer(tmp_path, {"bos_token": "<S>", "eos_token": 7, "add_bos_token": True}, lambda found: None)
    tokenizer = Tokenizer.from_file(tmp_path)
    assert (tokenizer.bos, tokenizer.eos) == (None, None)
    assert "the tokenizer has no id for its bos_token '<S>': texts go without it" in tokenizer.notes()


def test_every_message_is_short_whatever_is_put_into_it() -> None:
    long = "x" * 100_000
    assert len(str(UserError(f"{long} is no file"))) <= LONGEST_MESSAGE
    assert len(str(UserError("word " * 9000))) <= LONGEST_MESSAGE
    assert len(str(UserError(f"{'word ' * 9000}\ngo on: command"))) <= LONGEST_MESSAGE
    assert str(UserError(f"{'word ' * 9000}\ngo on: command")).endswith("\ngo on: command")
    assert len(str(InvalidValue("a.b", long, long))) <= LONGEST_MESSAGE
    path = f"/{'folder/' * 60}file"
    assert path in str(UserError(f"{path} is damaged: {long}"))  # a path, and a command with it, stays whole
    assert str(UserError("short")) == "short"
