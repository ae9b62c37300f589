"""The data source `data=shards`: documents of ids in files, packed into rows of train.sequence_length."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.config.data import IdType, Verify
from dsv3.data.rows import RowOptions, held_out_rows, training_rows
from dsv3.data.sources import PreparedData
from dsv3.errors import UserError
from dsv3.metrics.progress import amount, phase
from dsv3.tokens.background_check import BACKGROUND, DigestedFile, check_at_start
from dsv3.tokens.cache import CacheEntryError
from dsv3.tokens.data_record import DataRecord, layout_digest
from dsv3.tokens.document_index import with_documents
from dsv3.tokens.file_array import FileArray, find_missing
from dsv3.tokens.remote_files import is_remote
from dsv3.tokens.token_inputs import (
    TokenFiles,
    has_tokens,
    open_remote_shards,
    open_token_files,
)
from dsv3.tokens.token_store import Segment, TokenStore
from dsv3.tokens.tokenizer import Tokenizer, TokenizerSource, TrainedTokenizer

CHECKED_TOKENS = 1 << 25
"""Tokens, and documents, that each rank looks at when a run starts; all are looked at when they are read."""

NAMED = 3
"""Files of the held-out side that are named."""

AT_START = 1 << 28
"""Bytes of files with digests that each rank compares when a run starts; the rest of its share it compares
while the run goes on."""

_INDEX = "its index.json"

_REMEDY = "it is damaged or of other shards; copy it anew, or write its digest into index.json"


class ShardsRecipe(NamedTuple):
    """Let a process read what another one has opened: no file is opened again."""

    train: Sequence[Segment]
    held_out: Sequence[Segment]
    fingerprint: str
    tokenizer: tuple[str, Path] | None
    """Fingerprint and folder of the shards' own tokenizer, where it is used."""
    vocab_size: int | None
    marks_held_out: bool
    """The files say what is held out."""
    digests: dict[str, str]
    """XXH128 by file, of the files that are read."""
    mark: tuple[int, int] | None
    """What tells whether this node reads the same files: `_mark` of the first of them."""
    summary: dict[str, int]


