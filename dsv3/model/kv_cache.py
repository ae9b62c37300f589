"""KV cache of multi-head latent attention: one latent and one rotated key per past token and layer.

Report section 2.1.1: the keys and values of all heads follow from the latent (kv_lora_rank, after its norm)
and the key that the heads share (qk_rope_head_dim, after its rotation): 512 + 64 values per token in V3.
A token's slot is its position. Rows of different lengths are therefore padded on the right, and `slot <=
position` is the whole mask: padding lies behind every token, and is overwritten before it is reached.

Shapes: B batch, T new tokens per row, D dim, S slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.config.model import ModelConfig


class LayerCache(NamedTuple):
    """One layer's part of the cache during one forward pass."""

    entries: Tensor
    """[B, S, kv_lora_rank + qk_rope_head_dim], a view of the cache."""
    positions: Tensor
    """[B, T]: the slots of this pass's tokens."""
    visible: Tensor | None
    """[B, T, S] bool: the slots that each token sees; None if the cache was empty before this pass."""

    def write(self, latent: Tensor, k_rope: Tensor) -> None:
        """Store `latent` [B, T, kv_lora_rank] and `k_rope` [B, T, qk_rope_head_dim] in this pass's slots."""
        rows = torch.arange(len(self.entries), device=self.entries.device).unsqueeze(-1)
        self.entries[rows, self.positions] = torch.cat([latent, k_rope], dim=-1)


class CacheStep(NamedTuple):
    """The cache of all layers, and the slots of the new tokens, during one forward pass."""

    entries: Tensor
    """[layers, B, S, kv_lora_rank + qk_rope_head_dim], a view of the cache."""
    positions: Tensor
    """[B, T]: the positions of the new tokens in their rows, padding included."""
    visible: Tensor | None
    """[B, T, S] bool: the slots that each token sees; None if the cache was empty before this pass."""
    last: Tensor
    """[B]: the index in T of each row's last new token, before any padding."""

    def layer(self, number: int) -> LayerCache:
        """Return the part of layer `number`."""
        return LayerCache(self.entries[number], self.positions, self.visible)

    def last_token(self, x: Tensor) -> Tensor:
        """Select each row's last token from `x` [B, T, D]: [B, 1, D]."""
        return x[torch.arange(len(x), device=x.device), self.last].unsqueeze(1)


class LatentCache:
    """The KV cache: slots for `capacity` tokens in each of `batch` rows, allocated once."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = config.attention.kv_lora_rank + config.attention.qk_rope_head_dim
        # Zeros: an unwritten slot has probability 0, which does not cancel a NaN left in memory.
        self.entries = torch.zeros(config.num_layers, batch, capacity, width, dtype=dtype, device=device)
        self.lengths = [0] * batch

    def extend(self, counts: list[int]) -> CacheStep:
        """Assign slots to the next `counts[b]` tokens of each row b.

        The forward pass has T = max(counts) tokens per row, padded on the right. Raises ValueError if a row
        brings no token or does not fit.
        """
        capacity, longest, sequence = self.entries.shape[2], max(self.lengths), max(counts)
        if min(counts) < 1:
            raise ValueError("every row must bring at least one token")
        if longest + sequence > capacity:
            raise ValueError(f"the cache has room for {capacity} tokens a row, not {longest + sequence}")
        device = self.entries.device
        starts, added = torch.tensor([self.lengths, counts], device=device)
        positions = starts.unsqueeze(-1) + torch.arange(sequence, device=device)
        slots = torch.arange(longest + sequence, device=device)
        # With an empty cache the causal order of the new tokens suffices, and attention needs no mask.
        visible = slots <= positions.unsqueeze(-1) if longest else None
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return CacheStep(self.entries[:, :, : len(slots)], positions, visible, added - 1)
