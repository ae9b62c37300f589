"""Embedding and head split over the vocabulary, and the cross-entropy of logits split so (loss parallel).

Each rank of the tensor axis has a run of ids: it looks up those tokens that are its own and sums are
exchanged; its logits stay where they are, and only three numbers a token travel for the loss.


Tensor parallelism with sequence parallelism between: what is split, and what travels.

Between attention and feed-forward every rank holds a part of the sequence. Whatever is computed token by
token - norms, low-rank projections, routers, shared experts - works on that part with whole weights.
Attention gathers the latents, which are smaller than the hidden states, and computes its own heads; a
dense feed-forward gathers the hidden states and computes its own columns; both scatter the sum of their
results back to parts of the sequence. The head keeps its logits split over the vocabulary.
"""

from fnmatch import fnmatchcase
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from dsv3.model.attention import LatentAttention
from dsv3.model.layers import IGNORE, FeedForward, LocalVocabularyShard
from dsv3.model.transformer import Transformer
from dsv3.parallel.collectives import all_gather, all_reduce, reduce_scatter
from dsv3.parallel.mesh import ParallelMesh


def embed_split(embedding: nn.Embedding, tokens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Vectors of this rank's part of the sequence, from `tokens` [batch, sequence] of all tensor ranks."""
    weight: Tensor = embedding.weight.to_local()  # type: ignore[attr-defined]
    here = tokens - group.rank() * weight.shape[0]
    mine = (here >= 0) & (here < weight.shape[0])
    found = F.embedding(here.clamp(0, weight.shape[0] - 1), weight)
    return reduce_scatter(found.masked_fill(~mine.unsqueeze(-1), 0.0), 1, group)


class VocabularyShard(LocalVocabularyShard):
    """Logits [batch, sequence, vocab / ranks] on each of the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def cross_entropy_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum over valid `targets` [batch, sequence] in fp32 nats; the same number on every rank."""
        flat = logits.float().flatten(0, -2)
        return _SplitCrossEntropy.apply(flat, targets.flatten(), self.group)  # type: ignore[no-any-return, no-untyped-call]

    def gather(self, logits: Tensor) -> Tensor:
        """The logits [..., vocab] of all ids."""
        return all_gather(logits, logits.ndim - 1, self.group)


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        largest = all_reduce(logits.amax(-1, keepdim=True), group, "max")
        shifted = logits - largest
        log_total = all_reduce(shifted.exp().sum(-1, keepdim=True), group).log()
        here = targets.unsqueeze(-1) - group.rank() * logits.shape[-1]
        mine = (here >= 0) & (here < logits.shape[-1])
        here = here.clamp(0, logits.shape[-1] - 1)
        chosen = all_reduce(shifted.gather(-1, here).masked_fill(~mine, 0.0), group)
        valid = (targets != IGNORE).unsqueeze(-1)
        ctx.save_for_backward(shifted, log_total, here, mine, valid)
        return (log_total - chosen).masked_fill(~valid, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        shifted, log_total, here, mine, valid = ctx.saved_tensors
        change = (shifted - log_total).exp()
        change.scatter_add_(-1, here, -mine.to(change.dtype))
        return change * valid * gradients[0], None, None


SEQUENCE = 1

SPLIT = {
    "embedding": 0,
    "*.attention.q_proj": 0,
    "*.attention.q_b_proj": 0,
    "*.attention.kv_b_proj": 0,
    "*.attention.o_proj": 1,
    "layers.*.ffn.gate_proj": 0,
    "layers.*.ffn.up_proj": 0,
    "layers.*.ffn.down_proj": 1,
    "head": 0,
}
"""Module by module the dim of its weight that is split: 0 its outputs (colwise), 1 its inputs (rowwise)."""


class TensorParallel:
    """Splits heads, dense hidden widths and the vocabulary over the `tp` axis."""

    def __call__(self, model: Transformer, mesh: ParallelMesh) -> None:
        """Wrap `model` in place where `tp` is above 1."""
        if mesh.degrees.tp == 1:
            return
        axis = mesh.dense["tp"]
        group = axis.get_group()
        for name, module in list(model.named_modules()):
            dim = split_dim(name)
            if dim is not None:
                _split_weight(module, dim, axis)
                module.forward = _FORWARDS[dim](module, group)
            elif isinstance(module, LatentAttention):
                module.gather = partial(_gather_latents, group)
            elif isinstance(module, FeedForward) and split_dim(f"{name}.gate_proj") is not None:
                module.register_forward_pre_hook(partial(_gather_input, group))
        if model.embedding is not None:
            model.embedding.forward = partial(_embed, model.embedding, group)  # type: ignore[method-assign]
        if model.head is not None:
            model.head.register_forward_pre_hook(partial(_gather_input, group))
            model.vocabulary_shard = VocabularyShard(group)


def split_dim(name: str) -> int | None:
    """The dim that the weight of module `name` is split on; None where it is whole."""
    return next((dim for pattern, dim in SPLIT.items() if fnmatchcase(name, pattern)), None)


def _split_weight(module: nn.Module, dim: int, axis: DeviceMesh) -> None:
    weight = distribute_tensor(module.weight, axis, [Shard(dim)], src_data_rank=None)  # type: ignore[arg-type]
    module.weight = nn.Parameter(weight)


def _colwise(module: nn.Module, group: dist.ProcessGroup) -> Any:
    return MethodType(_local_linear, module)


def _rowwise(module: nn.Module, group: dist.ProcessGroup) -> Any:
    return lambda x: reduce_scatter(_local_linear(module, x), SEQUENCE, group)


_FORWARDS = {0: _colwise, 1: _rowwise}


def _local_linear(module: Any, x: Tensor) -> Tensor:
    return module.product(x, module.weight.to_local())  # type: ignore[no-any-return]


def _embed(embedding: nn.Embedding, group: dist.ProcessGroup, tokens: Tensor) -> Tensor:
    return embed_split(embedding, tokens, group)


def _gather_input(group: dist.ProcessGroup, module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (all_gather(arguments[0], SEQUENCE, group),)


def _gather_latents(
    group: dist.ProcessGroup, q_latent: Tensor, latent: Tensor, k_rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All three in one exchange, whole over the ranks of the axis."""
    widths = [x.shape[-1] for x in (q_latent, latent, k_rope)]
    together = all_gather(torch.cat([q_latent, latent, k_rope], dim=-1), SEQUENCE, group)
    q_latent, latent, k_rope = together.split(widths, dim=-1)
    return q_latent, latent, k_rope
