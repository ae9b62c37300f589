"""Write safetensors files front to back: every header is complete before the first tensor exists.

The safetensors library writes a file only from tensors that are all in memory, up to 5 GB of them.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from dsv3.hf.names import SCALE_SUFFIX
from dsv3.hf.safetensors_header import DTYPE_NAMES, METADATA, PACKED, TensorInfo, byte_view

Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor to be written."""


@dataclass(frozen=True)
class SafetensorsPlan:
    """A file to be written: its name, its header and the place of each tensor."""

    name: str
    header: bytes
    """All bytes before the data, the eight of the length included."""
    tensors: tuple[TensorInfo, ...]
    """In the order of writing; their `file` is the bare name."""

    @property
    def data_nbytes(self) -> int:
        """Return the bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole file."""
        return len(self.header) + self.data_nbytes


def plan_files(tensors: Sequence[Entry], max_shard_size: int) -> list[SafetensorsPlan]:
    """Return files of at most `max_shard_size` bytes, in the order given; a larger tensor stays whole.

    A weight and its scales behind it share a file. Files are named as transformers names them.
    """
    counts = Counter([METADATA, *(name for name, _, _ in tensors)])
    for name, count in counts.items():
        if count > 1:
            raise RuntimeError(f"'{name}' is planned twice")
    groups = _split_into_files(tensors, max_shard_size)
    if len(groups) == 1:
        return [_plan("model.safetensors", groups[0])]
    count = len(groups)
    return [
        _plan(f"model-{number:05d}-of-{count:05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def index_json(plans: Sequence[SafetensorsPlan]) -> str:
    """Return the text of model.safetensors.index.json, laid out as by transformers; sizes in bytes."""
    weight_map = {tensor.name: plan.name for plan in plans for tensor in plan.tensors}
    index = {
        "metadata": {"total_size": sum(plan.data_nbytes for plan in plans)},
        "weight_map": weight_map,
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


class SafetensorsWriter:
    """Appends one planned file to `sink` (binary, open for writing; it stays open).

    As a context manager it checks at the end that nothing is missing. RuntimeError for tensors that the plan
    does not have; an OSError of the sink (a full disk) passes through.
    """

    def __init__(self, plan: SafetensorsPlan, sink: BinaryIO) -> None:
        self.plan = plan
        self._sink = sink
        self._number = 0
        self._written = 0
        self._append(memoryview(plan.header))

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()

    def write(self, name: str, rows: Tensor) -> None:
        """Append the next rows of a tensor (any number of them; a scalar as it is), in the plan's order.

        Tensors without elements need no call. Contiguous rows on the CPU are not copied.
        """
        tensor = self._next(name)
        if tensor is None or tensor.name != name:
            raise RuntimeError(f"{self.plan.name} cannot take '{name}' now: {self._wanted()}")
        fits = tuple(rows.shape[1:]) == tensor.shape[1:] and rows.dim() == len(tensor.shape)
        if rows.dtype is not tensor.dtype or not fits:
            got = f"{rows.dtype} of shape {tuple(rows.shape)}"
            raise RuntimeError(f"'{name}' is planned as {tensor.dtype} of shape {tensor.shape}, got {got}")
        data = byte_view(rows.cpu().contiguous())
        if self._written + len(data) > tensor.nbytes:
            raise RuntimeError(f"'{name}' has {tensor.nbytes} bytes, got {self._written} + {len(data)}")
        if len(data):
            self._append(data.numpy().data)
        self._written += len(data)

    def finish(self) -> None:
        """Raise RuntimeError unless every tensor has got all its bytes."""
        if self._next(None) is not None:
            raise RuntimeError(f"{self.plan.name} is not complete: {self._wanted()}")

    def _next(self, name: str | None) -> TensorInfo | None:
        """Return the first tensor that is called `name` or is not complete yet; None behind the last one."""
        tensors = self.plan.tensors
        while self._number < len(tensors):
            tensor = tensors[self._number]
            if tensor.name == name or self._written < tensor.nbytes:
                return tensor
            self._number, self._written = self._number + 1, 0
        return None

    def _wanted(self) -> str:
        """Return what the plan asks for next, for a message."""
        if self._number == len(self.plan.tensors):
            return "all is written"
        tensor = self.plan.tensors[self._number]
        return f"'{tensor.name}' has {self._written} of {tensor.nbytes} bytes"

    def _append(self, data: memoryview) -> None:
        while data:  # an unbuffered file may take less than all
            data = data[self._sink.write(data) :]


def _split_into_files(tensors: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Return the tensors of each file."""
    groups: list[list[Entry]] = []
    room = 0
    for number, entry in enumerate(tensors):
        size = needed = _nbytes(entry)
        behind = tensors[number + 1 : number + 2]
        if behind and behind[0][0] == entry[0] + SCALE_SUFFIX:
            needed += _nbytes(behind[0])
        # Scales are known once their weight is written: they follow it, even over the limit.
        follows = number > 0 and entry[0] == tensors[number - 1][0] + SCALE_SUFFIX
        if not groups or (needed > room and not follows):
            groups.append([])
            room = limit
        groups[-1].append(entry)
        room -= size
    return groups


def _nbytes(entry: Entry) -> int:
    return math.prod(entry[2]) * entry[1].itemsize


def _plan(name: str, entries: Sequence[Entry]) -> SafetensorsPlan:
    """Return the plan of one file."""
    header: dict[str, object] = {METADATA: {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry[0]] = {
            "dtype": DTYPE_NAMES[entry[1]],
            "shape": [*entry[2][:-1], 2 * entry[2][-1]] if entry[1] is PACKED else entry[2],
            "data_offsets": [end, end := end + _nbytes(entry)],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data for every dtype
    begin = 8 + len(text)
    tensors = []
    for entry in entries:
        tensors.append(TensorInfo(entry[0], Path(name), entry[1], entry[2], begin, _nbytes(entry)))
        begin += _nbytes(entry)
    return SafetensorsPlan(name, len(text).to_bytes(8, "little") + text, tuple(tensors))
