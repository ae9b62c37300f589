"""What generation keeps of past tokens: one latent and one rotated key a token and layer.

Report section 2.1.1: keys and values of all heads follow from the latent (kv_lora_rank, after its norm)
and the key that the heads share (qk_rope_head_dim, after its rotation), 512 + 64 numbers in V3.
A token's slot is its position. Rows of different lengths are thus padded on the right, and `slot <=
position` is the whole mask: padding lies behind every token, and is overwritten before it is reached.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.config.model import ModelConfig


class LayerCache(NamedTuple):
    """One layer's part of the cache, as one forward pass sees it."""

    entries: Tensor
    """[batch, slots, kv_lora_rank + qk_rope_head_dim], a view of the cache."""
    positions: Tensor
    """[batch, sequence]: the slots of this pass's tokens."""
    visible: Tensor | None
    """[batch, sequence, slots]: what each token sees; None where nothing was held before this pass."""

    def write(self, latent: Tensor, k_rope: Tensor) -> None:
        """Keep `latent` [batch, sequence, kv_lora_rank] and `k_rope` [batch, sequence, qk_rope_head_dim]."""
        rows = torch.arange(len(self.entries), device=self.entries.device).unsqueeze(-1)
        self.entries[rows, self.positions] = torch.cat([latent, k_rope], dim=-1)


class CacheStep(NamedTuple):
    """The cache and the places of new tokens in it, for one forward pass."""

    entries: Tensor
    """[layers, batch, slots, kv_lora_rank + qk_rope_head_dim], a view of the cache."""
    positions: Tensor
    """[batch, sequence]: where the new tokens stand in their rows, padding included."""
    visible: Tensor | None
    """[batch, sequence, slots]: what each token sees; None where nothing was held before this pass."""
    last: Tensor
    """[batch]: which of the new tokens is the last of its row, before any padding."""

    def layer(self, number: int) -> LayerCache:
        """The part of layer `number`."""
        return LayerCache(self.entries[number], self.positions, self.visible)

    def last_token(self, x: Tensor) -> Tensor:
        """From `x` [batch, sequence, dim] that of each row's last token: [batch, 1, dim]."""
        return x[torch.arange(len(x), device=x.device), self.last].unsqueeze(1)


class LatentCache:
    """Room for `capacity` tokens in each of `batch` rows, allocated once."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = config.attention.kv_lora_rank + config.attention.qk_rope_head_dim
        # Zeros: an unwritten slot has probability 0, which does not cancel a NaN left in memory.
        self.entries = torch.zeros(config.num_layers, batch, capacity, width, dtype=dtype, device=device)
        self.lengths = [0] * batch

    def extend(self, counts: list[int]) -> CacheStep:
        """Give slots to the next `counts` [batch] tokens; the pass has max(counts), padded on the right.

        ValueError where a row brings no token or does not fit.
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
        # In an empty cache the causal order among the new tokens says it all, and needs no mask.
        visible = slots <= positions.unsqueeze(-1) if longest else None
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return CacheStep(self.entries[:, :, : len(slots)], positions, visible, added - 1)
