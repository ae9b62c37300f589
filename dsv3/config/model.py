"""Schema of the `model` group: the numbers of a DeepSeek-V3 model, which the modules receive as they are."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dsv3.config.limits import EXPERTS
from dsv3.config.registry import PATH, schema
from dsv3.errors import require, require_positive

MISSING: Any = "???"
"""OmegaConf's mark of a missing value; planning reads this file without OmegaConf."""


class RopeScaling(Enum):
    """The stretch of rotary frequencies beyond the pre-training length."""

    none = "none"
    yarn = "yarn"


class ScoreFunction(Enum):
    """The function from router logits to affinities: softmax in V2, sigmoid in V3."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class AttentionKernel(Enum):
    """The implementation that computes softmax(q k^T) v."""

    auto = "auto"
    sdpa = "sdpa"
    varlen = "varlen"
    flex = "flex"


@dataclass(unsafe_hash=True)
class AttentionConfig:
    """Multi-head latent attention (report section 2.1.1)."""

    heads: int
    """Attention heads."""
    q_lora_rank: int | None
    """Width of the compressed query latent; null projects queries directly."""
    kv_lora_rank: int
    """Width of the compressed key-value latent, which the KV cache holds."""
    qk_nope_head_dim: int
    """Width of a query or key head's part without rotation."""
    qk_rope_head_dim: int
    """Width of a query or key head's part with rotary embedding; even."""
    v_head_dim: int
    """Width of a value head."""
    kernel: AttentionKernel = AttentionKernel.auto
    """Implementation of softmax(q k^T) v; auto picks one for the device and the mask."""

    @property
    def qk_head_dim(self) -> int:
        """Return the width of one query or key head: the parts without and with rotation."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def validate(self) -> None:
        require_positive(self, "heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        rope = self.qk_rope_head_dim
        require(rope > 0 and rope % 2 == 0, "qk_rope_head_dim", rope, "must be even: RoPE turns pairs")


@dataclass(unsafe_hash=True)
class RopeConfig:
    """Rotary embedding, and YaRN's stretch of it (arXiv 2309.00071; report section 4.3)."""

    theta: float = 10000.0
    """Base of the rotary frequencies."""
    scaling: RopeScaling = RopeScaling.none
    """Stretch beyond the pre-training length: none or yarn."""
    factor: float = 40.0
    """YaRN's stretch: the new length per pre-training length."""
    original_sequence_length: int = 4096
    """Pre-training length in tokens; the default of train.sequence_length."""
    beta_fast: float = 32.0
    """Turns over the pre-training length above which YaRN keeps a frequency."""
    beta_slow: float = 1.0
    """Turns over the pre-training length below which YaRN divides a frequency by `factor`."""
    mscale: float = 1.0
    """YaRN's scale of cosines and sines, per that of `mscale_all_dim` (0.1 mscale ln(factor) + 1)."""
    mscale_all_dim: float = 1.0
    """YaRN's scale of the softmax: (0.1 mscale_all_dim ln(factor) + 1)^2."""

    def validate(self) -> None:
        require_positive(self, "original_sequence_length", "beta_slow")
        require(self.theta > 1, "theta", self.theta, "must be above 1")
        require(self.factor >= 1, "factor", self.factor, "must be at least 1")
        allowed = f"must be at least beta_slow={self.beta_slow}"
        require(self.beta_fast >= self.beta_slow, "beta_fast", self.beta_fast, allowed)


