"""Move the expert bias after each optimizer step: aux-loss-free load balancing (report, section 2.1.2).

The router adds the bias (`Router.selection_bias`) to an expert's score when it chooses experts, never to the
weight of the expert's output (model/router.py). The load is counted in the forward pass, by `Router.load`.

Routers come by their place among all MoE layers of the model, because a rank may hold some layers only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3.model.router import Router

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""


def take_expert_load(
    routers: dict[int, Router], shape: tuple[int, int], reduce: Reduce, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the tokens per expert in the step's global batch, and reset the routers' counters to 0.

    The load is fp32 of `shape` [all MoE layers, experts]. `reduce` sums over all ranks: every token of a
    layer is counted on one of them alone.
    """
    load = torch.zeros(shape, device=device)
    for place, router in routers.items():
        load[place] = router.load
        router.load.zero_()
    return reduce(load)


@torch.no_grad()
def update_expert_bias(
    routers: dict[int, Router], load: Tensor, speed: float, skip: Tensor | None = None
) -> None:
    """Move each bias by `speed`: up for an expert below its layer's mean load, down for one above.

    b += speed * sign(mean load - load), with the `load` [all MoE layers, experts] of the global batch.
    Routers without a bias, and those whose bias is frozen, stay as they are, and so do all where `skip`, a
    bool on the device, is true.
    """
    for place, router in routers.items():
        if router.selection_bias is not None and router.bias_moves:
            bias, change = router.selection_bias, speed * torch.sign(load[place].mean() - load[place])
            bias.copy_(bias + change if skip is None else torch.where(skip, bias, bias + change))


def stack_expert_bias(routers: dict[int, Router], device: torch.device | str = "cpu") -> Tensor:
    """Return the biases [layers, experts] of the routers that have one, zeros [1, 1] where none has.

    All are on `device`: a pipeline stage may have no router.
    """
    biases = [router.selection_bias for router in routers.values() if router.selection_bias is not None]
    return torch.stack(biases) if biases else torch.zeros(1, 1, device=device)
