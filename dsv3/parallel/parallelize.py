"""Wrap a configured model for training on a mesh. `parallelize` has the wrap order and the reasons for it."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsv3.checkpoint.state import local_tensor
from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.distributed.torch_private import local_shape_and_offset
from dsv3.fp8.convert_model import enable_fp8_all_gather
from dsv3.metrics.progress import phase
from dsv3.model.attention_kernels import check_kernel
from dsv3.model.initialization import Shard, initialize, whole
from dsv3.model.transformer import Transformer
from dsv3.parallel.context_parallel import join_sequence_shards
from dsv3.parallel.expert_parallel import dispatch_in_fp8
from dsv3.parallel.mesh import ParallelMesh
from dsv3.planning.pipeline_stages import reshard_after_forward, splits_backward
from dsv3.training.optimizer import freeze


def build_model(
    config: Config, mesh: ParallelMesh | None, device: torch.device, initial: bool = True
) -> Transformer:
    """Build the model on `device`, wrapped as the config chooses; see `materialize` for its weights.

    It starts on the meta device, so that no rank ever holds more than its own shards.
    """
    model = build_on_meta(config, device)
    parallelize(model, model, config, mesh, device)
    materialize(model, config, mesh, device, initial)
    return model


def build_on_meta(config: Config, device: torch.device) -> Transformer:
    """Build the configured model on meta; raise UserError for an attention kernel that `device` lacks.

    On a GPU it also sets how this process computes fp32 matmuls (precision.matmul).
    """
    dtype = getattr(torch, config.precision.compute.value)
    if device.type == "cuda":
        torch.set_float32_matmul_precision(config.precision.matmul.value)
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
        join_sequence_shards(model, mesh)
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


@torch.no_grad()
def materialize(
    model: Transformer, config: Config, mesh: ParallelMesh | None, device: torch.device, initial: bool
) -> None:
    """Allocate a wrapped `model` on `device` and set its initial weights, this rank's shards alone.

    Without `initial` a checkpoint will fill the weights: nothing is drawn. They are nan until then, and so is
    the expert bias, so that one that nothing fills does not pass for a weight.
    """
    fsdp = config.parallel.fsdp
    offload = mesh is not None and fsdp is not None and fsdp.cpu_offload
    model.to_empty(device=torch.device("cpu") if offload else device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):  # FSDP offloads parameters alone
            setattr(module, name, torch.zeros_like(buffer, device=device))
    enable_fp8_all_gather(model)
    if initial:
        count = sum(shard_of(parameter)[0].numel() for parameter in model.parameters())
        with phase("initializing weights", count, "parameters") as work:
            initialize(model, config.train.seed, shard_of, work.advance)
    else:
        for tensor in model.state_dict().values():
            local_tensor(tensor).fill_(torch.nan)


def shard_of(parameter: Tensor) -> Shard:
    """Return this rank's shard of a parameter, which may be empty, and its place in the whole parameter."""
    if not isinstance(parameter, DTensor):
        return whole(parameter)
    local = parameter.to_local()
    shape, offset = local_shape_and_offset(parameter)
    assert not local.numel() or local.shape == shape, (local.shape, shape)
    return local, offset


@torch.no_grad()
def write_shard(parameter: Tensor, value: Tensor) -> None:
    """Copy a full `value` into a parameter, or this rank's shard of it into a sharded one."""
    local, offset = shard_of(parameter)
    if local.numel():
        box = (slice(start, start + n) for start, n in zip(offset, local.shape, strict=True))
        local.copy_(value[tuple(box)])
