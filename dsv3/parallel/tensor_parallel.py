"""Tensor parallelism (TP) with sequence parallelism between attention and feed-forward.

Between attention and feed-forward every rank holds a shard of the sequence. Whatever is computed token by
token - norms, low-rank projections, routers, shared experts - works on that shard with whole weights.
Attention all-gathers the latents, which are smaller than the hidden states, and computes its own heads. A
dense feed-forward all-gathers the hidden states and computes its own columns. Both reduce-scatter their
results back to shards of the sequence.

The vocabulary is sharded as well: each rank embeds the ids of its own run, and the partial embeddings are
reduce-scattered. The head keeps its logits sharded, and the cross-entropy works on them (loss parallel): for
each chunk of tokens the ranks exchange three values per token.
"""

from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dsv3.model.attention import LatentAttention
from dsv3.model.head import LocalVocabularyShard, Softmax
from dsv3.model.layers import FeedForward, Linear, Matmul
from dsv3.model.transformer import Transformer
from dsv3.parallel.collectives import all_gather, reduce_scatter
from dsv3.parallel.mesh import ParallelMesh

SEQUENCE_DIM = 1

SHARD_DIMS = {
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
"""The TP plan: the sharded dim of each module's weight, 0 its outputs (colwise) or 1 its inputs (rowwise)."""


class TensorParallel:
    """Wrapper that shards heads, dense hidden widths and the vocabulary over the `tp` axis."""

    def __call__(self, model: Transformer, mesh: ParallelMesh) -> None:
        """Wrap `model` in place where `tp` is above 1."""
        if mesh.degrees.tp == 1:
            return
        axis = mesh.dense["tp"]
        group = axis.get_group()
        for name, module in list(model.named_modules()):
            dim = shard_dim(name)
            if dim is not None:
                weight = distribute_tensor(module.weight, axis, [Shard(dim)], src_data_rank=None)
                module.weight = nn.Parameter(weight)
                if isinstance(module, Linear):
                    forward = _rowwise_linear if dim == 1 else _colwise_linear
                    module.forward = partial(forward, module, group)  # type: ignore[method-assign]
            elif isinstance(module, LatentAttention):
                module.gather_latents = partial(_gather_latents, group)
            elif isinstance(module, FeedForward) and shard_dim(f"{name}.gate_proj") is not None:
                module.register_forward_pre_hook(partial(_gather_input, group))
        if model.embedding is not None:
            model.embedding.forward = partial(_embed, model.embedding, group)  # type: ignore[method-assign]
        if model.head is not None:
            model.head.vocabulary_shard = VocabularyShard(group, model.config.vocab_size)


def shard_dim(name: str) -> int | None:
    """Return the dim on which the weight of module `name` is sharded; None where it is whole."""
    return next((dim for pattern, dim in SHARD_DIMS.items() if fnmatchcase(name, pattern)), None)


def _colwise_linear(module: Any, group: dist.ProcessGroup, x: Tensor, matmul: Matmul | None = None) -> Tensor:
    return (matmul or module.matmul)(x, module.weight.to_local())


def _rowwise_linear(module: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
    return reduce_scatter(_colwise_linear(module, group, x), SEQUENCE_DIM, group)


def _embed(embedding: nn.Embedding, group: dist.ProcessGroup, tokens: Tensor) -> Tensor:
    """Return the embeddings of this rank's sequence shard from `tokens` [batch, sequence] of all TP ranks."""
    weight: Tensor = embedding.weight.to_local()  # type: ignore[attr-defined]
    local_id = tokens - group.rank() * weight.shape[0]
    is_local = (local_id >= 0) & (local_id < weight.shape[0])
    partial_sum = F.embedding(local_id.clamp(0, weight.shape[0] - 1), weight)
    return reduce_scatter(partial_sum.masked_fill(~is_local.unsqueeze(-1), 0.0), SEQUENCE_DIM, group)


def _gather_input(group: dist.ProcessGroup, module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (all_gather(arguments[0], SEQUENCE_DIM, group),)


def _gather_latents(
    group: dist.ProcessGroup, q_latent: Tensor, latent: Tensor, k_rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All-gather the three over the sequence, in one collective."""
    widths = [x.shape[-1] for x in (q_latent, latent, k_rope)]
    joined = all_gather(torch.cat([q_latent, latent, k_rope], dim=-1), SEQUENCE_DIM, group)
    q_latent, latent, k_rope = joined.split(widths, dim=-1)
    return q_latent, latent, k_rope


class VocabularyShard(LocalVocabularyShard):
    """A run of vocab_size / ranks ids on each rank of `group`; every rank predicts from all of its tokens."""

    def __init__(self, group: dist.ProcessGroup, vocab_size: int) -> None:
        self.group = group
        self.first_id = group.rank() * (vocab_size // group.size())  # a layout divides the vocabulary

    def local_weight(self, weight: Tensor) -> Tensor:
        """See LocalVocabularyShard."""
        assert isinstance(weight, DTensor)
        return weight.to_local()

    def gather_tokens(self, x: Tensor) -> Tensor:
        """All-gather the sequence; the backward pass adds up what each rank's ids give to a token."""
        return all_gather(x, SEQUENCE_DIM, self.group)

    def gather(self, logits: Tensor) -> Tensor:
        """All-gather the logits [..., vocab] of all ids."""
        return all_gather(logits, logits.ndim - 1, self.group)

    def reduce(self, softmax: Softmax) -> Softmax:
        """All-gather the statistics of every rank's ids and combine them, equally on all ranks."""
        largest, total, target = all_gather(torch.stack(softmax), 2, self.group)
        whole = largest.amax(-1, keepdim=True)
        total = (total * (largest - whole).exp()).sum(-1, keepdim=True)
        return Softmax(whole, total, target.sum(-1, keepdim=True))
