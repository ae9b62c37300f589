"""How evenly the router spreads tokens: three numbers from the counts of a step.

Everything stays on the device of its input: nothing here waits for a GPU. The counts are those of the
global batch, summed over ranks by the caller.
"""

import math

from torch import Tensor


def max_violation(load: Tensor) -> Tensor:
    """Max load / mean load - 1, the largest over the layers: 0 is even, experts - 1 is one expert for all.

    `load [layers, experts]` counts the tokens each expert received, of any real or integer type; there is
    at least one layer. A layer without load counts as even. MaxVio of Wang et al. 2024 (arXiv:2408.15664).
    """
    load = load.float()
    mean = load.mean(dim=-1)
    violation = load.amax(dim=-1) / mean.where(mean > 0, 1) - 1
    return violation.where(mean > 0, 0).amax()


def entropy(load: Tensor) -> Tensor:
    """Entropy of the expert load in units of log(experts), mean over the layers: 1 is even, 0 is collapse.

    `load [layers, experts]` as in `max_violation`; a layer without load, or of one expert, counts as even.
    """
    load = load.float()
    experts = load.shape[-1]
    total = load.sum(dim=-1, keepdim=True)
    share = load / total.where(total > 0, 1)
    nats = -share.xlogy(share).sum(dim=-1)
    even = (total.squeeze(-1) == 0) | (experts == 1)
    return (nats / math.log(max(experts, 2))).where(~even, 1).mean()


def bias_range(bias: Tensor) -> Tensor:
    """Max - min of the selection bias `bias [layers, experts]`, the largest over the layers."""
    bias = bias.float()
    return (bias.amax(dim=-1) - bias.amin(dim=-1)).amax()
