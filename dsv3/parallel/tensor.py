"""Tensor parallelism with sequence parallelism between: what is split, and what travels.

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
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from dsv3.model.attention import LatentAttention
from dsv3.model.layers import FeedForward
from dsv3.model.transformer import Transformer
from dsv3.parallel.collectives import all_gather, reduce_scatter
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.vocabulary import SplitVocabulary, embed_split

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
            model.vocabulary = SplitVocabulary(group)


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
