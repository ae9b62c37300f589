"""Read a DCP checkpoint that somebody else may have made: as data, never as code.

torch.distributed.checkpoint unpickles its `.metadata` file, and a pickle can run anything. Here the
pickle creates nothing but inert records (metadata_pickle.py), from which the metadata is built field by
field, and only tensors are read (torch loads those with `weights_only=True`); everything else of ours is
JSON or YAML. A file may be a link to elsewhere, as in a hub's cache: it is read as a tensor all the same.
"""

import math
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from os import PathLike
from pathlib import Path, PurePath
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from dsv3.checkpoint.metadata_pickle import Record, load_records
from dsv3.checkpoint.tensor_archive import require_tensor_archive
from dsv3.config.limits import LARGEST
from dsv3.distributed.garbage import without_collections
from dsv3.distributed.torch_private import chunk_location
from dsv3.errors import UserError, quoted
from dsv3.hf.names import MODEL_PREFIX
from dsv3.hf.nonfinite import require_finite
from dsv3.metrics.progress import Phase, phase
from dsv3.untrusted_files import BadFile, MissingFile, open_file, read_bytes


class _Metadata(Record):
    __slots__ = ()


class _Tensor(Record):
    __slots__ = ()


class _Bytes(Record):
    __slots__ = ()


class _Chunk(Record):
    __slots__ = ()


class _Index(Record):
    __slots__ = ()


class _Info(Record):
    __slots__ = ()


_METADATA = "torch.distributed.checkpoint.metadata"

_STAND_INS: dict[tuple[str, str], type] = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "BytesStorageMetadata"): _Bytes,
    (_METADATA, "ChunkStorageMetadata"): _Chunk,
    (_METADATA, "MetadataIndex"): _Index,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Info,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    # Named by every checkpoint, needed by none:
    (_METADATA, "TensorProperties"): Record,
    (_METADATA, "StorageMeta"): Record,
    (_METADATA, "_MEM_FORMAT_ENCODING"): Record,
    ("torch.serialization", "_get_layout"): Record,
    ("pathlib", "PosixPath"): Record,
    ("pathlib", "PurePosixPath"): Record,
    ("pathlib._local", "PosixPath"): Record,
}


def _stand_in(module: str, name: str) -> Any:
    """Return the record for a name that DCP's metadata consists of; ValueError for every other."""
    if (module, name) in _STAND_INS:
        return _STAND_INS[module, name]
    if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
        return dtype
    raise ValueError(f"it names {module}.{name}, which no checkpoint needs")


class _RegularFiles(FileSystem):
    """DCP's file system, with regular files alone: a pipe among the tensors would wait for its writer."""

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[Any]:
        """Yield a file that is open for reading."""
        with open_file(Path(path)) as file:
            yield file


class _SoundArchives:
    """Look at the archive of a tensor before torch.load gets it, where DCP transforms its stream."""

    def transform_load_stream(
        self, read_item: ReadItem, transform_descriptors: Sequence[str], raw_stream: IO[bytes]
    ) -> IO[bytes]:
        """Return the stream of a tensor's archive as it is."""
        require_tensor_archive(raw_stream)
        return raw_stream


class SafeReader(FileSystemReader):
    """FileSystemReader with the metadata that `read_metadata` returned."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self.metadata = metadata
        self.fs = _RegularFiles()
        self.transforms: Any = _SoundArchives()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata, marked as DCP wants it."""
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self.metadata


def read_metadata(directory: Path) -> Metadata:
    """Return the `.metadata` of a DCP directory.

    UserError where it is missing, broken or not plain metadata.
    """
    try:
        # Seconds for a large model on thousands of ranks.
        with phase(f"reading {directory}/.metadata"), without_collections():
            return _metadata(load_records(read_bytes(directory / ".metadata", "pickle"), _stand_in))
    except MissingFile:
        raise UserError(f"{directory} is no checkpoint: there is no .metadata file in it") from None
    except BadFile:
        raise
    except Exception as error:
        reason = str(error)[:300] or type(error).__name__
        raise UserError(f"{directory}/.metadata is refused: {reason}") from None


def load_tensors(directory: Path, targets: dict[str, Tensor], metadata: Metadata | None = None) -> None:
    """Fill `targets` in place from a checkpoint, resharding as needed.

    Nothing is exchanged: ranks that load together agree on the outcome afterwards (agreement.together). DCP
    would first gather the plans of all ranks on rank 0: 165 s and 3 GB for 2,048 ranks of 671b.

    `metadata` is that of the directory, where it has been read: the metadata of many shards takes seconds.
    UserError that names the tensor for one that is missing or of another shape.
    """
    metadata = metadata or read_metadata(directory)
    require_tensors(directory, metadata, targets)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # DCP remarks that one process is no process group
            with loading(directory) as planner:
                planner.must_be_finite = directory
                reader = SafeReader(directory, metadata)
                load(dict(targets), storage_reader=reader, planner=planner, no_dist=True)
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        raise user_error(error) or UserError(
            f"{directory} cannot be read, it may be damaged: {_reason(error)}"
        ) from error


