"""Metrics of expert load balance: how evenly the router spreads the tokens of a step over the experts.

Results stay on the device of their input, so nothing here waits for a GPU. The caller sums the counts over
ranks: they are those of the global batch.
"""

import math

from torch import Tensor


def max_violation(load: Tensor) -> Tensor:
    """Return max load / mean load - 1, the largest over the layers; an fp32 scalar.

    0 is an even load, experts - 1 is one expert for all tokens. This is MaxVio of Wang et al. 2024
    (arXiv:2408.15664). `load` [layers, experts] counts the tokens per expert, in any real or integer dtype,
    with at least one layer. A layer without load counts as even.
    """
    load = load.float()
    mean = load.mean(dim=-1)
    violation = load.amax(dim=-1) / mean.where(mean > 0, 1) - 1
    return violation.where(mean > 0, 0).amax()


def entropy(load: Tensor) -> Tensor:
    """Return the entropy of the expert load in units of log(experts), mean over the layers; an fp32 scalar.

    1 is an even load, 0 is one expert for all tokens. `load` is as for `max_violation`; a layer without load,
    or of one expert, counts as even.
    """
    load = load.float()
    experts = load.shape[-1]
    total = load.sum(dim=-1, keepdim=True)
    share = load / total.where(total > 0, 1)
    nats = -share.xlogy(share).sum(dim=-1)
    even = (total.squeeze(-1) == 0) | (experts == 1)
    return (nats / math.log(max(experts, 2))).where(~even, 1).mean()


def bias_range(bias: Tensor) -> Tensor:
    """Return max - min of the expert bias [layers, experts], the largest over the layers; an fp32 scalar."""
    bias = bias.float()
    return (bias.amax(dim=-1) - bias.amin(dim=-1)).amax()
