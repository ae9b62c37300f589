"""task=prepare: make token shards of text, JSON lines, Parquet or datasets, for data=shards (docs/data.md).

Imports no torch. dsv3/tokens/prepare_shards.py does the work; here the input is found, the tokenizer made,
and the result told.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dsv3.config.data import InputDataConfig, TrainedTokenizerConfig
from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.distributed.signals import NOTHING_TO_SAVE, stop_on_signal
from dsv3.documents.document_files import ReadOptions
from dsv3.documents.input_files import HUB, FileKind, FoundFiles, InputFile, Unit, find_files
from dsv3.documents.input_units import plan_units
from dsv3.documents.skip_limit import REASONS_NAMED, Reason, Skipped, require_few_skipped, skipped_lines
from dsv3.documents.table_files import hub_dataset, saved_dataset
from dsv3.documents.unit_pool import JOURNAL_FILE
from dsv3.errors import UserError
from dsv3.launch.job import Job
from dsv3.metrics.progress import amount, phase
from dsv3.tokens.prepare_shards import (
    TOKENIZER_FOLDER,
    UNFINISHED,
    HashedSides,
    Prepared,
    claimed_output,
    is_finished,
    keep_tokenizer,
    prepare_shards,
    unwritable,
)
from dsv3.tokens.shard_index import HELD_OUT, TRAIN, ShardIndex
from dsv3.tokens.tokenizer import Tokenizer, TrainedTokenizer, training_patience

SAMPLE_CHARACTERS = 32 << 20
"""Characters that a new tokenizer is trained on at most: BPE needs 80 bytes for each."""

SAMPLE_PLACES = 64
"""Units, spread over the input, that the sample is taken from at most."""

FORMAT = "2"
"""Raise it when the same input is to be written differently: older unfinished work is then refused."""


class PrepareTask:
    """Writes the documents of the input as token shards; the same command goes on after a kill.

    Args:
        input: files, folders, patterns of names, folders of datasets, and hf:OWNER/NAME.
        output: folder for the shards.
        workers: cores to use, None for all.
        subset: config of a dataset of the hub.
        split: split of a dataset.
    """

    def __init__(
        self,
        input: Sequence[str],
        output: str,
        workers: int | None = None,
        subset: str | None = None,
        split: str | None = None,
    ) -> None:
        self.input = list(input)
        self.output = Path(output)
        self.workers = workers
        self.subset = subset
        self.split = split

    def run(self, job: Job) -> None:
        """Prepare, and print a table of what was read, skipped and written."""
        if os.environ.get("RANK", "0") != "0":
            return
        message = "stopped; the same command goes on where it was"
        with stop_on_signal(leaves=True, message=message, save_message=NOTHING_TO_SAVE):
            print(self.prepare(job.config))

    def prepare(self, config: Config) -> str:
        """Make the shards, unless they are there already; return the table."""
        if is_finished(self.output):
            return self._prepare(config)
        with claimed_output(self.output, "task.output"):
            return self._prepare(config)

    def _prepare(self, config: Config) -> str:
        data = config.data
        if not isinstance(data, InputDataConfig):
            raise UserError("task=prepare reads what task.input names: leave data=... out")
        options = ReadOptions(data.field, unescape(data.separator))
        found = self._find(options)
        units = plan_units(found.files, options)
        source = HashedSides(options, data.held_out)
        settings = {"field": options.field, "separator": options.separator, "held_out": data.held_out}
        identity = {
            "format": FORMAT,
            "input": _input_identity(found.files),
            **{f"data.{name}": json.dumps(value) for name, value in settings.items()},
        }
        trains = isinstance(config.tokenizer, TrainedTokenizerConfig)
        choice: Any = build(config.tokenizer)
        with phase("loading the tokenizer"):
            loaded: Tokenizer | None = None if trains else choice.prepare(())
        identity["tokenizer"] = (
            loaded.fingerprint() if loaded else f"trained, {choice.vocab_size} ids at most"
        )
        if is_finished(self.output):
            return self._finished(identity)
        tokenizer = loaded or self._train(choice, units, source)
        size = sum(unit.nbytes for unit in units)
        files = len(found.files) + len(found.unreadable)
        before = Skipped()
        for name in found.unreadable:
            before.add(Reason.UNREADABLE, name)

        def check(skipped: Skipped, at_end: bool) -> None:
            key = f"task.input={','.join(self.input)}"
            require_few_skipped(skipped, files, data.max_skipped, key, at_end, options.field)
            if at_end and not skipped.documents:
                told = "; ".join([*skipped_lines(skipped, REASONS_NAMED), f"{skipped.empty:,} empty ones"])
                raise UserError(f"{key} holds no document: {told}")

        source_told = {"paths": self.input, "files": files, "bytes": size}
        with phase(f"preparing {amount(files, 'files')}", size or None, "bytes") as progress:
            made = prepare_shards(
                self.output,
                units,
                source,
                tokenizer,
                identity,
                workers=self.workers,
                progress=progress,
                told=source_told,
                settings={**settings, "identity": identity},
                check=check,
                before=before,
            )
        return report(made, found, self.output, options.field)

    def _find(self, options: ReadOptions) -> FoundFiles:
        """Return the input files, in the order of `task.input`."""
        found = FoundFiles()
        with phase("looking for the input"):
            for path in self.input:
                if path.startswith(HUB):
                    found.files.append(hub_dataset(path, self.subset, self.split))
                    continue
                more = find_files([path], options.field)
                found.left_out += more.left_out
                found.unreadable += more.unreadable
                found.files += [
                    saved_dataset(file, self.split) if file.kind is FileKind.dataset else file
                    for file in more.files
                ]
        output = self.output.resolve()
        inside = next((file for file in found.files if output in file.path.resolve().parents), None)
        if inside is not None:
            raise UserError(f"task.output={self.output} holds the input {inside.name}: give another folder")
        found.files = list({file.path: file for file in found.files}.values())
        return found

    def _train(self, choice: TrainedTokenizer, units: Sequence[Unit], source: HashedSides) -> Tokenizer:
        """Return a tokenizer trained on a sample, or the one that the unfinished work has."""
        kept = self.output / UNFINISHED / TOKENIZER_FOLDER
        if kept.exists() and (self.output / UNFINISHED / JOURNAL_FILE).exists():
            return Tokenizer.from_file(kept)
        patience = training_patience(SAMPLE_CHARACTERS)
        with phase("training the tokenizer on a sample", unit="characters", patience=patience):
            trained: Tokenizer = choice.prepare(sample_texts(units, source))
        try:
            keep_tokenizer(trained, kept)
        except OSError as error:
            raise UserError(unwritable(f"task.output={self.output}", error)) from error
        return trained

    def _finished(self, identity: dict[str, str]) -> str:
        """Return what to say of shards that are there already; UserError where they are of other input."""
        index = ShardIndex.read(self.output)
        before = index.settings.get("identity") or {}
        if before == identity:
            return f"{self.output} is prepared already: {index.num_tokens():,} tokens to train on"
        differing = [key for key in identity if before.get(key) != identity[key]]
        raise UserError(
            f"task.output={self.output} holds shards of another command (different: {', '.join(differing)}): "
            "give another folder, or remove it"
        )


def unescape(separator: str | None) -> str | None:
    r"""Return a separator as typed with \n, \r, \t, \f and \\ read as the characters that they name."""
    if separator is None:
        return None
    names = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "\\": "\\"}
    parts = iter(separator)
    read = ""
    for character in parts:
        following = next(parts, "") if character == "\\" else ""
        read += names.get(following, character + following)
    return read


def sample_texts(units: Sequence[Unit], source: HashedSides) -> Iterator[str]:
    """Yield training texts from up to SAMPLE_PLACES units, SAMPLE_CHARACTERS in all."""
    count = min(SAMPLE_PLACES, len(units))
    for number in range(count):
        left = SAMPLE_CHARACTERS // count
        unit = units[number * len(units) // count]
        for side, pieces in source.documents(unit, Skipped(), lambda nbytes: None):
            if side != TRAIN:
                continue
            # Of a long document the first piece: it may turn out to be none behind it.
            for piece in islice(pieces, 1):
                yield piece[:left]
                left -= len(piece)
            if left <= 0:
                break


def _input_identity(files: Sequence[InputFile]) -> str:
    """Return what tells these files, by names, sizes and times, from others."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps(file.identity()).encode())
    size = sum(file.size for file in files)
    return f"{amount(len(files), 'files')}, {size:,} bytes, names and times {digest.hexdigest()[:16]}"


