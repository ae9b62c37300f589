"""Build the optimizer with its parameter groups, clip gradients, and AdamW with bf16 moments.

DeepSeek-V3 stores the two moments of AdamW in bf16 (report, section 3.3.3): BF16MomentAdamW, chosen by
precision.moments=bf16.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from dsv3.checkpoint.state import local_tensor
from dsv3.config.optimizer import TORCH, MuonConfig, OptimizerConfig, check_moments
from dsv3.config.precision import MomentType
from dsv3.config.strict import build
from dsv3.distributed.process_group import RankContext
from dsv3.distributed.torch_private import (
    foreach_add_,
    foreach_copy_,
    foreach_mul_,
    foreach_norm,
    foreach_subtract_,
)
from dsv3.model.router import Router
from dsv3.model.transformer import Transformer
from dsv3.planning.parameter_groups import ParameterGroup, is_frozen, parameter_groups

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
"""Elements per update call, by type of device: their fp32 moments take 32 or 256 MiB.

A GPU needs 0.3 to 0.5 ms for its chunk, many times what the host needs to launch it. More would not help, and
the memory is needed when activations have gone.
"""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""PyTorch's names of the running means of the gradient and of its square."""


class RowSlice(NamedTuple):
    """Rows of a parameter on this rank, the same rows of its gradient and moments, and the steps so far."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """That of the whole parameter, which other slices have too."""


class BF16MomentAdamW(torch.optim.AdamW):
    """torch.optim.AdamW in fp32 arithmetic, with moments that are stored in bf16.

    A step updates the parameters by the fp32 moments and then rounds those (to nearest, ties to even).
    Parameters are fp32 tensors, or DTensors whose gradients have the same placements. The update is
    elementwise, so a rank updates its own shards without communication.

    Where `found_inf`, a scalar on the device, is 1, a fused step leaves all as it is.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the loss of `closure` if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not trained:
                continue
            steps = [self._get_state(parameter, group)["step"] for parameter in trained]
            slices = (rows for parameter in trained for rows in _split_rows(parameter, self.state[parameter]))
            found_inf = getattr(self, "found_inf", None)
            for chunk in _group_into_chunks(slices):
                _update(chunk, group, found_inf)
            # Each slice counted a step on a copy of its own: all slices of a parameter take the same step.
            foreach_add_(steps, 1)
            if found_inf is not None:
                foreach_subtract_(steps, [found_inf] * len(steps))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. PyTorch casts its moments to the parameters' dtype; cast them back to bf16."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({key: state[key].bfloat16() for key in MOMENTS if key in state})

    def _get_state(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the parameter's state by PyTorch's names; create it with zeros at the first step."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            # As in torch.optim.AdamW: only the fused kernel needs the step count on the parameter's device.
            state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return state


def _split_rows(parameter: nn.Parameter, state: dict[str, Tensor]) -> Iterator[RowSlice]:
    """Split a parameter along dim 0 into slices of at most a chunk's elements, at least one row each."""
    assert parameter.grad is not None
    tensors = (parameter.data, parameter.grad, *(state[key] for key in MOMENTS))
    local = [torch.atleast_1d(local_tensor(tensor)) for tensor in tensors]
    elements, rows = local[0].numel(), len(local[0])
    if elements:
        rows_per_slice = max(1, CHUNK_ELEMENTS[local[0].device.type] * rows // elements)
        for same_rows in zip(*(tensor.split(rows_per_slice) for tensor in local), strict=True):
            yield RowSlice._make((*same_rows, state["step"]))


def _group_into_chunks(slices: Iterable[RowSlice]) -> Iterator[list[RowSlice]]:
    """Group slices for one update call each: at most a chunk's elements together, at least one slice."""
    chunk: list[RowSlice] = []
    elements = 0
    for rows in slices:
        if chunk and elements + rows.parameter.numel() > CHUNK_ELEMENTS[rows.parameter.device.type]:
            yield chunk
            chunk, elements = [], 0
        chunk.append(rows)
        elements += rows.parameter.numel()
    if chunk:
        yield chunk


def _update(chunk: list[RowSlice], group: dict[str, Any], found_inf: Tensor | None) -> None:
    """Take one step of PyTorch's AdamW with fp32 copies of the moments; round the new moments to bf16.

    With `found_inf` of 1 the kernel leaves the copies as they are, which bf16 holds without rounding.
    """
    # Multi-tensor kernels throughout: on a GPU a launch per slice would take longer than its work.
    stored = [rows.exp_avg for rows in chunk] + [rows.exp_avg_sq for rows in chunk]
    moments = [torch.empty_like(moment, dtype=torch.float32) for moment in stored]
    foreach_copy_(moments, stored)
    exp_avgs, exp_avg_sqs = moments[: len(chunk)], moments[len(chunk) :]
    steps = list(torch.stack([rows.step for rows in chunk]).unbind())
    beta1, beta2 = group["betas"]
    adamw(
        [rows.parameter for rows in chunk], [rows.gradient for rows in chunk],
        exp_avgs, exp_avg_sqs, [], steps,
        fused=group["fused"], foreach=group["foreach"], found_inf=found_inf,
        amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
    foreach_copy_(stored, moments)


SHARDED = {
    f"{TORCH}Adafactor": "dsv3.training.sharded_optimizers.ShardedAdafactor",
    f"{TORCH}Rprop": "dsv3.training.sharded_optimizers.ShardedRprop",
}
"""What takes the place of PyTorch's class where parameters are sharded."""


def build_optimizer(
    config: OptimizerConfig, model_parts: Sequence[Transformer], moments: MomentType = MomentType.fp32
) -> torch.optim.Optimizer:
    """Build the configured optimizer for the parameters of `model_parts` that are trained.

    A group of parameters shares the settings of planning/parameter_groups.py and a device mesh, because one
    multi-tensor update cannot span several. InvalidValue for `moments` that the optimizer cannot store.
    """
    check_moments(config, moments)
    settings = parameter_groups(config, model_parts[0].config)
    by_group: dict[tuple[Any, ParameterGroup], list[nn.Parameter]] = {}
    for name, parameter in (item for part in model_parts for item in part.named_parameters()):
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            by_group.setdefault((mesh, settings[name]), []).append(parameter)
    if moments is MomentType.bf16:
        config = replace(config, _target_="dsv3.training.optimizer.BF16MomentAdamW")
    elif any(mesh is not None for mesh, _ in by_group):
        config = replace(config, _target_=SHARDED.get(config._target_, config._target_))
    groups = []
    for (_, shared), members in by_group.items():
        group: dict[str, Any] = {"params": members, "lr_scale": shared.lr_scale}
        group["lr"] = config.lr * shared.lr_scale
        if not shared.decays and hasattr(config, "weight_decay"):
            group["weight_decay"] = 0.0
        if isinstance(config, MuonConfig):
            group |= {"hidden": shared.hidden, "fused_matrices": shared.fused}
        groups.append(group)
    # A pipeline rank whose layers are all frozen has an optimizer without parameters.
    # `params` goes through a partial: Hydra would try to copy tensors handed to it as config.
    optimizer: torch.optim.Optimizer = build(config, _partial_=True)(params=groups or [{"params": []}])
    return optimizer


@torch.no_grad()
def freeze(model: Transformer, patterns: Sequence[str]) -> None:
    """Take the parameters and expert biases of `model` that match out of training."""
    for name, parameter in model.named_parameters():
        if is_frozen(name, patterns):
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, Router):
            module.bias_moves = not is_frozen(f"{name}.selection_bias", patterns)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times the factor of the group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip_gradients(model_parts: Sequence[nn.Module], max_norm: float, ranks: RankContext) -> Tensor:
    """Clip all gradients to a common norm of at most `max_norm`; return the norm before clipping."""
    norm = gradient_norm(model_parts, ranks)
    scale_gradients(model_parts, norm, max_norm)
    return norm


@torch.no_grad()
def gradient_norm(model_parts: Sequence[nn.Module], ranks: RankContext) -> Tensor:
    """Return the norm of the whole model's gradient, an fp32 scalar, on any layout.

    Ranks add the squared norms of their shards, each divided by the number of ranks that hold the same shard.
    """
    # A parameter of two pipeline stages (the embedding, which MTP shares) counts on one of them only.
    counted = [p.grad for p in _trained(model_parts) if not getattr(p, "is_replica", False)]
    squares = torch.zeros((), device=ranks.device)
    # A pipeline rank whose layers are all frozen has no gradient; offloaded ones are on the CPU.
    for (copies, _), gradients in _grouped(counted, lambda g: (replicas(g), local_tensor(g).device)).items():
        of_group = torch.stack(foreach_norm(gradients)).square().sum() / copies
        squares = squares + of_group.to(ranks.device)
    return ranks.sum(squares).sqrt()


@torch.no_grad()
def scale_gradients(model_parts: Sequence[nn.Module], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients, whose common norm is `norm`, such that it is at most `max_norm`."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients = [p.grad for p in _trained(model_parts)]
    for device, of_device in _grouped(gradients, lambda g: local_tensor(g).device).items():
        foreach_mul_(of_device, scale.to(device))


def _trained(model_parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that have a gradient."""
    return [p for part in model_parts for p in part.parameters() if p.grad is not None]


def _grouped(tensors: Iterable[Tensor | None], key: Callable[[Tensor], Any]) -> dict[Any, list[Tensor]]:
    """Return this rank's shards of the tensors that are there, by their `key`."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor is not None:
            groups.setdefault(key(tensor), []).append(local_tensor(tensor))
    return groups


def replicas(tensor: Tensor) -> int:
    """Return the number of ranks that hold the same shard of `tensor`, 1 for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(axis) for axis, p in enumerate(tensor.placements) if p.is_replicate())
