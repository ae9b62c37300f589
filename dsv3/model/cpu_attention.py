"""Causal attention on CPU as matmuls over blocks of queries: exact, with memory linear in the sequence.

PyTorch's CPU flash kernel reaches a tenth of the speed of its matmuls, and takes heads of one width only.
Here a block of queries attends to all keys that it may see: the scores are computed in fp32, the softmax
statistics are kept, and the backward pass computes the scores again (FlashAttention, arXiv 2205.14135,
section 3.1, without its tiling over keys). The queries may be the last of the keys' tokens, as in context
parallelism. It is one custom operator, so that torch.compile and activation checkpointing see it as a whole.

Shapes outside: [B, T, H, head dim] (B batch, T tokens, H heads); inside: [B x H, T, head dim].
"""

import torch
from torch import Tensor

BLOCK = 128
"""Queries per block; 64 to 256 are as fast within 20 % (docs/performance.md)."""


@torch.library.custom_op("dsv3::blocked_attention", mutates_args=())
def blocked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale q k^T) v, where query i of n sees the keys up to number `keys - n + i`.

    q: [B, queries, H, qk_head_dim]; k: [B, keys, H, qk_head_dim]; v: [B, keys, H, v_head_dim].
    Returns the output [B, queries, H, v_head_dim] in the dtype of q, and the log-sum-exp of the scores
    [B x H, queries, 1] in fp32.
    """
    batch = q.shape[0]
    q, k, v = (_by_head(x) for x in (q, k, v))
    queries, keys = q.float(), k.float()
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    statistics = queries.new_empty(*q.shape[:2], 1)
    for rows, seen in _blocks(q.shape[1], k.shape[1]):
        scores = _scores(queries[:, rows], keys[:, :seen], scale)
        log_sum = scores.logsumexp(-1, keepdim=True)
        statistics[:, rows] = log_sum
        out[:, rows] = torch.bmm(scores.sub_(log_sum).exp_().to(q.dtype), v[:, :seen])
    return _by_token(out, batch), statistics


@torch.library.custom_op("dsv3::blocked_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; the scores are computed again, block by block."""
    batch, dtype = q.shape[0], q.dtype
    gradient, q, k, v, out = (_by_head(x) for x in (gradient, q, k, v, out))
    queries, keys = q.float(), k.float()
    # The sum over keys of p dp, from the output only (FlashAttention, appendix B.2).
    inner = (gradient.float() * out).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, seen in _blocks(q.shape[1], k.shape[1]):
        weights = _scores(queries[:, rows], keys[:, :seen], scale).sub_(statistics[:, rows]).exp_()
        dv[:, :seen].baddbmm_(weights.to(dtype).transpose(1, 2), gradient[:, rows])
        change = torch.bmm(gradient[:, rows], v[:, :seen].transpose(1, 2)) - inner[:, rows]
        change = weights.mul_(change).mul_(scale).to(dtype)
        dq[:, rows] = torch.bmm(change, k[:, :seen])
        dk[:, :seen].baddbmm_(change.transpose(1, 2), q[:, rows])
    return _by_token(dq, batch), _by_token(dk, batch), _by_token(dv, batch)


def _scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return fp32 scores [B x H, block, keys], -inf for later keys; the queries are the last of `keys`."""
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    block = queries.shape[1]
    ahead = torch.ones(block, block, dtype=torch.bool).triu_(1)
    scores[:, :, -block:].masked_fill_(ahead, -torch.inf)
    return scores


def _blocks(queries: int, keys: int) -> list[tuple[slice, int]]:
    """Return the blocks of queries, each with the number of keys that its last query sees."""
    ends = [min(first + BLOCK, queries) for first in range(0, queries, BLOCK)]
    return [(slice(end - (end - 1) % BLOCK - 1, end), keys - queries + end) for end in ends]


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _by_token(x: Tensor, batch: int) -> Tensor:
    tokens: Tensor = x.unflatten(0, (batch, -1))
    return tokens.transpose(1, 2).contiguous()


@blocked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, queries, heads = q.shape[:3]
    statistics = q.new_empty(batch * heads, queries, 1, dtype=torch.float32)
    return q.new_empty(batch, queries, heads, v.shape[-1]), statistics


@_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, gradient, _):  # type: ignore[no-untyped-def]
    return *_backward(gradient, *ctx.saved_tensors, ctx.scale), None


blocked_attention.register_autograd(_differentiate, setup_context=_save)