def report(made: Prepared, found: FoundFiles, output: Path, field: str) -> str:
    """Return the table of what was read, skipped and written."""
    index, skipped, counts = made.index, made.skipped, made.counts
    tokens = index.num_tokens(TRAIN) + index.num_tokens(HELD_OUT)
    rows: list[tuple[str, Any]] = [
        ("read", f"{amount(len(found.files), 'files')}, {amount(int(index.source['bytes']), 'bytes')}"),
        ("documents", skipped.documents),
        ("characters", counts.characters),
    ]
    rows += [("empty documents", skipped.empty)] * bool(skipped.empty)
    lines = [line.removeprefix("skipped ") for line in skipped_lines(skipped)]
    rows += [("skipped", line) for line in lines or ["nothing"]]
    rows += [("read as text", line) for line in found.told_json(field)]
    if found.left_out:
        first = found.left_out[0]
        rows.append(("left out", f"{len(found.left_out):,} hidden, leftover or no file, first {first}"))
    if counts.left_out:
        rows.append(("without tokens", counts.left_out))
    rows += [
        ("tokens", f"{tokens:,} ({counts.characters / max(tokens, 1):.2f} characters per token)"),
        ("to train on", f"{index.num_tokens(TRAIN):,} tokens of {index.num_documents(TRAIN):,} documents"),
        ("held out", f"{index.num_tokens(HELD_OUT):,} tokens of {index.num_documents(HELD_OUT):,} documents"),
        ("largest", f"{counts.largest:,} tokens, {100 * counts.largest / max(tokens, 1):.3g} % of all"),
    ]
    if counts.blind_cuts:
        rows.append(("cut blindly", f"{counts.blind_cuts:,} stretches without a space or a line end"))
    shards = sum(len(found) for found in index.splits.values())
    rows += [
        ("tokenizer", f"{index.vocab_size:,} ids, stored as {index.dtype_name}"),
        ("written", f"{shards:,} shards in {output}; train on them: data=shards data.path={output}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{name:<{width}}  {f'{told:,}' if isinstance(told, int) else told}" for name, told in rows
    )
