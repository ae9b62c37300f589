"""The tensors of a training run (model, optimizer, random state) by their names in a checkpoint."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.hf.names import MODEL_PREFIX
from dsv3.model.transformer import Transformer

OPTIMIZER_PREFIX = "optimizer.state."
"""Put before the name of a parameter and of a tensor of its state: `optimizer.state.norm.weight.exp_avg`."""

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
        (f"{OPTIMIZER_PREFIX}{name}.{key}", value)
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
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


class NewState:
    """The parameters that a checkpoint has no optimizer state of, such as those that were frozen.

    Their state begins anew: `begin` puts back what it was before `make_optimizer_state`.
    """

    def __init__(
        self, model_parts: ModelParts, optimizer: torch.optim.Optimizer, stored: Collection[str]
    ) -> None:
        known = {_parameter_name(name) for name in stored if name.startswith(OPTIMIZER_PREFIX)}
        named = [item for part in model_parts for item in part.named_parameters()]
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.optimizer = optimizer
        self.parameters = {
            name: parameter for name, parameter in named if id(parameter) in trained and name not in known
        }
        self._before = {
            parameter: {key: value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
            for parameter in self.parameters.values()
        }

    def __contains__(self, name: str) -> bool:
        """Return True for the name of a tensor of such a state."""
        return _parameter_name(name) in self.parameters

    def begin(self) -> list[str]:
        """Set the state of these parameters to its start; return the names of those that have any."""
        names = [name for name, parameter in self.parameters.items() if self.optimizer.state.get(parameter)]
        for parameter, state in self._before.items():
            self.optimizer.state[parameter] = state
        return names


def _parameter_name(name: str) -> str:
    """Return the parameter of a tensor of the optimizer's state."""
    return name.removeprefix(OPTIMIZER_PREFIX).rpartition(".")[0]


def missing_state(wanted: Iterable[str], stored: Collection[str]) -> list[str]:
    """Return the kinds of optimizer state among the names `wanted` that a checkpoint does not have."""
    kinds = {name.rpartition(".")[2] for name in wanted if name not in stored}
    return sorted(kinds)


def unique_by_name(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors by name; of several with the same name the first."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in named:
        tensors.setdefault(name, tensor)
    return tensors


def nonfinite_names(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors whose shard on this rank is not finite; the host waits once."""
    names, finite = [], []
    for name, tensor in named:
        names.append(name)
        finite.append(local_tensor(tensor.detach()).isfinite().all())
    by_device: dict[torch.device, list[int]] = {}
    for number, flag in enumerate(finite):
        by_device.setdefault(flag.device, []).append(number)
    bad = [
        number
        for numbers in by_device.values()
        for number, flag in zip(numbers, torch.stack([finite[n] for n in numbers]).tolist(), strict=True)
        if not flag
    ]
    return [names[number] for number in sorted(bad)]


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
