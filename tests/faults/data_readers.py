"""The readers of data and tokenizers for corruptions.py: a small sound input of each kind, and its use."""

import gzip
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.config.data import IdType
from dsv3.data.sources import PreparedData, TextData
from dsv3.data.token_shards import ShardsData
from dsv3.data.token_table import TokensData
from dsv3.tokens.tokenizer import Tokenizer, TrainedTokenizer
from tests.data import token_formats as formats
from tests.data.texts import sentence
from tests.faults.corruptions import Reader
from tests.tokens import tiktoken_release

DOCUMENTS = [[*range(number, number + 9 + number % 5)] for number in range(24)]

VOCABULARY = 200


def read_rows(data: PreparedData) -> None:
    """Check data as a run does, and read all of its rows once."""
    data.check_vocabulary(max(VOCABULARY, data.tokenizer.size if data.tokenizer else 0))
    data.check_digests()
    for rows in (data.train, data.held_out):
        for number in range(min(len(rows or ()), 200)):
            assert rows is not None
            rows.row(number)


def _write_table(folder: Path, files: int = 1) -> Path:
    for number in range(files):
        np.save(folder / f"{number}.npy", np.arange(17 * 9, dtype=np.int32).reshape(9, 17))
    return folder if files > 1 else folder / "0.npy"


def _read_table(path: Path) -> None:
    read_rows(TokensData(path=str(path)).prepare())


def _write_shards(folder: Path) -> Path:
    return formats.with_digests(
        formats.shards(folder / "data", DOCUMENTS, DOCUMENTS[:3], files=2, vocab_size=150)
    )


def _read_shards(path: Path, eos_id: int | None = None) -> None:
    given: dict[str, Any] = {"path": str(path), "dtype": IdType.uint16, "eos_id": eos_id, "held_out": 0.1}
    given["cache_dir"] = str(path.parent / ".cache")
    read_rows(ShardsData(**given).prepare(TrainedTokenizer(300), 8, 1))


def _format(write: Callable[..., Path]) -> Callable[[Path], Path]:
    return lambda folder: write(folder / "data", DOCUMENTS)


def _write_texts(folder: Path) -> Path:
    root = folder / "corpus"
    root.mkdir()
    for number in range(6):
        (root / f"{number}.txt").write_text(sentence(number))
    lines = "".join(json.dumps({"text": sentence(number), "n": number}) + "\n" for number in range(10, 16))
    (root / "lines.jsonl").write_text(lines)
    (root / "packed.jsonl.gz").write_bytes(gzip.compress(lines.replace("text 1", "text 2").encode(), mtime=0))
    return root


def _read_texts(path: Path) -> None:
    given: dict[str, Any] = {"path": str(path), "cache_dir": str(path.parent / ".cache"), "held_out": 0.2}
    read_rows(TextData(**given, max_skipped=0.9).prepare(TrainedTokenizer(300), 16, 1))


@cache
def trained() -> Tokenizer:
    """Return a small trained tokenizer, the same one each time."""
    return TrainedTokenizer(290).prepare([sentence(number) for number in range(5)])


@cache
def _ranks() -> dict[bytes, int]:
    return tiktoken_release.ranks(300)


def _write_tokenizer(folder: Path) -> Path:
    trained().save(folder / "tokenizer")
    (folder / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [1]}')
    return folder / "tokenizer"


def _write_word_tokenizer(folder: Path) -> Path:
    """Write one of another model, with an unk token, a normalizer and a template."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, processors

    words = ["[UNK]", "<s>", "</s>", *dict.fromkeys(sentence(1).split())]
    backend = Backend(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("a", "b")])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = folder / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "unk_token": "[UNK]",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<s>"]}))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": len(words)}))
    return folder


def _write_tiktoken(folder: Path) -> Path:
    return tiktoken_release.write_release(folder / "tokenizer", _ranks())


def read_tokenizer(path: Path) -> None:
    """Use a tokenizer as a run does, and save it."""
    tokenizer = Tokenizer.from_file(path)
    tokenizer.encode_batch([sentence(1), "\u6f22 \U0001f600"])
    tokenizer.decode(tokenizer.encode("some text"))
    assert tokenizer.fingerprint()
    assert tokenizer.document is not None
    tokenizer.notes()
    tokenizer.save(path.parent / "saved")


READERS = {
    reader.name: reader
    for reader in (
        Reader("table", _write_table, _read_table),
        Reader("tables", partial(_write_table, files=3), _read_table),
        Reader("shards", _write_shards, _read_shards),
        *(
            Reader(name, _format(write), _read_shards)
            for name, write in formats.INDEXED.items()
            if name != "shards"
        ),
        *(Reader(name, _format(write), _read_shards) for name, write in formats.FLAT.items()),
        Reader("documents of flat files", _format(formats.npy), partial(_read_shards, eos_id=9)),
        Reader("texts", _write_texts, _read_texts),
        Reader("trained tokenizer", _write_tokenizer, read_tokenizer),
        Reader("word tokenizer", _write_word_tokenizer, read_tokenizer),
        Reader("tiktoken", _write_tiktoken, read_tokenizer),
    )
}
"""By name; what is not given has the values of a run by default."""
