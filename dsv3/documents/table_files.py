"""Texts in columns: Parquet files, datasets saved by the package `datasets`, and datasets of the hub.

pyarrow and datasets are imported where they are needed alone; the extra `data` has them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsv3.documents.byte_blocks import NEEDS_DATA_EXTRA, DamagedFile, Report
from dsv3.documents.input_files import HUB, FileKind, InputFile, Part
from dsv3.errors import UserError
from dsv3.metrics.progress import tell

ROWS_AT_ONCE = 64

SPLIT, REVISION, FILES, SUBSET = "split", "revision", "files", "subset"
"""Keys of InputFile.detail."""


@dataclass
class Table:
    """The rows of a part: their texts, or the columns that it has where the field is missing.

    Attributes:
        texts: a str per row; bytes that are no UTF-8 as UnicodeDecodeError; anything else as it is.
        first_row: number of the first row in its file, from 0.
        num_rows: rows of the part, 0 where it is not known.
    """

    texts: Iterator[Any]
    columns: list[str]
    has_field: bool = True
    first_row: int = 0
    num_rows: int = 0


def plan_parquet(file: InputFile, part_bytes: int) -> list[Part]:
    """Return ranges of row groups of about `part_bytes` each; the file as one part where it is damaged."""
    try:
        metadata = _parquet(file.path).metadata
    except DamagedFile:
        return [Part(file, 0, None, file.size)]
    rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    parts: list[Part] = []
    start, bytes_per_row = 0, file.size / max(sum(rows), 1)
    for number in range(len(rows)):
        size = round(sum(rows[start : number + 1]) * bytes_per_row)
        if size >= part_bytes or number == len(rows) - 1:
            parts.append(Part(file, start, number + 1, size))
            start = number + 1
    return parts or [Part(file, 0, None, file.size)]


def _read_parquet(part: Part, field: str, report: Report) -> Table:
    opened = _parquet(part.file.path)
    metadata = opened.metadata
    end = metadata.num_row_groups if part.end is None else part.end
    groups = list(range(part.start, end))
    rows = [metadata.row_group(number).num_rows for number in range(end)]
    table = Table(iter(()), opened.schema_arrow.names, first_row=sum(rows[: part.start]))
    table.num_rows = sum(rows[part.start :])
    table.has_field = field in table.columns
    if table.has_field:
        table.texts = _parquet_texts(opened, groups, field, part.nbytes / max(table.num_rows, 1), report)
    return table


def _parquet_texts(
    opened: Any, groups: list[int], field: str, bytes_per_row: float, report: Report
) -> Iterator[Any]:
    import pyarrow

    told = seen = 0
    try:
        for batch in opened.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[field], use_threads=False):
            seen += batch.num_rows
            report(round(seen * bytes_per_row) - told)
            told = round(seen * bytes_per_row)
            yield from _values(batch.column(0))
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedFile(str(error)) from error


def _values(column: Any) -> Iterator[Any]:
    """Yield the values of an arrow array; bytes as text, and as the error where they are none."""
    for value in column:
        try:
            text = value.as_py()
            yield text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            yield error


def _parquet(path: Path) -> Any:
    """Open a Parquet file; pages are read as they are needed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"Parquet files are read with the package pyarrow: {NEEDS_DATA_EXTRA}") from None
    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except pyarrow.ArrowException as error:
        raise DamagedFile(str(error).splitlines()[0]) from error


