"""One tensor of a safetensors file, its types, and how what is wrong with it is told.

The header of a safetensors file, read as strictly as the format is written down.

Eight bytes of little-endian length, a JSON object of {"dtype", "shape", "data_offsets"} by name, and
the data, without holes (https://github.com/huggingface/safetensors#format). The library's messages do
not say which tensor is wrong, and it takes the last of two equal keys.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.errors import nearest
from dsv3.hf.pread_file import PreadFile, fault, quoted

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls PyTorch's types; F6_E2M3 and F6_E3M2 have no counterpart."""

CODES = {dtype: code for code, dtype in DTYPES.items()}

PACKED = torch.float4_e2m1fn_x2
"""Two values a byte: the file's last dim counts values, PyTorch's counts bytes."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes of `file` from byte `offset` on, row-major, little-endian."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Counted from the beginning of the file."""
    nbytes: int

    @property
    def rows(self) -> int:
        """The length of dim 0; a tensor without dims is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def byte_view(tensor: Tensor) -> Tensor:
    """uint8 [bytes] over the memory of a contiguous tensor: NumPy has no types for bf16 and fp8."""
    return tensor.reshape(-1).view(torch.uint8)


LIMIT = 100_000_000
"""Bytes of the longest header, as in the library."""

METADATA = "__metadata__"

_FIELDS = ("dtype", "shape", "data_offsets")

_LARGEST = 2**63 - 1

_AGAIN = "download or save it again"


def read_header(file: PreadFile) -> list[StoredTensor]:
    """The tensors of a file as they lie in it; UserError for everything that the format does not allow."""
    length = _header_length(file)
    header = bytearray(length)
    file.read(memoryview(header), 8, "its header")
    if not header.startswith(b"{"):
        raise fault(file.path, f"is no safetensors file: its header begins with {quoted(bytes(header[:8]))}")
    entries = json_object(file.path, bytes(header), "header")
    _check_metadata(file.path, entries.pop(METADATA, None))
    found = [_tensor(file.path, 8 + length, name, entry) for name, entry in entries.items()]
    found.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(file, 8 + length, found)
    return found


def json_object(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object of a file's `what`; UserError for anything else and for a key that comes twice."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_without_doubles)
    except UnicodeDecodeError as error:
        raise fault(path, f"is damaged: byte {error.start} of its {what} is not UTF-8; {_AGAIN}") from None
    except _Double as error:
        raise fault(path, f"is damaged: its {what} has {quoted(error.args[0])} twice") from None
    except RecursionError:
        raise fault(path, f"is damaged: its {what} is nested too deeply") from None
    except ValueError as error:
        raise fault(path, f"is damaged: its {what} is not JSON ({error}); {_AGAIN}") from None
    if not isinstance(value, dict):
        raise fault(path, f"is damaged: its {what} is {quoted(value)} instead of a JSON object")
    return value


class _Double(ValueError):
    """A key that an object has twice."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Double(next(key for key, count in counts.items() if count > 1))
    return found


def _header_length(file: PreadFile) -> int:
    if file.size < 8:
        text = "is empty" if file.size == 0 else f"has only {file.size} bytes, too few for a safetensors file"
        raise fault(file.path, f"{text}: {_AGAIN}")
    raw = bytearray(8)
    file.read(memoryview(raw), 0, "the length of its header")
    length = int.from_bytes(raw, "little")
    if length > LIMIT:
        raise fault(file.path, f"is no safetensors file: a header of {length} bytes, at most {LIMIT} may be")
    if length > file.size - 8:
        raise fault(file.path, f"is cut off in its header of {length} bytes after {file.size - 8}: {_AGAIN}")
    return length


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault(path, f"is damaged: its {METADATA} is {quoted(metadata)} instead of texts by name")


def _tensor(path: Path, data: int, name: str, entry: Any) -> StoredTensor:
    """One entry of the header of a file whose data begins at byte `data`."""
    _check_entry(path, name, entry)
    offsets = _counts(path, name, "data_offsets", entry["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        text = f"{quoted(name)} has data_offsets {quoted(list(offsets))} instead of a begin and an end"
        raise fault(path, f"is damaged: {text}")
    dtype = DTYPES[entry["dtype"]]
    shape = _shape(path, name, dtype, entry["shape"])
    held, needed = offsets[1] - offsets[0], math.prod(shape) * dtype.itemsize
    if held != needed:
        kind = f"{entry['dtype']} of shape {quoted(entry['shape'])}"
        raise fault(path, f"is damaged: {quoted(name)} has {held} bytes, {kind} needs {needed}")
    return StoredTensor(name, path, dtype, shape, data + offsets[0], held)


def _shape(path: Path, name: str, dtype: torch.dtype, stored: Any) -> tuple[int, ...]:
    """The shape as PyTorch counts it."""
    shape, shown = _counts(path, name, "shape", stored), f"{quoted(name)} has shape {quoted(stored)}"
    if dtype is PACKED:
        if not shape or shape[-1] % 2:
            raise fault(path, f"is damaged: {shown}, and F4 comes in pairs")
        shape = (*shape[:-1], shape[-1] // 2)
    # Beside a dim of 0 the others could be of any size, but PyTorch still computes the strides.
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize > _LARGEST:
        raise fault(path, f"is damaged: {shown}, too large to address")
    return shape


def _check_entry(path: Path, name: str, entry: Any) -> None:
    """UserError unless it has exactly the three fields, a type we know and a name that is Unicode."""
    shown = quoted(name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise fault(path, f"is damaged: the name {shown} is not Unicode") from None
    if not isinstance(entry, dict):
        raise fault(path, f"is damaged: {shown} is described by {quoted(entry)} instead of an object")
    for field in _FIELDS:
        if field not in entry:
            raise fault(path, f"is damaged: {shown} has no '{field}'")
    if len(entry) > len(_FIELDS):
        unknown = next(field for field in entry if field not in _FIELDS)
        # It could change what the bytes mean.
        raise fault(path, f"has {shown} with the field {quoted(unknown)}, which safetensors does not know")
    code = entry["dtype"]
    if not isinstance(code, str) or code not in DTYPES:
        hint = nearest(code, DTYPES) if isinstance(code, str) and len(code) < 20 else ""
        raise fault(path, f"has {shown} of dtype {quoted(code)}, which PyTorch does not have.{hint}")


def _counts(path: Path, name: str, field: str, values: Any) -> tuple[int, ...]:
    right = isinstance(values, list) and all(type(each) is int and 0 <= each <= _LARGEST for each in values)
    if not right:
        text = f"{quoted(name)} has {field} {quoted(values)} instead of a list of counts"
        raise fault(path, f"is damaged: {text}")
    return tuple(values)


def _check_layout(file: PreadFile, data: int, tensors: list[StoredTensor]) -> None:
    """UserError unless the tensors, in the order of their offsets, fill the file behind the header."""
    end, before = data, "the header"
    for tensor in tensors:
        shown = quoted(tensor.name)
        if tensor.offset < end:
            overlap = end - tensor.offset
            raise fault(file.path, f"is damaged: {shown} and {before} overlap by {overlap} bytes")
        if tensor.offset > end:
            gap = tensor.offset - end
            raise fault(file.path, f"is damaged: {gap} bytes between {before} and {shown} are of no tensor")
        end, before = tensor.offset + tensor.nbytes, shown
        if end > file.size:
            raise fault(
                file.path, f"is cut off: {shown} ends at byte {end}, the file has {file.size}; {_AGAIN}"
            )
    if end < file.size:
        raise fault(file.path, f"is damaged: {file.size - end} bytes behind {before} are of no tensor")
