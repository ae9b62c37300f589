"""Whether a checkpoint holds the weights of a model, by its metadata and without memory for either."""

from pathlib import Path

import torch

from dsv3.checkpoint.reader import read_metadata, require_tensors
from dsv3.config import build
from dsv3.model.config import ModelConfig


def require_weights(config: ModelConfig, directory: Path) -> None:
    """UserError that names the first of the model's tensors that `directory` has not, or in another shape."""
    with torch.device("meta"):
        model = build(config)
    targets = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    require_tensors(directory, read_metadata(directory), targets)
