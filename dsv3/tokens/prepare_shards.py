"""Make token shards of documents: tokenise units in parallel, and go on after a kill where it was.

task=prepare and the cache of data=text and data=stdlib use it. While the work goes on, everything lies in the
folder `unfinished` of the output: a journal of the units that are done, their shards, and how far a unit is.
At the end the shards move one level up and index.json is written: until then nothing there is read.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dsv3.documents.byte_blocks import Report
from dsv3.documents.document_files import FIRST_PIECE, Document, ReadOptions, read_documents
from dsv3.documents.input_files import Unit
from dsv3.documents.skip_limit import Skipped
from dsv3.documents.unit_pool import IN_PROCESS_BELOW, JOURNAL_FILE, run_units
from dsv3.errors import UserError
from dsv3.metrics.progress import Phase
from dsv3.tokens.shard_index import (
    DTYPES,
    HELD_OUT,
    INDEX_FILE,
    TRAIN,
    Shard,
    ShardIndex,
    TokenizerReference,
    dtype_for,
    sync_folder,
)
from dsv3.tokens.shard_writer import SHARD_TOKENS
from dsv3.tokens.tokenize_unit import NOTE_EVERY, Counts, DocumentSource, TokenizeUnit
from dsv3.tokens.tokenizer import Tokenizer

UNFINISHED = "unfinished"
"""Folder of the output that holds the work until it is done."""

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class HashedSides:
    """The documents of files, of which a share is held out by the hash of their first characters.

    Equal texts are on the same side, whatever their files, and so are texts whose first FIRST_PIECE
    characters are equal.
    """

    options: ReadOptions
    held_out: float

    def documents(
        self, unit: Unit, skipped: Skipped, report: Report
    ) -> Iterator[tuple[str | None, Iterable[str]]]:
        """Yield side and pieces of each document of a unit."""
        for document in read_documents(unit, self.options, skipped, report):
            yield self.side(document), document.pieces()

    def side(self, document: Document) -> str:
        """Return the split of a document."""
        if not self.held_out:
            return TRAIN
        digest = sha256(document.text[:FIRST_PIECE].encode()).digest()
        return HELD_OUT if digest < self._bound else TRAIN

    @cached_property
    def _bound(self) -> bytes:
        return int(self.held_out * 2**64).to_bytes(8)


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare_shards`: the index, and counts of what was read."""

    index: ShardIndex
    skipped: Skipped
    counts: Counts


