"""Attention from queries that are consecutive tokens of a row to all keys up to each: context parallelism's.

On CPU it is one operator (model/cpu_attention.py). On CUDA not every fused kernel has a causal mask for fewer
queries than keys, so the kernel is chosen here:

- Documents: one call of FlashAttention's varlen kernel for the documents of all rows.
- Whole rows in bf16 on Hopper and Blackwell: cuDNN, twice. All queries see all keys before them, which needs
  no mask; among themselves the mask is the usual one. `SplitAttention` merges the two by their log-sum-exp,
  as ring attention does (arXiv 2310.01889), and hands the merged result to both backward passes.
- Whole rows elsewhere: PyTorch's lower-right causal bias, which takes FlashAttention in bf16 (heads padded to
  one width) and the memory-efficient kernel in fp32.

Shapes: q [B, queries, H, qk_head_dim], k [B, keys, H, qk_head_dim], v [B, keys, H, v_head_dim] (B batch,
H heads); within SplitAttention and its kernels [B, H, tokens, head dim].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from dsv3.distributed.torch_private import cudnn_attention, cudnn_attention_backward
from dsv3.model.attention_kernels import (
    Segments,
    cudnn_takes,
    fit_one_width,
    flash_takes,
    pad_to_one_width,
    sdpa,
)
from dsv3.model.transfers import upload


def attend_to_prefix(
    q: Tensor, k: Tensor, v: Tensor, scale: float, start: int, segments: Segments | None
) -> Tensor:
    """Attend from consecutive queries, the first at position `start` of its row, to all keys up to each.

    k and v begin at their row's first token and reach at least the last query. With `segments` of the whole
    rows a query sees only its own document. Returns [B, queries, H, v_head_dim].
    """
    end = start + q.shape[1]
    k, v = k[:, :end], v[:, :end]
    if segments is None:
        return _whole_rows(q, k, v, scale)
    width = max(q.shape[-1], v.shape[-1])
    if q.is_cuda and flash_takes(q.device, q.dtype, width):
        return cast(Tensor, _documents_at_once(q, k, v, scale, start, segments))
    return cast(Tensor, _each_document(q, k, v, scale, start, segments))


def _whole_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend causally; the queries are the last of the keys' tokens."""
    if not q.is_cuda or q.shape[1] == k.shape[1]:
        return sdpa(q, k, v, scale, None)  # on CPU it takes fewer queries than keys
    if cudnn_takes(q.device, q.dtype, q.shape[-1], v.shape[-1]):
        # cuDNN takes no views of wider tensors.
        q, k, v = (x.contiguous().transpose(1, 2) for x in (q, k, v))
        return split_attention(q, k, v, scale, CUDNN).transpose(1, 2)
    return _lower_right(q, k, v, scale)


def _lower_right(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend on CUDA by the kernels other than cuDNN."""
    v_head_dim = v.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in fit_one_width(q, k, v))
    bias = causal_lower_right(q.shape[2], k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2)[..., :v_head_dim]


@dataclass(frozen=True)
class FusedKernel:
    """A fused attention kernel with and without the causal mask of as many queries as keys."""

    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, tuple[Tensor | None, ...]]]
    """(q, k, v, causal, scale) -> the output, the log-sum-exp [B, H, queries, 1] fp32, and the state: what
    the backward pass wants besides."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(gradient, q, k, v, out, log_sum, state, causal, scale) -> the gradients of q, k and v."""


CUDNN = FusedKernel(cudnn_attention, cudnn_attention_backward)


def split_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: FusedKernel) -> Tensor:
    """Attend from q [B, H, queries, ..] to longer k and v [B, H, keys, ..] by two calls of `kernel`."""
    return cast(Tensor, SplitAttention.apply(q, k, v, scale, kernel))  # type: ignore[no-untyped-call]


class SplitAttention(torch.autograd.Function):
    """Causal attention as the merge of two calls: keys before the queries, and keys among them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: FusedKernel) -> Tensor:
        """Return the output [B, H, queries, v_head_dim]; shapes as in split_attention."""
        parts = [kernel.forward(q, *keys, causal, scale) for causal, keys in _parts(q, k, v)]
        log_sum = torch.logaddexp(*(log_sum for _, log_sum, _ in parts))
        # Each part is normalised by its own sum.
        before, among = (out.float() * (own - log_sum).exp() for out, own, _ in parts)
        merged = before.add_(among).to(q.dtype)
        ctx.scale, ctx.kernel = scale, kernel
        ctx.save_for_backward(q, k, v, merged, log_sum, *(x for _, _, state in parts for x in state))
        return merged

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients: with the merged output and log-sum-exp a part's own are exact shares."""
        q, k, v, merged, log_sum, *states = ctx.saved_tensors
        half = len(states) // 2
        gradient = gradients[0].transpose(1, 2).contiguous().transpose(1, 2)
        found = [
            ctx.kernel.backward(gradient, q, *keys, merged, log_sum, tuple(state), causal, ctx.scale)
            for (causal, keys), state in zip(_parts(q, k, v), (states[:half], states[half:]), strict=True)
        ]
        (dq_before, *before), (dq_among, *among) = found
        dk, dv = (torch.cat(pair, dim=2) for pair in zip(before, among, strict=True))
        return dq_before + dq_among, dk, dv, None, None


