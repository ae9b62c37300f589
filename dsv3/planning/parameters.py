"""Every weight of a model by name: shape, component, and the dim that tensor parallelism splits.

Parameter counts, FLOPs, memory and traffic are all computed from this one table. It mirrors the modules of
dsv3/model; a test holds it to them on the meta device.

Training FLOPs per token, by both conventions in use: a token costs 6 FLOPs per matmul weight that it meets
(2 forward, 4 backward) and, per layer, 6 x heads x (qk + v head dims) for every position that it attends to.
Publications disagree about those positions: `causal` counts the half of the square that is computed,
`full_square` (PaLM, arXiv 2204.02311, appendix B) counts all of it. Recomputation is never counted, so a rate
over the hardware's peak is the MFU and not the HFU (training/loop.py computes it).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from dsv3.config.model import ModelConfig


class Component(Enum):
    """The part of the model that a weight belongs to."""

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
    """A parameter; `tensor_dim` is the dim that tensor parallelism splits (None: replicated over tp ranks).

    Routed experts are one stack [experts, rows, columns], which expert parallelism splits instead.
    """

    component: Component
    shape: tuple[int, ...]
    tensor_dim: int | None = None
    name: str = field(default="", compare=False)
    """The parameter's name in the model."""

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """True if a matmul reads the weight: all but the norms and the embedding's lookup table."""
        return self.component not in (Component.norms, Component.embedding)


def embedding(config: ModelConfig) -> list[Weight]:
    """Return the input embedding, split over the vocabulary."""
    return [Weight(Component.embedding, (config.vocab_size, config.dim), 0, "embedding.weight")]


def output(config: ModelConfig) -> list[Weight]:
    """Return the last norm and the head, which is split over the vocabulary."""
    head = Weight(Component.head, (config.vocab_size, config.dim), 0, "head.weight")
    return [_norm(config.dim, "norm"), head]


def block(config: ModelConfig, dense: bool, name: str = "") -> list[Weight]:
    """Return the weights of the layer `name` with its two norms (model/transformer.py, Block)."""
    feed_forward = (_dense_ffn if dense else _moe)(config, f"{name}.ffn")
    norms = (_norm(config.dim, f"{name}.{part}_norm") for part in ("attention", "ffn"))
    return [next(norms), *_attention(config, f"{name}.attention"), next(norms), *feed_forward]


def layers(config: ModelConfig) -> list[list[Weight]]:
    """Return the weights of each layer of the main model, in order."""
    return [block(config, n < config.num_dense_layers, layer_name(n)) for n in range(config.num_layers)]


def mtp_modules(config: ModelConfig) -> list[list[Weight]]:
    """Return the weights of each MTP depth, without the shared embedding and head."""
    return [[*mtp_join(config, n), *mtp_block(config, n)] for n in range(config.mtp_depths)]


def mtp_join(config: ModelConfig, depth: int = 0) -> list[Weight]:
    """Return the weights of MTP depth `depth`, from 0, around its layer: three norms and the projection."""
    shape, name = (config.dim, 2 * config.dim), f"mtp.{depth}"
    norms = (f"{name}.{part}" for part in ("embedding_norm", "hidden_norm", "norm"))
    projection = Weight(Component.mtp_projection, shape, None, f"{name}.projection.weight")
    return [projection, *(_norm(config.dim, norm) for norm in norms)]


def mtp_block(config: ModelConfig, depth: int = 0) -> list[Weight]:
    """Return the weights of the layer of MTP depth `depth`, from 0."""
    return block(config, dense=False, name=mtp_block_name(depth))


def layer_name(number: int) -> str:
    """Return the name of a layer of the main model, from 0."""
    return f"layers.{number}"


def mtp_block_name(depth: int) -> str:
    """Return the name of the layer of MTP depth `depth`, from 0."""
    return f"mtp.{depth}.block"


def main_model(config: ModelConfig) -> list[Weight]:
    """Return every weight except those of the MTP depths."""
    return [*embedding(config), *(w for layer in layers(config) for w in layer), *output(config)]


def every_weight(config: ModelConfig) -> list[Weight]:
    """Return the weights of the whole model, MTP depths last."""
    return [*main_model(config), *(weight for depth in mtp_modules(config) for weight in depth)]


def _norm(dim: int, name: str) -> Weight:
    return Weight(Component.norms, (dim,), None, f"{name}.weight")


def _attention(config: ModelConfig, name: str) -> list[Weight]:
    # tp splits the projections that have heads; those to the small latents are replicated.
    a, dim = config.attention, config.dim

    def projection(part: str, rows: int, columns: int, tensor_dim: int | None = None) -> Weight:
        return Weight(Component.attention, (rows, columns), tensor_dim, f"{name}.{part}_proj.weight")

    query_rows = a.heads * a.qk_head_dim
    if a.q_lora_rank is None:
        queries = [projection("q", query_rows, dim, 0)]
    else:
        queries = [projection("q_b", query_rows, a.q_lora_rank, 0), projection("q_a", a.q_lora_rank, dim)]
        queries.append(_norm(a.q_lora_rank, f"{name}.q_a_norm"))
    return [
        *queries,
        projection("kv_a", a.kv_lora_rank + a.qk_rope_head_dim, dim),
        _norm(a.kv_lora_rank, f"{name}.kv_a_norm"),
        projection("kv_b", a.heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank, 0),
        projection("o", dim, a.heads * a.v_head_dim, 1),
    ]


