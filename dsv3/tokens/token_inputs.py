"""Find and open token files of any kind: directories of token shards, Megatron's, litgpt's and flat ones.

What a path leads to is told by the files themselves. Each is opened once, by one process; the others get the
segments, which hold no open file (token_shards.py).
"""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import xxhash

from dsv3.errors import UserError, list_hint, repository_hint
from dsv3.metrics.progress import phase
from dsv3.tokens.data_record import Piece
from dsv3.tokens.file_array import FileArray
from dsv3.tokens.flat_tokens import is_litdata, open_flat, open_litdata
from dsv3.tokens.megatron_files import open_megatron
from dsv3.tokens.npy_file import NpyFile
from dsv3.tokens.remote_files import RemoteFolder, is_remote
from dsv3.tokens.shard_index import HELD_OUT, INDEX_FILE, TRAIN, Shard, ShardIndex
from dsv3.tokens.token_store import Segment, TokenStore
from dsv3.tokens.tokenizer_files import READABLE
from dsv3.untrusted_files import BadFile, open_file, read_bytes

HELD_OUT_WORDS = frozenset({"val", "valid", "validation", "dev", "test", "eval", "heldout"})
"""Words of a name, among those of others, that mark a file to score, not to train on."""

TOKENIZER_NAMES = (*READABLE, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
"""Files that a tokenizer is read from."""

THREADS = 16
"""Files that are opened at once: on a network file system it takes about a millisecond each."""

DIGESTED_WHOLE, SAMPLES, SAMPLE_BYTES = 1 << 22, 16, 1 << 14
"""Bytes of a file that are all digested; of a larger one so many samples of so many bytes."""

WANTED = (
    "give a directory that task=prepare wrote, Megatron's PREFIX.bin and .idx, a flat .bin, a 1-D .npy, or a "
    "folder of them; rows of ids [rows, width] are read by data=tokens"
)

Out = TypeVar("Out")
In = TypeVar("In")


class TokenizerPlace(NamedTuple):
    """The directory of shards that a tokenizer made, and the folder of the tokenizer where it is there."""

    shards: str
    folder: Path | None


@dataclass
class TokenFiles:
    """Files of ids, opened.

    Attributes:
        train: segments to train on.
        held_out: segments to score, none where the files do not say.
        pieces: what the files are, for the record of a run's data.
        layout: what decides how rows are cut.
        tokenizers: by fingerprint where it is, for each that shards were made with.
        vocab_size: the largest that a directory of shards tells; None where none does.
        kinds: what each file is, for people.
        digests: by file the XXH128 of its content, where an index tells it.
    """

    train: list[Segment] = field(default_factory=list)
    held_out: list[Segment] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    layout: list[object] = field(default_factory=list)
    tokenizers: dict[str, TokenizerPlace] = field(default_factory=dict)
    vocab_size: int | None = None
    kinds: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, other: "TokenFiles") -> None:
        """Add other files behind these."""
        for name in ("train", "held_out", "pieces", "layout", "kinds"):
            getattr(self, name).extend(getattr(other, name))
        self.tokenizers = other.tokenizers | self.tokenizers
        self.digests |= other.digests
        if other.vocab_size is not None:
            self.vocab_size = max(self.vocab_size or 0, other.vocab_size)

    def describe(self, shard: Shard, index: ShardIndex, name: str, digest: str, split: str) -> None:
        """Note what a shard is."""
        size = shard.num_tokens * index.dtype.itemsize
        self.pieces.append(Piece(name, size, digest, shard.num_documents, shard.num_tokens))
        self.kinds.append("of token shards")
        if split == TRAIN:
            self.layout.append((shard.num_tokens, shard.digests.get("offsets", digest)))


