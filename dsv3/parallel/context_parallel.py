"""Context parallelism (CP): sequences sharded over ranks in the zigzag split, attention by gathered latents.

Of 2 x cp equal chunks of a row, rank r has chunks r and 2 cp - 1 - r, so that every rank attends to the
same number of keys. Attention all-gathers what MLA caches of a token, kv_lora_rank + qk_rope_head_dim
values, expands the keys and values that the rank's own queries can see, and attends to them.

Generation splits the prompts in the same way. What prefill has gathered is the KV cache of whole rows, so
that every context rank has it all and decodes alike, without communication over `cp`.

`join_sequence_shards` serves tensor parallelism as well: it lets the ranks that hold shards of a sequence sum
the router's counts, and find its last token and its padding.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.model.attention import LatentAttention
from dsv3.model.attention_kernels import Segments
from dsv3.model.kv_cache import CacheStep
from dsv3.model.router import LocalRouterReduction, Router
from dsv3.model.transformer import LocalSequenceShard, Transformer
from dsv3.parallel.collectives import all_gather, all_reduce
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.prefix_attention import attend_to_prefix


class RouterReduction(LocalRouterReduction):
    """The router reduction of sequences that are sharded over the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.shards = group.size()

    def sum(self, counts: Tensor) -> Tensor:
        """Sum `counts` over the ranks of a sequence, without gradient."""
        return all_reduce(counts, self.group)


def join_sequence_shards(model: Transformer, mesh: ParallelMesh) -> None:
    """Let ranks that share a sequence (axes cp and tp) sum router counts, and know their positions in it."""
    if mesh.sequence is None:
        return
    reduction = RouterReduction(mesh.sequence.get_group("sequence"))
    for module in model.modules():
        if isinstance(module, Router):
            module.reduction = reduction
    model.take_hidden = partial(_take_hidden, model.sequence_shard, mesh)
    model.select_last_token = partial(_select_last_token, model, mesh)


def _take_hidden(shard: LocalSequenceShard, mesh: ParallelMesh, x: Tensor) -> Tensor:
    """Return the positions of `x` [.., T] that this rank has between attention and feed-forward.

    They are the rank's run of those that its tensor ranks embed together: `shard` takes these.
    """
    x, tp = shard.take_local(x), mesh.degrees.tp
    return x if tp == 1 else x.chunk(tp, dim=-1)[mesh.dense.get_local_rank("tp")]


def _select_last_token(model: Transformer, mesh: ParallelMesh, x: Tensor, step: CacheStep) -> Tensor:
    """Select each row's last token [B, 1, D] from this rank's `x` [B, T, D], on all ranks of the row.

    The other ranks add zeros to it: the sum is exact.
    """
    assert mesh.sequence is not None
    tp = mesh.degrees.tp
    if step.decodes:  # context ranks have whole rows each
        group = mesh.dense.get_group("tp") if tp > 1 else None
    else:
        group = mesh.sequence.get_group("sequence")
    positions = torch.arange(step.positions.shape[1], device=x.device)
    own = _take_hidden(model.shard_of_pass(step), mesh, positions)
    is_last = (own == step.last.unsqueeze(1)).unsqueeze(-1)
    selected = torch.where(is_last, x, x.new_zeros(())).sum(1, keepdim=True)
    return selected if group is None else all_reduce(selected, group)


class ContextParallel:
    """Wrapper that shards sequences over the `cp` axis."""

    def __call__(self, model: Transformer, mesh: ParallelMesh) -> None:
        """Wrap `model` in place where `cp` is above 1."""
        if mesh.cp is None:
            return
        model.sequence_shard = shard = SequenceShard(mesh.cp.get_group("cp"))
        for module in model.modules():
            if isinstance(module, LatentAttention):
                module.gather_row = partial(_gather_row, shard)
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


def _gather_row(shard: SequenceShard, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """All-gather the two over the row, in one collective; see model/attention.GatherRow."""
    gathered = shard.gather(torch.cat([latent, k_rope], dim=-1))
    latent, k_rope = gathered.split([latent.shape[-1], k_rope.shape[-1]], dim=-1)
    return latent, k_rope


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
    # No query sees a key behind the rank's second chunk: leave those latents unexpanded.
    seen = chunk * (2 * ranks - rank)
    k, v = attention.expand_kv(latent[:, :seen], k_rope[:, :seen])
    starts = (chunk * rank, chunk * (2 * ranks - 1 - rank))
    out = [
        attend_to_prefix(q_chunk, k, v, attention.softmax_scale, start, segments)
        for q_chunk, start in zip(q.split(chunk, dim=1), starts, strict=True)
    ]
    return torch.cat(out, dim=1)
