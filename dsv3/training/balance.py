"""The selection bias's move after each optimizer step (report section 2.1.2, loss-free balancing)."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3.model.router import Router

Reduce = Callable[[Tensor], Tensor]


def take_load(routers: list[Router], reduce: Reduce) -> Tensor:
    """Load [layers, experts] of the step's whole global batch; the counters start again from 0.

    `reduce` sums over the ranks that saw other tokens.
    """
    if not routers:
        return torch.zeros(0, 1)
    load = reduce(torch.stack([router.load for router in routers]))
    for router in routers:
        router.load.zero_()
    return load


@torch.no_grad()
def update_biases(routers: list[Router], load: Tensor, speed: float) -> None:
    """b += speed * sign(mean load - load): an overloaded expert gets less likely to be chosen."""
    for router, counts in zip(routers, load, strict=True):
        if router.selection_bias is not None:
            router.selection_bias += speed * torch.sign(counts.mean() - counts)


def selection_biases(routers: list[Router]) -> Tensor:
    """The biases [layers, experts] of the layers that have one."""
    biases = [router.selection_bias for router in routers if router.selection_bias is not None]
    return torch.stack(biases) if biases else torch.zeros(0, 1)
