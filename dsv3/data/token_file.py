"""Documents as one flat, memory-mapped array of ids with the offset of each."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv3.data.cache import StaleError, cached
from dsv3.data.tokenizer import Tokenizer, pieces
from dsv3.errors import UserError

FORMAT = 1  # part of the cache key: raise it when the same corpus is to be written differently

PIECE = 1 << 20  # characters encoded at once: the tokenizer needs some 100 bytes for each id

HEADER = 128  # bytes of an .npy header


@dataclass(frozen=True)
class TokenFile:
    """The documents of one side: `tokens` [total] and `offsets` [documents + 1] where each begins."""

    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1


def cached_tokens(target: Path, tokenizer: Tokenizer, texts: Iterable[str]) -> TokenFile:
    """Open the token file at `target`; where there is no sound one, `texts` is encoded to it first."""
    dtype = np.dtype("<u2") if tokenizer.size < 65536 else np.dtype("<u4")

    def build(directory: Path) -> None:
        write_tokens(directory, encode_documents(tokenizer, texts), dtype)

    return cached(target, read_tokens, build)


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[str], piece: int = PIECE
) -> Iterator[npt.NDArray[np.uint32]]:
    """The ids of each text with bos before and eos behind, where the tokenizer has them; none is empty.

    Texts of more than `piece` characters are encoded piecewise, some four pieces at once: enough to
    keep every core busy, little enough for the memory.
    """
    before = np.array([i for i in (tokenizer.bos,) if i is not None], np.uint32)
    after = np.array([i for i in (tokenizer.eos,) if i is not None], np.uint32)
    document = [before]
    for group in _groups((part for text in texts for part in pieces(text, piece)), 4 * piece):
        encoded = tokenizer.encode_batch([part for part, _ in group])
        for ids, (_, last) in zip(encoded, group, strict=True):
            document.append(np.array(ids, np.uint32))
            if last:
                whole = np.concatenate([*document, after])
                document = [before]
                if len(whole):
                    yield whole


def write_tokens(directory: Path, documents: Iterable[npt.NDArray[np.uint32]], dtype: np.dtype[Any]) -> None:
    """Write tokens.npy, offsets.npy and sizes.json into `directory`, one document at a time.

    Raises:
        UserError: there is not a single token.
    """
    ends = [0]
    with (directory / "tokens.npy").open("wb") as file:
        file.write(_header(dtype, 0))
        for ids in documents:
            file.write(ids.astype(dtype).tobytes())
            ends.append(ends[-1] + len(ids))
        file.seek(0)
        file.write(_header(dtype, ends[-1]))
    if ends[-1] == 0:
        raise UserError("data: the tokenizer makes no token of these documents; give more text")
    np.save(directory / "offsets.npy", np.array(ends, np.int64))
    sizes = {name: (directory / name).stat().st_size for name in ("tokens.npy", "offsets.npy")}
    (directory / "sizes.json").write_text(json.dumps(sizes), "utf-8")


def read_tokens(directory: Path) -> TokenFile:
    """Map the files that `write_tokens` wrote.

    Raises:
        StaleError: they are missing or damaged.
    """
    try:
        sizes = json.loads((directory / "sizes.json").read_text("utf-8"))
        for name in ("tokens.npy", "offsets.npy"):
            if (directory / name).stat().st_size != sizes[name]:
                raise StaleError(f"{directory / name} has not the size it was written with")
        tokens = np.load(directory / "tokens.npy", mmap_mode="r", allow_pickle=False)
        offsets = np.load(directory / "offsets.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StaleError(str(error)) from error
    if offsets[0] != 0 or offsets[-1] != len(tokens):
        raise StaleError(f"the offsets in {directory} do not fit the tokens")
    return TokenFile(tokens, offsets)


def _header(dtype: np.dtype[Any], length: int) -> bytes:
    """An .npy header (format 1.0) of HEADER bytes for any length, so that it can be filled in at the end."""
    described = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
    magic = b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little")
    return magic + described.ljust(HEADER - 11).encode() + b"\n"


def _groups(items: Iterable[tuple[str, bool]], limit: int) -> Iterator[list[tuple[str, bool]]]:
    """Gather pieces to groups of somewhat more than `limit` characters."""
    group: list[tuple[str, bool]] = []
    size = 0
    for item in chain(items, [None]):
        if item is not None:
            group.append(item)
            size += len(item[0])
        if group and (item is None or size > limit):
            yield group
            group, size = [], 0
