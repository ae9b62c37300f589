"""The files of a dataset of `datasets`, by which its data is known: names, sizes and digests or blobs."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from dsv3.metrics.progress import phase
from dsv3.tokens.data_record import Piece
from dsv3.untrusted_files import open_file

SAMPLED_BYTES, SAMPLE = 2 << 30, 1 << 20
"""Bytes of local files that enter the fingerprint, if they have more, and bytes of one stretch of them."""


def dataset_pieces(files: dict[str, list[str]], known: Any) -> Iterator[Piece]:
    """Yield the files of the splits, by names that do not tell where they lie.

    Args:
        files: URLs and paths by split.
        known: what the library knows of them, by split: DataFilesDict with `origin_metadata`.
    """
    here = [Path(file) for paths in files.values() for file in paths if Path(file).is_file()]
    total = sum(path.stat().st_size for path in here)
    share = min(1.0, SAMPLED_BYTES / total) if total else 1.0
    listed = _hub_listing(file for paths in files.values() for file in paths)
    for split, paths in files.items():
        folders = {str(Path(file).parent) for file in paths if Path(file).is_file()}
        root = os.path.commonpath(folders) if folders else ""
        tags = list(getattr(known.get(split), "origin_metadata", []))
        tags = tags if len(tags) == len(paths) else [None] * len(paths)
        with phase("looking at the files", len(paths), "files") as work:
            for file, tag in zip(paths, tags, strict=True):
                if Path(file).is_file():
                    size, digest = _sample(Path(file), share)
                    yield Piece(f"{split}: {os.path.relpath(file, root)}", size, digest)
                else:
                    size, digest = listed.get(file, (0, json.dumps(tag, default=str)))
                    yield Piece(f"{split}: {_without_commit(file)}", size, digest)
                work.advance()


def shard_file(shard: Any) -> str | None:
    """Return the file that a shard of a streamed dataset is read from; None where the library does not tell.

    The fields are private; datasets 5.2 has them.
    """
    arguments = getattr(getattr(shard, "_ex_iterable", None), "kwargs", None)
    if not isinstance(arguments, dict):
        return None
    for name in ("original_files", "base_files", "files"):
        files = arguments.get(name)
        if isinstance(files, list) and len(files) == 1 and isinstance(files[0], str):
            return files[0]
    return None


def _sample(path: Path, share: float) -> tuple[int, str]:
    """Return the size of a file, and a digest of `share` of its bytes, in stretches spread over all of it."""
    state, size = xxhash.xxh3_128(), path.stat().st_size
    stretches = max(1, math.ceil(size * share / SAMPLE))
    with open_file(path) as file:
        for number in range(stretches):
            file.seek(size * number // stretches)
            wanted = size * (number + 1) // stretches - file.tell()
            state.update(file.read(wanted if share == 1.0 else min(SAMPLE, wanted)))
    return size, state.hexdigest()


def _hub_listing(urls: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Return size and blob of the hub's files by URL: a commit that leaves the files alone changes no blob.

    The hub answers 1,000 files at a time. Where it does not list them, their commits must do.
    """
    listed: dict[str, tuple[int, str]] = {}
    parts = [url.partition("@") for url in urls if _is_hub(url)]
    for root in sorted({f"{name}@{rest.partition('/')[0]}" for name, _, rest in parts}):
        with contextlib.suppress(OSError, ValueError):
            from huggingface_hub import HfFileSystem

            found: Any = HfFileSystem().find(root, detail=True)
            for path, info in found.items():
                listed[f"hf://{path}"] = info["size"], str(info["blob_id"])
    return listed


def _is_hub(url: str) -> bool:
    return url.startswith("hf://") and "@" in url


def _without_commit(url: str) -> str:
    """Return the URL of a file of the hub without the commit, which is told as its tag."""
    begin, _, rest = url.partition("@")
    return f"{begin}/{rest.partition('/')[2]}" if _is_hub(url) else url
