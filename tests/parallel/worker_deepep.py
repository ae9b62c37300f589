"""Worker side: the DeepEP token dispatcher beside all-to-all, and training over it."""

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.config.parallel import DispatchBackend
from dsv3.config.root import Config
from dsv3.model.moe import RowCounts, apply_experts, grouped_linear
from dsv3.model.router import RouterStats, Routing
from dsv3.planning.layout import ParallelDims
from tests.parallel import fake_deepep
from tests.parallel.tiny_training import Trace, mesh_of, train_config
from tests.parallel.worker_token_dispatch import make_dispatcher

EXPERTS, TOP_K, DIM, HIDDEN = 16, 4, 256, 16


def run_both_backends(ep: int, in_fp8: bool) -> list[tuple[Tensor, ...]] | None:
    """Return result and all gradients of SwiGLU experts in bf16, by all-to-all and by DeepEP.

    `in_fp8` sends rows to experts in FP8.
    """
    mesh = mesh_of(ParallelDims(dp_shard=ep, ep=ep))
    if dist.get_rank() >= ep:
        return None
    found = []
    with fake_deepep.installed():
        for backend in DispatchBackend:
            dispatcher = make_dispatcher(mesh, backend, DIM, in_fp8)
            x, choice, *weights = _random_inputs(ep)
            zero = torch.zeros(())
            load = torch.bincount(choice.flatten(), minlength=EXPERTS)
            routing = Routing(choice, weights[0], RouterStats(load, zero, zero, torch.tensor(True)))
            dispatched = dispatcher.dispatch(x, routing)

            def experts(
                rows: Tensor, counts: RowCounts, own: tuple[Tensor, Tensor] = (weights[1], weights[2])
            ) -> Tensor:
                return apply_experts(rows, counts, *own, grouped_linear)

            out = dispatcher.combine(dispatched, experts)
            out.mul(torch.arange(DIM) - 100).sum().backward()
            found.append((out.detach(), *(part.grad for part in (x, *weights) if part.grad is not None)))
    return found


def _random_inputs(ep: int) -> list[Tensor]:
    """Return tokens, the experts they choose, their router weights, and two stacks of experts' weights."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = 9 + 4 * dist.get_rank()
    x = torch.randn(tokens, DIM, generator=generator).bfloat16()
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weights, choice = scores.topk(TOP_K)
    shapes = [(EXPERTS // ep, 2 * HIDDEN, DIM), (EXPERTS // ep, DIM, HIDDEN)]
    stacks = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [x.requires_grad_(), choice, weights.requires_grad_(), *(s.requires_grad_() for s in stacks)]


def train_over_deepep(config: Config, degrees: ParallelDims, microbatch: int) -> tuple[Trace | None, int]:
    """Train a step over the stand-in; return its trace and the number of buffers made for it."""
    before = len(fake_deepep.made)
    with fake_deepep.installed():
        trace = train_config(config, degrees, 1, microbatch, "sgd")
    return trace, len(fake_deepep.made) - before
