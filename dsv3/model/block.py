"""One layer: attention and feed-forward, each behind its norm and around a residual."""

from torch import Tensor, nn

from dsv3.model.attention import LatentAttention
from dsv3.model.cache import LayerCache
from dsv3.model.config import ModelConfig
from dsv3.model.layers import FeedForward, RMSNorm
from dsv3.model.moe import MoE
from dsv3.model.rope import softmax_scale
from dsv3.model.router import RouterStats
from dsv3.model.segments import Segments


class Block(nn.Module):
    """A dense or an MoE transformer layer (HF: model.layers.N)."""

    def __init__(self, config: ModelConfig, dense: bool) -> None:
        super().__init__()
        attention = config.attention
        scale = softmax_scale(config.rope, attention.qk_head_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = LatentAttention(config.dim, attention, scale, config.latent_norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config.dim, config.dense_hidden_dim) if dense else MoE(config.dim, config.moe)

    def forward(
        self, x: Tensor, rotary: Tensor, segments: Segments | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """Map `x` [batch, sequence, dim] to the same shape; MoE layers also give their router's stats."""
        x = x + self.attention(self.attention_norm(x), rotary, segments, cache)
        if isinstance(self.ffn, MoE):
            out, stats = self.ffn(self.ffn_norm(x))
            return x + out, stats
        return x + self.ffn(self.ffn_norm(x)), None
