"""The tensors of a training run (model, optimizer, random state) by their names in a checkpoint."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.hf.names import MODEL_PREFIX
from dsv3.model.transformer import Transformer

ModelParts = Sequence[Transformer]
"""The model of a rank: all of it, or some stages of a pipeline."""


def model_state(model_parts: ModelParts) -> list[tuple[str, Tensor]]:
    """Return parameters and buffers by name; a tensor of two stages, such as the embedding, comes twice."""
    return [
        (MODEL_PREFIX + name, tensor) for part in model_parts for name, tensor in part.state_dict().items()
    ]


def optimizer_state(model_parts: ModelParts, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """Return the optimizer's tensors by name; its hyperparameters come from the config, not from a file."""
    named = [(name, parameter) for part in model_parts for name, parameter in part.named_parameters()]
    return [
        (f"optimizer.state.{name}.{key}", value)
        for name, parameter in named
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    ]


def random_state(rank: int) -> dict[str, Tensor]:
    """Return the state of this rank's random number generator, by name."""
    return {f"random.{rank}": torch.get_rng_state()}


def make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer create its tensors, by a step with a learning rate of 0.

    A load then overwrites them.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def unique_by_name(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors by name; of several with the same name the first."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in named:
        tensors.setdefault(name, tensor)
    return tensors


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
