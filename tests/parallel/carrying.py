"""DeepEP's dispatcher beside the plain exchange, and training over it; runs in the workers."""

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.config.parallel import ExchangeBackend
from dsv3.config.root import Config
from dsv3.model.moe import apply_experts, grouped_linear
from dsv3.model.router import RouterStats, Routing
from dsv3.planning.layout import ParallelDims
from tests.parallel import fake_deepep
from tests.parallel.routing import make_dispatcher
from tests.parallel.training import Trace, mesh_of, train_config

EXPERTS, TOP_K, DIM, HIDDEN = 16, 4, 256, 16


def both(ep: int, in_fp8: bool) -> list[tuple[Tensor, ...]] | None:
    """The result and all gradients of SwiGLU experts in bf16, by the plain exchange and by DeepEP.

    `in_fp8`: rows go to experts in FP8.
    """
    mesh = mesh_of(ParallelDims(dp_shard=ep, ep=ep))
    if dist.get_rank() >= ep:
        return None
    found = []
    with fake_deepep.installed():
        for backend in ExchangeBackend:
            dispatcher = make_dispatcher(mesh, backend, DIM, in_fp8)
            x, choice, *weights = _numbers(ep)
            zero = torch.zeros(())
            load = torch.bincount(choice.flatten(), minlength=EXPERTS)
            routing = Routing(choice, weights[0], RouterStats(load, zero, zero, torch.tensor(True)))
            dispatched = dispatcher.dispatch(x, routing)

            def experts(
                rows: Tensor, counts: Tensor, own: tuple[Tensor, Tensor] = (weights[1], weights[2])
            ) -> Tensor:
                return apply_experts(rows, counts, *own, grouped_linear)

            out = dispatcher.combine(dispatched, experts)
            out.mul(torch.arange(DIM) - 100).sum().backward()
            found.append((out.detach(), *(part.grad for part in (x, *weights) if part.grad is not None)))
    return found


def _numbers(ep: int) -> list[Tensor]:
    """Tokens, the experts they choose, their weights, and two stacks of experts' weights."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = 9 + 4 * dist.get_rank()
    x = torch.randn(tokens, DIM, generator=generator).bfloat16()
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weights, choice = scores.topk(TOP_K)
    shapes = [(EXPERTS // ep, 2 * HIDDEN, DIM), (EXPERTS // ep, DIM, HIDDEN)]
    stacks = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [x.requires_grad_(), choice, weights.requires_grad_(), *(s.requires_grad_() for s in stacks)]


def train_over_deepep(config: Config, degrees: ParallelDims, microbatch: int) -> tuple[Trace | None, int]:
    """A step over the stand-in, and how many buffers were made for it."""
    before = len(fake_deepep.made)
    with fake_deepep.installed():
        trace = train_config(config, degrees, 1, microbatch, "sgd")
    return trace, len(fake_deepep.made) - before
