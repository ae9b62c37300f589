"""The numbers of a DeepSeek-V3 model: the schema Hydra validates and the objects the modules receive.

Which checkpoint a command reads and which ones a run keeps.
"""

from dataclasses import dataclass, field
from enum import Enum

from dsv3.errors import require, require_positive


class RopeScaling(Enum):
    """How rotary frequencies are stretched beyond the pre-training length."""

    none = "none"
    yarn = "yarn"


class ScoreFunction(Enum):
    """What turns router logits into affinities: softmax in V2, sigmoid in V3."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class AttentionKernel(Enum):
    """Which implementation computes softmax(q k^T) v."""

    auto = "auto"
    sdpa = "sdpa"
    varlen = "varlen"
    flex = "flex"


@dataclass
class AttentionConfig:
    """Multi-head latent attention (report section 2.1.1); `q_lora_rank` null projects queries directly."""

    heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kernel: AttentionKernel = AttentionKernel.auto

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without and the part with rotation."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def validate(self) -> None:
        require_positive(self, "heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        rope = self.qk_rope_head_dim
        require(rope > 0 and rope % 2 == 0, "qk_rope_head_dim", rope, "must be even: RoPE turns pairs")


@dataclass
class RopeConfig:
    """Rotary embedding, and YaRN's stretch of it (arXiv 2309.00071; report section 4.3)."""

    theta: float = 10000.0
    scaling: RopeScaling = RopeScaling.none
    factor: float = 40.0
    original_sequence_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def validate(self) -> None:
        require_positive(self, "original_sequence_length", "beta_slow")
        require(self.theta > 1, "theta", self.theta, "must be above 1")
        require(self.factor >= 1, "factor", self.factor, "must be at least 1")
        allowed = f"must be at least beta_slow={self.beta_slow}"
        require(self.beta_fast >= self.beta_slow, "beta_fast", self.beta_fast, allowed)


@dataclass
class MoEConfig:
    """Fine-grained experts and their router (report section 2.1.2).

    `top_k_groups` of `num_groups` groups are open to a token. With `selection_bias` (V3) a group is
    scored by the sum of its two best biased scores, without (V2) by its maximum.
    """

    num_experts: int
    top_k: int
    num_shared_experts: int
    hidden_dim: int
    score_function: ScoreFunction = ScoreFunction.sigmoid
    num_groups: int = 1
    top_k_groups: int = 1
    route_scale: float = 1.0
    normalize_top_k: bool = True
    selection_bias: bool = True
    forced_balance: bool = False
    """For benchmarks only: experts take turns whatever the scores, so that every one has the same load."""

    def validate(self) -> None:
        require_positive(
            self, "num_experts", "top_k", "hidden_dim", "num_groups", "top_k_groups", "route_scale"
        )
        _require_aligned("hidden_dim", self.hidden_dim)
        shared = self.num_shared_experts
        require(shared >= 0, "num_shared_experts", shared, "must be 0 or more")
        allowed = f"must be at most num_experts={self.num_experts}"
        require(self.top_k <= self.num_experts, "top_k", self.top_k, allowed)
        self._validate_groups()

    def _validate_groups(self) -> None:
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


@dataclass
class ModelConfig:
    """A whole model; `latent_norm_eps` is that of the norms on the compressed latents alone."""

    vocab_size: int
    dim: int
    num_layers: int
    num_dense_layers: int
    dense_hidden_dim: int
    attention: AttentionConfig
    moe: MoEConfig
    rope: RopeConfig = field(default_factory=RopeConfig)
    mtp_depths: int = 0
    norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6
    init_std: float = 0.006
    _target_: str = "dsv3.model.transformer.Transformer"
    _recursive_: bool = False
    _convert_: str = "object"

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model and of the MTP modules together."""
        return self.num_layers - self.num_dense_layers + self.mtp_depths

    def moe_layers(self) -> list[str]:
        """The names of the MoE layers in order, the MTP depths' last."""
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


def _require_aligned(key: str, width: int) -> None:
    """Rows of grouped matmuls start at multiples of 16 bytes: 8 numbers of bf16, whatever the precision."""
    near = ", ".join(str(n) for n in (width // 8 * 8, width // 8 * 8 + 8) if n > 0)
    require(width % 8 == 0, key, width, f"must be a multiple of 8 for grouped matmul; nearest: {near}")


@dataclass
class HFModelConfig(ModelConfig):
    """model=hf: a model whose numbers are still in the config.json of the checkpoint at `path`.

    runtime/prepare.py puts a plain ModelConfig in its place.
    """

    path: str | None = None
