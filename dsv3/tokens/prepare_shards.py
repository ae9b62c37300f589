"""Make token shards of documents: tokenise units in parallel, and go on after a kill where it was.

task=prepare and the cache of data=text and data=stdlib use it. While the work goes on, everything lies in the
folder `unfinished` of the output: a journal of the units that are done, their shards, and how far a unit is.
At the end the shards move one level up and index.json is written: until then nothing there is read.
"""

import errno
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any

from dsv3.distributed.directory_lock import DirectoryLock
from dsv3.documents.byte_blocks import Report
from dsv3.documents.document_files import FIRST_PIECE, Document, ReadOptions, read_documents
from dsv3.documents.input_files import Unit
from dsv3.documents.skip_limit import Skipped
from dsv3.documents.unit_pool import IN_PROCESS_BELOW, JOURNAL_FILE, run_units
from dsv3.errors import UserError, quoted
from dsv3.metrics.jsonl import read_whole_lines
from dsv3.metrics.progress import Phase
from dsv3.tokens.file_digests import digest
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


@contextmanager
def claimed_output(output: Path, key: str) -> Iterator[None]:
    """Own a folder that can be written, before anything is done for it; leave no empty one on an error.

    Raises:
        UserError: `output`, which the config calls `key`, cannot be made or written, or is another command's,
            or something else lies in it.
    """
    work_folder = output / UNFINISHED
    try:
        foreign = _foreign(output)
    except OSError as error:
        raise UserError(unwritable(f"{key}={output}", error)) from error
    if foreign is not None:
        run = (output / "config.yaml").is_file()
        told = "holds a run" if run else f"is not empty, {quoted(foreign)} is in it"
        raise UserError(
            f"{key}={output} {told}, and shards are not mixed with other files: "
            f"give a new folder, {shlex.join([f'{key}={output}/shards'])}"
        )
    new = list(takewhile(lambda folder: not folder.exists(), (work_folder, output, *output.parents)))
    try:
        try:
            work_folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=work_folder) as file:
                file.write(bytes(1))  # a full disk shows here
                file.flush()
        except OSError as error:
            raise UserError(unwritable(f"{key}={output}", error)) from error
        with DirectoryLock(output, f"{key}={output}", "being prepared", stays=False):
            yield
    except BaseException:
        for folder in new:
            with suppress(OSError):  # it holds what a later command goes on with
                folder.rmdir()
        raise


def _foreign(output: Path) -> str | None:
    """Return the first name in a folder that is none of this work's and not hidden; None where there is none.

    Shards and their tokenizer lie there while finished work moves up, before the index is written.
    """
    own, suffixes = {UNFINISHED, "lost+found"}, tuple[str, ...]()
    if (output / UNFINISHED / JOURNAL_FILE).exists() or is_finished(output):
        own |= {TOKENIZER_FOLDER, INDEX_FILE}
        suffixes = (".tokens.npy", ".offsets.npy")
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    others = (name for name in names if name not in own and not name.endswith(suffixes))
    return next((name for name in others if not name.startswith(".")), None)


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
    compare: bool = False,
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
        compare: compare the shards that a killed process has left with their digests, and not their sizes
            alone: for tokens that are trained on at once.

    Raises:
        UserError: of `check`; the folder holds other work, is in use, or cannot be written.
        RunFailed: a process died.
    """
    work_folder = output / UNFINISHED
    skipped, counts = Skipped(), Counts()
    skipped.merge(before or Skipped())
    journal, told_identity = work_folder / JOURNAL_FILE, {"ids": tokenizer.fingerprint(), **identity}

    def count(result: Mapping[str, Any]) -> None:
        skipped.merge(Skipped.from_json(result["skipped"]))
        counts.merge(result["counts"])
        check(skipped, False)

    try:
        work_folder.mkdir(parents=True, exist_ok=True)
        with (
            DirectoryLock(work_folder, f"{key}={output}", "being prepared"),
            _refusing(journal, told_identity, units, in_process_below),
        ):
            tokenizer_folder = work_folder / TOKENIZER_FOLDER
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
                told_identity,
                workers,
                progress,
                in_process_below,
                lambda result: _is_intact(result, output, DTYPES[dtype_name].itemsize, compare),
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
            with suppress(OSError):  # the index is there: what is left does no harm
                shutil.rmtree(work_folder)
    except OSError as error:
        raise UserError(unwritable(f"{key}={output}", error)) from error
    return Prepared(index, skipped, counts)


@contextmanager
def _refusing(
    journal: Path, identity: Mapping[str, str], units: Sequence[Unit], worth_keeping: int
) -> Iterator[None]:
    """Remove the work beside a journal where a UserError ends it, or say that it stays.

    It stays where at least `worth_keeping` bytes of input are done, and where it is another command's.
    """
    try:
        yield
    except UserError as error:
        done = _bytes_done(journal, identity, units)
        if done is not None and done >= worth_keeping:
            raise UserError(f"{error} (what is done stays in {journal.parent})") from error
        if done is not None:
            shutil.rmtree(journal.parent, ignore_errors=True)  # in the way of a command with other keys
        raise


def _bytes_done(journal: Path, identity: Mapping[str, str], units: Sequence[Unit]) -> int | None:
    """Return the bytes of input that a refused command has done and another one can go on with.

    None where what lies there is another command's.
    """
    first, *lines = read_whole_lines(journal) or [None]
    if first is not None and first != identity:
        return None
    try:
        for file in {part.file for unit in units for part in unit.parts}:
            file.check_unchanged()
    except UserError:
        return 0
    done = {line.get("unit") for line in lines if line is not None}
    return sum(unit.nbytes for unit in units if unit.number in done)


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


def _is_intact(result: Mapping[str, Any], output: Path, itemsize: int, compare: bool) -> bool:
    """Return whether the files of a result are there, in the work folder or moved up.

    With their sizes, or where `compare` is set with their digests.
    """
    for shard in (Shard(**each) for shards in result["shards"].values() for each in shards):
        for kind, name, size in (
            ("tokens", shard.tokens, shard.num_tokens * itemsize),
            ("offsets", shard.offsets, (shard.num_documents + 1) * 8),
        ):
            path = output / UNFINISHED / name
            path = path if path.exists() else output / name
            if not path.exists() or not size < path.stat().st_size <= size + 1024:  # the header
                return False
            if compare and digest(path) != shard.digests.get(kind):
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
