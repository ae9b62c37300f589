"""Muon: momentum whose update is orthogonalised, for the matrices of the hidden layers; AdamW for the rest.

Keller Jordan's Muon (kellerjordan.github.io/posts/muon) with Moonlight's scaling and weight decay (arXiv
2502.16982). torch.optim.Muon does the same for whole matrices on one process; a test compares the two.

Each matrix is orthogonalised by itself: every expert of a stack, and its gate and up projections, which lie
one below the other in one parameter. A matrix that is cut over ranks (by FSDP or TP) is sent, part by part,
to one of those ranks, its owner, which orthogonalises it and sends the parts of the result back. So no matrix
is computed twice within a shard group, and a rank holds one whole matrix at a time (docs/optimizers.md).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from dsv3.checkpoint.state import local_tensor
from dsv3.config.optimizer import UpdateScale
from dsv3.config.precision import ComputeType, default_compute

CHUNK_ELEMENTS = 2**26
"""Elements of whole matrices that are orthogonalised together, or one matrix if it is larger."""


class Cut(NamedTuple):
    """The ranks of one mesh axis that hold parts of each matrix, and the dim that is cut.

    It is -2 for rows and -1 for columns.
    """

    group: dist.ProcessGroup
    dim: int

    def length(self, whole: int, rank: int) -> int:
        """Return how much of a dim of length `whole` lies on `rank`: equal runs, the last ones shorter."""
        run = -(-whole // self.group.size())
        return max(0, min(run, whole - rank * run))


class CutMatrix(NamedTuple):
    """This rank's part of a matrix with its gradient and momentum, and the shape of the whole."""

    parameter: Tensor
    gradient: Tensor
    momentum: Tensor
    shape: tuple[int, int]
    fused: int
    """Matrices that lie one below the other in it."""


