"""The token file of `data=text` and `data=stdlib`: one memory-mapped array of ids, with document offsets."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dsv3.data.cache import CacheEntryError, load_or_build
from dsv3.data.tokenizer import Tokenizer, split_text
from dsv3.errors import UserError

FORMAT = 1  # part of the cache key: raise it when the same corpus is to be written differently

CHUNK_CHARACTERS = 1 << 20  # characters encoded at once: the tokenizer needs some 100 bytes per id


@dataclass(frozen=True)
class TokenFile:
    """The documents of one side: `tokens` [total], and `offsets` [documents + 1] at which each begins."""

    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        """Return the number of documents."""
        return len(self.offsets) - 1


def load_or_tokenize(target: Path, tokenizer: Tokenizer, texts: Iterable[str]) -> TokenFile:
    """Open the token file at `target`; where there is no sound one, encode `texts` to it first.

    Ids are stored as uint16 where they fit, else as uint32.
    """
    dtype = np.dtype("<u2") if tokenizer.size < 65536 else np.dtype("<u4")

    def build(directory: Path) -> None:
        write_token_file(directory, encode_documents(tokenizer, texts), dtype)

    return load_or_build(target, read_token_file, build)


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[str], chunk_characters: int = CHUNK_CHARACTERS
) -> Iterator[npt.NDArray[np.uint32]]:
    """Yield the ids of each text, begun by bos as the tokenizer says and ended by eos; skip empty documents.

    eos ends every document, also where add_eos_token is false: that key speaks of prompts, and a model learns
    from documents where to stop.

    Texts of more than `chunk_characters` characters are encoded in chunks, about four chunks at once: enough
    to keep every core busy, few enough for the memory.
    """
    before = np.array([i for i in (tokenizer.bos,) if i is not None and tokenizer.add_bos], np.uint32)
    after = np.array([i for i in (tokenizer.eos,) if i is not None], np.uint32)
    document = [before]
    chunks = (chunk for text in texts for chunk in split_text(text, chunk_characters))
    for batch in _batch_chunks(chunks, 4 * chunk_characters):
        encoded = tokenizer.encode_batch([text for text, _ in batch])
        for ids, (_, is_last) in zip(encoded, batch, strict=True):
            document.append(np.array(ids, np.uint32))
            if is_last:
                complete = np.concatenate([*document, after])
                document = [before]
                if len(complete):
                    yield complete


def write_token_file(
    directory: Path, documents: Iterable[npt.NDArray[np.uint32]], dtype: np.dtype[Any]
) -> None:
    """Write tokens.npy, offsets.npy and sizes.json into `directory`, one document at a time.

    Raises:
        UserError: there is not a single token.
    """

    def write_header(file: IO[bytes], length: int) -> int:
        """Write the .npy header of `length` tokens at the start of the file, and return its size in bytes."""
        file.seek(0)
        header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        return file.tell()

    ends = [0]
    with (directory / "tokens.npy").open("wb") as file:
        size = write_header(file, 0)
        for ids in documents:
            file.write(ids.astype(dtype).tobytes())
            ends.append(ends[-1] + len(ids))
        # numpy pads the header so that it has one size for every length of the first dimension.
        rewritten = write_header(file, ends[-1])
        assert rewritten == size
    if ends[-1] == 0:
        raise UserError("data: the tokenizer makes no token of these documents; give more text")
    np.save(directory / "offsets.npy", np.array(ends, np.int64))
    sizes = {name: (directory / name).stat().st_size for name in ("tokens.npy", "offsets.npy")}
    (directory / "sizes.json").write_text(json.dumps(sizes), "utf-8")


def read_token_file(directory: Path) -> TokenFile:
    """Memory-map the files that `write_token_file` wrote.

    Raises:
        CacheEntryError: they are missing or damaged.
    """
    try:
        sizes = json.loads((directory / "sizes.json").read_text("utf-8"))
        for name in ("tokens.npy", "offsets.npy"):
            if (directory / name).stat().st_size != sizes[name]:
                raise CacheEntryError(f"{directory / name} does not have the size it was written with")
        tokens = np.load(directory / "tokens.npy", mmap_mode="r", allow_pickle=False)
        offsets = np.load(directory / "offsets.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheEntryError(str(error)) from error
    if offsets[0] != 0 or offsets[-1] != len(tokens):
        raise CacheEntryError(f"the offsets in {directory} do not fit the tokens")
    return TokenFile(tokens, offsets)


def _batch_chunks(chunks: Iterable[tuple[str, bool]], limit: int) -> Iterator[list[tuple[str, bool]]]:
    """Group chunks into batches of slightly more than `limit` characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for chunk in chain(chunks, [None]):
        if chunk is not None:
            batch.append(chunk)
            size += len(chunk[0])
        if batch and (chunk is None or size > limit):
            yield batch
            batch, size = [], 0
