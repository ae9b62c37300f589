"""Multi-head latent attention: keys and values from one compressed latent a token.

Report section 2.1.1, equations 1 to 11. Only the latent (kv_lora_rank) and one rotated key
(qk_rope_head_dim) a token need to be kept for generation; per-head keys and values are expanded
from them. Module names follow the released checkpoints (HF: self_attn.*).
"""

import torch
from torch import Tensor, nn

from dsv3.model.config import AttentionConfig
from dsv3.model.kernels import Segments, attention_kernel
from dsv3.model.layers import Linear, RMSNorm
from dsv3.model.rope import apply_rotary


class LatentAttention(nn.Module):
    """MLA; queries come through their own latent where the config has a `q_lora_rank`."""

    def __init__(
        self, dim: int, config: AttentionConfig, softmax_scale: float, latent_norm_eps: float
    ) -> None:
        super().__init__()
        self.config = config
        self.softmax_scale = softmax_scale
        self.kernel = attention_kernel(config.kernel)
        heads, latent = config.heads, config.kv_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = Linear(dim, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(dim, config.q_lora_rank)
            self.q_a_norm = RMSNorm(config.q_lora_rank, latent_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj = Linear(dim, latent + config.qk_rope_head_dim)
        self.kv_a_norm = RMSNorm(latent, latent_norm_eps)
        self.kv_b_proj = Linear(latent, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, dim)

    def forward(self, x: Tensor, rotary: Tensor, segments: Segments | None = None) -> Tensor:
        """Attend within `x` [batch, sequence, dim]; `rotary` comes from rope.rotary_table."""
        q = self.queries(x, rotary)
        latent, k_rope = self.compress(x, rotary)
        k, v = self.expand(latent, k_rope)
        out = self.kernel(q, k, v, self.softmax_scale, segments)
        return self.o_proj(out.flatten(-2))  # type: ignore[no-any-return]

    def queries(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Queries [batch, sequence, heads, qk_head_dim], the last qk_rope_head_dim of them rotated."""
        c = self.config
        q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        # The head count is inferred: a tensor-parallel rank holds only its own heads.
        q = q.unflatten(-1, (-1, c.qk_head_dim))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return torch.cat([q_nope, apply_rotary(q_rope, rotary)], dim=-1)

    def compress(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """What a token leaves behind: latent [batch, sequence, kv_lora_rank] and rotated key [.., rope]."""
        c = self.config
        latent, k_rope = self.kv_a_proj(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return self.kv_a_norm(latent), apply_rotary(k_rope.unsqueeze(-2), rotary).squeeze(-2)

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Per-head keys and values [batch, sequence, heads, ...]; the rotated key is every head's."""
        c = self.config
        kv = self.kv_b_proj(latent).unflatten(-1, (-1, c.qk_nope_head_dim + c.v_head_dim))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_rope = k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)
        return torch.cat([k_nope, k_rope], dim=-1), v
