"""Context parallelism (CP): sequences sharded over ranks in the zigzag split, attention by gathered latents.

Of 2 x cp equal chunks of a row, rank r has chunks r and 2 cp - 1 - r, so that every rank attends to the
same number of keys. Attention all-gathers what MLA caches of a token, kv_lora_rank + qk_rope_head_dim
values, expands the keys and values that the rank's own queries can see, and attends to them.

`reduce_router_counts` serves tensor parallelism as well: it sums the router's counts of a sequence over all
ranks that hold a shard of it.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.model.attention import LatentAttention
from dsv3.model.attention_kernels import Segments, attend_to_prefix
from dsv3.model.router import LocalRouterReduction, Router
from dsv3.model.transformer import LocalSequenceShard, Transformer
from dsv3.parallel.collectives import all_gather, all_reduce
from dsv3.parallel.mesh import ParallelMesh


class RouterReduction(LocalRouterReduction):
    """The router reduction of sequences that are sharded over the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.shards = group.size()

    def sum(self, counts: Tensor) -> Tensor:
        """Sum `counts` over the ranks of a sequence, without gradient."""
        return all_reduce(counts, self.group)


def reduce_router_counts(model: Transformer, mesh: ParallelMesh) -> None:
    """Make every router of `model` sum its counts over the ranks that share a sequence (axes cp and tp)."""
    if mesh.sequence is not None:
        reduction = RouterReduction(mesh.sequence.get_group("sequence"))
        for module in model.modules():
            if isinstance(module, Router):
                module.reduction = reduction


class ContextParallel:
    """Wrapper that shards sequences over the `cp` axis."""

    def __call__(self, model: Transformer, mesh: ParallelMesh) -> None:
        """Wrap `model` in place where `cp` is above 1."""
        if mesh.cp is None:
            return
        model.sequence_shard = shard = SequenceShard(mesh.cp.get_group("cp"))
        for module in model.modules():
            if isinstance(module, LatentAttention):
                module.attend = partial(_attend, shard)


class SequenceShard(LocalSequenceShard):
    """This rank's two chunks of each row, of 2 x ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.ranks = group.size()

    def take_local(self, x: Tensor) -> Tensor:
        """Return this rank's positions of `x` [..., sequence]."""
        chunks = x.chunk(2 * self.ranks, dim=-1)
        return torch.cat([chunks[self.rank], chunks[-1 - self.rank]], dim=-1)

    def gather(self, x: Tensor) -> Tensor:
        """All-gather `x` [batch, local sequence, ..] and return whole rows [batch, sequence, ..]."""
        return undo_zigzag(all_gather(x, 1, self.group), self.ranks)


def undo_zigzag(gathered: Tensor, ranks: int) -> Tensor:
    """Put `gathered` [batch, sequence, ..], two chunks per rank in rank order, into the row's order."""
    chunks = gathered.chunk(2 * ranks, dim=1)
    return torch.cat([*chunks[0::2], *chunks[1::2][::-1]], dim=1)


def _attend(
    shard: SequenceShard,
    attention: LatentAttention,
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    segments: Segments | None,
) -> Tensor:
    """Attend from the rank's `q` to all earlier keys of the row; see model/attention.attend_locally."""
    ranks, rank, chunk = shard.ranks, shard.rank, q.shape[1] // 2
    gathered = shard.gather(torch.cat([latent, k_rope], dim=-1))
    # No query sees a key behind the rank's second chunk: leave those latents unexpanded.
    visible = gathered[:, : chunk * (2 * ranks - rank)]
    k, v = attention.expand_kv(*visible.split([latent.shape[-1], k_rope.shape[-1]], dim=-1))
    starts = (chunk * rank, chunk * (2 * ranks - 1 - rank))
    out = [
        attend_to_prefix(q_chunk, k, v, attention.softmax_scale, start, segments)
        for q_chunk, start in zip(q.split(chunk, dim=1), starts, strict=True)
    ]
    return torch.cat(out, dim=1)