def open_token_files(path: str, key: str, dtype: str | None, only_held_out: bool = False) -> TokenFiles:
    """Open what lies at `path`.

    Args:
        key: the config key of the path, for messages.
        dtype: that of flat files without a header, as in the data's config.
        only_held_out: leave the training side of a directory closed that has a held-out side.

    Raises:
        UserError: nothing is there, or a file is damaged, cut off, or does not fit the others.
    """
    places = list(_find(path, key))
    root = Path(os.path.commonpath([place.parent for place in places]))
    marked = [bool(HELD_OUT_WORDS & set(_words(place.relative_to(root)))) for place in places]
    is_held_out = marked if not all(marked) else [False] * len(places)
    found = TokenFiles()

    def open_one(entry: tuple[Path, bool]) -> TokenFiles:
        place, scored = entry
        opened = _open(place, root, dtype, only_held_out)
        if scored:
            opened.held_out, opened.train, opened.layout = [*opened.train, *opened.held_out], [], []
        work.advance()
        return opened

    with phase(f"opening the files of {key}", len(places), "files", each_node=True) as work:
        for opened in _in_threads(open_one, list(zip(places, is_held_out, strict=True))):
            found.add(opened)
    _require_one_dtype([*found.train, *found.held_out])
    if not has_tokens(found.train) and not has_tokens(found.held_out):
        raise UserError(f"{key}={path} holds no ids: {WANTED}")
    return found


def has_tokens(segments: Iterable[Segment]) -> bool:
    """Return True where opened segments hold a token."""
    return any(s.bounds is not None and s.bounds[0] < s.bounds[1] for s in segments)


def open_remote_shards(url: str, cache_dir: str | None, cache_bytes: int) -> TokenFiles:
    """Return what the index.json at a URL tells; no shard is opened before its first token is read.

    Raises:
        UserError: there is no index of token shards, or it cannot be read.
    """
    folder, found = RemoteFolder(url, cache_dir, cache_bytes), TokenFiles()
    described = ShardIndex.parse(read_bytes(folder.fetch(INDEX_FILE), "listing"), f"{url}/{INDEX_FILE}")
    if (reference := described.tokenizer) is not None:
        own = reference.folder
        local = None if own is None else TokenizerPlace(url, folder.fetch_folder(own, TOKENIZER_NAMES))
        found.tokenizers[reference.fingerprint] = local or TokenizerPlace(url, None)
    found.vocab_size = described.vocab_size
    for split in (TRAIN, HELD_OUT):
        for shard in described.splits.get(split, ()):
            bounds, version = (0, shard.num_tokens), shard.digests.get
            tokens = folder.array(shard.tokens, described.dtype, shard.num_tokens, version("tokens"))
            offsets = folder.array(
                shard.offsets, np.int64, shard.num_documents + 1, version("offsets"), ends=bounds
            )
            side = found.held_out if split == HELD_OUT else found.train
            name = f"{folder.url}/{shard.tokens}"
            size = described.vocab_size
            side.append(
                Segment(tokens, offsets, 0, shard.num_documents, name, bounds=bounds, vocab_size=size)
            )
            digest = version("tokens") or folder.version(shard.tokens)
            found.describe(shard, described, shard.tokens, digest, split)
    return found


def is_there(path: str) -> bool:
    """Return True where a path of token files leads to something: also a pattern, a prefix or a URL."""
    if is_remote(path):
        return True
    place = Path(path).expanduser()
    return place.exists() or Path(f"{place}.idx").exists() or (glob.has_magic(path) and bool(_matches(place)))


def _find(path: str, key: str) -> Iterator[Path]:
    """Yield the files that a path leads to: flat ones, .idx of Megatron's, index.json of directories."""
    place = Path(path).expanduser()
    found: Iterable[Path] = [place]
    if not place.exists():
        if Path(f"{place}.idx").is_file():
            found = [Path(f"{place}.idx")]
        elif not (glob.has_magic(path) and (found := _matches(place))):
            raise UserError(f"{key}={path} does not exist: {WANTED}{repository_hint(path)}{list_hint(path)}")
    seen = False
    for one in found:
        for file in _below(one) if one.is_dir() else [_index_of(one)]:
            seen = True
            yield file.absolute()
    if not seen:
        raise UserError(f"{key}={path} holds no .bin, .idx or .npy file and no {INDEX_FILE}: {WANTED}")


