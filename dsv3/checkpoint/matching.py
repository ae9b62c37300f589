"""Whether a checkpoint holds the weights of a model, by its metadata and without memory for either."""

from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.directory import is_released
from dsv3.checkpoint.reader import read_metadata, require_tensors
from dsv3.config import build
from dsv3.model.config import ModelConfig


def require_weights(config: ModelConfig, directory: Path) -> None:
    """UserError that names the first of the model's tensors that `directory` has not, or in another shape."""
    if is_released(directory):
        return  # the reader compares all headers with the model before it reads
    require_tensors(directory, read_metadata(directory), expected_tensors(config))


def expected_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """What a checkpoint of the whole model holds, by name, on the meta device."""
    with torch.device("meta"):
        model = build(config)
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole model's parameters and biases, by the model's own names."""
    return {
        name.removeprefix("model."): tuple(tensor.shape) for name, tensor in expected_tensors(config).items()
    }