@dataclass(frozen=True)
class PreparedShards(PreparedData):
    """Documents of ids, ready for the data loader.

    Attributes:
        stores: those of the rows.
        vocab_size: the ids that the shards tell of; None where they do not.
        marks_held_out: True where the files say what is held out.
        digests: XXH128 by file, to verify.
        verify: how much is read at start.
    """

    stores: Sequence[TokenStore] = field(default=(), kw_only=True)
    vocab_size: int | None = field(default=None, kw_only=True)
    marks_held_out: bool = field(default=False, kw_only=True)
    digests: dict[str, str] = field(default_factory=dict, kw_only=True)
    verify: Verify = field(default=Verify.sample, kw_only=True)

    def check_vocabulary(self, vocab_size: int, share: tuple[int, int] = (0, 1)) -> None:
        """Check ids and offsets: some now, or all with Verify.all, and each when it is read.

        Raises:
            UserError: an id goes beyond the vocabulary, or offsets descend.
        """
        super().check_vocabulary(vocab_size, share)
        if self.vocab_size is not None and self.vocab_size > vocab_size:
            raise UserError(
                f"the shards are of {self.vocab_size} ids, model.vocab_size={vocab_size} is too small: "
                f"use model.vocab_size={self.vocab_size}"
            )
        limit = None if self.verify is Verify.all else CHECKED_TOKENS
        for store in self.stores:
            store.vocab_size = vocab_size
            is_local = all(isinstance(segment.tokens, FileArray) for segment in store.segments)
            if not is_local and self.verify is Verify.sample:
                continue  # a request per block: what is wrong is told when it is read
            count = (store.num_tokens + store.num_documents) // share[1]
            total = count if limit is None else min(count, 2 * limit)
            with phase("checking the token ids", total, "tokens") as work:
                store.check(share, limit, work.advance)

    def check_digests(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compare a share of the files with their digests: AT_START bytes now, the rest in the background.

        With Verify.all the whole share now.

        Raises:
            UserError: a file has not the digest that its index tells.
        """
        files = sorted(self.digests.items())[share[0] :: share[1]]
        BACKGROUND.add(_verify(files, 1 << 63 if self.verify is Verify.all else AT_START))

    def verify_newer(self, since: float) -> None:
        """Compare the local files that were written after `since` with their digests; UserError as above.

        The fingerprint of shards is that of their index, which says nothing of a byte that has changed since.
        """
        newer = []
        for name, digest in sorted(self.digests.items()):
            with suppress(OSError):  # told when it is read
                if Path(name).stat().st_mtime > since:
                    newer.append((name, digest))
        _verify(newer, 1 << 63)


def _verify(files: Sequence[tuple[str, str]], nbytes: int) -> list[DigestedFile]:
    """Compare up to `nbytes` of files with their digests, and return the others; UserError for damage."""
    digested = [DigestedFile(name, digest, _INDEX, _REMEDY) for name, digest in files]
    wrong, left = check_at_start(digested, nbytes, "verifying digests")
    if wrong:
        raise UserError(wrong[0])
    return left


def _mark(path: str) -> tuple[int, int]:
    """Return two numbers that are equal on all nodes of a shared file system, and differ between copies."""
    try:
        told = Path(path).stat()
    except OSError:
        return 0, 0
    return told.st_ino, told.st_ctime_ns


class ShardsData:
    """`data=shards`: token shards of task=prepare, or the files of other tools (token_inputs.py).

    Documents go on as they are: no id is added. What is held out is what the files say: the held-out side of
    a directory of shards, `held_out_path`, or files with a word such as `val` in their names. Where nothing
    says it, stretches of documents from all over are set aside; equal documents are then not looked for.

    Args:
        path: a file, a directory, a folder of them, a pattern, or the URL of a directory of shards.
        held_out_path: what to score, in place of a share of `path`.
        dtype: of flat files without a header.
        eos_id: the id that ends each document of flat files; None: a file is one document.
        verify: how much is read at start.
        cache_bytes: of blocks of remote files that are kept.
        common: the fields of RowOptions.

    Raises:
        UserError: `path` is not given.
    """

    def __init__(
        self,
        path: str | None = None,
        held_out_path: str | None = None,
        dtype: IdType | None = None,
        eos_id: int | None = None,
        verify: Verify = Verify.sample,
        cache_bytes: int = 64 << 30,
        **common: Any,
    ) -> None:
        if not path:
            raise UserError("data.path is not set: give a directory of token shards, data.path=DIR")
        self.options = RowOptions(**common)
        self.path, self.held_out_path = path, held_out_path
        self.dtype, self.eos_id, self.verify, self.cache_bytes = dtype, eos_id, verify, cache_bytes

    def prepare(
        self,
        tokenizer_source: TokenizerSource | Tokenizer | None,
        sequence_length: int,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedShards:
        """Open the files, choose the held-out side and pack the documents.

        Args:
            tokenizer_source: a tokenizer other than the trained one must be that of the shards; of the
                trained one nothing is used: the shards' own is taken where they have one.
            sequence_length: tokens per row.
            seed: seed of the shuffling; what is held out does not depend on it.
            evaluate: prepare only what is scored: the held-out side where the files mark one, else all.

        Raises:
            UserError: a file is damaged or missing, or the tokenizer is another one.
        """
        found = self._open(evaluate)
        fingerprint = _fingerprint(found, self.eos_id)
        own = _own_tokenizer(found)
        segments = [found.train, found.held_out]
        if self.eos_id is not None:
            flat = with_documents([*found.train, *found.held_out], self.eos_id, self.options.cache_dir)
            segments = [flat[: len(found.train)], flat[len(found.train) :]]
        marked, told = has_tokens(segments[1]), _told(found, self)
        if not marked and evaluate:
            segments = [[], segments[0]]
        elif not marked:
            sides = TokenStore(segments[0]).split(self.options.held_out)
            segments = [list(side.segments) for side in sides]
            found.layout.append(self.options.held_out)
            told.append("held out: the files mark nothing; stretches of whole documents from all over")
        if not evaluate and not has_tokens(segments[0]):
            raise UserError(f"data.path={self.path} has a held-out side alone: there is nothing to train on")
        summary = {"files_read": len(found.pieces)}
        tokenizer = None
        if own is not None and own[1] is not None and _uses_own(tokenizer_source):
            tokenizer = own[0], own[1]
        opened = [s for side in segments[bool(evaluate) :] for s in side]
        read = {str(getattr(array, "path", "")) for s in opened for array in (s.tokens, s.offsets)}
        digests = {name: digest for name, digest in found.digests.items() if name in read}
        recipe = ShardsRecipe(
            train=segments[0] if not evaluate else (),
            held_out=segments[1],
            fingerprint=fingerprint,
            tokenizer=tokenizer,
            vocab_size=found.vocab_size,
            marks_held_out=marked,
            digests=digests,
            mark=next(map(_mark, digests), None),
            summary=summary,
        )
        chosen = _choose_tokenizer(tokenizer_source, own)
        layout = layout_digest(found.layout) if self.eos_id is None else None
        record = DataRecord.of(found.pieces, layout, "files")
        return self._pack(recipe, chosen, sequence_length, seed, record, told)

    def reopen(
        self,
        recipe: ShardsRecipe,
        tokenizer_source: TokenizerSource | Tokenizer | None,
        sequence_length: int,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedShards:
        """Return what `prepare` has returned in another process.

        Raises:
            CacheEntryError: a file is not there, or shorter.
        """
        if missing := find_missing(
            [a for s in (*recipe.train, *recipe.held_out) for a in (s.tokens, s.offsets)]
        ):
            raise CacheEntryError(missing)
        if recipe.tokenizer is not None and not recipe.tokenizer[1].is_dir():
            raise CacheEntryError(f"{recipe.tokenizer[1]} is not here")
        chosen = _choose_tokenizer(tokenizer_source, recipe.tokenizer)
        return self._pack(recipe, chosen, sequence_length, seed, None)

    def _open(self, evaluate: bool) -> TokenFiles:
        """Return the files of `path`, and as their held-out side those of `held_out_path`."""
        dtype = None if self.dtype is None else self.dtype.value
        if is_remote(self.path):
            found = open_remote_shards(self.path, self.options.cache_dir, self.cache_bytes)
        else:
            found = open_token_files(self.path, "data.path", dtype, only_held_out=evaluate)
        if self.held_out_path is not None:
            scored = open_token_files(self.held_out_path, "data.held_out_path", dtype)
            found.held_out = []
            scored.held_out, scored.train, scored.layout = [*scored.train, *scored.held_out], [], []
            scored.pieces = [p._replace(name=f"held out: {p.name}") for p in scored.pieces]
            found.add(scored)
        return found

    def _pack(
        self,
        recipe: ShardsRecipe,
        tokenizer: Tokenizer | None,
        sequence_length: int,
        seed: int,
        record: DataRecord | None,
        told: Sequence[str] = (),
    ) -> PreparedShards:
        """Return the rows of both sides."""
        held_out = TokenStore(recipe.held_out)
        scored, counts = held_out_rows(held_out, sequence_length)
        summary, stores, rows = recipe.summary | counts, [held_out], None
        if recipe.train:
            store = TokenStore(recipe.train)
            how = (self.options, sequence_length, seed, tokenizer, recipe.fingerprint)
            rows, counts = training_rows(store, *how)
            summary |= counts
            stores.append(store)
        return PreparedShards(
            rows,
            scored,
            tokenizer,
            recipe.fingerprint,
            summary,
            recipe=recipe,
            record=record,
            stores=stores,
            told=told,
            vocab_size=recipe.vocab_size,
            marks_held_out=recipe.marks_held_out,
            digests=recipe.digests,
            is_shared=next(map(_mark, recipe.digests), None) == recipe.mark,
            verify=self.verify,
        )


def _told(found: TokenFiles, data: ShardsData) -> list[str]:
    """Return lines for the user on the files and on what is held out."""
    kinds = {kind: found.kinds.count(kind) for kind in found.kinds}
    lines = [" and ".join(f"{amount(count, 'files')} {kind}" for kind, count in kinds.items())]
    if found.held_out:
        names = [Path(segment.name).name for segment in found.held_out[:NAMED]]
        more = f" and {len(found.held_out) - NAMED:,} more" if len(found.held_out) > NAMED else ""
        lines.append(f"held out, as the files say: {', '.join(names)}{more}")
    flat = any(segment.divisible for segment in (*found.train, *found.held_out))
    if flat and data.eos_id is None:
        lines.append("flat files: each is one document, data.eos_id=ID would find where documents end")
    elif data.eos_id is not None and not flat:
        lines.append("data.eos_id is not used: the files say where documents end")
    return lines


def _fingerprint(found: TokenFiles, eos_id: int | None) -> str:
    """Return 16 hex characters over the contents: of shards their digests, of other files what is sampled."""
    total = hashlib.sha256(f"eos {eos_id}".encode() if eos_id is not None else b"")
    for piece in found.pieces:
        total.update(f"{piece.size} {piece.digest} {piece.documents}\n".encode())
    return total.hexdigest()[:16]


def _own_tokenizer(found: TokenFiles) -> tuple[str, Path | None] | None:
    """Return fingerprint and folder of the tokenizer that made the shards; None where none is told."""
    if len(found.tokenizers) > 1:
        (first, here), (second, there) = list(found.tokenizers.items())[:2]
        raise UserError(
            f"{here.shards} holds ids of the tokenizer {first}, {there.shards} of {second}: the same id "
            "means other texts in them; prepare both with one tokenizer"
        )
    return next(((told, place.folder) for told, place in found.tokenizers.items()), None)


def _uses_own(source: TokenizerSource | Tokenizer | None) -> bool:
    return source is None or isinstance(source, TrainedTokenizer)


def _choose_tokenizer(
    source: TokenizerSource | Tokenizer | None, own: tuple[str, Path | None] | None
) -> Tokenizer | None:
    """Return the tokenizer of the run; UserError where it is not that of the shards.

    Args:
        own: fingerprint and folder of the shards' tokenizer.
    """
    told, folder = own or ("", None)
    if isinstance(source, Tokenizer):
        tokenizer, whose = source, "the tokenizer of the weights"
    elif source is not None and not isinstance(source, TrainedTokenizer):
        tokenizer, whose = source.prepare(()), "tokenizer=local"
    elif folder is None or not folder.is_dir():
        return None
    else:
        tokenizer, whose = Tokenizer.from_file(folder), f"that in {folder}"
    if told and tokenizer.fingerprint() != told:
        raise UserError(
            f"the shards hold ids of the tokenizer {told}, and {whose} is {tokenizer.fingerprint()}: its ids "
            "mean other texts; leave tokenizer= out to take the shards' own, or prepare the text anew with it"
        )
    return tokenizer
