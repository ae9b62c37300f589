"""Multi-head latent attention (MLA): the keys and values of all heads come from one latent per token.

Technical report section 2.1.1, equations 1 to 11. `compress` makes the latents, `expand_kv` makes per-head
keys and values from them. Training expands. Generation keeps only the latent and one rotated key per token
(kv_cache.py), and decoding attends to them without expansion (`attend_absorbed`).

Shapes: B batch, T sequence, D dim, H heads, S slots of the KV cache. Sizes in DeepSeek-V3: D 7168, H 128,
q_lora_rank 1536, kv_lora_rank 512, qk_head_dim 192 = qk_nope_head_dim 128 + qk_rope_head_dim 64, v_head_dim
128.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dsv3.config.model import AttentionConfig
from dsv3.model.attention_kernels import Segments, attention_kernel
from dsv3.model.kv_cache import LayerCache
from dsv3.model.layers import Linear, RMSNorm
from dsv3.model.rope import apply_rotary

GatherLatents = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(q_latent, latent, k_rope) of this rank's tokens -> the same three for all tokens whose queries this rank
computes. Tensor parallelism puts an all-gather here (parallel/tensor_parallel.py)."""

GatherRow = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(latent, k_rope) of this rank's part of each row, k_rope rotated -> the same two of whole rows. Context
parallelism puts an all-gather here (parallel/context_parallel.py)."""

Attend = Callable[["LatentAttention", Tensor, Tensor, Tensor, Segments | None], Tensor]
"""(attention, q, latent, k_rope, segments) -> the heads' outputs [B, T, H, v_head_dim]. The latents are those
of whole rows; under context parallelism `q` is a part of them."""


class LatentAttention(nn.Module):
    """Multi-head latent attention (HF: self_attn); with a `q_lora_rank` queries have a latent too.

    Parallel wrappers put their communication into `gather_latents` and `gather_row`, and replace `attend`.
    """

    def __init__(
        self, dim: int, config: AttentionConfig, softmax_scale: float, latent_norm_eps: float
    ) -> None:
        super().__init__()
        self.config = config
        self.softmax_scale = softmax_scale
        self.kernel = attention_kernel(config.kernel)
        self.gather_latents: GatherLatents = keep_local_latents
        self.gather_row: GatherRow = keep_local_row
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
        """Attend within `x` [B, T, D] and return [B, T, D]; `rotary` comes from rope.rotary_table.

        `segments` keeps attention within documents. With a `cache` (generation) the tokens of `x` are written
        to the cache and attend to all tokens in it; every rank caches whole rows.
        """
        q_latent, latent, k_rope = self.gather_latents(*self.compress(x))
        q = self.project_queries(q_latent, rotary)
        k_rope = apply_rotary(k_rope.unsqueeze(-2), rotary).squeeze(-2)
        visible = None if cache is None else cache.visible
        if visible is None:  # else the ranks of a row have all of its new tokens
            latent, k_rope = self.gather_row(latent, k_rope)
        if cache is not None:
            cache.write(latent, k_rope)
        if cache is None or visible is None:
            # Training, or prefill of an empty cache: expansion is cheaper than attending to wide latents.
            out = self.attend(self, q, latent, k_rope, segments)
        else:
            # The projection is called, not read: whatever shards its weight gathers it for a call.
            out = self.kv_b_proj(q, partial(self.attend_absorbed, cache.entries, visible))
        return self.o_proj(out.flatten(-2))  # type: ignore[no-any-return]

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project `x` [B, T, D] down to (q_latent, latent, k_rope); equations 1, 3 and 6.

        q_latent [B, T, q_lora_rank] is the queries' latent after its norm, or `x` itself without a
        q_lora_rank. latent [B, T, kv_lora_rank] is that of keys and values after its norm. k_rope [B, T,
        qk_rope_head_dim] is the key that all heads share, before its rotation.
        """
        c = self.config
        q_latent = x if c.q_lora_rank is None else self.q_a_norm(self.q_a_proj(x))
        latent, k_rope = self.kv_a_proj(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return q_latent, self.kv_a_norm(latent), k_rope

    def project_queries(self, q_latent: Tensor, rotary: Tensor) -> Tensor:
        """Return queries [B, T, H, qk_head_dim]; RoPE turns the last qk_rope_head_dim (equations 7 to 9)."""
        c = self.config
        q = self.q_proj(q_latent) if c.q_lora_rank is None else self.q_b_proj(q_latent)
        # The head count is inferred: a tensor-parallel rank holds only its own heads.
        q = q.unflatten(-1, (-1, c.qk_head_dim))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return torch.cat([q_nope, apply_rotary(q_rope, rotary)], dim=-1)

    def expand_kv(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Expand latents to keys [B, T, H, qk_head_dim] and values [B, T, H, v_head_dim]; equations 2, 4, 5.

        `k_rope` [B, T, qk_rope_head_dim] is rotated already; every head gets the same one.
        """
        c = self.config
        kv = self.kv_b_proj(latent).unflatten(-1, (-1, c.qk_nope_head_dim + c.v_head_dim))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_rope = k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)
        return torch.cat([k_nope, k_rope], dim=-1), v

    def attend_absorbed(self, entries: Tensor, visible: Tensor, q: Tensor, weight: Tensor) -> Tensor:
        """Attend from `q` [B, T, H, qk_head_dim] to the cache's `entries` without expanding them.

        q (W_UK c) = (q W_UK) c, so the two parts of kv_b_proj move to the query and to the output
        (DeepSeek-V2, arXiv 2405.04434, section 2.1.2; equations 2 and 5 put into equation 10). It stands in
        the place of that projection's matmul.

        entries: [B, S, kv_lora_rank + qk_rope_head_dim].
        visible: [B, T, S] bool, true where a token may attend to a slot.
        weight: that of kv_b_proj [H x (qk_nope_head_dim + v_head_dim), kv_lora_rank].
        Returns [B, T, H, v_head_dim].
        """
        c = self.config
        weight = weight.to(q.dtype).unflatten(0, (-1, c.qk_nope_head_dim + c.v_head_dim))
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
    """Attend from `q` [B, T, H, qk_head_dim] to the same T tokens and return [B, T, H, v_head_dim].

    This rank has whole rows.

    latent: [B, T, kv_lora_rank]; k_rope: [B, T, qk_rope_head_dim], rotated.
    """
    k, v = attention.expand_kv(latent, k_rope)
    return attention.kernel(q, k, v, attention.softmax_scale, segments)


def keep_local_latents(q_latent: Tensor, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the latents unchanged: without tensor parallelism a rank has those of all its queries."""
    return q_latent, latent, k_rope


def keep_local_row(latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents unchanged: without context parallelism a rank has those of whole rows."""
    return latent, k_rope
