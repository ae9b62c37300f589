"""What flex_attention needs: documents as a mask of blocks, and its compiled form on CUDA."""

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Queries and keys that one block of the mask decides on together."""


@functools.cache
def compiled_on_cuda(device_type: str) -> Callable[..., object]:
    """flex_attention as it is worth calling on a device of this type."""
    attend = cast(Callable[..., object], flex_attention)
    return torch.compile(attend) if device_type == "cuda" else attend


def document_mask(starts: Tensor) -> BlockMask:
    """Causal attention from documents' `starts` [batch, sequence] on, for flex_attention.

    Worked out a block at a time: create_block_mask would write the whole square first.
    """
    sequence = starts.shape[1]
    number = torch.arange(-(-sequence // BLOCK), device=starts.device)
    first = number * BLOCK
    last = (first + BLOCK).clamp(max=sequence) - 1
    # The earliest document of a block of queries decides which blocks of keys it reaches, its latest
    # which of them all its queries see whole.
    reached = (last >= starts[:, first, None]) & (number <= number[:, None])
    whole = (first >= starts[:, last, None]) & (number < number[:, None])

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[batch, query])

    return BlockMask.from_kv_blocks(
        *_block_lists(reached & ~whole),
        *_block_lists(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(sequence, sequence),
    )


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """From `blocks` [batch, queries, keys] how many each query block has, and their numbers put first."""
    blocks = blocks.unsqueeze(1).int()
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(stable=True, dim=-1, descending=True).int()
