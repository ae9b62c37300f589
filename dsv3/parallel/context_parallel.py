"""What a router is told where sequences are split over ranks (of the context and the tensor axis).

Context parallelism: rows over ranks in the zigzag split, attention by gathered latents.

Of 2 x cp equal chunks of a row rank r has number r and number 2 cp - 1 - r, so that every rank has as
much to attend to. Attention gathers what MLA keeps of a token, kv_lora_rank + qk_rope_head_dim numbers,
over the axis, expands the keys and values that the rank's own queries can see, and attends to them.
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
    """A sequence whose parts lie on the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.shards = group.size()

    def sum(self, counts: Tensor) -> Tensor:
        """`counts` added up over the ranks of a sequence, without gradient."""
        return all_reduce(counts, self.group)


def reduce_router_counts(model: Transformer, mesh: ParallelMesh) -> None:
    """Tell every router of `model` that the sequences it sees are parts."""
    if mesh.sequence is not None:
        over = RouterReduction(mesh.sequence.get_group("sequence"))
        for module in model.modules():
            if isinstance(module, Router):
                module.reduction = over


class ContextParallel:
    """Splits rows over the `cp` axis."""

    def __call__(self, model: Transformer, mesh: ParallelMesh) -> None:
        """Wrap `model` in place where `cp` is above 1."""
        if mesh.cp is None:
            return
        model.sequence_shard = row = SequenceShard(mesh.cp.get_group("cp"))
        for module in model.modules():
            if isinstance(module, LatentAttention):
                module.attend = partial(_attend, row)


class SequenceShard(LocalSequenceShard):
    """The two chunks of a row that this rank of `group` has."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.ranks = group.size()

    def take_local(self, x: Tensor) -> Tensor:
        """This rank's positions of `x` [..., sequence]."""
        chunks = x.chunk(2 * self.ranks, dim=-1)
        return torch.cat([chunks[self.rank], chunks[-1 - self.rank]], dim=-1)

    def gather(self, x: Tensor) -> Tensor:
        """The row again, from every rank's positions `x` [batch, sequence, ..]."""
        return in_row_order(all_gather(x, 1, self.group), self.ranks)


def in_row_order(parts: Tensor, ranks: int) -> Tensor:
    """`parts` [batch, sequence, ..], every rank's two chunks one behind the other, in the row's order."""
    chunks = parts.chunk(2 * ranks, dim=1)
    return torch.cat([*chunks[0::2], *chunks[1::2][::-1]], dim=1)


def _attend(
    row: SequenceShard,
    attention: LatentAttention,
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    segments: Segments | None,
) -> Tensor:
    """Attend from the rank's `q` to all keys before each query, as attend_locally does to its own."""
    ranks, rank, chunk = row.ranks, row.rank, q.shape[1] // 2
    gathered = row.gather(torch.cat([latent, k_rope], dim=-1))
    # Nothing behind the second chunk is seen, so it is not expanded either.
    seen = gathered[:, : chunk * (2 * ranks - rank)]
    k, v = attention.expand(*seen.split([latent.shape[-1], k_rope.shape[-1]], dim=-1))
    starts = (chunk * rank, chunk * (2 * ranks - 1 - rank))
    out = [
        attend_to_prefix(part, k, v, attention.softmax_scale, start, segments)
        for part, start in zip(q.split(chunk, dim=1), starts, strict=True)
    ]
    return torch.cat(out, dim=1)
