"""Flat files of ids: raw ones (nanoGPT), those of llm.c and of Lit-GPT with their headers, and 1-D .npy.

    raw       ids alone; nothing says which dtype they have, `data.dtype` does
    llm.c     256 int32: a magic number, a version, the number of ids; then uint16 or uint32
    LITPKDS   7 bytes of magic, version 1 (u64), dtype code (u8) as Megatron's, ids per file (u64)
    litdata   a folder with index.json of chunks: the number of items (u32), where each begins and the last
              one ends in bytes (u32), then their ids; an item is a document

All numbers are little-endian. Sources: dev/data/data_common.py of llm.c; packed_dataset.py of Lit-GPT,
TinyLlama and their like; streaming/writer.py and TokensLoader of litdata, which litgpt writes today.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.errors import UserError, quoted
from dsv3.tokens.file_array import FileArray, read_head
from dsv3.tokens.megatron_files import DTYPES
from dsv3.tokens.npy_file import NpyFile
from dsv3.tokens.shard_index import INDEX_FILE
from dsv3.tokens.shuffle import Ids
from dsv3.tokens.token_store import Segment
from dsv3.untrusted_files import parse_json

LLM_C: dict[int, np.dtype[Any]] = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
"""Dtypes by magic number: of GPT-2's ids and of Llama 3's."""

LLM_C_BYTES = 1024

LITPKDS, LITPKDS_BYTES = b"LITPKDS", 24

LITDATA_DTYPES = {11: "u1", 12: "i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8"}
"""Dtypes by litdata's number of a PyTorch dtype; NumPy's are below."""

LITDATA_NUMPY_DTYPES = {0: "i1", 1: "<i2", 2: "<i4", 3: "<i8", 4: "u1", 5: "<u2", 6: "<u4", 7: "<u8"}

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "a zip archive", b"BZh": "bzip2"}

_SAMPLE = 4096
"""Bytes of a raw file that are looked at to tell the width of its ids."""

WANTED = "a .npy file of whole numbers in one dimension is needed; rows of ids in two are read by data=tokens"


def open_flat(path: Path, dtype: str | None) -> Segment:
    """Return the ids of a file as one document.

    Args:
        dtype: that of a file without a header; None where the user did not say.

    Raises:
        UserError: the file is empty, cut off, compressed or damaged, or does not say its dtype.
    """
    head, size = read_head(path, _SAMPLE)
    if path.suffix == ".npy" or head.startswith(np.lib.format.MAGIC_PREFIX):
        found = NpyFile.read(path, WANTED)
        if len(found.shape) != 1:
            raise UserError(f"{path} holds {found.dtype.name} {list(found.shape)}: {WANTED}")
        return _whole(found.array)
    if not size:
        raise UserError(f"{path} is empty: it holds no ids")
    if head.startswith(LITPKDS):
        return _whole(_lit_packed(path, head, size))
    magic = struct.unpack_from("<i", head)[0] if size >= 4 else 0
    if magic in LLM_C:
        return _whole(_llm_c(path, head, size, LLM_C[magic]))
    for begin, kind in _COMPRESSED.items():
        if dtype is None and head.startswith(begin):
            raise UserError(f"{path} is compressed ({kind}): ids are read in place, unpack it first")
    return _whole(_raw(path, head, size, dtype))


def _whole(tokens: FileArray) -> Segment:
    """Return the ids of a file that does not say where documents begin."""
    if not len(tokens):
        raise UserError(f"{tokens.path} holds no ids")
    bounds = (0, len(tokens))
    return Segment(tokens, np.array(bounds), 0, 1, tokens.path, divisible=True, bounds=bounds)


def _raw(path: Path, head: bytes, size: int, dtype: str | None) -> FileArray:
    """Return the ids of a file without a header."""
    words = np.frombuffer(head[: len(head) // 4 * 4], "<u2")
    # Ids below 65,536 that take 4 bytes have an upper half of zeros; ids of 2 bytes are hardly so regular.
    is_wide = len(words) >= 32 and not words[1::2].any() and bool(words[::2].any())
    guess = "uint32" if is_wide else "uint16"
    if dtype is None:
        raise UserError(
            f"{path} has no header: say of which dtype its ids are, data.dtype=uint16 or uint32 "
            f"(its first bytes look like {guess})"
        )
    kind = np.dtype(dtype).newbyteorder("<")
    if kind.itemsize == 2 and is_wide:
        raise UserError(f"{path}: every other id would be 0 with data.dtype={dtype}: use data.dtype=uint32")
    if size % kind.itemsize:
        raise UserError(
            f"{path} has {size:,} bytes, no multiple of the {kind.itemsize} of data.dtype={dtype}: "
            "it is cut off or of another dtype"
        )
    return FileArray(str(path), kind, 0, size // kind.itemsize)


def _llm_c(path: Path, head: bytes, size: int, dtype: np.dtype[Any]) -> FileArray:
    """Return the ids behind llm.c's header."""
    if size < LLM_C_BYTES:
        raise UserError(f"{path} is cut off: llm.c's header has {LLM_C_BYTES} bytes, it has {size}")
    count = struct.unpack_from("<i", head, 8)[0]
    _fits(path, "llm.c", LLM_C_BYTES, count, dtype, size)
    return FileArray(str(path), dtype, LLM_C_BYTES, count)


