"""A model's weights streamed from every rank; runs in the workers."""

import torch
from torch import Tensor

from dsv3.checkpoint.hf import stream
from dsv3.config import Config
from dsv3.parallel.degrees import Degrees
from tests.distributed.training import prepared


def streamed(config: Config, degrees: Degrees | None, dtype: torch.dtype) -> list[tuple[str, Tensor]] | None:
    """What this rank gets; None on ranks that the layout leaves out."""
    setup = prepared(config, degrees, "sgd")
    return None if setup is None else [(name, tensor.clone()) for name, tensor in stream(setup[0], dtype)]
