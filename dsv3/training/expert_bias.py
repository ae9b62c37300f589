"""The selection bias's move after each optimizer step (report section 2.1.2, loss-free balancing).

Routers come by their place among all MoE layers, for a rank may hold those of some layers only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3.model.router import Router

Reduce = Callable[[Tensor], Tensor]


def take_load(
    routers: dict[int, Router], shape: tuple[int, int], reduce: Reduce, device: torch.device | str = "cpu"
) -> Tensor:
    """Load [all MoE layers, experts] of the step's whole global batch; the counters start again from 0.

    `reduce` sums over all ranks: every token of a layer is counted on one of them alone.
    """
    load = torch.zeros(shape, device=device)
    for place, router in routers.items():
        load[place] = router.load
        router.load.zero_()
    return reduce(load)


@torch.no_grad()
def update_biases(routers: dict[int, Router], load: Tensor, speed: float) -> None:
    """b += speed * sign(mean load - load): an overloaded expert gets less likely to be chosen."""
    for place, router in routers.items():
        if router.selection_bias is not None:
            router.selection_bias += speed * torch.sign(load[place].mean() - load[place])


def selection_biases(routers: dict[int, Router]) -> Tensor:
    """The biases [layers, experts] of the layers that have one."""
    biases = [router.selection_bias for router in routers.values() if router.selection_bias is not None]
    return torch.stack(biases) if biases else torch.zeros(1, 1)