@dataclass(unsafe_hash=True)
class MoEConfig:
    """Fine-grained experts and their router (report section 2.1.2).

    With `selection_bias` (V3) a group is scored by the sum of its two best biased scores, without (V2) by its
    maximum.
    """

    num_experts: int
    """Routed experts per MoE layer."""
    top_k: int
    """Routed experts per token."""
    num_shared_experts: int
    """Experts that every token passes through."""
    hidden_dim: int
    """Hidden width of one expert."""
    score_function: ScoreFunction = ScoreFunction.sigmoid
    """Function from router logits to affinities: softmax in V2, sigmoid in V3."""
    num_groups: int = 1
    """Groups that the routed experts are divided into."""
    top_k_groups: int = 1
    """Groups whose experts are open to a token."""
    route_scale: float = 1.0
    """Factor on the routed experts' gate values."""
    normalize_top_k: bool = True
    """Divide the gate values of a token by their sum."""
    selection_bias: bool = True
    """Add the expert bias to the scores that select (aux-loss-free load balancing, V3)."""
    forced_balance: bool = False
    """For benchmarks only: give every expert the same load, whatever the scores."""

    def validate(self) -> None:
        require_positive(
            self, "num_experts", "top_k", "hidden_dim", "num_groups", "top_k_groups", "route_scale"
        )
        _require_aligned("hidden_dim", self.hidden_dim)
        shared = self.num_shared_experts
        require(shared >= 0, "num_shared_experts", shared, "must be 0 or more")
        allowed = f"must be at most num_experts={self.num_experts}"
        require(self.top_k <= self.num_experts, "top_k", self.top_k, allowed)
        groups, chosen, experts = self.num_groups, self.top_k_groups, self.num_experts
        divisors = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        require(experts % groups == 0, "num_groups", groups, f"must divide num_experts={experts}: {divisors}")
        require(chosen <= groups, "top_k_groups", chosen, f"must be at most num_groups={groups}")
        reachable = chosen * (experts // groups)
        allowed = f"must be at most {reachable}, the experts in top_k_groups={chosen} of {groups} groups"
        require(self.top_k <= reachable, "top_k", self.top_k, allowed)
        if self.selection_bias and groups > 1:
            allowed = f"leaves {experts // groups} expert a group; the group score needs its best two"
            require(experts // groups >= 2, "num_groups", groups, allowed)


@schema("model")
@dataclass(unsafe_hash=True)
class ModelConfig:
    """A whole model of the DeepSeek-V3 family."""

    vocab_size: int
    """Token ids of the embedding and the output head."""
    dim: int
    """Width of the residual stream."""
    num_layers: int
    """Layers of the main model, dense and MoE."""
    num_dense_layers: int
    """First layers, which have a dense feed-forward network."""
    dense_hidden_dim: int
    """Hidden width of a dense feed-forward network."""
    attention: AttentionConfig
    """Multi-head latent attention."""
    moe: MoEConfig
    """Experts and their router."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary embedding."""
    mtp_depths: int = 0
    """Multi-token prediction modules, each one token further ahead."""
    norm_eps: float = 1e-6
    """Epsilon of the RMSNorms of the residual stream."""
    latent_norm_eps: float = 1e-6
    """Epsilon of the RMSNorms on the compressed latents alone."""
    init_std: float = 0.006
    """Standard deviation of the initial weights."""
    _target_: str = "dsv3.model.transformer.Transformer"
    _recursive_: bool = False
    _convert_: str = "object"

    @property
    def num_moe_layers(self) -> int:
        """Return the number of MoE layers of the main model and of the MTP modules together."""
        return self.num_layers - self.num_dense_layers + self.mtp_depths

    def moe_layers(self) -> list[str]:
        """Return the names of the MoE layers in order, those of the MTP depths last."""
        main = [f"layers.{n}" for n in range(self.num_dense_layers, self.num_layers)]
        return main + [f"mtp.{n}.block" for n in range(self.mtp_depths)]

    def validate(self) -> None:
        require_positive(self, "vocab_size", "dim", "num_layers", "dense_hidden_dim")
        require_positive(self, "norm_eps", "latent_norm_eps", "init_std")
        _require_aligned("dim", self.dim)
        dense = self.num_dense_layers
        allowed = f"must lie between 0 and num_layers={self.num_layers}"
        require(0 <= dense <= self.num_layers, "num_dense_layers", dense, allowed)
        require(self.mtp_depths >= 0, "mtp_depths", self.mtp_depths, "must be 0 or more")
        most = EXPERTS // max(self.num_moe_layers, 1)
        allowed = f"must be at most {most:,} with {self.num_moe_layers:,} MoE layers"
        require(self.moe.num_experts <= most, "moe.num_experts", self.moe.num_experts, allowed)


def _require_aligned(key: str, width: int) -> None:
    """Raise InvalidValue for a width of grouped matmul that is no multiple of 16 bytes: 8 bf16 values."""
    near = ", ".join(str(n) for n in (width // 8 * 8, width // 8 * 8 + 8) if n > 0)
    require(width % 8 == 0, key, width, f"must be a multiple of 8 for grouped matmul; nearest: {near}")


@schema("model/hf")
@dataclass(unsafe_hash=True)
class HFModelConfig(ModelConfig):
    """A HuggingFace checkpoint: every number comes from its config.json; keys that you type win.

    launch/checkpoint_defaults.py fills the numbers in and puts a plain ModelConfig in its place.
    """

    vocab_size: int = MISSING
    dim: int = MISSING
    num_layers: int = MISSING
    num_dense_layers: int = MISSING
    dense_hidden_dim: int = MISSING
    attention: AttentionConfig = field(default_factory=lambda: AttentionConfig(*[MISSING] * 6))
    moe: MoEConfig = field(default_factory=lambda: MoEConfig(*[MISSING] * 4))
    path: str | None = field(default=None, metadata=PATH)
    """HuggingFace checkpoint: a directory with a config.json."""
