"""Multi-head latent attention: keys and values from one compressed latent a token.

Report section 2.1.1, equations 1 to 11. Only the latent (kv_lora_rank) and one rotated key
(qk_rope_head_dim) a token are kept for generation (cache.py): training expands per-head keys and
values from them, decoding attends to them as they are. Module names follow the released checkpoints
(HF: self_attn.*).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv3.config.model import AttentionConfig
from dsv3.model.attention_kernels import Segments, attention_kernel
from dsv3.model.kv_cache import LayerCache
from dsv3.model.layers import Linear, RMSNorm
from dsv3.model.rope import apply_rotary

Gather = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From the latents of a rank's own tokens to those of the queries it computes (parallel/tensor.py)."""

Attend = Callable[["LatentAttention", Tensor, Tensor, Tensor, Segments | None], Tensor]
"""From queries and compressed keys and values to the heads' outputs (parallel/context.py)."""


class LatentAttention(nn.Module):
    """MLA; queries come through their own latent where the config has a `q_lora_rank`."""

    def __init__(
        self, dim: int, config: AttentionConfig, softmax_scale: float, latent_norm_eps: float
    ) -> None:
        super().__init__()
        self.config = config
        self.softmax_scale = softmax_scale
        self.kernel = attention_kernel(config.kernel)
        self.gather: Gather = _own
        self.attend: Attend = attend_locally
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

    def forward(
        self, x: Tensor, rotary: Tensor, segments: Segments | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Attend within `x` [batch, sequence, dim]; `rotary` comes from rope.rotary_table.

        With a `cache` (generation) also to the tokens that it holds; it then holds those of `x` too.
        """
        q_latent, latent, k_rope = self.gather(*self.compress(x))
        q = self.queries(q_latent, rotary)
        k_rope = apply_rotary(k_rope.unsqueeze(-2), rotary).squeeze(-2)
        if cache is not None:
            cache.write(latent, k_rope)
        if cache is None or cache.visible is None:
            out = self.attend(self, q, latent, k_rope, segments)
        else:
            out = self.absorbed(q, cache.entries, cache.visible)
        return self.o_proj(out.flatten(-2))  # type: ignore[no-any-return]

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the low-rank projections make of `x` [batch, sequence, dim], each [batch, sequence, ..].

        The queries' latent [.., q_lora_rank] (`x` itself without one), that of keys and values
        [.., kv_lora_rank], and the key that is still to be rotated [.., qk_rope_head_dim].
        """
        c = self.config
        q_latent = x if c.q_lora_rank is None else self.q_a_norm(self.q_a_proj(x))
        latent, k_rope = self.kv_a_proj(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return q_latent, self.kv_a_norm(latent), k_rope

    def queries(self, q_latent: Tensor, rotary: Tensor) -> Tensor:
        """Queries [batch, sequence, heads, qk_head_dim], the last qk_rope_head_dim of them rotated."""
        c = self.config
        q = self.q_proj(q_latent) if c.q_lora_rank is None else self.q_b_proj(q_latent)
        # The head count is inferred: a tensor-parallel rank holds only its own heads.
        q = q.unflatten(-1, (-1, c.qk_head_dim))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return torch.cat([q_nope, apply_rotary(q_rope, rotary)], dim=-1)

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Per-head keys and values [batch, sequence, heads, ...]; the rotated key is every head's."""
        c = self.config
        kv = self.kv_b_proj(latent).unflatten(-1, (-1, c.qk_nope_head_dim + c.v_head_dim))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_rope = k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)
        return torch.cat([k_nope, k_rope], dim=-1), v

    def absorbed(self, q: Tensor, entries: Tensor, visible: Tensor) -> Tensor:
        """Attend from `q` [batch, sequence, heads, qk_head_dim] to `entries` of the cache, not expanded.

        q (W_UK c) = (q W_UK) c, so the two parts of kv_b_proj move to the query and to the output
        (DeepSeek-V2, arXiv 2405.04434, section 2.1.2; equations 2 and 5 put into equation 10).
        `visible` is [batch, sequence, slots]; the result [batch, sequence, heads, v_head_dim].
        """
        c = self.config
        weight = self.kv_b_proj.weight.to(q.dtype).unflatten(0, (-1, c.qk_nope_head_dim + c.v_head_dim))
        w_uk, w_uv = weight.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        q = torch.cat([torch.einsum("bshd,hdc->bshc", q_nope, w_uk), q_rope], dim=-1)
        scores = torch.einsum("bshe,bte->bsht", q, entries).float() * self.softmax_scale
        scores = scores.masked_fill(~visible.unsqueeze(2), -torch.inf)
        latents = entries[..., : c.kv_lora_rank]
        mixed = torch.einsum("bsht,btc->bshc", scores.softmax(-1).to(q.dtype), latents)
        return torch.einsum("bshc,hvc->bshv", mixed, w_uv)


def attend_locally(
    attention: LatentAttention, q: Tensor, latent: Tensor, k_rope: Tensor, segments: Segments | None
) -> Tensor:
    """Attend from `q` to the same tokens, whose keys and values are expanded; shapes as in the methods."""
    k, v = attention.expand(latent, k_rope)
    return attention.kernel(q, k, v, attention.softmax_scale, segments)


def _own(q_latent: Tensor, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q_latent, latent, k_rope
