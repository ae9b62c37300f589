"""Initial weights: normal with one standard deviation, norms at 1 (report section 4.2).

Every parameter draws from a generator of its own, seeded by the run's seed and the parameter's name
(and expert number), so that its values depend neither on the order of modules nor on which rank
holds which part.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv3.model.transformer import Transformer

Write = Callable[[Tensor, Tensor], object]


@torch.no_grad()
def initialize(model: Transformer, seed: int, write: Write = Tensor.copy_) -> None:
    """Fill every parameter and buffer of a materialised `model`.

    `write(parameter, value)` stores a full value; a sharded parameter needs one that keeps its part.
    """
    for name, parameter in model.named_parameters():
        write(parameter, initial_value(name, parameter.shape, model.config.init_std, seed))
    for buffer in model.buffers():
        buffer.zero_()


def initial_value(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    """The fp32 value of parameter `name` at the start; one-dimensional parameters are norm weights."""
    if len(shape) == 1:
        return torch.ones(shape)
    if len(shape) == 2:
        return _normal(name, shape, std, seed)
    return torch.stack([_normal(f"{name}.{n}", shape[1:], std, seed) for n in range(shape[0])])


def parameter_count(model: nn.Module) -> int:
    """Parameters, each once, buffers (the selection biases) left out."""
    return sum(parameter.numel() for parameter in model.parameters())


def _normal(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
