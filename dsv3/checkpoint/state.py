"""What of a training run is tensors, by the names that a checkpoint gives them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.model.transformer import Transformer

Parts = Sequence[Transformer]
"""What a rank has of the model: all of it, or some stages of a pipeline."""


def model_state(parts: Parts) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name; what two stages both have, as the embedding, is there twice."""
    return [(f"model.{name}", tensor) for part in parts for name, tensor in part.state_dict().items()]


def optimizer_state(parts: Parts, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The optimizer's tensors by name; its hyperparameters come from the config, not from a file."""
    named = [(name, parameter) for part in parts for name, parameter in part.named_parameters()]
    return [
        (f"optimizer.state.{name}.{key}", value)
        for name, parameter in named
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    ]


def random_state(rank: int) -> dict[str, Tensor]:
    """This rank's random state."""
    return {f"random.{rank}": torch.get_rng_state()}


def make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its tensors, by a step that moves nothing; they are overwritten then."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def first(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors by name, of those with the same name the first."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in named:
        tensors.setdefault(name, tensor)
    return tensors


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
