"""Read the headers of safetensors files as strictly as the format is defined.

A file holds eight bytes of little-endian length, a JSON object of {"dtype", "shape", "data_offsets"} by
name, and the data without holes (https://github.com/huggingface/safetensors#format). The safetensors library
checks the same, but its messages do not name the tensor that is wrong, it takes the last of two equal keys,
and it does not tell where in the file a tensor lies (docs/checkpoints.md has the comparison).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.errors import did_you_mean, quoted
from dsv3.hf.pread_file import PreadFile, fault
from dsv3.untrusted_files import LIMITS, BadFile, parse_json, refuse_lfs_pointer

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
"""safetensors' dtype names -> PyTorch dtypes; F6_E2M3 and F6_E3M2 have no counterpart."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

PACKED = torch.float4_e2m1fn_x2
"""The dtype with two values per byte: the last dim counts values in a file and bytes in PyTorch."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a safetensors file: `nbytes` bytes from byte `offset` on, row-major, little-endian."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Counted from the beginning of the file."""
    nbytes: int

    @property
    def rows(self) -> int:
        """Return the length of dim 0; a tensor without dims is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Return the bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def byte_view(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor as uint8 [bytes]: NumPy has no dtypes for bf16 and fp8."""
    return tensor.reshape(-1).view(torch.uint8)


LONGEST_HEADER = LIMITS["listing"].nbytes
"""Bytes; the same limit as in the library."""

METADATA = "__metadata__"

_FIELDS = ("dtype", "shape", "data_offsets")

_LARGEST_INT = 2**63 - 1

_AGAIN = "download or save it again"


def read_header(file: PreadFile) -> list[TensorInfo]:
    """Return the tensors of a file in the order of their data; UserError for a file that is not valid."""
    refuse_lfs_pointer(file.path)
    length = _header_length(file)
    header = bytearray(length)
    file.read(memoryview(header), 8, "its header")
    if not header.startswith(b"{"):
        raise fault(file.path, f"is no safetensors file: its header begins with {quoted(bytes(header[:8]))}")
    entries = json_object(file.path, bytes(header), "header")
    metadata = entries.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        text = f"its {METADATA} is {quoted(metadata)} instead of texts by name"
        raise fault(file.path, f"is damaged: {text}")
    found = [_tensor_info(file.path, 8 + length, name, entry) for name, entry in entries.items()]
    found.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(file, 8 + length, found)
    return found


def json_object(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in `what` (header or index) of a file.

    UserError for anything else, also for a key that comes twice.
    """
    try:
        value = parse_json(raw, path, "listing", unique_keys=True)
    except BadFile as error:
        raise fault(path, f"is damaged: its {what} {error.reason}; {_AGAIN}") from None
    if not isinstance(value, dict):
        raise fault(path, f"is damaged: its {what} is {quoted(value)} instead of a JSON object")
    return value


def _header_length(file: PreadFile) -> int:
    """Return the length of the JSON in bytes, at most what the file holds."""
    if file.size < 8:
        text = "is empty" if file.size == 0 else f"has only {file.size} bytes, too few for a safetensors file"
        raise fault(file.path, f"{text}: {_AGAIN}")
    raw = bytearray(8)
    file.read(memoryview(raw), 0, "the length of its header")
    length = int.from_bytes(raw, "little")
    if length > LONGEST_HEADER:
        raise fault(
            file.path, f"is no safetensors file: a header of {length} bytes, at most {LONGEST_HEADER} may be"
        )
    if length > file.size - 8:
        raise fault(file.path, f"is cut off in its header of {length} bytes after {file.size - 8}: {_AGAIN}")
    return length


def _tensor_info(path: Path, data: int, name: str, entry: Any) -> TensorInfo:
    """Return one entry of the header of a file whose data begins at byte `data`."""
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
    return TensorInfo(name, path, dtype, shape, data + offsets[0], held)


def _shape(path: Path, name: str, dtype: torch.dtype, stored: Any) -> tuple[int, ...]:
    """Return the shape as PyTorch counts it."""
    shape, refused = _counts(path, name, "shape", stored), ""
    if dtype is PACKED:
        refused = "" if shape and shape[-1] % 2 == 0 else "and F4 comes in pairs"
        shape = (*shape[:-1], shape[-1] // 2) if not refused else shape
    # Beside a dim of 0 the others could be of any size, but PyTorch still computes the strides.
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize > _LARGEST_INT:
        refused = refused or "too large to address"
    if refused:
        raise fault(path, f"is damaged: {quoted(name)} has shape {quoted(stored)}, {refused}")
    return shape


def _check_entry(path: Path, name: str, entry: Any) -> None:
    """Raise UserError unless an entry has exactly the three fields, a dtype of PyTorch and a Unicode name."""
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
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        hint = did_you_mean(dtype, DTYPES) if isinstance(dtype, str) and len(dtype) < 20 else ""
        raise fault(path, f"has {shown} of dtype {quoted(dtype)}, which PyTorch does not have.{hint}")


def _counts(path: Path, name: str, field: str, values: Any) -> tuple[int, ...]:
    """Return a field that must be a list of integers from 0 to 2**63 - 1."""
    right = isinstance(values, list) and all(
        type(each) is int and 0 <= each <= _LARGEST_INT for each in values
    )
    if not right:
        text = f"{quoted(name)} has {field} {quoted(values)} instead of a list of counts"
        raise fault(path, f"is damaged: {text}")
    return tuple(values)


def _check_layout(file: PreadFile, data: int, tensors: list[TensorInfo]) -> None:
    """Raise UserError unless the tensors, in the order of their offsets, fill the file behind the header."""
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
