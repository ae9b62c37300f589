"""Every weight of a model as numbers: its shape, the component it counts to, how it is split.

The one table that parameter counts, FLOPs and memory are computed from; it mirrors the modules of
dsv3/model and is held to them by a test on the meta device.


How many parameters a model has, by component.

Training FLOPs a token, by both conventions in use, and the utilisation they give.

A token costs 6 FLOPs a matmul weight it meets (2 forward, 4 backward) and, a layer, 6 x heads x
(qk + v head dims) for every position it attends to. Peers disagree about those positions: `causal`
counts the half of the square that is computed, `full_square` (PaLM, arXiv 2204.02311, appendix B)
counts all of it. Recomputation is never counted: MFU, not HFU.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from dsv3.config.model import ModelConfig


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


def active_matmul_parameters(of: Iterable[Weight], config: ModelConfig) -> int:
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


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of each component over the main model's layers; `mtp` is all of the MTP depths."""

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    router: int
    experts: int
    shared_experts: int
    norms: int
    mtp: int

    @property
    def total(self) -> int:
        """All of them: shared embedding and head once."""
        return sum(vars(self).values())


def count(config: ModelConfig) -> ParameterCounts:
    """Parameters by component, selection biases (buffers) left out."""
    main = main_model(config)
    names = [c.value for c in Component if c is not Component.mtp_projection]
    counts = {name: numel(w for w in main if w.component.value == name) for name in names}
    return ParameterCounts(**counts, mtp=sum(map(numel, mtp_modules(config))))


def total(config: ModelConfig) -> int:
    """Parameters with the MTP depths, shared embedding and head once."""
    return count(config).total


def total_without_mtp(config: ModelConfig) -> int:
    """Parameters of the main model: what a released checkpoint's size is named after."""
    return numel(main_model(config))


def active(config: ModelConfig) -> int:
    """Parameters one token uses: top_k routed experts and everything else, both embeddings, no MTP."""
    moe_layers = config.num_layers - config.num_dense_layers
    idle = config.moe.num_experts - config.moe.top_k
    return total_without_mtp(config) - moe_layers * idle * expert(config)


def expert(config: ModelConfig) -> int:
    """Parameters of one routed expert: gate, up and down."""
    return 3 * config.dim * config.moe.hidden_dim


def attention_per_layer(config: ModelConfig) -> int:
    """Parameters of one layer's attention without the norms of its latents."""
    return numel(w for w in block(config, dense=False) if w.component is Component.attention)


def biases(config: ModelConfig) -> int:
    """Selection biases: fp32 buffers, one an expert in every MoE layer, the MTP depths' too."""
    return config.num_moe_layers * config.moe.num_experts if config.moe.selection_bias else 0


def numel(of: Iterable[Weight]) -> int:
    """Numbers in several weights."""
    return sum(weight.numel for weight in of)


class FlopsConvention(Enum):
    """Which part of the attention square counts."""

    causal = "causal"
    full_square = "full_square"


def training_flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    convention: FlopsConvention = FlopsConvention.causal,
    mtp: bool = True,
) -> int:
    """FLOPs a token, forward and backward, at `sequence_length` tokens; with MTP unless `mtp` is off.

    6 x active matmul weights (input embedding left out) + 3 x layers x heads x (qk + v head dims) x
    sequence (causal), twice the last term for the full square. An MTP depth adds its projection, its
    layer and another pass through the head.
    """
    depths = config.mtp_depths if mtp else 0
    attention = 3 * config.attention.heads * (config.attention.qk_head_dim + config.attention.v_head_dim)
    if convention is FlopsConvention.full_square:
        attention *= 2
    active_matmul_parameters = 6 * active_matmul_weights(config, depths)
    return active_matmul_parameters + (config.num_layers + depths) * attention * sequence_length


def active_matmul_weights(config: ModelConfig, mtp_depths: int) -> int:
    """Matmul weights that one token meets, the shared head once a prediction."""
    main = active_matmul_parameters(main_model(config), config)
    head = config.vocab_size * config.dim
    return main + sum(
        active_matmul_parameters(module, config) + head for module in mtp_modules(config)[:mtp_depths]
    )


def mfu(
    tokens_per_second: float, flops_per_token: float, peak_flops: float | None, devices: int
) -> float | None:
    """Model FLOPs utilisation from 0 to 1; None where the peak (FLOP/s a device) is unknown.

    `tokens_per_second` is that of all `devices` together.
    """
    return None if peak_flops is None else tokens_per_second * flops_per_token / (peak_flops * devices)
