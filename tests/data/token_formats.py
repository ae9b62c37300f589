"""Writers of every kind of token file, each by the public description of its format, with struct alone."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from dsv3.tokens.shard_index import Shard, ShardIndex, TokenizerReference

Documents = Sequence[Sequence[int]]

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def join(documents: Documents, dtype: str) -> bytes:
    return np.array([i for ids in documents for i in ids], dtype).tobytes()


def megatron(prefix: Path, documents: Documents, dtype: str = "uint16", sequences: int = 1) -> Path:
    """Write PREFIX.bin and PREFIX.idx; each document is cut into so many sequences."""
    parts = [ids[len(ids) * n // sequences : len(ids) * (n + 1) // sequences] for ids in documents
             for n in range(sequences)]  # fmt: skip
    sizes = [len(part) for part in parts]
    width = np.dtype(dtype).itemsize
    pointers = [sum(sizes[:n]) * width for n in range(len(sizes))]
    firsts = [sequences * n for n in range(len(documents) + 1)]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sizes), len(firsts))
    index += struct.pack(f"<{len(sizes)}i{len(sizes)}q{len(firsts)}q", *sizes, *pointers, *firsts)
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(join(documents, dtype))
    return prefix.with_suffix(".bin")


def old_megatron(prefix: Path, documents: Documents, dtype: str = "int32") -> Path:
    """Write the files of Megatron's older IndexedDatasetBuilder, a document per sequence."""
    sizes, count = [len(ids) for ids in documents], len(documents)
    ends = [sum(sizes[:n]) for n in range(count + 1)]
    index = b"TNTIDX\x00\x00" + struct.pack("<QQQ", 1, CODES[dtype], np.dtype(dtype).itemsize)
    index += struct.pack("<QQQ", count, count, count + 1)
    numbers = [*range(count + 1), *ends, *sizes, *range(count + 1)]
    prefix.with_suffix(".idx").write_bytes(index + struct.pack(f"<{len(numbers)}q", *numbers))
    prefix.with_suffix(".bin").write_bytes(join(documents, dtype))
    return prefix.with_suffix(".idx")


def raw(prefix: Path, documents: Documents, dtype: str = "uint16") -> Path:
    """Write nanoGPT's train.bin: numpy's tofile."""
    np.array([i for ids in documents for i in ids], dtype).tofile(prefix.with_suffix(".bin"))
    return prefix.with_suffix(".bin")


def llm_c(prefix: Path, documents: Documents, dtype: str = "uint16") -> Path:
    """Write llm.c's shard of FineWeb: a header of 256 int32."""
    header = np.zeros(256, np.int32)
    header[:3] = {"uint16": 20240520, "uint32": 20240801}[dtype], {"uint16": 1, "uint32": 7}[dtype], 0
    header[2] = sum(map(len, documents))
    prefix.with_suffix(".bin").write_bytes(header.tobytes() + join(documents, dtype))
    return prefix.with_suffix(".bin")


def lit_packed(prefix: Path, documents: Documents, dtype: str = "uint16") -> Path:
    """Write a chunk of Lit-GPT's PackedDatasetBuilder."""
    head = b"LITPKDS" + struct.pack("<QBQ", 1, CODES[dtype], sum(map(len, documents)))
    prefix.with_suffix(".bin").write_bytes(head + join(documents, dtype))
    return prefix.with_suffix(".bin")


def npy(prefix: Path, documents: Documents, dtype: str = "uint16") -> Path:
    np.save(prefix.with_suffix(".npy"), np.array([i for ids in documents for i in ids], dtype))
    return prefix.with_suffix(".npy")


def litdata(prefix: Path, documents: Documents, dtype: str = "int32") -> Path:
    """Write the chunks of litdata.optimize with TokensLoader, two documents each."""
    prefix.mkdir()
    chunks, width = [], np.dtype(dtype).itemsize
    for number in range(0, len(documents), 2):
        part = documents[number : number + 2]
        begins = [4 * (len(part) + 2) + width * sum(map(len, part[:n])) for n in range(len(part) + 1)]
        name = f"chunk-0-{number // 2}.bin"
        content = struct.pack(f"<I{len(begins)}I", len(part), *begins) + join(part, dtype)
        (prefix / name).write_bytes(content)
        dim = sum(map(len, part))
        chunks.append({"chunk_bytes": dim * width, "chunk_size": len(part), "dim": dim, "filename": name})
    form = {"int32": "no_header_tensor:16", "uint16": "no_header_numpy:5"}[dtype]
    config = {"compression": None, "chunk_size": None, "chunk_bytes": 1 << 26, "data_format": [form]}
    (prefix / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
    return prefix


def shards(
    prefix: Path,
    documents: Documents,
    held_out: Documents = (),
    files: int = 1,
    dtype: str = "uint16",
    tokenizer: TokenizerReference | None = None,
    vocab_size: int | None = None,
) -> Path:
    """Write a directory of token shards, so many for the training side, as docs/data.md describes them."""
    prefix.mkdir()
    splits: dict[str, list[Shard]] = {}
    for split, texts, count in (("train", documents, files), ("held_out", held_out, 1)):
        for number in range(count):
            part = texts[len(texts) * number // count : len(texts) * (number + 1) // count]
            names = [f"{split}-{number:05}.{kind}.npy" for kind in ("tokens", "offsets")]
            np.save(prefix / names[0], np.array([i for ids in part for i in ids], dtype))
            np.save(prefix / names[1], np.cumsum([0, *map(len, part)]))
            shard = Shard(names[0], names[1], sum(map(len, part)), len(part))
            splits.setdefault(split, []).append(shard)
    if not held_out:
        del splits["held_out"]
    ShardIndex(dtype, splits, vocab_size, tokenizer=tokenizer).write(prefix)
    return prefix


INDEXED: dict[str, Callable[[Path, Documents], Path]] = {
    "megatron": megatron,
    "old megatron": old_megatron,
    "litdata": litdata,
    "shards": shards,
}
"""Writers of the kinds that say where documents begin; each returns what data.path is."""

FLAT: dict[str, Callable[[Path, Documents], Path]] = {
    "raw": raw,
    "llm.c": llm_c,
    "lit-gpt": lit_packed,
    "npy": npy,
}
"""Writers of the kinds that do not."""


def with_digests(shards: Path) -> Path:
    """Write the digests of all files into the index of token shards, as task=prepare does."""
    found = ShardIndex.read(shards).to_json()
    for entries in found["splits"].values():
        for entry in entries:
            entry["digests"] = {
                kind: xxhash.xxh3_128_hexdigest((shards / entry[kind]).read_bytes())
                for kind in ("tokens", "offsets")
            }
    (shards / "index.json").write_text(json.dumps(found))
    return shards
