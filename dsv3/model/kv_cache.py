"""KV cache of multi-head latent attention: one latent and one rotated key per past token and layer.

Report section 2.1.1: the keys and values of all heads follow from the latent (kv_lora_rank, after its norm)
and the key that the heads share (qk_rope_head_dim, after its rotation): 512 + 64 values per token in V3.
A token's slot is its position. Rows of different lengths are therefore padded on the right, and `slot <=
position` is the whole mask: padding lies behind every token, and is overwritten before it is reached. The
same padding brings a pass to a multiple of the ranks that share its tokens (parallel/parallel_model.py).

Shapes: B batch, T new tokens per row, D dim, S slots.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.config.model import ModelConfig
from dsv3.model.transfers import upload


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
    places: dict[str, int]
    """Index in `entries` by the name of the layer."""
    positions: Tensor
    """[B, T]: the positions of the new tokens in their rows, padding included."""
    visible: Tensor | None
    """[B, T, S] bool: the slots that each token sees; None if the cache was empty before this pass."""
    last: Tensor
    """[B]: the index in T of each row's last new token, before any padding."""

    def layer(self, name: str) -> LayerCache:
        """Return the part of the layer of this name."""
        return LayerCache(self.entries[self.places[name]], self.positions, self.visible)

    @property
    def decodes(self) -> bool:
        """Return True where the tokens follow others in the cache; False for the prefill of an empty one."""
        return self.visible is not None


def select_last_token(x: Tensor, step: CacheStep) -> Tensor:
    """Select each row's last token from `x` [B, T, D]: [B, 1, D]."""
    return x[torch.arange(len(x), device=x.device), step.last].unsqueeze(1)


class LatentCache:
    """The KV cache: slots for `capacity` tokens in each of `batch` rows, allocated once.

    It holds the layers of these names, which are all of the model's but for a stage of a pipeline.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        layers: Sequence[str] | None = None,
    ) -> None:
        names = list(map(str, range(config.num_layers))) if layers is None else layers
        width = config.attention.kv_lora_rank + config.attention.qk_rope_head_dim
        # Zeros: an unwritten slot has probability 0, which does not cancel a NaN left in memory.
        self.entries = torch.zeros(len(names), batch, capacity, width, dtype=dtype, device=device)
        self.places = {name: place for place, name in enumerate(names)}
        self.lengths = [0] * batch

    def extend(self, counts: list[int], multiple: int = 1) -> CacheStep:
        """Assign slots to the next `counts[b]` tokens of each row b.

        The forward pass has T tokens per row, padded on the right: the largest of `counts`, rounded up to a
        multiple of `multiple`. Raises ValueError if a row brings no token or does not fit.
        """
        capacity, longest = self.entries.shape[2], max(self.lengths)
        sequence = -(-max(counts) // multiple) * multiple
        if min(counts) < 1:
            raise ValueError("every row must bring at least one token")
        if longest + sequence > capacity:
            raise ValueError(f"the cache has room for {capacity} tokens a row, not {longest + sequence}")
        device = self.entries.device
        starts, added = upload(torch.tensor([self.lengths, counts]), device)
        positions = starts.unsqueeze(-1) + torch.arange(sequence, device=device)
        slots = torch.arange(longest + sequence, device=device)
        # With an empty cache the causal order of the new tokens suffices, and attention needs no mask.
        visible = slots <= positions.unsqueeze(-1) if longest else None
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        entries = self.entries[:, :, : len(slots)]
        return CacheStep(entries, self.places, positions, visible, added - 1)