def prepare_shards(
    output: Path,
    units: Sequence[Unit],
    source: DocumentSource,
    tokenizer: Tokenizer,
    identity: Mapping[str, str],
    *,
    workers: int | None = None,
    progress: Phase | None = None,
    in_process_below: int = IN_PROCESS_BELOW,
    note_every: float = NOTE_EVERY,
    shard_tokens: int = SHARD_TOKENS,
    told: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    check: Callable[[Skipped, bool], None] = lambda skipped, at_end: None,
    splits: Sequence[str] = (TRAIN, HELD_OUT),
    before: Skipped | None = None,
    key: str = "task.output",
) -> Prepared:
    """Make token shards in the folder `output` of all documents of `source`, in the order of the units.

    Args:
        identity: what decides the shards besides the tokenizer, by aspect: a folder with unfinished work of
            another identity is refused.
        workers: cores to use; None: all that this process may use.
        progress: is advanced by the bytes of the units.
        in_process_below: bytes of input that are worked on in this process.
        note_every: seconds between two notes on how far a unit is.
        shard_tokens: tokens at which a shard ends.
        told: what the index says of the source, besides the counts.
        settings: what the index says of how the source was read.
        check: gets the counts so far after each unit, and True with those of all; may raise UserError.
        before: what was skipped before the units were made.
        splits: the splits that the index has, also where they are empty.
        key: the config key of `output`, for messages.

    Raises:
        UserError: of `check`; the folder holds other work, is in use, or cannot be written.
        RunFailed: a process died.
    """
    work_folder = output / UNFINISHED
    skipped, counts = Skipped(), Counts()
    skipped.merge(before or Skipped())
    seen: list[Mapping[str, Any]] = []

    def count(result: Mapping[str, Any]) -> None:
        seen[:] = [result]
        skipped.merge(Skipped.from_json(result["skipped"]))
        counts.merge(result["counts"])
        check(skipped, False)

    try:
        work_folder.mkdir(parents=True, exist_ok=True)
        with _locked(work_folder, key):
            tokenizer_folder = work_folder / TOKENIZER_FOLDER
            journal = work_folder / JOURNAL_FILE
            if not (journal.exists() and tokenizer_folder.exists()):
                keep_tokenizer(tokenizer, tokenizer_folder)
            dtype_name = dtype_for(tokenizer.size)
            cores = workers or len(os.sched_getaffinity(0))
            work = TokenizeUnit(source, tokenizer_folder, dtype_name, cores, note_every, shard_tokens)
            vars(work)["tokenizer"] = tokenizer  # of this process
            results = run_units(
                units,
                work,
                work_folder,
                {"ids": tokenizer.fingerprint(), **identity},
                workers,
                progress,
                in_process_below,
                lambda result: _is_intact(result, output, DTYPES[dtype_name].itemsize),
                count,
            )
            skipped = (
                Skipped()
            )  # anew in the order of the units: the first place of a reason is the first one
            skipped.merge(before or Skipped())
            for result in results:
                skipped.merge(Skipped.from_json(result["skipped"]))
            check(skipped, True)
            index = ShardIndex(
                dtype_name=dtype_name,
                splits={side: _shards(results, side) for side in splits},
                vocab_size=tokenizer.size,
                bos=tokenizer.bos if tokenizer.add_bos else None,
                eos=tokenizer.eos,
                tokenizer=TokenizerReference(tokenizer.fingerprint(), TOKENIZER_FOLDER),
                source={**(told or {}), "documents": skipped.documents, "characters": counts.characters},
                skipped={**skipped.counts, **skipped.files},
                settings=settings or {},
            )
            _publish(output, index)
    except OSError as error:
        raise UserError(unwritable(f"{key}={output}", error)) from error
    except UserError:
        if seen and not skipped.documents:  # nothing is lost, and a command with another field may follow
            shutil.rmtree(work_folder, ignore_errors=True)
        raise
    with suppress(OSError):  # the index is there: what is left does no harm
        shutil.rmtree(work_folder)
    return Prepared(index, skipped, counts)


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save a tokenizer into a folder that appears whole or not at all."""
    new = folder.with_name(f".{folder.name}.new")
    for old in (new, folder):
        shutil.rmtree(old, ignore_errors=True)
    tokenizer.save(new)
    new.replace(folder)


def unwritable(what: str, error: OSError) -> str:
    """Return the message for a folder that cannot be written, and how to go on."""
    way = "give a folder that can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        way = "make room, and repeat the command: it goes on where it was"
    return f"{what} cannot be written ({error.strerror or error}): {way}"


def _locked(folder: Path, key: str) -> Any:
    """Return a lock on the work in a folder, held; UserError where another process holds it."""
    lock = FileLock(folder / "lock", fallback_to_soft=False)
    try:
        return lock.acquire(timeout=5, poll_interval=0.1)
    except Timeout:
        raise UserError(f"{key}={folder.parent} is being prepared by another process: wait for it") from None
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None) in (None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return nullcontext()  # a file system without locks
        raise


def _is_intact(result: Mapping[str, Any], output: Path, itemsize: int) -> bool:
    """Return whether the files of a result are there with their sizes, in the work folder or moved up."""
    for shard in (Shard(**each) for shards in result["shards"].values() for each in shards):
        for name, size in (
            (shard.tokens, shard.num_tokens * itemsize),
            (shard.offsets, (shard.num_documents + 1) * 8),
        ):
            path = output / UNFINISHED / name
            path = path if path.exists() else output / name
            if not path.exists() or not size < path.stat().st_size <= size + 1024:  # the header
                return False
    return True


def _shards(results: Sequence[Mapping[str, Any]], side: str) -> list[Shard]:
    return [Shard(**each) for result in results for each in result["shards"].get(side, ())]


def _publish(output: Path, index: ShardIndex) -> None:
    """Move the shards and the tokenizer of the finished work to their place, and write the index."""
    work_folder = output / UNFINISHED
    for shard in (shard for shards in index.splits.values() for shard in shards):
        for name in (shard.tokens, shard.offsets):
            with suppress(FileNotFoundError):  # moved before a kill
                (work_folder / name).replace(output / name)
    if (work_folder / TOKENIZER_FOLDER).exists():
        shutil.rmtree(output / TOKENIZER_FOLDER, ignore_errors=True)
        (work_folder / TOKENIZER_FOLDER).replace(output / TOKENIZER_FOLDER)
    sync_folder(output)
    index.write(output)


def is_finished(output: Path) -> bool:
    """Return whether a folder has an index."""
    return (output / INDEX_FILE).exists()


class InputData:
    """`data=input`: what task=prepare reads. It is no data to train on."""

    def __init__(self, **common: Any) -> None:
        self.common = common

    def prepare(self, *args: Any, **how: Any) -> None:
        """Raise UserError, which names the way to rows."""
        raise UserError(
            "data=input is what task=prepare reads: train on its shards, data=shards data.path=DIR"
        )
