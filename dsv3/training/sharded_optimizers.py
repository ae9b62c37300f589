"""The optimizers of torch.optim that PyTorch cannot step on DTensors: Rprop and Adafactor.

Both equal PyTorch's on the whole parameters. Each rank computes with its own shards; Adafactor sums over the
ranks of a parameter where a mean or a norm goes over all of it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.optim.rprop import rprop

from dsv3.checkpoint.state import local_tensor


class ShardedRprop(torch.optim.Rprop):
    """torch.optim.Rprop on this rank's shards: its update is elementwise."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the loss of `closure` if one is given."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if not self.state[parameter]:
                    self.state[parameter] = {
                        "step": torch.zeros(()),
                        "prev": torch.zeros_like(parameter),
                        "step_size": torch.full_like(parameter, group["lr"]),
                    }
            states = [self.state[parameter] for parameter in trained]
            smaller, larger = group["etas"]
            least, most = group["step_sizes"]
            rprop(
                [local_tensor(parameter.detach()) for parameter in trained],
                # PyTorch writes zeros into the gradient where the sign has changed.
                [local_tensor(parameter.grad) for parameter in trained],
                [local_tensor(state["prev"]) for state in states],
                [local_tensor(state["step_size"]) for state in states],
                [state["step"] for state in states],
                step_size_min=least, step_size_max=most, etaminus=smaller, etaplus=larger,
            )  # fmt: skip
        return loss


class ShardedAdafactor(torch.optim.Adafactor):
    """torch.optim.Adafactor on this rank's shards; the rows and columns of the state are sharded likewise.

    A row's value lies where the row does, on each rank that holds a part of it, and a column's likewise.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the loss of `closure` if one is given."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self._get_state(parameter)
        state["step"] += 1
        step, lr = state["step"].item(), group["lr"]
        weight, gradient = local_tensor(parameter.detach()), local_tensor(_gradient(parameter))
        every = range(parameter.ndim)
        least, least_weight = group["eps"]
        least = torch.finfo(weight.dtype).eps if least is None else least
        forget = step ** group["beta2_decay"]
        root_mean_square = math.sqrt(_sum(weight.square().sum(), parameter, every).item() / parameter.numel())
        size = max(least_weight, root_mean_square) * min(lr, 1 / math.sqrt(step))
        if group["weight_decay"]:
            weight.mul_(1 - lr * group["weight_decay"])
        squares = gradient.square()
        if parameter.ndim > 1:
            rows, columns = parameter.ndim - 2, parameter.ndim - 1
            row, column = local_tensor(state["row_var"]), local_tensor(state["col_var"])
            means = _sum(squares.sum(-1, keepdim=True), parameter, [columns]) / parameter.shape[-1]
            row.lerp_(means, forget)
            means = _sum(squares.sum(-2, keepdim=True), parameter, [rows]) / parameter.shape[-2]
            column.lerp_(means, forget)
            mean = _sum(row.sum(-2, keepdim=True), parameter, [rows]) / parameter.shape[-2]
            variance = (row @ column).div_(mean.clamp_(min=least))
        else:
            variance = local_tensor(state["variance"]).lerp_(squares, forget).clone()
        update = variance.clamp_(min=least * least).rsqrt_().mul_(gradient)
        norm = math.sqrt(_sum(update.square().sum(), parameter, every).item())
        weight.add_(update, alpha=-size / max(1.0, norm / (math.sqrt(parameter.numel()) * group["d"])))

    def _get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the parameter's state by PyTorch's names; create it with zeros at the first step."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            if parameter.ndim > 1:
                state["row_var"] = _zeros_without(parameter, parameter.ndim - 1)
                state["col_var"] = _zeros_without(parameter, parameter.ndim - 2)
            else:
                state["variance"] = torch.zeros_like(parameter)
        return state


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _sharded_axes(parameter: Tensor, dims: Iterable[int]) -> list[tuple[DeviceMesh, int]]:
    """Return the mesh axes over which a parameter's `dims` are sharded."""
    if not isinstance(parameter, DTensor):
        return []
    mesh, wanted = parameter.device_mesh, set(dims)
    placed = enumerate(parameter.placements)
    return [(mesh, axis) for axis, placement in placed if getattr(placement, "dim", None) in wanted]


def _sum(partial: Tensor, parameter: Tensor, dims: Iterable[int]) -> Tensor:
    """Return `partial`, a sum over this rank's part of `dims` of a parameter, summed over all parts."""
    for mesh, axis in _sharded_axes(parameter, dims):
        if mesh.size(axis) > 1:
            # NCCL takes no tensor of the host, where FSDP keeps the shards under cpu_offload.
            on_mesh = partial.contiguous().to(mesh.device_type)
            dist.all_reduce(on_mesh, group=mesh.get_group(axis))
            partial = on_mesh.to(partial.device)
    return partial


def _zeros_without(parameter: Tensor, dim: int) -> Tensor:
    """Return zeros of a parameter's shape with length 1 in `dim`, sharded as it is in the other dims."""
    local = local_tensor(parameter.detach())
    zeros = local.new_zeros([1 if n == dim else length for n, length in enumerate(local.shape)])
    if not isinstance(parameter, DTensor):
        return zeros
    placements: list[Placement] = [
        Replicate() if getattr(placement, "dim", None) == dim else placement
        for placement in parameter.placements
    ]
    shape = torch.Size(1 if n == dim else length for n, length in enumerate(parameter.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros, parameter.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