def _parts(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[bool, tuple[Tensor, Tensor]]]:
    """Return (causal, (keys, values)) of the tokens before the queries and of those among them."""
    start = k.shape[2] - q.shape[2]

    def cut(x: Tensor, part: slice) -> Tensor:
        # In memory a token's heads lie together, whole rows after one another.
        return x.transpose(1, 2)[:, part].contiguous().transpose(1, 2)

    before, among = slice(start), slice(start, None)
    return [(False, (cut(k, before), cut(v, before))), (True, (cut(k, among), cut(v, among)))]


class PrefixSpans(NamedTuple):
    """The documents that consecutive queries of each row belong to, as the varlen kernel asks for them."""

    keys: list[slice]
    """Per row the keys that its queries see, from the first document's begin on."""
    cu_queries: Tensor
    """[documents + 1] int32: where each document's queries begin, all rows end to end."""
    cu_keys: Tensor
    """[documents + 1] int32: the same for its keys."""
    max_queries: int
    max_keys: int


def prefix_spans(segments: Segments, rows: int, start: int, queries: int) -> PrefixSpans:
    """Return the spans of `queries` tokens from position `start` of each of `rows` rows, made once a pass."""
    if (start, queries) not in segments.by_prefix:
        end, keys = start + queries, []
        of_queries, of_keys = [0], [0]
        for documents in segments.spans_by_row(rows):
            seen = [(begin, min(stop, end)) for begin, stop in documents if begin < end and stop > start]
            keys.append(slice(seen[0][0], end))
            of_queries += [stop - max(begin, start) for begin, stop in seen]
            of_keys += [stop - begin for begin, stop in seen]
        # One small upload; they are int32 as the kernel wants them.
        lengths = torch.tensor([of_queries, of_keys], dtype=torch.int32)
        ends = upload(lengths.cumsum(1, dtype=torch.int32), segments.cu_seqlens.device)
        spans = PrefixSpans(keys, ends[0], ends[1], max(of_queries), max(of_keys))
        segments.by_prefix[start, queries] = spans
    return cast(PrefixSpans, segments.by_prefix[start, queries])


# Compiled, every new set of lengths would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _documents_at_once(
    q: Tensor, k: Tensor, v: Tensor, scale: float, start: int, segments: Segments
) -> Tensor:
    """Attend within documents in one call; a document's queries are the last of its keys' tokens."""
    from torch.nn.attention.varlen import varlen_attn  # the import takes a second

    rows, v_head_dim = q.shape[0], v.shape[-1]
    spans = prefix_spans(segments, rows, start, q.shape[1])
    q, k, v = pad_to_one_width(q, k, v)
    keys, values = (torch.cat([x[row, span] for row, span in enumerate(spans.keys)]) for x in (k, v))
    out = varlen_attn(
        q.flatten(0, 1), keys, values, spans.cu_queries, spans.cu_keys, spans.max_queries, spans.max_keys,
        scale=scale, window_size=(-1, 0),
    )  # fmt: skip
    return cast(Tensor, out)[..., :v_head_dim].unflatten(0, (rows, -1))  # type: ignore[no-any-return]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _each_document(q: Tensor, k: Tensor, v: Tensor, scale: float, start: int, segments: Segments) -> Tensor:
    """Attend within documents in one call each: on CPU, and on GPUs without FlashAttention."""
    end, rows = start + q.shape[1], []
    attend = _lower_right if q.is_cuda else _whole_rows
    for row, documents in enumerate(segments.spans_by_row(q.shape[0])):
        parts = [
            attend(
                q[row : row + 1, max(begin, start) - start : stop - start],
                k[row : row + 1, begin : min(stop, end)],
                v[row : row + 1, begin : min(stop, end)],
                scale,
            )
            for begin, stop in documents
            if begin < end and stop > start
        ]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)