def user_error(error: BaseException) -> UserError | None:
    """Return the UserError in DCP's wrapper of what happened, None without one."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return next((cause for cause, _ in failures if isinstance(cause, UserError)), None)


class LoadPlanner(DefaultLoadPlanner):
    """DCP's own planner; `work` gets the bytes of each tensor that has been read, and their total."""

    def __init__(self, work: Phase) -> None:
        super().__init__()
        self.work = work
        self.must_be_finite: Path | None = None
        """The checkpoint whose weights are looked at as they come; one of HF tensors looks for itself."""

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """Return the plan, and add up what this rank is going to read."""
        sizes = [
            item.lengths.numel() * self.lookup_tensor(item.dest_index).itemsize for item in new_plan.items
        ]
        self.work.total = sum(sizes)
        return super().finish_plan(new_plan)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Take a tensor that has been read; UserError for a weight with a value that is not finite."""
        super().commit_tensor(read_item, tensor)
        name = read_item.dest_index.fqn
        if self.must_be_finite is not None and name.startswith(MODEL_PREFIX):
            origin = read_item.storage_index.offset or (0,) * len(read_item.storage_offsets)
            begin = [a + b for a, b in zip(origin, read_item.storage_offsets, strict=True)]
            require_finite(tensor, self.must_be_finite, name, tuple(begin))
        self.work.advance(tensor.nbytes)


@contextmanager
def loading(directory: Path) -> Iterator[LoadPlanner]:
    """Show how far a load is by DCP; yields the planner for it."""
    with phase(f"loading {directory}") as work:
        yield LoadPlanner(work)


def require_tensors(directory: Path, metadata: Metadata, targets: dict[str, Tensor]) -> None:
    """Raise UserError with the first of `targets` (on any device) that is missing or of another shape."""
    for name, tensor in targets.items():
        entry = metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{directory} has no tensor '{name}': it was saved from another model")
        if entry.size != tensor.shape:
            saved, wanted = list(entry.size), list(tensor.shape)
            raise UserError(f"{directory}: '{name}' has shape {saved}, the model needs {wanted}")


def _metadata(record: Any) -> Metadata:
    """Return DCP's metadata from the record of it; ValueError for content that DCP would not have written."""
    fields = _fields(record, _Metadata)
    entries, storage = (_typed(fields.get(key), dict) for key in ("state_dict_metadata", "storage_data"))
    return Metadata(
        state_dict_metadata={_typed(name, str): _entry(name, entry) for name, entry in entries.items()},
        storage_data={_index(index): _info(info) for index, info in storage.items()},
    )


def _entry(name: str, record: Any) -> STORAGE_TYPES:
    if isinstance(record, _Bytes):
        return BytesStorageMetadata()
    fields = _fields(record, _Tensor)
    size = _size(fields.get("size"))
    chunks = [_chunk(chunk, size) for chunk in _typed(fields.get("chunks"), list)]
    # DCP would silently leave elements unread that no part covers.
    whole = math.prod(size)  # torch.Size.numel() wraps around
    if whole > LARGEST or sum(math.prod(chunk.sizes) for chunk in chunks) != whole:
        raise ValueError(f"the parts of {quoted(name)} do not make up the whole")
    dtype = _typed(fields.get("properties"), Record).state[0]
    return TensorStorageMetadata(TensorProperties(dtype=_typed(dtype, torch.dtype)), size, chunks)


def _chunk(record: Any, whole: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(record, _Chunk)
    offsets, sizes = _size(fields.get("offsets")), _size(fields.get("sizes"))
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    if any(end > length for end, length in zip(ends, whole, strict=True)):
        raise ValueError(f"a part {list(offsets)} to {ends} is not inside its tensor {list(whole)}")
    return ChunkStorageMetadata(offsets, sizes)


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, _Index)
    offset = fields.get("offset")
    return MetadataIndex(_typed(fields.get("fqn"), str), None if offset is None else _size(offset))


def _info(record: Any) -> Any:
    fields = _fields(record, _Info)
    path = _path_inside(_typed(fields.get("relative_path"), str))
    return chunk_location(path, *_size((fields.get("offset"), fields.get("length"))))


@lru_cache(maxsize=2**14)  # a file holds hundreds of parts
def _path_inside(text: str) -> str:
    path = PurePath(text)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"it points outside the directory, to {str(path)[:200]}")
    return str(path)


def _size(value: Any) -> torch.Size:
    for number in _typed(value, tuple):
        if _typed(number, int) < 0:
            raise ValueError(f"it holds a size of {number}")
    return torch.Size(value)


def _fields(record: Any, kind: type[Record]) -> dict[str, Any]:
    fields: dict[str, Any] = _typed(_typed(record, kind).state, dict)
    return fields


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"it holds a {type(value).__name__} for a {kind.__name__}")
    return value


def _reason(error: BaseException) -> str:
    """Return one line on an error; DCP wraps the error of a rank into the text of a traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):
        return "there is something else than tensors in it"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
