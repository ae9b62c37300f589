"""One tensor of a safetensors file, its types, and how what is wrong with it is told."""

import math
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr

import torch
from torch import Tensor

from dsv3.runtime.errors import UserError

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

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlist = 8


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


def quoted(value: object) -> str:
    """A name or value out of a file, short, in quotes and with everything unprintable escaped."""
    return _SHORT.repr(value)


def fault(file: Path, text: str) -> UserError:
    """What is wrong with a file, in one line that cannot steer the terminal."""
    path = "".join(char if char.isprintable() else "\ufffd" for char in str(file))
    return UserError(f"{path} {text}")