def _dense_ffn(config: ModelConfig, name: str) -> list[Weight]:
    return _feed_forward(Component.dense_ffn, config.dim, config.dense_hidden_dim, name, (0, 0, 1))


def _moe(config: ModelConfig, name: str) -> list[Weight]:
    moe, dim = config.moe, config.dim
    up, down = (moe.num_experts, 2 * moe.hidden_dim, dim), (moe.num_experts, dim, moe.hidden_dim)
    routed = [
        Weight(Component.router, (moe.num_experts, dim), None, f"{name}.router.weight"),
        Weight(Component.experts, up, None, f"{name}.experts.gate_up_proj"),
        Weight(Component.experts, down, None, f"{name}.experts.down_proj"),
    ]
    # Under tp the shared experts work on sequence shards and are replicated on every tp rank.
    hidden, whole = moe.num_shared_experts * moe.hidden_dim, (None, None, None)
    shared = _feed_forward(Component.shared_experts, dim, hidden, f"{name}.shared_experts", whole)
    return [*routed, *shared] if hidden else routed


def _feed_forward(
    component: Component, dim: int, hidden: int, name: str, tensor_dims: tuple[int | None, ...]
) -> list[Weight]:
    parts, shapes = ("gate", "up", "down"), ((hidden, dim), (hidden, dim), (dim, hidden))
    return [
        Weight(component, shape, tensor_dim, f"{name}.{part}_proj.weight")
        for part, shape, tensor_dim in zip(parts, shapes, tensor_dims, strict=True)
    ]


def numel(of: Iterable[Weight]) -> int:
    """Count the elements of several weights."""
    return sum(weight.numel for weight in of)


def total(config: ModelConfig) -> int:
    """Count all parameters with the MTP depths; shared embedding and head once, no expert biases."""
    return total_without_mtp(config) + sum(map(numel, mtp_modules(config)))


def total_without_mtp(config: ModelConfig) -> int:
    """Count the parameters of the main model, after which a released checkpoint's size is named."""
    return numel(main_model(config))


def active(config: ModelConfig) -> int:
    """Count the parameters that one token uses: top_k routed experts, all else, both embeddings, no MTP."""
    moe_layers = config.num_layers - config.num_dense_layers
    idle = config.moe.num_experts - config.moe.top_k
    return total_without_mtp(config) - moe_layers * idle * expert(config)


def expert(config: ModelConfig) -> int:
    """Count the parameters of one routed expert: gate, up and down."""
    return 3 * config.dim * config.moe.hidden_dim


def active_matmul_parameters(of: Iterable[Weight], config: ModelConfig) -> int:
    """Count the matmul weights that one token meets: top_k of the routed experts, no embedding."""
    experts, chosen = config.moe.num_experts, config.moe.top_k
    return sum(
        weight.numel // experts * chosen if weight.component is Component.experts else weight.numel
        for weight in of
        if weight.is_matrix
    )


class FlopsConvention(Enum):
    """The part of the attention square that counts."""

    causal = "causal"
    full_square = "full_square"


def training_flops_by_component(
    config: ModelConfig, sequence_length: int, convention: FlopsConvention = FlopsConvention.causal
) -> dict[str, int]:
    """Return FLOPs per token, with the MTP depths, by component; `scores` is attention's square.

    They sum to training_flops_per_token.
    """
    heads = 1 + config.mtp_depths
    found: dict[str, int] = {}
    for weight in every_weight(config):
        passes = heads if weight.component is Component.head else 1
        name = weight.component.value
        found[name] = found.get(name, 0) + 6 * passes * active_matmul_parameters([weight], config)
    total = training_flops_per_token(config, sequence_length, convention)
    return {name: flops for name, flops in found.items() if flops} | {"scores": total - sum(found.values())}


def training_flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    convention: FlopsConvention = FlopsConvention.causal,
    mtp: bool = True,
) -> int:
    """Return FLOPs per token, forward and backward, at `sequence_length` tokens; without MTP if `mtp` is off.

    6 x active matmul weights (input embedding left out) + 3 x layers x heads x (qk + v head dims) x
    sequence (causal), twice the last term for the full square. An MTP depth adds its projection, its
    layer and another pass through the head.
    """
    depths = config.mtp_depths if mtp else 0
    head = config.vocab_size * config.dim
    matmul = active_matmul_parameters(main_model(config), config)
    matmul += sum(active_matmul_parameters(depth, config) + head for depth in mtp_modules(config)[:depths])
    attention = 3 * config.attention.heads * (config.attention.qk_head_dim + config.attention.v_head_dim)
    if convention is FlopsConvention.full_square:
        attention *= 2
    return 6 * matmul + (config.num_layers + depths) * attention * sequence_length
