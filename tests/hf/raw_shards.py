"""Make safetensors files by hand, valid and damaged ones, and tensors of every dtype and shape."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dsv3.hf.safetensors_header import DTYPES


def raw(header: Any, data: bytes = b"") -> bytes:
    """Return a file of this header (an object, or the text itself) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    """Return a tensor's entry of a header; by default as many F32 as fit between begin and end."""
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def index(directory: Path, weight_map: Any) -> None:
    """Write the index of a directory."""
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


def noise(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return a tensor of random bytes (bools: 0 and 1), so with every kind of NaN."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype is torch.bool else 256
    count = math.prod(shape) * dtype.itemsize
    found = torch.randint(0, top, (count,), generator=generator, dtype=torch.uint8)
    return found.view(dtype).reshape(shape)


def same(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors are equal in dtype, shape and every bit."""
    if left.dtype is not right.dtype or left.shape != right.shape:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (left, right)))


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Draw some tensors by name, of any dtypes, scalars and empty ones among them."""
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    found: dict[str, Tensor] = {}
    for name in draw(st.lists(names, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
        least = 1 if dtype is torch.float4_e2m1fn_x2 else 0
        shape = draw(st.lists(st.integers(0, 5), min_size=least, max_size=4))
        found[name] = noise(dtype, tuple(shape), seed=len(found))
    return found
