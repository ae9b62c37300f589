"""Wrap a configured model for training on a mesh. `parallelize` has the wrap order and the reasons for it."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.distributed.torch_private import local_shape_and_offset
from dsv3.fp8.convert_model import enable_fp8_all_gather
from dsv3.metrics.progress import phase
from dsv3.model.attention_kernels import check_kernel
from dsv3.model.initialization import initialize
from dsv3.model.transformer import Transformer
from dsv3.parallel.context_parallel import reduce_router_counts
from dsv3.parallel.expert_parallel import dispatch_in_fp8
from dsv3.parallel.mesh import ParallelMesh
from dsv3.planning.pipeline_stages import reshard_after_forward, splits_backward
from dsv3.training.optimizer import freeze


def build_model(config: Config, mesh: ParallelMesh | None, device: torch.device) -> Transformer:
    """Build the model on `device` with its initial weights, wrapped as the config chooses.

    It starts on the meta device, so that no rank ever holds more than its own shards.
    """
    model = build_on_meta(config, device)
    parallelize(model, model, config, mesh, device)
    materialize(model, config.train.seed, device)
    return model


def build_on_meta(config: Config, device: torch.device) -> Transformer:
    """Build the configured model on meta; raise UserError for an attention kernel that `device` lacks."""
    dtype = getattr(torch, config.precision.compute.value)
    check_kernel(config.model.attention.kernel, device.type, config.task.trains, dtype)
    with torch.device("meta"):
        model = build(config.model, compute_dtype=dtype)
    assert isinstance(model, Transformer)
    return model


def parallelize(
    model: Transformer, root: nn.Module, config: Config, mesh: ParallelMesh | None, device: torch.device
) -> None:
    """Apply the wrappers to `model` in the wrap order, innermost first; `root` is the module that is called.

    The wrap order, and why:
    1. TP, CP, EP and FP8 change what a layer computes, so all later wrappers must see them.
    2. torch.compile compiles a layer's forward alone.
    3. Activation checkpointing calls the compiled code twice; its selective mode could not be traced itself.
    4. FSDP comes last, because its hooks must run outside of compiled and recomputed code.
    """
    parallel = config.parallel
    if mesh is not None:
        for wrapper in (parallel.tensor, parallel.context, parallel.expert):
            if wrapper is not None:
                build(wrapper)(model, mesh)
        reduce_router_counts(model, mesh)
    freeze(model, config.optimizer.frozen if config.task.trains else ())  # the wrappers made parameters anew
    split = mesh is not None and mesh.degrees.pp > 1 and splits_backward(parallel.schedule)
    if config.precision.fp8 is not None:
        fp8 = build(config.precision.fp8)
        # Compiled layers compute all gradients in both halves of a split backward pass and count twice.
        fp8(model, device, counts=not (split and config.compile.enabled))
        if fp8.dispatch:
            dispatch_in_fp8(model, fp8.power_of_two)
    build(config.compile)(model, device, split)
    build(config.recompute)(model)
    if mesh is not None and parallel.fsdp is not None:
        reshard = reshard_after_forward(parallel, mesh.degrees.pp)
        build(parallel.fsdp, reshard_after_forward=reshard)(root, mesh, model.compute_dtype)


def materialize(model: Transformer, seed: int, device: torch.device) -> None:
    """Allocate a wrapped `model` on `device` and set its initial weights."""
    count = sum(parameter.numel() for parameter in model.parameters())
    with phase("initializing weights", count, "parameters") as work:

        def write(parameter: Tensor, value: Tensor) -> None:
            write_shard(parameter, value)
            work.advance(value.numel())

        model.to_empty(device=device)
        enable_fp8_all_gather(model)
        initialize(model, seed, write)


@torch.no_grad()
def write_shard(parameter: Tensor, value: Tensor) -> None:
    """Copy a full `value` into a parameter, or this rank's shard of it into a sharded one."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    local = parameter.to_local()
    if local.numel():
        shape, offset = local_shape_and_offset(parameter)
        local.copy_(value[tuple(slice(start, start + n) for start, n in zip(offset, shape, strict=True))])
