"""Causal attention on CPU as matrix products over blocks of queries; exact, and linear in memory.

PyTorch's CPU flash kernel reaches a tenth of what its matrix products do, and takes heads of one width
alone. Here a block of queries meets all keys that it may look at: its scores are computed in fp32, the
statistics of the softmax are kept, and the backward pass computes the scores again (FlashAttention,
arXiv 2205.14135, section 3.1, without its tiling over keys). Queries may be the last ones of the keys'
tokens, as in context parallelism. One operator, so that compilation and selective recomputation see it
as a whole.
"""

import torch
from torch import Tensor

BLOCK = 128
"""Queries that meet their keys together; 64 to 256 are as fast within 20 % (docs/performance.md)."""


@torch.library.custom_op("dsv3::blocked_attention", mutates_args=())
def blocked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, where query i of n sees the keys up to number `keys - n + i`.

    q is [batch, queries, heads, qk_head_dim], k [batch, keys, heads, qk_head_dim], v [batch, keys, heads,
    v_head_dim]. Returns [batch, queries, heads, v_head_dim] and the log-sum-exp of the scores
    [batch x heads, queries, 1] in fp32.
    """
    batch = q.shape[0]
    q, k, v = (_by_head(x) for x in (q, k, v))
    queries, keys = q.float(), k.float()
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    statistics = queries.new_empty(*q.shape[:2], 1)
    for rows, seen in _blocks(q.shape[1], k.shape[1]):
        scores = _scores(queries[:, rows], keys[:, :seen], scale)
        largest = scores.logsumexp(-1, keepdim=True)
        statistics[:, rows] = largest
        out[:, rows] = torch.bmm(scores.sub_(largest).exp_().to(q.dtype), v[:, :seen])
    return _by_token(out, batch), statistics


@torch.library.custom_op("dsv3::blocked_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the scores are computed again, a block at a time."""
    batch, dtype = q.shape[0], q.dtype
    gradient, q, k, v, out = (_by_head(x) for x in (gradient, q, k, v, out))
    queries, keys = q.float(), k.float()
    # The sum over keys of p dp, from the output alone (FlashAttention, appendix B.2).
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
    """fp32 scores of a block of queries, which are the last tokens of `keys`, -inf where a key is ahead."""
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    block = queries.shape[1]
    ahead = torch.ones(block, block, dtype=torch.bool).triu_(1)
    scores[:, :, -block:].masked_fill_(ahead, -torch.inf)
    return scores


def _blocks(queries: int, keys: int) -> list[tuple[slice, int]]:
    """Blocks of queries and the number of keys that the last query of each sees."""
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
