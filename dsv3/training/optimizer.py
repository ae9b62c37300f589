"""The optimizer and its view of the parameters."""

from typing import Any

import torch
from torch import Tensor, nn

from dsv3.config import build
from dsv3.training.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Instantiate the configured optimizer; norm weights are left out of weight decay."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim > 1]
    norms = [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    # `params` goes through a partial: Hydra would try to copy tensors handed to it as config.
    optimizer: torch.optim.Optimizer = build(config, _partial_=True)(params=groups)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients to a norm of at most `max_norm`; the norm before, over all shards, a scalar."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
