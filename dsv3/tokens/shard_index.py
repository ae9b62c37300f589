"""The index of token shards: index.json, which names the files of ids and of offsets in a directory.

docs/data.md has the format for who writes it with another tool. The index is written last, by a rename: a
directory without one holds nothing that is read.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dsv3.config.limits import LARGEST_VOCABULARY
from dsv3.errors import UserError, quoted
from dsv3.untrusted_files import BadFile, MissingFile, parse_json, read_bytes

INDEX_FILE = "index.json"

FORMAT, VERSION = "dsv3-token-shards", 1

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

_DIGEST = re.compile("[0-9a-fA-F]{32}")

TRAIN, HELD_OUT = "train", "held_out"
"""Splits: documents to train on, and those set aside for the held-out loss."""


def dtype_for(vocab_size: int) -> str:
    """Return the smaller dtype, uint16 or uint32, that holds the ids 0 .. vocab_size - 1."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class Shard:
    """Documents in two files of the directory.

    Attributes:
        tokens: .npy file of ids [num_tokens].
        offsets: .npy file, int64 [num_documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]].
        digests: `tokens` and `offsets` to the XXH128 of the whole file, in hex; may be empty.
    """

    tokens: str
    offsets: str
    num_tokens: int
    num_documents: int
    digests: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the index."""
        return {
            "tokens": self.tokens,
            "offsets": self.offsets,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "digests": dict(self.digests),
        }


@dataclass(frozen=True)
class TokenizerReference:
    """The tokenizer of the ids: its fingerprint, and its folder within the directory, None if not there."""

    fingerprint: str
    folder: str | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The content of index.json.

    Attributes:
        dtype_name: uint16 or uint32.
        vocab_size: ids lie below it; None where the writer did not say.
        bos: the id that begins each document, None where none does.
        eos: the id that ends each document, None where none does.
        splits: shards by split, `train` and perhaps `held_out`, in the order of their documents.
        source: where the text came from, and counts.
        skipped: documents and files that were left out, by reason.
        settings: how the text was read.
    """

    dtype_name: str
    splits: Mapping[str, list[Shard]]
    vocab_size: int | None = None
    bos: int | None = None
    eos: int | None = None
    tokenizer: TokenizerReference | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of the ids, little-endian."""
        return DTYPES[self.dtype_name]

    def num_tokens(self, split: str = TRAIN) -> int:
        """Return the tokens of a split."""
        return sum(shard.num_tokens for shard in self.splits.get(split, ()))

    def num_documents(self, split: str = TRAIN) -> int:
        """Return the documents of a split."""
        return sum(shard.num_documents for shard in self.splits.get(split, ()))

    def to_json(self) -> dict[str, Any]:
        """Return the object of index.json."""
        reference = self.tokenizer
        return {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype_name,
            "vocab_size": self.vocab_size,
            "bos": self.bos,
            "eos": self.eos,
            "tokenizer": reference and {"fingerprint": reference.fingerprint, "folder": reference.folder},
            "splits": {name: [shard.to_json() for shard in shards] for name, shards in self.splits.items()},
            "source": dict(self.source),
            "skipped": dict(self.skipped),
            "settings": dict(self.settings),
        }

    def write(self, folder: Path) -> None:
        """Write index.json durably, by a rename: it is there whole or not at all."""
        new = folder / f".{INDEX_FILE}.new"
        with new.open("w", encoding="utf-8") as file:
            json.dump(self.to_json(), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(folder / INDEX_FILE)
        sync_folder(folder)

    @classmethod
    def read(cls, folder: Path) -> "ShardIndex":
        """Return the index of a directory; UserError where there is none, or one that is damaged."""
        file = folder / INDEX_FILE
        try:
            content = read_bytes(file, "listing")
        except MissingFile:
            raise UserError(
                f"{folder} holds no {INDEX_FILE}: it is no directory of token shards, or its task=prepare is "
                "not finished; the same command goes on with it"
            ) from None
        return cls.parse(content, str(file))

    @classmethod
    def parse(cls, content: bytes, where: str) -> "ShardIndex":
        """Return what an index.json says; UserError, which names it as `where`, for what cannot be."""
        try:
            found = parse_json(content, where, "listing")
        except BadFile as error:
            raise UserError(f"{where} is damaged: it {error.reason}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UserError(f"{where} is no index of token shards: its format is not {FORMAT!r}")
        if found.get("version") != VERSION:
            told = quoted(found.get("version"))
            raise UserError(f"{where} has the version {told}, and this dsv3 reads {VERSION}: use a newer one")
        try:
            return cls._of(found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            told = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where} is damaged: {told}") from None

    @classmethod
    def _of(cls, found: dict[str, Any]) -> "ShardIndex":
        if found["dtype"] not in DTYPES:
            raise ValueError(f"dtype={quoted(found['dtype'])}, must be {' or '.join(DTYPES)}")
        splits = {
            str(name): [_shard(entry) for entry in entries] for name, entries in found["splits"].items()
        }
        if TRAIN not in splits and HELD_OUT not in splits:
            raise ValueError(f"splits has neither {TRAIN} nor {HELD_OUT}")
        names = [
            name for shards in splits.values() for shard in shards for name in (shard.tokens, shard.offsets)
        ]
        if len(set(names)) < len(names):
            raise ValueError("a file is named twice")
        reference = found.get("tokenizer")
        if reference is not None:
            folder = reference.get("folder")
            reference = TokenizerReference(
                str(reference["fingerprint"]), None if folder is None else _inside(folder)
            )
        return cls(
            dtype_name=found["dtype"],
            splits=splits,
            vocab_size=_size_or_none(found, "vocab_size"),
            bos=_size_or_none(found, "bos"),
            eos=_size_or_none(found, "eos"),
            tokenizer=reference,
            source=dict(found.get("source") or {}),
            skipped=dict(found.get("skipped") or {}),
            settings=dict(found.get("settings") or {}),
        )


def _shard(entry: dict[str, Any]) -> Shard:
    """Return a shard of the index; KeyError, TypeError or ValueError where the entry is none."""
    counts = [entry["num_tokens"], entry["num_documents"]]
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"{quoted(entry['tokens'])}: num_tokens and num_documents must be whole numbers")
    digests = dict(entry.get("digests") or {})
    for name, value in digests.items():
        if name not in ("tokens", "offsets") or not isinstance(value, str) or not _DIGEST.fullmatch(value):
            raise ValueError(f"digests has {quoted(name)}: {quoted(value)}, must be 32 hexadecimal digits")
    return Shard(_inside(entry["tokens"]), _inside(entry["offsets"]), counts[0], counts[1], digests)


def _inside(name: Any) -> str:
    """Return the path of a file within the directory; ValueError for any other."""
    path = PurePosixPath(str(name))
    if not isinstance(name, str) or not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{quoted(name)} is no path within the directory")
    return name


def _size_or_none(found: dict[str, Any], key: str) -> int | None:
    """Return an id or the size of a vocabulary, None for null; ValueError for any other."""
    value = found.get(key)
    if value is not None and (type(value) is not int or not 0 <= value <= LARGEST_VOCABULARY):
        allowed = f"must be null or a whole number of at least 0 and at most {LARGEST_VOCABULARY:,}"
        raise ValueError(f"{key}={quoted(value)}, {allowed}")
    return value


def sync_folder(folder: Path) -> None:
    """Make renames and new files of a folder durable, on file systems that can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)
