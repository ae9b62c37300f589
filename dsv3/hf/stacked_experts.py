"""See stacked experts of an HF checkpoint as the tensors of single experts that releases store.

transformers 5 keeps the experts of a layer as two stacks, gate_up_proj [experts, 2 x hidden, dim] and
down_proj [experts, dim, hidden], and saves them so on request (`save_original_format=False`). A stack is
row-major: the matrices of one expert are a range of its bytes, the rows of gate_proj before those of up_proj.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from dsv3.errors import quoted
from dsv3.hf.names import SCALE_SUFFIX
from dsv3.hf.pread_file import fault
from dsv3.hf.safetensors_header import TensorInfo

_STACK = re.compile(rf"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)({SCALE_SUFFIX})?")

_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""A stack -> the matrices of one expert in it, row halves in this order."""


def split_stacks(stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors with each stack replaced by an entry per matrix of an expert; nothing is read.

    UserError for a stack that has no rows per expert, or beside single experts of the same layer.
    """
    found: dict[str, TensorInfo] = {}
    for name, entry in stored.items():
        stack = _STACK.fullmatch(name)
        if stack is None:
            found[name] = entry
            continue
        for matrix, part in _matrices(stack, entry):
            if matrix in stored:
                text = f"has {quoted(name)}, and {quoted(matrix)} is there as well: remove one"
                raise fault(entry.file, text)
            found[matrix] = part
    return found


def _matrices(stack: re.Match[str], entry: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the name of each expert's matrix, or its scale grid, and where it lies."""
    prefix, kind, scales = stack[1], stack[2], stack[3] or ""
    halves = _MATRICES[kind]
    if len(entry.shape) != 3 or entry.shape[1] % len(halves):
        what = "even rows per expert" if len(halves) > 1 else "a matrix per expert"
        text = f"has {quoted(entry.name)} of shape {list(entry.shape)}: a stack of experts needs {what}"
        raise fault(entry.file, text)
    experts, rows, columns = entry.shape
    shape = (rows // len(halves), columns)
    nbytes = shape[0] * columns * entry.dtype.itemsize
    for expert in range(experts):
        for number, half in enumerate(halves):
            offset = entry.offset + (expert * len(halves) + number) * nbytes
            part = replace(entry, shape=shape, offset=offset, nbytes=nbytes)
            yield f"{prefix}{expert}.{half}.weight{scales}", part
