"""Worker side: dispatch tokens by adversarial routings to experts with known results, and combine them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.config.parallel import DispatchBackend
from dsv3.model.moe import RowCounts, TokenDispatcher
from dsv3.model.padding import padding_mask
from dsv3.model.router import RouterStats, Routing
from dsv3.parallel.deepep import DeepEPTokenDispatcher
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.token_dispatch import AllToAllTokenDispatcher
from dsv3.planning.layout import ParallelDims
from tests.parallel import fake_deepep
from tests.parallel.tiny_training import mesh_of

EXPERTS, TOP_K, DIM = 16, 4, 8
KINDS = [
    "random",
    "all to one",
    "none to the first rank",
    "one rank has no tokens",
    "own rank only",
    "no tokens",
    "padding",
]


def dispatch_and_combine(
    ep: int, ranks_per_node: int | None, backend: DispatchBackend
) -> dict[str, dict[str, Any]] | None:
    """Return this rank's tokens, routing and results by kind of routing; None on ranks left out."""
    mesh = mesh_of(ParallelDims(dp_shard=ep, ep=ep), ranks_per_node)
    if dist.get_rank() >= ep:
        return None
    with fake_deepep.installed():
        return {kind: _round_trip(kind, ep, mesh, backend) for kind in KINDS}


def make_dispatcher(
    mesh: ParallelMesh, backend: DispatchBackend, dim: int, in_fp8: bool = False
) -> TokenDispatcher:
    """Build the token dispatcher of a backend; DeepEP's needs the stand-in of `fake_deepep.installed`."""
    dispatcher: AllToAllTokenDispatcher | DeepEPTokenDispatcher = AllToAllTokenDispatcher(mesh.expert_groups)
    if backend is DispatchBackend.deepep:
        dispatcher = DeepEPTokenDispatcher.from_mesh(mesh, dim)
    if in_fp8:
        dispatcher.dispatch_in_fp8(power_of_two=False)
    return dispatcher


def _round_trip(kind: str, ep: int, mesh: ParallelMesh, backend: DispatchBackend) -> dict[str, Any]:
    rank = dist.get_rank()
    x, routing = _tokens(kind, rank, ep, backend)
    x.requires_grad_()
    routing.weights.requires_grad_()
    dispatcher = make_dispatcher(mesh, backend, DIM)
    seen: list[RowCounts] = []

    def experts(rows: Tensor, counts: RowCounts) -> Tensor:
        """Multiply the rows of expert e of the world by e + 1."""
        seen.append(counts)
        local = rank * (EXPERTS // ep) + torch.arange(EXPERTS // ep)
        return rows * (local.repeat_interleave(counts.on_device) + 1).unsqueeze(1)

    dispatched = dispatcher.dispatch(x, routing)
    out = dispatcher.combine(dispatched, experts)
    out.sum().backward()
    deepep = backend is DispatchBackend.deepep
    return {
        "x": x.detach().float(),
        "experts": routing.experts,
        "is_token": None if routing.padding is None else routing.padding.is_token.flatten(),
        "weights": routing.weights.detach(),
        "out": out.detach().float(),
        "x_grad": None if x.grad is None else x.grad.float(),
        "weights_grad": routing.weights.grad,
        "counts": seen[0],
        # The stand-in's handle begins with the tokens that go to each rank.
        "sent": dispatched.received.handle[0].sum(0).tolist()
        if deepep
        else dispatched.handle.splits.input_splits,
    }


def _tokens(kind: str, rank: int, ep: int, backend: DispatchBackend) -> tuple[Tensor, Routing]:
    """Return integer tokens and weights that are powers of two, so that no sum rounds in any order.

    DeepEP's bf16 has 8 bits for them: the values of a row are then one power of two, up to the sign.
    """
    narrow = backend is DispatchBackend.deepep
    generator = torch.Generator().manual_seed(rank)
    count = 0 if kind == "no tokens" or (kind == "one rank has no tokens" and rank == 1) else 5 + 3 * rank
    own = EXPERTS // ep
    allowed = {
        "all to one": torch.arange(TOP_K),
        "none to the first rank": torch.arange(own, EXPERTS),
        "own rank only": torch.arange(rank * own, rank * own + max(own, TOP_K)) % EXPERTS,
    }.get(kind, torch.arange(EXPERTS))
    chosen = [allowed[torch.randperm(len(allowed), generator=generator)[:TOP_K]] for _ in range(count)]
    experts = torch.stack(chosen) if chosen else torch.empty(0, TOP_K, dtype=torch.long)
    weights = 2.0 ** torch.randint(-1 if narrow else -3, 1, experts.shape, generator=generator)
    x = torch.randint(-99, 99, (count, DIM), generator=generator).float()
    if narrow:
        scale = 2 ** torch.randint(0, 6, (count, 1), generator=generator)
        x = (x.sign() * scale).bfloat16()
    padding = None
    if kind == "padding" and rank > 0:  # rank 1 has nothing else, and rank 0 none
        padding = padding_mask([0 if rank == 1 else count // 2], torch.arange(count), x.device)
    routed = experts if padding is None else experts[padding.places]
    load = torch.bincount(routed.flatten(), minlength=EXPERTS)
    zero = torch.zeros(())
    return x, Routing(experts, weights, RouterStats(load, zero, zero, torch.tensor(True)), padding)