def _matches(pattern: Path) -> list[Path]:
    """Return what a pattern matches, each dataset of Megatron's once."""
    found = sorted(map(Path, glob.glob(str(pattern), recursive=True)))  # noqa: PTH207  # an absolute pattern
    return [one for one in found if one.suffix != ".bin" or not one.with_suffix(".idx").is_file()]


def _index_of(file: Path) -> Path:
    """Return the .idx beside a .bin of Megatron's, any other file as it is."""
    index = file.with_suffix(".idx")
    return index if file.suffix == ".bin" and index.is_file() else file


def _below(folder: Path) -> Iterator[Path]:
    """Yield the files of ids in a folder in the order of their names; one with an index.json is one."""
    if (folder / INDEX_FILE).is_file():
        yield folder / INDEX_FILE
        return
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    names = {entry.name for entry in entries}
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.name.endswith((".tokens.npy", ".offsets.npy")):
            raise UserError(
                f"{folder} holds token shards without their {INDEX_FILE}, which is written last: they are "
                "not whole; the same task=prepare goes on with them"
            )
        if entry.is_dir():
            yield from _below(entry)
        elif entry.suffix in (".npy", ".idx") or (
            entry.suffix == ".bin" and f"{entry.stem}.idx" not in names
        ):
            yield entry


def _words(name: Path) -> list[str]:
    """Return the words of a relative path; of index.json those of its folder."""
    text = name.parent if name.name == INDEX_FILE else name.with_suffix("")
    return [word for word in re.split(r"[^a-z]+", str(text).lower()) if word]


def _open(place: Path, root: Path, dtype: str | None, only_held_out: bool) -> TokenFiles:
    """Open one file, or the directory of an index.json."""
    if place.name == INDEX_FILE:
        content = read_bytes(place, "listing")
        foreign = is_litdata(content)
        if foreign is None:
            return _open_shards(place, ShardIndex.parse(content, str(place)), root, only_held_out)
        segments, kind = open_litdata(place.parent, foreign), "of litdata"
    elif place.suffix == ".idx":
        segments, kind = [open_megatron(place)], "of Megatron-LM"
    else:
        segments = [open_flat(place, dtype)]
        kind = f"flat, {_array(segments[0]).dtype.name}"
    pieces = [_piece(segment, root) for segment in segments]
    layout: list[object] = [(piece.tokens, piece.documents) for piece in pieces]
    return TokenFiles(segments, [], pieces, layout, kinds=[kind] * len(pieces))


def _open_shards(index: Path, described: ShardIndex, root: Path, only_held_out: bool) -> TokenFiles:
    """Open a directory of token shards."""
    folder, found = index.parent, TokenFiles(vocab_size=described.vocab_size)
    if (reference := described.tokenizer) is not None:
        own = None if reference.folder is None else folder / reference.folder
        found.tokenizers[reference.fingerprint] = TokenizerPlace(str(folder), own)
    has_held_out = bool(described.num_tokens(HELD_OUT))
    for split in (TRAIN, HELD_OUT):
        shards = described.splits.get(split, [])
        if not (only_held_out and has_held_out and split == TRAIN):
            opened = list(_in_threads(lambda shard: open_shard(folder, described, shard), shards))
            (found.held_out if split == HELD_OUT else found.train).extend(opened)
        for shard in shards:
            digest = shard.digests.get("tokens") or _digest(folder / shard.tokens)
            found.describe(shard, described, os.path.relpath(folder / shard.tokens, root), digest, split)
            found.digests |= {str(folder / getattr(shard, kind)): d for kind, d in shard.digests.items()}
    return found