def _lit_packed(path: Path, head: bytes, size: int) -> FileArray:
    """Return the ids behind Lit-GPT's header."""
    if size < LITPKDS_BYTES:
        raise UserError(f"{path} is cut off: its header has {LITPKDS_BYTES} bytes, it has {size}")
    version, code, count = struct.unpack_from("<QBQ", head, len(LITPKDS))
    if version != 1 or code not in DTYPES:
        raise UserError(f"{path} has the version {version} and the dtype code {code}: ids have version 1 and "
                        f"one of {sorted(DTYPES)}")  # fmt: skip
    dtype = np.dtype(DTYPES[code])
    _fits(path, "its", LITPKDS_BYTES, count, dtype, size)
    return FileArray(str(path), dtype, LITPKDS_BYTES, count)


def _fits(path: Path, whose: str, begin: int, count: int, dtype: np.dtype[Any], size: int) -> None:
    needed = begin + count * dtype.itemsize
    if count < 0 or size != needed:
        raise UserError(
            f"{path} has {size:,} bytes, and by {whose} header {count:,} ids of {dtype.name} end at byte "
            f"{needed:,}: it is cut off or damaged"
        )


@dataclass(frozen=True)
class ItemOffsets:
    """The offsets [items + 1], in ids, that a chunk of litdata's has in bytes from the start of the file."""

    places: FileArray
    begin: int
    itemsize: int

    @property
    def path(self) -> str:
        """Return the file, as messages name it."""
        return self.places.path

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, part: slice) -> Ids:
        """Return the offsets of a slice; UserError where one lies within an id."""
        places = self.places[part].astype(np.int64) - self.begin
        if (places % self.itemsize).any():
            first = part.indices(len(self))[0] + int(np.argmax(places % self.itemsize != 0))
            raise UserError(f"{self.path} is damaged: item {first} begins within an id")
        return places // self.itemsize


def open_litdata(folder: Path, index: dict[str, Any]) -> list[Segment]:
    """Return the documents of the chunks that litdata's index.json names.

    Raises:
        UserError: the chunks hold other than ids, or are compressed, encrypted, cut off or damaged.
    """
    where = folder / "index.json"
    try:
        config, chunks = index["config"], index["chunks"]
        (form,) = config["data_format"]
        packed = next((key for key in ("compression", "encryption") if config.get(key)), None)
        kind, _, number = form.partition(":")
        codes = {"no_header_tensor": LITDATA_DTYPES, "no_header_numpy": LITDATA_NUMPY_DTYPES}[kind]
        dtype = np.dtype(codes[int(number)])
        files = [(str(chunk["filename"]), int(chunk["chunk_size"]), chunk["dim"]) for chunk in chunks]
        if any("/" in name or items < 1 for name, items, _ in files):
            raise ValueError(f"a chunk is {quoted(files[0])}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where} is an index of litdata's, but of no ids or damaged ({quoted(str(error))}): tokens are "
            "written by litgpt, or by litdata.optimize with TokensLoader"
        ) from error
    if packed:
        raise UserError(f"{where}: its chunks have {packed}={quoted(config[packed])}: ids are read in place, "
                        "write them without")  # fmt: skip
    return [_chunk(folder / name, items, dim, dtype) for name, items, dim in files]


def _chunk(path: Path, items: int, dim: Any, dtype: np.dtype[Any]) -> Segment:
    """Return the documents of a chunk of `items` documents and `dim` ids."""
    head, size = read_head(path, 4)
    begin = 4 * (items + 2)
    count, rest = divmod(size - begin, dtype.itemsize)
    told = struct.unpack("<I", head)[0] if len(head) == 4 else None
    if size < begin or rest or told != items or count != dim:
        raise UserError(
            f"{path} is cut off or damaged: index.json tells of {items} items and {quoted(dim)} ids of "
            f"{dtype.name}, it has {quoted(told)} and {max(count, 0):,}"
        )
    places = ItemOffsets(FileArray(str(path), np.dtype("<u4"), 4, items + 1), begin, dtype.itemsize)
    ends = (int(places[:1][0]), int(places[items:][0]))
    if ends != (0, count):
        raise UserError(f"{path} is damaged: its items span the ids {ends[0]} to {ends[1]}, of 0 to {count}")
    return Segment(FileArray(str(path), dtype, begin, count), places, 0, items, str(path), bounds=(0, count))


def is_litdata(content: bytes) -> dict[str, Any] | None:
    """Return the object of an index.json where it is litdata's; None where it is not."""
    try:
        found = parse_json(content, INDEX_FILE, "listing")
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"chunks", "config"} <= found.keys() else None
