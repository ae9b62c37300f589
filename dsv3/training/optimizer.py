"""The optimizer and its view of the parameters."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsv3.config import build
from dsv3.precision.config import MomentType
from dsv3.runtime.distributed import Worker
from dsv3.training.config import OptimizerConfig, check_moments

BF16_MOMENTS = "dsv3.training.adamw.BF16MomentAdamW"


def build_optimizer(
    config: OptimizerConfig, parts: Sequence[nn.Module], moments: MomentType = MomentType.fp32
) -> torch.optim.Optimizer:
    """Instantiate the configured optimizer; norm weights are left out of weight decay.

    A group holds parameters of one mesh, as one multi-tensor update cannot span several. InvalidValue for
    `moments` that the optimizer cannot keep.
    """
    check_moments(config, moments)
    if moments is MomentType.bf16:
        config = replace(config, _target_=BF16_MOMENTS)
    grouped: dict[tuple[Any, bool], list[nn.Parameter]] = {}
    for parameter in (p for part in parts for p in part.parameters()):
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        grouped.setdefault((mesh, parameter.ndim > 1), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members} if decays else {"params": members, "weight_decay": 0.0}
        for (_, decays), members in grouped.items()
    ]
    # `params` goes through a partial: Hydra would try to copy tensors handed to it as config.
    optimizer: torch.optim.Optimizer = build(config, _partial_=True)(params=groups)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(parts: Sequence[nn.Module], max_norm: float, worker: Worker) -> Tensor:
    """Scale all gradients to a norm of at most `max_norm`; the norm before, over the whole model, a scalar.

    Each rank adds the squares of what it holds, divided by the ranks that hold the same.
    """
    gradients = [p.grad for part in parts for p in part.parameters() if p.grad is not None and not is_copy(p)]
    norms = torch._foreach_norm([local(gradient) for gradient in gradients])
    shares = torch.tensor([1.0 / copies(gradient) for gradient in gradients], device=worker.device)
    norm = worker.sum((torch.stack(norms).square() * shares).sum()).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    held = [local(p.grad) for part in parts for p in part.parameters() if p.grad is not None]
    torch._foreach_mul_(held, scale)
    return norm


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(tensor: Tensor) -> int:
    """Ranks that hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(axis) for axis, p in enumerate(tensor.placements) if p.is_replicate())


def is_copy(parameter: nn.Parameter) -> bool:
    """Whether another pipeline stage holds this parameter too and counts it."""
    return getattr(parameter, "is_copy", False)
