"""Initialize weights: normal with one standard deviation (0.006 in V3), norms at 1 (report section 4.2).

Every parameter draws from its own generator, seeded by the run's seed and the parameter's name
(and expert number). Its values therefore depend neither on the order of modules nor on which rank
holds which shard.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from dsv3.model.transformer import Transformer

WriteParameter = Callable[[Tensor, Tensor], object]


@torch.no_grad()
def initialize(model: Transformer, seed: int, write: WriteParameter = Tensor.copy_) -> None:
    """Fill every parameter of a materialized `model`, and set its buffers (expert bias, load) to 0.

    `write(parameter, value)` stores a full fp32 value; for sharded parameters pass one that stores the shard.
    """
    for name, parameter in model.named_parameters():
        write(parameter, initial_value(name, parameter.shape, model.config.init_std, seed))
    for buffer in model.buffers():
        buffer.zero_()


def initial_value(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    """Return the initial fp32 value of parameter `name`; one-dimensional parameters are norm weights.

    A stack of experts [experts, out, in] draws expert by expert, so each expert's values are independent of
    their number.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    if len(shape) == 2:
        return _normal(name, shape, std, seed)
    return torch.stack([_normal(f"{name}.{n}", shape[1:], std, seed) for n in range(shape[0])])


def _normal(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
