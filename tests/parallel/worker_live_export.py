"""Worker side: stream the weights of a live model from every rank."""

import torch
from torch import Tensor

from dsv3.config.root import Config
from dsv3.convert.live_export import stream
from dsv3.planning.layout import ParallelDims
from tests.parallel.tiny_training import prepared


def stream_weights(
    config: Config, degrees: ParallelDims | None
) -> dict[torch.dtype, list[tuple[str, Tensor]]] | None:
    """Return the tensors that this rank gets in each dtype; None on ranks that the layout leaves out."""
    setup = prepared(config, degrees, "sgd")
    if setup is None:
        return None
    return {
        dtype: [(name, tensor.clone()) for name, tensor in stream(setup[0], dtype)]
        for dtype in (torch.bfloat16, torch.float32)
    }
