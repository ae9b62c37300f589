"""Reads the safetensors files of a released checkpoint, tensor by tensor."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3.checkpoint.names import released_parts
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import Transformer
from dsv3.runtime.errors import UserError

SCALE = "_scale_inv"
"""What a block-fp8 weight's name ends with where its scales are stored."""
BLOCK = 128
"""Rows and columns that share a scale."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Moonlight and Kimi K2 store it; like all of HF's rotary tables it follows from config.json.
_DERIVED = "self_attn.rotary_emb.inv_freq"


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
        tensor, scaled = self._stored(name), name + SCALE in self.files
        if scaled is not (tensor.dtype is torch.float8_e4m3fn):
            have = "has" if scaled else "has no"
            raise UserError(f"{self.directory}: '{name}' of {tensor.dtype} {have} scales '{name + SCALE}'")
        if scaled:
            scales = self._stored(name + SCALE)
            grid = [-(-length // BLOCK) for length in tensor.shape]
            if tensor.ndim != 2 or list(scales.shape) != grid:
                raise UserError(
                    f"{self.directory}: '{name + SCALE}' has shape {list(scales.shape)}, the weight's "
                    f"{list(tensor.shape)} in blocks of {BLOCK} needs {grid}"
                )
            return dequantize(tensor, scales)
        if tensor.dtype not in _DTYPES:
            known = "float32, bfloat16, float16 and float8_e4m3fn"
            raise UserError(f"{self.directory}: '{name}' is of {tensor.dtype}; supported: {known}")
        return tensor

    def has_layer(self, number: int) -> bool:
        """Whether anything of `model.layers.NUMBER` is stored."""
        return any(name.startswith(f"model.layers.{number}.") for name in self.files)

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
    """Fill a model on one device from a released checkpoint.

    UserError names what is missing, misshapen or left over; MTP layers alone may be left over.
    """
    with ReleasedWeights(directory) as weights:
        for _, place, value in _values(model, weights):
            place.copy_(value)


@torch.no_grad()
def released_norms(model: Transformer, directory: Path) -> dict[str, float]:
    """The norms of a checkpoint's tensors by our names, read one by one for a `model` on the meta device.

    UserError as for `load_released`; a tensor with numbers that are not finite has no finite norm.
    """
    squares: dict[str, float] = {}
    with ReleasedWeights(directory) as weights:
        for name, _, value in _values(model, weights):
            squares[name] = squares.get(name, 0.0) + float(value.float().norm()) ** 2
    return {name: math.sqrt(square) for name, square in squares.items()}


def _values(model: Transformer, weights: ReleasedWeights) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every stored tensor with our parameter's name and its place in it."""
    targets = model.state_dict()
    parts = {name: list(released_parts(name, model.config)) for name in targets}
    _check_names(weights, {part.source for group in parts.values() for part in group}, model.config)
    for name, target in targets.items():
        for part in parts[name]:
            place = target if part.index is None else target[part.index]
            place = place if part.rows is None else place[slice(*part.rows)]
            value = weights.read(part.source)
            if value.shape != place.shape:
                raise UserError(
                    f"{weights.directory}: '{part.source}' has shape {list(value.shape)}, "
                    f"config.json makes it {list(place.shape)}"
                )
            yield name, place, value


def _check_names(weights: ReleasedWeights, wanted: set[str], config: ModelConfig) -> None:
    """UserError for a tensor that the model has no place for, or an MTP layer that was never saved."""
    first_mtp = config.num_layers
    if config.mtp_depths and not weights.has_layer(first_mtp):
        raise UserError(
            f"{weights.directory} has no 'model.layers.{first_mtp}.enorm.weight', nor anything else of that "
            "MTP layer: model.mtp_depths=0 leaves it out"
        )
    for name in weights.files:
        layer = _LAYER.fullmatch(name)
        left_out = layer is not None and (int(layer[1]) >= first_mtp or layer[2] == _DERIVED)
        if name.removesuffix(SCALE) not in wanted and not left_out:
            raise UserError(
                f"{weights.directory} has '{name}', for which the model of its config.json has no place"
            )


def dequantize(weight: Tensor, scales: Tensor, block: int = BLOCK) -> Tensor:
    """fp32 [rows, columns] of an fp8 `weight` with one scale a block x block; edge blocks may be partial."""
    rows, columns = weight.shape
    spread = scales.float().repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return weight.float() * spread


def _files_by_tensor(directory: Path) -> dict[str, str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            stored = dict(json.loads(index.read_text())["weight_map"])
            return {str(name): str(file) for name, file in stored.items()}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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
