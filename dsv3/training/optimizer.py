"""AdamW whose two moments are stored in bf16, as DeepSeek-V3's are (report, section 3.3.3).

The optimizer and its view of the parameters.
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

from dsv3.config.precision import MomentType
from dsv3.config.strict import build
from dsv3.config.training import OptimizerConfig, check_moments
from dsv3.distributed.process_group import RankContext

PORTION = 2**22
"""Numbers that are updated together, whose moments take 32 MiB in fp32: enough to keep a GPU busy."""

MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """Rows of a parameter on this rank, the same rows of its gradient and moments, and the steps so far."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


class BF16MomentAdamW(torch.optim.AdamW):
    """torch.optim.AdamW in fp32 arithmetic; only what is kept of the moments is rounded to bf16.

    A step moves the parameters by the moments before they are rounded (to nearest, ties to even).
    Parameters are fp32, plain or DTensor with gradients placed alike; all is elementwise, so that a rank
    updates what it holds.
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
        """Update every parameter that has a gradient; the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moved:
                continue
            steps = [self._state_of(parameter, group)["step"] for parameter in moved]
            pieces = (piece for parameter in moved for piece in _pieces(parameter, self.state[parameter]))
            for portion in _portions(pieces):
                _update(portion, group)
            # Each piece counted a copy of its own: the pieces of a parameter are in one step together.
            torch._foreach_add_(steps, 1)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; moments of any dtype, which PyTorch casts to the parameters', are bf16 again."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({key: state[key].bfloat16() for key in MOMENTS if key in state})

    def _state_of(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state, zeros where it has none yet, by PyTorch's names."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            # As in torch.optim.AdamW: only the fused kernel wants the count beside the parameter.
            state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return state


def _pieces(parameter: nn.Parameter, state: dict[str, Tensor]) -> Iterator[Piece]:
    """The parameter in runs of rows (of dim 0) of at most PORTION numbers, or of one row."""
    assert parameter.grad is not None
    tensors = (parameter.data, parameter.grad, *(state[key] for key in MOMENTS))
    held = [torch.atleast_1d(local(tensor)) for tensor in tensors]
    numbers, rows = held[0].numel(), len(held[0])
    if numbers:
        at_once = max(1, PORTION * rows // numbers)
        for part in zip(*(tensor.split(at_once) for tensor in held), strict=True):
            yield Piece._make((*part, state["step"].clone()))


def _portions(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are updated by one call: as many as have PORTION numbers, or one."""
    portion: list[Piece] = []
    numbers = 0
    for piece in pieces:
        if portion and numbers + piece.parameter.numel() > PORTION:
            yield portion
            portion, numbers = [], 0
        portion.append(piece)
        numbers += piece.parameter.numel()
    if portion:
        yield portion


def _update(portion: list[Piece], group: dict[str, Any]) -> None:
    """One step of PyTorch's AdamW on fp32 copies of the moments, which are then rounded back."""
    exp_avgs = [piece.exp_avg.float() for piece in portion]
    exp_avg_sqs = [piece.exp_avg_sq.float() for piece in portion]
    beta1, beta2 = group["betas"]
    adamw(
        [piece.parameter for piece in portion], [piece.gradient for piece in portion],
        exp_avgs, exp_avg_sqs, [], [piece.step for piece in portion],
        fused=group["fused"], foreach=group["foreach"],
        amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
    torch._foreach_copy_([piece.exp_avg for piece in portion], exp_avgs)
    torch._foreach_copy_([piece.exp_avg_sq for piece in portion], exp_avg_sqs)


BF16_MOMENTS = "dsv3.training.optimizer.BF16MomentAdamW"


def build_optimizer(
    config: OptimizerConfig, parts: Sequence[nn.Module], moments: MomentType = MomentType.fp32
) -> torch.optim.Optimizer:
    """Instantiate the configured optimizer; norm weights are left out of weight decay.

    A group holds parameters of one mesh, as one multi-tensor update cannot span several. InvalidValue for
    `moments` that the optimizer cannot keep.
    """
    check_moments(config, moments)
    if moments is MomentType.bf16:
        config = replace(config, _target_=BF16_MOMENTS)
    grouped: dict[tuple[Any, bool], list[nn.Parameter]] = {}
    for parameter in (p for part in parts for p in part.parameters()):
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        grouped.setdefault((mesh, parameter.ndim > 1), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members} if decays else {"params": members, "weight_decay": 0.0}
        for (_, decays), members in grouped.items()
    ]
    # `params` goes through a partial: Hydra would try to copy tensors handed to it as config.
    optimizer: torch.optim.Optimizer = build(config, _partial_=True)(params=groups)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(parts: Sequence[nn.Module], max_norm: float, ranks: RankContext) -> Tensor:
    """Scale all gradients to a norm of at most `max_norm`; the norm before, over the whole model, a scalar.

    Each rank adds the squares of what it holds, divided by the ranks that hold the same.
    """
    gradients = [
        p.grad for part in parts for p in part.parameters() if p.grad is not None and not is_replica(p)
    ]
    norms = torch._foreach_norm([local(gradient) for gradient in gradients])
    shares = torch.tensor([1.0 / replicas(gradient) for gradient in gradients], device=ranks.device)
    norm = ranks.sum((torch.stack(norms).square() * shares).sum()).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    held = [local(p.grad) for part in parts for p in part.parameters() if p.grad is not None]
    torch._foreach_mul_(held, scale)
    return norm


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replicas(tensor: Tensor) -> int:
    """Ranks that hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(axis) for axis, p in enumerate(tensor.placements) if p.is_replicate())


def is_replica(parameter: nn.Parameter) -> bool:
    """Whether another pipeline stage holds this parameter too and counts it."""
    return getattr(parameter, "is_replica", False)