def plan_table(file: InputFile, part_bytes: int) -> list[Part]:
    """Return ranges of rows of a saved dataset, or of the files of one of the hub."""
    detail = dict(file.detail)
    if file.kind is FileKind.hub:
        count = int(detail[FILES])
        return [Part(file, number, number + 1, file.size // count) for number in range(count)]
    rows = len(_saved(file.path, detail[SPLIT]))
    count = max(1, min(rows, -(-file.size // part_bytes)))
    bounds = [rows * number // count for number in range(count + 1)]
    return [Part(file, start, end, file.size // count) for start, end in pairwise(bounds)]


def _read_dataset(part: Part, field: str, report: Report) -> Table:
    """Return the rows of a part of a saved dataset, or of a file of one of the hub."""
    detail = dict(part.file.detail)
    if part.file.kind is FileKind.hub:
        streamed = _hub(part.file.name, detail).shard(int(detail[FILES]), part.start)
        columns = list(streamed.column_names or next(iter(streamed.take(1)), {}))
        texts = (row.get(field) for row in streamed)
        return Table(_reported(texts, 0, part.nbytes, report), columns, field in columns)
    rows = _saved(part.file.path, detail[SPLIT])
    end = len(rows) if part.end is None else part.end
    table = Table(iter(()), list(rows.column_names), field in rows.column_names, part.start, end - part.start)
    if table.has_field:
        chosen = rows.select_columns([field]).select(range(part.start, end)).with_format("arrow")
        texts = (text for batch in chosen.iter(ROWS_AT_ONCE) for text in _values(batch.column(0)))
        table.texts = _reported(texts, table.num_rows, part.nbytes, report)
    return table


def _reported(texts: Iterable[Any], count: int, nbytes: int, report: Report) -> Iterator[Any]:
    """Yield texts, and report the bytes of the part by their number, or at the end where it is not known."""
    told = 0
    for number, text in enumerate(texts, 1):
        yield text
        if count:
            report(nbytes * number // count - told)
            told = nbytes * number // count
    report(nbytes - told)


def saved_dataset(file: InputFile, split: str | None) -> InputFile:
    """Return a folder of save_to_disk as an input: with the split that is read, and the size of its data.

    UserError where it has several splits and none is chosen, or not the chosen one.
    """
    found = _datasets().load_from_disk(str(file.path))
    splits = list(found) if (file.path / "dataset_dict.json").is_file() else []
    chosen = choose_split(splits, split, str(file.path))
    folder = file.path / chosen if splits else file.path
    size = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    times = [path.stat().st_mtime_ns for path in folder.glob("*")]
    return InputFile(file.path, file.name, FileKind.dataset, size, max(times), ((SPLIT, chosen),))


def hub_dataset(name: str, subset: str | None, split: str | None) -> InputFile:
    """Return a dataset of the hub (hf:OWNER/NAME) as an input, bound to the revision that it has now.

    UserError where it cannot be found or its files cannot be listed.
    """
    from huggingface_hub import HfApi

    datasets = _datasets()
    repository = name.removeprefix(HUB)
    try:
        revision = HfApi().dataset_info(repository).sha or ""
        splits = datasets.get_dataset_split_names(repository, subset, revision=revision)
        chosen = choose_split(splits, split, name)
        detail = {SUBSET: subset or "", SPLIT: chosen, REVISION: revision}
        streamed = _hub(name, detail)
    except UserError:
        raise
    except Exception as error:  # of requests, of the hub and of datasets, without a common base
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"task.input={name} cannot be read from the hub: {told[0]}\n"
            "Without a network give a folder of Dataset.save_to_disk, or its Parquet files"
        ) from error
    size = getattr(streamed.info, "download_size", None) or 0
    detail[FILES] = str(streamed.num_shards)
    return InputFile(Path(name), name, FileKind.hub, size, 0, tuple(detail.items()))


def choose_split(splits: list[str], wanted: str | None, where: str) -> str:
    """Return the split to read: the wanted one, the only one, or `train`; UserError where that is none."""
    if wanted is not None and splits and wanted not in splits:
        raise UserError(f"task.split={wanted} is none of the splits of {where}: {', '.join(splits)}")
    if wanted is None and len(splits) > 1 and "train" not in splits:
        raise UserError(f"{where} has the splits {', '.join(splits)}: choose one, task.split=NAME")
    chosen = wanted or ("train" if "train" in splits else next(iter(splits), ""))
    if wanted is None and len(splits) > 1:
        tell(f"{where}: reads {chosen} of its splits {', '.join(splits)}; task.split=NAME reads another")
    return chosen


def _saved(path: Path, split: str) -> Any:
    found = _datasets().load_from_disk(str(path))
    return found[split] if (path / "dataset_dict.json").is_file() else found


def _hub(name: str, detail: dict[str, str]) -> Any:
    return _datasets().load_dataset(
        name.removeprefix(HUB),
        detail[SUBSET] or None,
        split=detail[SPLIT],
        revision=detail[REVISION],
        streaming=True,
    )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"datasets are read with the package datasets: {NEEDS_DATA_EXTRA}") from None
    return datasets


TABLE_READERS = {
    FileKind.parquet: _read_parquet,
    FileKind.dataset: _read_dataset,
    FileKind.hub: _read_dataset,
}
