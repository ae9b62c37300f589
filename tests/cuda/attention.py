"""PyTorch's attention on a simulated GPU: its choice of a backend, and every backend's numbers by one plain
softmax.

The choice mirrors select_sdp_backend (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.13). The
chosen operator runs under its own name, so that selective recomputation sees what it would see on a GPU.
Equal losses therefore prove the arguments and the shapes of a call, never a kernel.

Shapes as in PyTorch: q [B, H, T, D], k and v [B, H, S, D].
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda.device import SUBSTITUTES, CUDARefuses, SimulatedTensor
from tests.cuda.ledger import LEDGER

CUDNN = 91600
"""The version of cuDNN, 9.16: it takes heads of 192 and 128 on Hopper, and comes first there."""

BACKENDS = {1: "flash", 2: "efficient", 3: "cudnn"}
"""PyTorch's numbers of the fused backends."""

CUDNN_NUMBER = 3

HALF = (torch.bfloat16, torch.float16)

LOWER_RIGHT = 2
"""The custom_mask_type of _efficient_attention_forward whose diagonal ends at the last key; 1 begins at the
first."""

_aten = torch.ops.aten
_USUAL_ORDER = torch._C._get_sdp_priority_order()
_plain_sdpa = F.scaled_dot_product_attention


def can_use_cudnn(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> bool:
    """Return True where cuDNN attends."""
    if q.dtype not in HALF or torch.are_deterministic_algorithms_enabled():
        return False
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    widths = q.shape[-1], v.shape[-1]
    hopper = torch.cuda.get_device_capability()[0] in (9, 10)
    limit = 192 if hopper and widths == (192, 128) else 128
    return max(widths) <= limit and widths[0] % 8 == widths[1] % 8 == 0 and k.shape[-2] != 1


def can_use_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Return True where FlashAttention attends."""
    one_width = q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    whole = not causal or q.shape[-2] == k.shape[-2]
    return (
        torch.backends.cuda.flash_sdp_enabled() and q.dtype in HALF and mask is None and one_width and whole
    )


def can_use_efficient(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> bool:
    """Return True where the memory-efficient kernel attends."""
    multiple = 8 if q.dtype in HALF else 4
    fits = q.shape[-1] % multiple == v.shape[-1] % multiple == 0
    return torch.backends.cuda.mem_efficient_sdp_enabled() and q.dtype in (*HALF, torch.float32) and fits


def chosen_backend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str:
    """Return the backend that scaled_dot_product_attention takes."""
    takes = {"flash": can_use_flash, "efficient": can_use_efficient, "cudnn": can_use_cudnn}
    order = torch._C._get_sdp_priority_order()
    if order == _USUAL_ORDER and torch.cuda.get_device_capability()[0] in (9, 10):  # with cuDNN after 9.15
        order = [CUDNN_NUMBER, *order]
    names = [BACKENDS[number] for number in order if number in BACKENDS]
    return next((name for name in names if takes[name](q, k, v, mask, causal)), "math")


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for F.scaled_dot_product_attention."""
    from torch.nn.attention.bias import CausalBias

    if isinstance(attn_mask, CausalBias):
        if attn_mask.seq_len_q != attn_mask.seq_len_kv:
            return CausalBias._dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        attn_mask, is_causal = None, True
    if not isinstance(query, SimulatedTensor):
        return _plain_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    backend = chosen_backend(query, key, value, attn_mask, is_causal)
    if backend != "math" and any(x.stride(-1) != 1 for x in (query, key, value)):
        raise CUDARefuses(f"{backend} attention: the last dim must be contiguous")
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if backend != "math" and attn_mask is not None:
        raise NotImplementedError("a fused kernel with a mask is not simulated")
    heads, out = (query, key, value), None
    if backend == "cudnn":
        out = _aten._scaled_dot_product_cudnn_attention(*heads, None, keep, 0.0, is_causal, scale=scale)
    elif backend == "flash":
        out = _aten._scaled_dot_product_flash_attention(*heads, 0.0, is_causal, scale=scale)
    elif backend == "efficient":
        out = _aten._scaled_dot_product_efficient_attention(*heads, None, keep, 0.0, is_causal, scale=scale)
    else:
        out = _aten._scaled_dot_product_attention_math(*heads, attn_mask, 0.0, is_causal, scale=scale)
    made: Tensor = out[0]
    return made


def _scores(q: Tensor, k: Tensor, scale: float | None, diagonal: int | None) -> Tensor:
    """Return scale q k^T in fp32, for keys up to each query's number plus `diagonal`; None for all keys."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if diagonal is None:
        return scores
    return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(diagonal), -torch.inf)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp [.., T]."""
    scores = _scores(q, k, scale, diagonal)
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def _gradients(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    scale: float | None,
    diagonal: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from what a fused kernel keeps: the output and its log-sum-exp."""
    g = g.float()
    p = (_scores(q, k, scale, diagonal) - log_sum.unsqueeze(-1)).exp()
    of_p = g @ v.float().transpose(-1, -2)
    of_scores = (
        p
        * (of_p - (g * out.float()).sum(-1, keepdim=True))
        * (q.shape[-1] ** -0.5 if scale is None else scale)
    )
    found = of_scores @ k.float(), of_scores.transpose(-1, -2) @ q.float(), p.transpose(-1, -2) @ g
    return tuple(x.to(q.dtype) for x in found)  # type: ignore[return-value]


def _forward(
    backend: str, q: Any, k: Any, v: Any, scale: float | None, diagonal: int | None
) -> tuple[SimulatedTensor, SimulatedTensor]:
    LEDGER.kernels[f"{backend} {q.shape[-1]}/{v.shape[-1]}"] += 1
    out, log_sum = _attend(q.inner, k.inner, v.inner, scale, diagonal)
    # In memory a fused kernel's result is [B, T, H, D].
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return SimulatedTensor(out, q.device.index), SimulatedTensor(log_sum, q.device.index)


def _backward(
    heads: tuple[Any, ...], scale: float | None, diagonal: int | None
) -> tuple[SimulatedTensor, ...]:
    """Return the gradients; `heads` are those of the result, then q, k, v, the result and its log-sum-exp."""
    gradient, q, k, v, out, log_sum = (x.inner for x in heads)
    found = _gradients(gradient, q, k, v, out, log_sum.view(q.shape[:-1]), scale, diagonal)
    return tuple(SimulatedTensor(x, heads[0].device.index) for x in found)


def _nothing(like: Any) -> SimulatedTensor:
    return SimulatedTensor(torch.zeros(0), like.device.index)


def _cudnn(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    keep: bool,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    if causal and q.shape[-2] != k.shape[-2]:
        raise CUDARefuses("cudnn attention: not simulated for a causal mask of other keys than queries")
    (out, log_sum), none = _forward("cudnn", q, k, v, scale, 0 if causal else None), _nothing(q)
    log_sum = SimulatedTensor(log_sum.inner.unsqueeze(-1), q.device.index)
    return out, log_sum, none, none, q.shape[-2], k.shape[-2], none, none, none


def _cudnn_backward(
    g: Any, q: Any, k: Any, v: Any, out: Any, log_sum: Any, *others: Any, scale: float | None = None
) -> Any:
    return _backward((g, q, k, v, out, log_sum), scale, 0 if others[-1] else None)


def _flash(
    q: Any,
    k: Any,
    v: Any,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    # FlashAttention aligns a causal mask to the last key.
    diagonal, none = k.shape[-2] - q.shape[-2] if causal else None, _nothing(q)
    return (
        *_forward("flash", q, k, v, scale, diagonal),
        none,
        none,
        q.shape[-2],
        k.shape[-2],
        none,
        none,
        none,
    )


def _flash_backward(
    g: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    log_sum: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    *_: Any,
    scale: float | None = None,
) -> Any:
    return _backward((g, q, k, v, out, log_sum), scale, k.shape[-2] - q.shape[-2] if causal else None)


def _efficient(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    keep: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    return *_forward("efficient", q, k, v, scale, 0 if causal else None), _nothing(q), _nothing(q)


def _efficient_backward(
    g: Any,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    out: Any,
    log_sum: Any,
    seed: Any,
    offset: Any,
    dropout: float,
    mask: Any,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    return *_backward((g, q, k, v, out, log_sum), scale, 0 if causal else None), None


def _turned(x: Any) -> SimulatedTensor:
    """Return [B, T, H, D] as [B, H, T, D], or back."""
    return SimulatedTensor(x.inner.transpose(1, 2), x.device.index)


def _diagonal(q: Any, k: Any, mask_type: int) -> int | None:
    """Return the diagonal of a custom_mask_type for q [B, T, H, D] and k [B, S, H, D]."""
    if mask_type == LOWER_RIGHT:
        return int(k.shape[1] - q.shape[1])
    return 0 if mask_type else None


def _efficient_forward(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: Any,
    max_k: Any,
    dropout: float,
    mask_type: int,
    keep: bool = False,
    *,
    scale: float | None = None,
    **_: Any,
) -> Any:
    name = "efficient lower-right" if mask_type == LOWER_RIGHT else "efficient"
    out, log_sum = _forward(name, _turned(q), _turned(k), _turned(v), scale, _diagonal(q, k, mask_type))
    return _turned(out), log_sum, _nothing(q), _nothing(q), q.shape[1], k.shape[1]


def _efficient_forward_backward(
    g: Any,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    out: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: int,
    max_k: int,
    log_sum: Any,
    dropout: float,
    seed: Any,
    offset: Any,
    mask_type: int,
    *_: Any,
    scale: float | None = None,
    **__: Any,
) -> Any:
    heads = (_turned(g), _turned(q), _turned(k), _turned(v), _turned(out), log_sum)
    return *map(_turned, _backward(heads, scale, _diagonal(q, k, mask_type))), None


def _documents(
    ends_q: Any, ends_k: Any, of_queries: list[Any], of_keys: list[Any]
) -> Iterator[tuple[Any, ...]]:
    """Yield each document's queries and keys as slices, and its rows of the tensors [rows, H, D] as [H, T,
    D]."""
    queries, keys = (pairwise(ends.inner.tolist()) for ends in (ends_q, ends_k))
    for own, seen in zip(queries, keys, strict=True):
        rows = [(of_queries, slice(*own)), (of_keys, slice(*seen))]
        cut = [x.inner[part].transpose(0, 1) for tensors, part in rows for x in tensors]
        yield slice(*own), slice(*seen), cut


def _varlen_diagonal(causal: bool, window: Any, queries: int, keys: int) -> int | None:
    return keys - queries if causal or (window is not None and list(window) == [-1, 0]) else None


def _varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: int,
    max_k: int,
    causal: bool = False,
    scale: float | None = None,
    window: Any = None,
    *_: Any,
) -> tuple[Any, ...]:
    if q.dtype not in HALF:
        raise CUDARefuses(f"FlashAttention only supports fp16 and bf16, not {q.dtype}")
    if any(cu.dtype != torch.int32 or not cu.is_contiguous() for cu in (cu_q, cu_k)):
        raise CUDARefuses("cu_seqlens must be contiguous int32")
    if not (q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and q.stride(-1) == 1):
        raise CUDARefuses(f"FlashAttention takes heads of one width, not {q.shape[-1]} and {v.shape[-1]}")
    for cu, longest in ((cu_q, max_q), (cu_k, max_k)):
        if max(b - a for a, b in pairwise(cu.inner.tolist())) > longest:
            raise CUDARefuses(f"a document is longer than the longest that was named, {longest}")
    LEDGER.kernels[f"varlen {q.shape[-1]}/{v.shape[-1]}"] += 1
    out, log_sum = torch.empty_like(q.inner), torch.empty(q.shape[1], q.shape[0])
    for own, _seen, (one_q, one_k, one_v) in _documents(cu_q, cu_k, [q], [k, v]):
        diagonal = _varlen_diagonal(causal, window, one_q.shape[1], one_k.shape[1])
        part, log_sum[:, own] = _attend(one_q, one_k, one_v, scale, diagonal)
        out[own] = part.transpose(0, 1)
    state = torch.zeros(2, dtype=torch.uint64)
    return tuple(SimulatedTensor(x, q.device.index) for x in (out, log_sum, state))


def _varlen_backward(
    g: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    log_sum: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: int,
    max_k: int,
    causal: bool,
    random_state: Any,
    scale: float | None = None,
    window: Any = None,
    *_: Any,
) -> tuple[Any, ...]:
    of_q, of_k, of_v = (torch.empty_like(x.inner) for x in (q, k, v))
    for own, seen, (one_g, one_q, one_out, one_k, one_v) in _documents(cu_q, cu_k, [g, q, out], [k, v]):
        diagonal = _varlen_diagonal(causal, window, one_q.shape[1], one_k.shape[1])
        one_sum = log_sum.inner[:, own]
        parts = _gradients(one_g, one_q, one_k, one_v, one_out, one_sum, scale, diagonal)
        for whole, rows, part in zip((of_q, of_k, of_v), (own, seen, seen), parts, strict=True):
            whole[rows] = part.transpose(0, 1)
    return tuple(SimulatedTensor(x, q.device.index) for x in (of_q, of_k, of_v))


def register() -> None:
    """Let operators find the substitutes, and PyTorch's own questions their answers."""
    SUBSTITUTES.update(
        _scaled_dot_product_cudnn_attention=_cudnn,
        _scaled_dot_product_cudnn_attention_backward=_cudnn_backward,
        _scaled_dot_product_flash_attention=_flash,
        _scaled_dot_product_flash_attention_backward=_flash_backward,
        _scaled_dot_product_efficient_attention=_efficient,
        _scaled_dot_product_efficient_attention_backward=_efficient_backward,
        _efficient_attention_forward=_efficient_forward,
        _efficient_attention_backward=_efficient_forward_backward,
        _varlen_attn=_varlen,
        _varlen_attn_backward=_varlen_backward,
    )
    F.scaled_dot_product_attention = sdpa