class Muon(torch.optim.Optimizer):
    """Muon for groups with `hidden`, AdamW for the others.

    `fused_matrices` of a group is the number of matrices that lie one below the other in its parameters. The
    state is one fp32 momentum per element of a hidden matrix, and AdamW's two moments for the rest, in the
    layout of the parameter. With `hidden` groups `step` is a collective of the ranks of each shard group.

    Where `found_inf`, a scalar on the device, is 1, a step leaves all as it is. That needs AdamW's fused
    kernel, which counts its steps on the device: it is used where all parameters are on a GPU.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        ns_dtype: ComputeType = ComputeType.auto,
        ns_eps: float = 1e-7,
        update_scale: UpdateScale = UpdateScale.match_rms_adamw,
        weight_decay: float = 0.1,
        adamw_betas: Sequence[float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        self.ns_coefficients, self.ns_steps, self.ns_eps = tuple(ns_coefficients), ns_steps, ns_eps
        self.ns_dtype, self.update_scale = ns_dtype, update_scale
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
            "betas": tuple(adamw_betas), "eps": adamw_eps, "hidden": False, "fused_matrices": 1,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.fused = all(p.is_cuda for group in self.param_groups for p in group["params"])
        self._step_supports_amp_scaling = self.fused  # what GradScaler asks, and training/step_guard.py

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the loss of `closure` if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if trained and group["hidden"]:
                self._step_muon(trained, group)
            elif trained:
                self._step_adamw(trained, group)
        return loss

    @property
    def _found_inf(self) -> Tensor | None:
        return getattr(self, "found_inf", None)

    def _step_adamw(self, trained: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in trained:
            if not self.state[parameter]:
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                steps = torch.zeros((), device=parameter.device if self.fused else "cpu")
                self.state[parameter] = {"step": steps, **moments}
        states = [self.state[parameter] for parameter in trained]
        beta1, beta2 = group["betas"]
        adamw(
            list(trained), [parameter.grad for parameter in trained if parameter.grad is not None],
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [state["step"] for state in states],
            fused=self.fused or None, found_inf=self._found_inf,
            amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip

    def _step_muon(self, trained: list[nn.Parameter], group: dict[str, Any]) -> None:
        cut: dict[tuple[Cut, ...], list[CutMatrix]] = {}
        for parameter in trained:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            assert parameter.grad is not None
            tensors = (parameter.detach(), parameter.grad, state["momentum_buffer"])
            local = [local_tensor(tensor) for tensor in tensors]
            shape, fused, cuts = parameter.shape, group["fused_matrices"], cuts_of(parameter)
            if not cuts:
                self._step_whole(local, (shape[-2], shape[-1]), group, _device(parameter))
                continue
            stacks = [tensor if tensor.ndim == 3 else tensor.unsqueeze(0) for tensor in local]
            whole = (shape[-2], shape[-1])
            for part, gradient, momentum in zip(*stacks, strict=True):
                cut.setdefault(cuts, []).append(CutMatrix(part, gradient, momentum, whole, fused))
        for cuts, matrices in cut.items():
            self._step_cut(cuts, matrices, group, _device(trained[0]))

    def _step_whole(
        self, local: list[Tensor], shape: tuple[int, int], group: dict[str, Any], device: torch.device
    ) -> None:
        """Update the whole matrices of this rank's part of a parameter."""
        rows, columns = shape[0] // group["fused_matrices"], shape[1]
        count = max(1, CHUNK_ELEMENTS // (rows * columns))
        stacks = [tensor.reshape(-1, rows, columns) for tensor in local]
        if not stacks[0].numel():
            return
        for parameter, gradient, momentum in zip(*(stack.split(count) for stack in stacks), strict=True):
            update = self._update(gradient, momentum, group, device)
            self._apply(parameter, self._orthogonalize(update), (rows, columns), group)

    def _step_cut(
        self, cuts: tuple[Cut, ...], matrices: list[CutMatrix], group: dict[str, Any], device: torch.device
    ) -> None:
        """Update matrices that are cut over ranks, in rounds of one matrix per rank, large ones first."""
        matrices = sorted(matrices, key=lambda matrix: -math.prod(matrix.shape))
        ranks = math.prod(cut.group.size() for cut in cuts)
        for start in range(0, len(matrices), ranks):
            members = matrices[start : start + ranks]
            exchange = Exchange(cuts, [matrix.shape for matrix in members])
            updates = [self._update(m.gradient, m.momentum, group, device) for m in members]
            owned = exchange.gather(updates)
            for number, whole in owned.items():
                rows, columns = whole.shape
                fused = members[number].fused
                stack = whole.view(fused, rows // fused, columns)
                owned[number] = self._orthogonalize(stack).reshape(rows, columns)
            for matrix, update in zip(members, exchange.scatter(owned, updates), strict=True):
                shape = (matrix.shape[0] // matrix.fused, matrix.shape[1])
                self._apply(matrix.parameter, update, shape, group)

    def _update(
        self, gradient: Tensor, momentum: Tensor, group: dict[str, Any], device: torch.device
    ) -> Tensor:
        """Return what is to be orthogonalised, in the dtype of the iteration; the momentum moves."""
        before = self._kept(momentum)
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        automatic = self.ns_dtype is ComputeType.auto
        chosen = default_compute(device.type) if automatic else self.ns_dtype
        found = update.to(
            device, getattr(torch, chosen.value), copy=update is momentum and before is not None
        )
        self._put_back(momentum, before)
        return found

    def _kept(self, tensor: Tensor) -> Tensor | None:
        """Return a copy of what a step is about to change, for `_put_back`; None where none is skipped."""
        return None if self._found_inf is None else tensor.clone()

    def _put_back(self, tensor: Tensor, before: Tensor | None) -> None:
        """Undo what has happened to `tensor` since `before`, if the step is skipped."""
        if before is not None and self._found_inf is not None:
            torch.where(self._found_inf.bool(), before, tensor, out=tensor)

    def _orthogonalize(self, stack: Tensor) -> Tensor:
        return orthogonalize(stack, self.ns_coefficients, self.ns_steps, self.ns_eps)

    def _apply(
        self, parameter: Tensor, update: Tensor, shape: tuple[int, int], group: dict[str, Any]
    ) -> None:
        """Decay the weights and add the update, scaled by the `shape` of its whole matrix."""
        rows, columns = shape
        if self.update_scale is UpdateScale.match_rms_adamw:
            scale = 0.2 * math.sqrt(max(rows, columns))
        else:
            scale = math.sqrt(max(1, rows / columns))
        before = self._kept(parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.device), alpha=-group["lr"] * scale)
        self._put_back(parameter, before)


def orthogonalize(stack: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Return each matrix of `stack` [matrices, rows, columns] with its singular values moved to about 1.

    The quintic Newton-Schulz iteration X <- a X + (b A + c A A) X with A = X X^T, on the shorter side.
    """
    a, b, c = coefficients
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # the largest singular value is at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def cuts_of(parameter: Tensor) -> tuple[Cut, ...]:
    """Return the cuts of a parameter's matrices in the order in which they are undone.

    The mesh axes of FSDP come before those of TP and EP: FSDP shards what those leave. Whole experts on
    different ranks are no cut.
    """
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    dims = [getattr(placement, "dim", None) for placement in parameter.placements]
    return tuple(
        Cut(mesh.get_group(axis), dim - parameter.ndim)
        for axis, dim in enumerate(dims)
        if dim is not None and mesh.size(axis) > 1 and dim >= parameter.ndim - 2
    )


def _device(parameter: Tensor) -> torch.device:
    """Return the device that computes: that of the mesh, where FSDP keeps the shards in host memory."""
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


class Exchange:
    """Sends the parts of matrices to their owners and the results back; every rank of the cuts calls it.

    Matrix n belongs to the n-th rank, counted along the first cut first. Each cut is undone by one all-to-all
    among its ranks: a rank sends its own part of each matrix, and no more.
    """

    def __init__(self, cuts: tuple[Cut, ...], shapes: list[tuple[int, int]]) -> None:
        self.cuts = cuts
        self.shapes = shapes
        self.owners: list[list[int]] = []
        """Per cut, the rank of its group that each matrix goes to."""
        before = 1
        for cut in cuts:
            self.owners.append([n // before % cut.group.size() for n in range(len(shapes))])
            before *= cut.group.size()
        self.held = [list(range(len(shapes)))]
        """The matrices that this rank holds parts of, before each cut is undone and at the end."""
        for cut, owner in zip(cuts, self.owners, strict=True):
            self.held.append([n for n in self.held[-1] if owner[n] == cut.group.rank()])

    def gather(self, parts: list[Tensor]) -> dict[int, Tensor]:
        """Return by number the whole matrices that this rank owns, from its part of every matrix."""
        tensors = dict(enumerate(parts))
        for level, cut in enumerate(self.cuts):
            owner, ranks = self.owners[level], range(cut.group.size())
            sent = [[tensors[n] for n in self.held[level] if owner[n] == rank] for rank in ranks]
            wanted = [[self._shape(n, level, rank) for n in self.held[level + 1]] for rank in ranks]
            received = _all_to_all(sent, wanted, cut.group, parts[0])
            tensors = {
                n: torch.cat([received[rank][place] for rank in ranks], cut.dim)
                for place, n in enumerate(self.held[level + 1])
            }
        return tensors

    def scatter(self, owned: dict[int, Tensor], like: list[Tensor]) -> list[Tensor]:
        """Return this rank's part of every matrix, from the whole ones that it owns."""
        tensors = owned
        for level in reversed(range(len(self.cuts))):
            cut, owner = self.cuts[level], self.owners[level]
            ranks = range(cut.group.size())
            split = {
                n: tensors[n].split([self._shape(n, level, rank)[cut.dim] for rank in ranks], cut.dim)
                for n in self.held[level + 1]
            }
            sent = [[split[n][rank] for n in self.held[level + 1]] for rank in ranks]
            from_rank = [[n for n in self.held[level] if owner[n] == rank] for rank in ranks]
            wanted = [[self._shape(n, level, cut.group.rank()) for n in numbers] for numbers in from_rank]
            received = _all_to_all(sent, wanted, cut.group, like[0])
            tensors = {
                n: tensor
                for numbers, parts in zip(from_rank, received, strict=True)
                for n, tensor in zip(numbers, parts, strict=True)
            }
        return [tensors[n] for n in range(len(self.shapes))]

    def _shape(self, number: int, level: int, rank: int) -> tuple[int, int]:
        """Return the shape of a matrix's part on `rank` of cut `level`, with the cuts before that undone."""
        shape = list(self.shapes[number])
        for later in reversed(range(level, len(self.cuts))):
            cut = self.cuts[later]
            shape[cut.dim] = cut.length(shape[cut.dim], rank if later == level else cut.group.rank())
        return shape[0], shape[1]


def _all_to_all(
    sent: list[list[Tensor]], wanted: list[list[tuple[int, int]]], group: dist.ProcessGroup, like: Tensor
) -> list[list[Tensor]]:
    """Send tensors to each rank of `group`; return what each rank sent, of the shapes `wanted`."""
    flat = [tensor.reshape(-1) for tensors in sent for tensor in tensors]
    outgoing = torch.cat(flat) if flat else like.new_empty(0)
    out_sizes = [sum(math.prod(shape) for shape in shapes) for shapes in wanted]
    in_sizes = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
    incoming = like.new_empty(sum(out_sizes))
    dist.all_to_all_single(incoming, outgoing, out_sizes, in_sizes, group=group)
    received = []
    for part, shapes in zip(incoming.split(out_sizes), wanted, strict=True):
        pieces = part.split([math.prod(shape) for shape in shapes]) if shapes else []
        received.append([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])
    return received
