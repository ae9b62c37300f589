"""From a configured model to one that trains on this mesh: what wraps what, and why in this order."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.fp8.convert_model import gather_weights
from dsv3.model.attention_kernels import check_kernel
from dsv3.model.initialization import initialize
from dsv3.model.transformer import Transformer
from dsv3.parallel.context_parallel import reduce_router_counts
from dsv3.parallel.expert_parallel import send_in_fp8
from dsv3.parallel.mesh import ParallelMesh
from dsv3.planning.pipeline_stages import reshard_after_forward, splits_backward


def build_model(config: Config, mesh: ParallelMesh | None, device: torch.device) -> Transformer:
    """The model on `device` with its initial weights, wrapped as the config chooses.

    It is built on the meta device, so that no rank ever holds more than its own shards.
    """
    model = build_on_meta(config, device)
    parallelize(model, model, config, mesh, device)
    materialize(model, config.train.seed, device)
    return model


def build_on_meta(config: Config, device: torch.device) -> Transformer:
    """The whole configured model without memory; UserError for a kernel that `device` lacks."""
    dtype = getattr(torch, config.precision.compute.value)
    check_kernel(config.model.attention.kernel, device.type, config.task.trains, dtype)
    with torch.device("meta"):
        model = build(config.model, compute_dtype=dtype)
    assert isinstance(model, Transformer)
    return model


def parallelize(
    model: Transformer, root: nn.Module, config: Config, mesh: ParallelMesh | None, device: torch.device
) -> None:
    """Put the wrappers around `model`, innermost first; `root` is the module that is called.

    Those that change what a layer computes come first, for all others to see. Compilation is next, of
    a layer's forward alone: recomputation calls compiled code twice, and its modes that keep results could
    not be traced. Sharding comes last, because its hooks must run outside of both.
    """
    chosen = config.parallel
    if mesh is not None:
        for wrapper in (chosen.tensor, chosen.context, chosen.expert):
            if wrapper is not None:
                build(wrapper)(model, mesh)
        reduce_router_counts(model, mesh)
    split = mesh is not None and mesh.degrees.pp > 1 and splits_backward(chosen.schedule)
    if config.precision.fp8 is not None:
        in_fp8 = build(config.precision.fp8)
        # Compiled layers compute all gradients in both passes, and the count with them.
        in_fp8(model, device, counts=not (split and config.compile.enabled))
        if in_fp8.dispatch:
            send_in_fp8(model, in_fp8.power_of_two)
    build(config.compile)(model, device, split)
    build(config.recompute)(model)
    if mesh is not None and chosen.fsdp is not None:
        reshard = reshard_after_forward(chosen, mesh.degrees.pp)
        build(chosen.fsdp, reshard_after_forward=reshard)(root, mesh, model.compute_dtype)


def materialize(model: Transformer, seed: int, device: torch.device) -> None:
    """Give a wrapped `model` memory on `device` and its initial weights."""
    model.to_empty(device=device)
    gather_weights(model)
    initialize(model, seed, write)


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Store a full `value` in a parameter, or this rank's part of it where the parameter is sharded."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    local = parameter.to_local()
    if local.numel():
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        local.copy_(value[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))])
