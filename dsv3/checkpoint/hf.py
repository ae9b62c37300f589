"""A live model and released weights: what files hold, and a model's weights as they would be released."""

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dsv3.checkpoint.boxes import inside, overlap
from dsv3.checkpoint.matching import parameter_shapes
from dsv3.checkpoint.released.names import Released, copies, released_layout, stored_dtype
from dsv3.checkpoint.released.shards import open_shards
from dsv3.checkpoint.released.stored_tensor import byte_view
from dsv3.checkpoint.weights import open_released
from dsv3.model.config import ModelConfig
from dsv3.parallel.distributed import Distributed

_ROWS = 1024


def has_layer(directory: Path, number: int) -> bool:
    """Whether a released checkpoint stores anything of `model.layers.NUMBER`."""
    return any(name.startswith(f"model.layers.{number}.") for name in open_shards(directory))


def released_norms(config: ModelConfig, directory: Path) -> dict[str, float]:
    """The norms of a checkpoint's weights by our names, read a few rows at a time.

    UserError as of ReleasedSource; a tensor with numbers that are not finite has no finite norm.
    """
    squares: dict[str, float] = {}
    with closing(open_released(directory, config)) as source:
        for tensor in source.layout:
            rows = tensor.shape[0] if tensor.shape else 1
            for first in range(0, rows, _ROWS):
                out = torch.empty(min(_ROWS, rows - first), *tensor.shape[1:])
                norm = float(source.rows(tensor, first, out.shape[0], out).norm())
                squares[tensor.parameter] = squares.get(tensor.parameter, 0.0) + norm**2
    return {name: math.sqrt(square) for name, square in squares.items()}


def streamed(config: ModelConfig) -> list[tuple[str, Released]]:
    """What `stream` yields, in its order: names, and which part of which parameter each is."""
    tensors = {tensor.name: tensor for tensor in released_layout(config, parameter_shapes(config))}
    return [*tensors.items(), *((copy, tensors[name]) for copy, name in copies(config).items())]


@torch.no_grad()
def stream(model: Distributed, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Tensor]]:
    """Yield (released name, whole tensor in `dtype`) of a live model on any layout, layer by layer.

    All ranks iterate together, to the end, and all get the tensors, on the model's device. Memory is one
    released tensor (of a stack of experts one expert's matrix). Selection biases stay fp32.
    """
    here = model.named_tensors()
    for name, tensor in streamed(model.parts[0].config):
        whole = torch.zeros(tensor.shape, dtype=stored_dtype(tensor, dtype), device=model.device)
        if tensor.parameter in here:
            _copy_here(here[tensor.parameter], tensor, whole)
        if model.mesh is not None:
            # Ranks that have the same part have the same bytes, the others zeros: the largest byte is
            # exact, where a sum would turn -0 into 0 and count replicas twice.
            dist.all_reduce(byte_view(whole), dist.ReduceOp.MAX, group=model.mesh.world)
        yield name, whole


def _copy_here(parameter: Tensor, tensor: Released, whole: Tensor) -> None:
    """Copy what this rank's shard of a parameter has of a released tensor to its place."""
    offset = tuple(0 for _ in parameter.shape)
    local = parameter
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        _, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    if not local.numel():
        return
    shared = overlap(tensor.offset, tensor.sizes, offset, local.shape)
    if shared is not None:
        whole.view(tensor.sizes)[inside(*shared, tensor.offset)].copy_(local[inside(*shared, offset)])