def open_shard(folder: Path, index: ShardIndex, shard: Shard) -> Segment:
    """Return the documents of a shard, both files checked by their headers and sizes.

    Raises:
        UserError: a file is not what the index says.
    """
    told = f"{folder / INDEX_FILE} tells of"
    tokens = NpyFile.read(folder / shard.tokens, f"{told} ids of {index.dtype.name} [{shard.num_tokens}]")
    if (tokens.dtype, tokens.shape) != (index.dtype, (shard.num_tokens,)):
        raise UserError(
            f"{tokens.path} holds {tokens.dtype.name} {list(tokens.shape)}, {told} {index.dtype.name} "
            f"[{shard.num_tokens}]"
        )
    documents = shard.num_documents
    offsets = NpyFile.read(folder / shard.offsets, f"{told} offsets of int64 [{documents + 1}]")
    if (offsets.dtype, offsets.shape) != (np.dtype(np.int64), (documents + 1,)):
        raise UserError(
            f"{offsets.path} holds {offsets.dtype.name} {list(offsets.shape)}, {told} offsets of int64 "
            f"[{documents + 1}]"
        )
    ends = [int(offsets.array[at : at + 1][0]) for at in (0, documents)]
    if ends != [0, shard.num_tokens]:
        raise UserError(
            f"{offsets.path} spans the tokens {ends[0]} to {ends[1]}, {told} 0 to {shard.num_tokens}"
        )
    bounds = (0, shard.num_tokens)
    size = index.vocab_size
    return Segment(tokens.array, offsets.array, 0, documents, tokens.path, bounds=bounds, vocab_size=size)


def _array(segment: Segment) -> FileArray:
    """Return the ids of a segment of a file on this machine."""
    assert isinstance(segment.tokens, FileArray)
    return segment.tokens


def _in_threads(work: Callable[[In], Out], entries: Sequence[In]) -> Iterator[Out]:
    """Yield `work` of each entry, in their order, done by THREADS threads where there are many."""
    if len(entries) < THREADS:
        yield from map(work, entries)
        return
    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(work, entries)


def _require_one_dtype(segments: Sequence[Segment]) -> None:
    """Raise UserError where files hold ids of several dtypes: they come from several tokenizers."""
    first: FileArray | None = None
    for segment in segments:
        array = _array(segment)
        first = first or array
        if array.dtype != first.dtype:
            raise UserError(
                f"{first.path} holds {first.dtype.name} and {array.path} {array.dtype.name}: the files of "
                "one data.path must have one dtype, or they are of several tokenizers; write one anew"
            )


def _piece(segment: Segment, root: Path) -> Piece:
    """Return what a file is, for the record of a run's data."""
    array = _array(segment)
    assert segment.bounds is not None
    tokens = segment.bounds[1] - segment.bounds[0]
    index = getattr(segment.offsets, "path", array.path)
    parts = {path: _digest(Path(path)) for path in (array.path, index)}
    digest = xxhash.xxh3_128_hexdigest(f"{array.dtype.str} {array.begin} {' '.join(parts.values())}".encode())
    name = os.path.relpath(array.path, root)
    return Piece(name, len(array) * array.dtype.itemsize, digest, segment.num_documents, tokens)


def _digest(path: Path) -> str:
    """Return the XXH128 of a file's size and content; of a large file of samples from all over it."""
    state = xxhash.xxh3_128()
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            state.update(f"{size} ".encode())
            if size <= DIGESTED_WHOLE:
                samples = [(0, size)]
            else:
                samples = [((size - SAMPLE_BYTES) * n // (SAMPLES - 1), SAMPLE_BYTES) for n in range(SAMPLES)]
            for begin, count in samples:
                file.seek(begin)
                state.update(file.read(count))
    except BadFile:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return state.hexdigest()


def open_side(folder: Path, split: str = TRAIN) -> TokenStore:
    """Return a side of a directory of token shards.

    Raises:
        UserError: it has no such side, or a file is not what the index says.
    """
    index = ShardIndex.read(folder)
    if split not in index.splits:
        raise UserError(f"{folder} has no side {split}")
    return TokenStore(open_shard(folder, index, shard) for shard in index.splits[split])
