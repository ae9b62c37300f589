"""Every weight of a model as numbers: its shape, the component it counts to, how it is split.

The one table that parameter counts, FLOPs and memory are computed from; it mirrors the modules of
dsv3/model and is held to them by a test on the meta device.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from dsv3.model.config import ModelConfig


class Component(Enum):
    """What a weight belongs to."""

    embedding = "embedding"
    head = "head"
    attention = "attention"
    dense_ffn = "dense_ffn"
    router = "router"
    experts = "experts"
    shared_experts = "shared_experts"
    norms = "norms"
    mtp_projection = "mtp_projection"


@dataclass(frozen=True)
class Weight:
    """A parameter; `tensor_dim` is the dim that tensor parallelism splits (None: every tp rank has it all).

    Routed experts are one stack [experts, rows, columns], split by expert parallelism instead.
    """

    component: Component
    shape: tuple[int, ...]
    tensor_dim: int | None = None

    @property
    def numel(self) -> int:
        """Numbers in the weight."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether a matmul reads it: everything but the norms and the embedding's lookup table."""
        return self.component not in (Component.norms, Component.embedding)


def embedding(config: ModelConfig) -> list[Weight]:
    """The input embedding, split over the vocabulary."""
    return [Weight(Component.embedding, (config.vocab_size, config.dim), 0)]


def output(config: ModelConfig) -> list[Weight]:
    """The last norm and the head, which is split over the vocabulary."""
    return [_norm(config.dim), Weight(Component.head, (config.vocab_size, config.dim), 0)]


def block(config: ModelConfig, dense: bool) -> list[Weight]:
    """One layer with its two norms (model/block.py)."""
    feed_forward = _dense_ffn(config) if dense else _moe(config)
    return [_norm(config.dim), *_attention(config), _norm(config.dim), *feed_forward]


def layers(config: ModelConfig) -> list[list[Weight]]:
    """The layers of the main model in order."""
    return [block(config, n < config.num_dense_layers) for n in range(config.num_layers)]


def mtp_modules(config: ModelConfig) -> list[list[Weight]]:
    """The MTP depths without the embedding and head they share (model/mtp.py)."""
    return [[*mtp_join(config), *block(config, dense=False)] for _ in range(config.mtp_depths)]


def mtp_join(config: ModelConfig) -> list[Weight]:
    """What an MTP depth has around its layer: three norms and the projection."""
    projection = Weight(Component.mtp_projection, (config.dim, 2 * config.dim))
    return [projection, *(_norm(config.dim) for _ in range(3))]


def main_model(config: ModelConfig) -> list[Weight]:
    """Every weight but those of the MTP depths."""
    return [*embedding(config), *(w for layer in layers(config) for w in layer), *output(config)]


def met(of: Iterable[Weight], config: ModelConfig) -> int:
    """Matmul weights that one token meets: of the routed experts its top_k, of the embedding none."""
    experts, chosen = config.moe.num_experts, config.moe.top_k
    return sum(
        weight.numel // experts * chosen if weight.component is Component.experts else weight.numel
        for weight in of
        if weight.is_matrix
    )


def _norm(dim: int) -> Weight:
    return Weight(Component.norms, (dim,))


def _attention(config: ModelConfig) -> list[Weight]:
    # The projections to the small latents stay whole under tp: only what has heads is split.
    a, dim, part = config.attention, config.dim, Component.attention
    queries = [Weight(part, (a.heads * a.qk_head_dim, a.q_lora_rank or dim), 0)]
    if a.q_lora_rank is not None:
        queries += [Weight(part, (a.q_lora_rank, dim)), _norm(a.q_lora_rank)]
    return [
        *queries,
        Weight(part, (a.kv_lora_rank + a.qk_rope_head_dim, dim)),
        _norm(a.kv_lora_rank),
        Weight(part, (a.heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank), 0),
        Weight(part, (dim, a.heads * a.v_head_dim), 1),
    ]


def _dense_ffn(config: ModelConfig) -> list[Weight]:
    up = Weight(Component.dense_ffn, (config.dense_hidden_dim, config.dim), 0)
    return [up, up, Weight(Component.dense_ffn, (config.dim, config.dense_hidden_dim), 1)]


def _moe(config: ModelConfig) -> list[Weight]:
    moe, dim = config.moe, config.dim
    routed = [
        Weight(Component.router, (moe.num_experts, dim)),
        Weight(Component.experts, (moe.num_experts, 2 * moe.hidden_dim, dim)),
        Weight(Component.experts, (moe.num_experts, dim, moe.hidden_dim)),
    ]
    # Shared experts work on sequence shards under tp and are whole on every tp rank.
    hidden = moe.num_shared_experts * moe.hidden_dim
    up, down = (Weight(Component.shared_experts, shape) for shape in ((hidden, dim), (dim, hidden)))
    return [*routed, up, up, down] if hidden else routed
