"""Reads the safetensors files of a released checkpoint, tensor by tensor."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3.checkpoint.names import released_parts
from dsv3.model.transformer import Transformer
from dsv3.runtime.errors import UserError

SCALE = "_scale_inv"
"""What a block-fp8 weight's name ends with where its scales are stored."""


class ReleasedWeights:
    """The tensors of a directory of safetensors files; at most one of them is in memory at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = _files_by_tensor(directory)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "ReleasedWeights":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """One tensor as stored; block-fp8 weights come back in fp32, multiplied by their scales."""
        tensor = self._stored(name)
        if tensor.dtype is not torch.float8_e4m3fn:
            return tensor
        if name + SCALE not in self.files:
            raise UserError(f"{self.directory}: the fp8 tensor '{name}' has no '{name + SCALE}'")
        return dequantize(tensor, self._stored(name + SCALE))

    def _stored(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"{self.directory} has no tensor '{name}', which its config.json asks for")
        file = self.files[name]
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(self.directory / file, "pt"))
            tensor: Tensor = self._open[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.directory / file} cannot be read: {error}") from None
        return tensor


@torch.no_grad()
def load_released(model: Transformer, directory: Path) -> None:
    """Fill a model on one device from a released checkpoint; UserError names what is missing or misshapen.

    MTP layers that the files leave out keep no weights: build the model with mtp_depths=0 for those.
    """
    with ReleasedWeights(directory) as weights:
        for name, target in model.state_dict().items():
            for part in released_parts(name, model.config):
                place = target if part.index is None else target[part.index]
                place = place if part.rows is None else place[slice(*part.rows)]
                value = weights.read(part.source)
                if value.shape != place.shape:
                    raise UserError(
                        f"{directory}: '{part.source}' has shape {list(value.shape)}, "
                        f"config.json makes it {list(place.shape)}"
                    )
                place.copy_(value)


def dequantize(weight: Tensor, scales: Tensor, block: int = 128) -> Tensor:
    """fp32 [rows, columns] of an fp8 `weight` with one scale a block x block; edge blocks may be partial."""
    rows, columns = weight.shape
    spread = scales.float().repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return weight.float() * spread


def _files_by_tensor(directory: Path) -> dict[str, str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            return dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} cannot be read: {error!r}") from None
    files: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path.name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    if not files:
        raise UserError(f"{directory} holds no .safetensors files")
    return files
