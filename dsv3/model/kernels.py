"""Attention kernels: softmax(scale * q k^T) v under the causal mask, one small interface.

A kernel is called with q, k [batch, sequence, heads, qk_head_dim], v [batch, sequence, heads,
v_head_dim], the softmax scale and `segments`: None where every row is one document, else the
documents' places as (row, start, end), beyond which no token looks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.model.config import AttentionKernel

Segments = list[tuple[int, int, int]]
Kernel = Callable[[Tensor, Tensor, Tensor, float, Segments | None], Tensor]


def attention_kernel(name: AttentionKernel) -> Kernel:
    """The kernel of a config choice; `auto` takes PyTorch's scaled_dot_product_attention."""
    return {AttentionKernel.auto: sdpa, AttentionKernel.sdpa: sdpa}[name]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments | None) -> Tensor:
    """PyTorch's fused attention, once for the batch or once a document: no mask is ever built."""
    if segments is None:
        return _causal(q, k, v, scale)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for row, start, end in segments:
        part = (slice(row, row + 1), slice(start, end))
        out[part] = _causal(q[part], k[part], v[part], scale)
    return out


def document_segments(documents: Tensor | None) -> Segments | None:
    """The documents of a batch as (row, start, end) from their numbers [batch, sequence].

    Reads the numbers on the host: called once a forward pass, not once a layer.
    """
    if documents is None:
        return None
    segments: Segments = []
    for row, numbers in enumerate(documents.cpu()):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        start = 0
        for length in lengths:
            segments.append((row, start, start + length))
            start += length
    return segments


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
