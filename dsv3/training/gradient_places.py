"""Name the parameters, and of stacked experts the experts, whose gradients are not finite or the largest.

The norms are taken before clipping, which would make all gradients NaN where one is. On a GPU they are taken
at every step, because the host learns of a bad one only when its gradients are gone: that reads the gradients
once more. On CPU they are taken of bad steps alone.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.checkpoint.state import local_tensor
from dsv3.distributed.torch_private import foreach_norm, local_shape_and_offset
from dsv3.model.transformer import Transformer

MOST = 8
"""Places that a rank reports, and that an entry of accidents.jsonl names."""

_ORDER = {"embedding": 0, "layers": 1, "mtp": 2, "norm": 3, "head": 4}
"""The modules of a model on the way to its loss."""

_NUMBERED = re.compile(r"(layers|mtp)\.(\d+)")


class Place(NamedTuple):
    """A parameter, or one expert of a stack, as far as a rank holds it."""

    parameter: str
    order: int
    """Place of the parameter among those of its rank."""
    expert: int | None
    norm: float
    """Norm of this rank's part of the gradient."""

    @property
    def name(self) -> str:
        """Return the name, with the expert in brackets: `layers.1.ffn.experts.down_proj[3]`."""
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"

    @property
    def layer(self) -> str:
        """Return the layer that it belongs to, else its module: `layers.1`, `mtp.0`, `head`."""
        found = _NUMBERED.match(self.parameter)
        return found[0] if found else self.parameter.partition(".")[0]

    @property
    def depth(self) -> tuple[int, int, int]:
        """Return what is larger the nearer a parameter is to the loss, in pipeline stages too."""
        found = _NUMBERED.match(self.parameter)
        module = self.parameter.partition(".")[0]
        return _ORDER.get(module, 0), int(found[2]) if found else 0, self.order


class GradientPlaces:
    """The gradients of this rank's parts of the model."""

    def __init__(self, model_parts: Sequence[Transformer]) -> None:
        self.single: list[tuple[str, int, Tensor]] = []
        """The name, the order and the parameter of those that have no matrix per expert."""
        self.stacks: list[tuple[str, int, Tensor, int]] = []
        """The others, with the number of the first expert that is here."""
        named = [item for part in model_parts for item in part.named_parameters() if item[1].requires_grad]
        for order, (name, parameter) in enumerate(named):
            if parameter.ndim == 3:
                whole: Tensor = parameter
                first = local_shape_and_offset(whole)[1][0] if isinstance(whole, DTensor) else 0
                self.stacks.append((name, order, parameter, first))
            else:
                self.single.append((name, order, parameter))

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Return the norms of this rank's gradients [places], fp32, of stacks one per expert."""
        norms: list[Tensor] = []
        for each in self.stacks:
            gradient, parameter = each[2].grad, local_tensor(each[2])
            if gradient is None:
                norms.append(parameter.new_zeros(len(parameter)))
            else:
                norms.append(torch.linalg.vector_norm(local_tensor(gradient), dim=(1, 2)).float())
        by_device: dict[torch.device, list[int]] = {}
        gradients = [parameter.grad for _, _, parameter in self.single]
        local = [None if gradient is None else local_tensor(gradient) for gradient in gradients]
        for number, tensor in enumerate(local):
            if tensor is not None:
                by_device.setdefault(tensor.device, []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in by_device.values():
            tensors = [tensor for number in numbers if (tensor := local[number]) is not None]
            found |= dict(zip(numbers, foreach_norm(tensors), strict=True))
        for number, (_, _, parameter) in enumerate(self.single):
            own = local_tensor(parameter)
            norms.append(found[number].float().view(1) if number in found else own.new_zeros(1))
        return torch.cat(norms) if norms else torch.zeros(0)

    def report(self, norms: Sequence[float], finite: bool) -> tuple[list[Place], int]:
        """Return what of `norms`, those of `measure`, to tell of this rank, at most MOST places.

        With `finite` the largest come first. Else it is the places that are not finite, the nearest to the
        loss first, for a backward pass carries NaN from there to all layers before. The number is how many
        there are of those.
        """
        places, values = [], iter(norms)
        for name, order, parameter, first in self.stacks:
            numbers = range(first, first + len(local_tensor(parameter)))
            places += [Place(name, order, expert, next(values)) for expert in numbers]
        places += [Place(name, order, None, next(values)) for name, order, _ in self.single]
        bad = [place for place in places if not math.isfinite(place.norm)]
        return ranked(places if finite else bad, finite), len(bad)


def ranked(places: Iterable[Place], finite: bool) -> list[Place]:
    """Return the MOST first of places on several ranks, each once; see GradientPlaces.report."""
    known: dict[str, Place] = {}
    for place in places:
        same = known.get(place.name)
        norm = place.norm if same is None else math.hypot(place.norm, same.norm)
        known[place.name] = place._replace(norm=norm)
    if finite:
        return sorted(known.values(), key=lambda place: -place.norm)[:MOST]
    return sorted(known.values(), key=lambda place: place.depth, reverse=True)[:MOST]
