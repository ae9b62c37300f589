"""From a configured model to one that trains on this mesh: what wraps what, and why in this order."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from dsv3.config import Config, build
from dsv3.model.initialization import initialize
from dsv3.model.kernels import check_kernel
from dsv3.model.transformer import Transformer


def build_model(config: Config, mesh: DeviceMesh | None, device: torch.device) -> Transformer:
    """The model on `device` with its initial weights, wrapped as the config chooses.

    It is built on the meta device, so that no rank ever holds more than its own shards.
    """
    dtype = getattr(torch, config.precision.compute.value)
    check_kernel(config.model.attention.kernel, device.type, config.task.trains, dtype)
    with torch.device("meta"):
        model = build(config.model, compute_dtype=dtype)
    assert isinstance(model, Transformer)
    parallelize(model, config, mesh, device)
    model.to_empty(device=device)
    initialize(model, config.train.seed, write)
    return model


def parallelize(model: Transformer, config: Config, mesh: DeviceMesh | None, device: torch.device) -> None:
    """Put the wrappers around `model`, innermost first.

    Recomputation wraps a layer's forward, so that compilation sees the recomputed region as a whole;
    sharding comes last, because its hooks must run outside of both.
    """
    build(config.recompute)(model)
    build(config.compile)(model, device)
    if config.parallel.fsdp is not None and mesh is not None:
        shard = build(config.parallel.fsdp, reshard_after_forward=config.parallel.reshard_after_forward)
        shard(model, mesh)


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Store a full `value` in a parameter, or this rank's part of it where the parameter is sharded."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        # src_data_rank=None: every rank has the full value, so nothing needs to be sent.
        part = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    else:
        parameter.copy_(value)
