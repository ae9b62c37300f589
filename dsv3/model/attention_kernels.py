"""Attention kernels: softmax(scale * q k^T) v under a causal mask, behind one small interface.

A kernel is called as kernel(q, k, v, scale, segments). Without `segments` each row is one document; with them
a token attends only within its own document. No kernel builds a [T, T] tensor, except flex on CPU. The values
of MLA are narrower than its keys (128 and 192 in V3), which decides which backend is fast (`_fit_head_dims`).

Shapes: q, k [B, T, H, qk_head_dim], v [B, T, H, v_head_dim] -> [B, T, H, v_head_dim]
(B batch, T sequence, H heads).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, is_flash_attention_available
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dsv3.config.model import AttentionConfig, AttentionKernel
from dsv3.errors import require
from dsv3.model.cpu_attention import blocked_attention

HALF = (torch.bfloat16, torch.float16)

FLASH_HEAD_DIM = 256
"""Largest head dim of FlashAttention."""

BLOCK = 128
"""Queries and keys in one block of flex_attention's mask."""


@dataclass(frozen=True, eq=False)
class Segments:
    """The documents of a packed batch, as attention kernels ask for them: the rows are put end to end."""

    lengths: list[int]
    """Tokens per document."""
    max_seqlen: int
    """The largest of the lengths."""
    cu_seqlens: Tensor
    """[documents + 1] int32: where each document begins, and the end of the last."""
    starts: Tensor
    """[B, T] int64: where in its row a token's document begins."""

    def spans_by_row(self, rows: int) -> list[list[tuple[int, int]]]:
        """Return per row the (begin, end) of its documents, as positions in the row."""
        ends, width = list(accumulate(self.lengths)), sum(self.lengths) // rows
        spans: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        for end, length in zip(ends, self.lengths, strict=True):
            row = (end - 1) // width
            spans[row].append((end - length - row * width, end - row * width))
        return spans

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """Return the mask of flex_attention, built once for all layers."""
        return document_mask(self.starts)


def document_segments(documents: Tensor | None) -> Segments | None:
    """Return the runs of equal numbers in each row of `documents` [B, T]; None stands for whole rows.

    The lengths are read on the host, which waits for the device: call it once per forward pass, not per
    layer.
    """
    if documents is None:
        return None
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    offsets = F.pad(begins.flatten().nonzero().squeeze(-1), (0, 1), value=documents.numel())
    positions = torch.arange(documents.shape[1], device=documents.device)
    starts = (positions * begins).cummax(dim=1).values
    lengths = offsets.diff().tolist()
    return Segments(lengths, max(lengths), offsets.int(), starts)


Kernel = Callable[[Tensor, Tensor, Tensor, float, Segments | None], Tensor]


def attention_kernel(name: AttentionKernel) -> Kernel:
    """Return the kernel of a config choice; check_kernel says which choices a device has."""
    return {
        AttentionKernel.auto: auto,
        AttentionKernel.sdpa: sdpa,
        AttentionKernel.varlen: varlen,
        AttentionKernel.flex: flex,
    }[name]


def check_kernel(
    kernel: AttentionKernel, device_type: str, trains: bool, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Raise InvalidValue unless `kernel` can compute in `dtype` on `device_type`.

    A kernel that `trains` needs gradients as well. The device need not be present.
    """
    key, cuda = "model.attention.kernel", device_type == "cuda"
    if kernel is AttentionKernel.varlen:
        others = "auto or sdpa" if trains and not cuda else "auto, sdpa or flex"
        require(cuda, key, kernel.value, f"it runs on CUDA alone; {device_type} has {others}")
        require(dtype in HALF, key, kernel.value, f"it computes in bf16; take precision=bf16, or {others}")
    if kernel is AttentionKernel.flex and trains:
        allowed = f"it trains on CUDA alone (no backward elsewhere); {device_type} has auto or sdpa"
        require(cuda, key, kernel.value, allowed)


def auto(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments | None) -> Tensor:
    """Attend by varlen for documents if the GPU has FlashAttention, else by sdpa; shapes as in the module."""
    width = max(q.shape[-1], v.shape[-1])
    if _auto_takes_varlen(segments is not None and q.is_cuda, q.device, q.dtype, width):
        return varlen(q, k, v, scale, segments)
    return sdpa(q, k, v, scale, segments)


def _auto_takes_varlen(documents_on_cuda: bool, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    return documents_on_cuda and _flash_takes(device, dtype, width)


def explain_kernel(
    config: AttentionConfig, device: torch.device, dtype: torch.dtype, documents: bool, cp: int = 1
) -> tuple[str, str]:
    """Return the kernel that computes attention on `device` in `dtype`, and the reason for it.

    `documents` says that documents are masked; with `cp` ranks per sequence queries attend to gathered keys.
    """
    told = f"model.attention.kernel={config.kernel.value}"
    width = max(config.qk_head_dim, config.v_head_dim)
    each = "documents are masked" if documents else "rows are attended whole"
    if config.kernel in (AttentionKernel.varlen, AttentionKernel.flex) and cp == 1:
        return config.kernel.value, told
    if device.type != "cuda":
        return "blocks of queries", f"{told}, and the device is a CPU; {each}"
    if cp > 1:
        return "sdpa", f"queries attend to the gathered keys of {cp} ranks (context parallelism); {each}"
    if config.kernel is AttentionKernel.auto and _auto_takes_varlen(documents, device, dtype, width):
        return "varlen", f"{told}; {each}, and FlashAttention takes heads of {width}"
    return "sdpa", f"{told}; {each}"


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments | None) -> Tensor:
    """Attend by scaled_dot_product_attention, once per batch or document; by cpu_attention.py on CPU."""
    v_head_dim = v.shape[-1]
    q, k, v = _fit_head_dims(q, k, v) if q.is_cuda else (q, k, v)
    out = _causal(q, k, v, scale) if segments is None else _by_document(q, k, v, scale, segments)
    return out[..., :v_head_dim]


def varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments | None) -> Tensor:
    """Attend to all documents in one FlashAttention call (torch.nn.attention.varlen): CUDA, bf16 or fp16."""
    # Imported here because the import takes a second.
    from torch.nn.attention.varlen import varlen_attn

    batch, sequence, v_head_dim = *q.shape[:2], v.shape[-1]
    if segments is None:
        max_seqlen = sequence
        cu_seqlens = torch.arange(0, batch * sequence + 1, sequence, dtype=torch.int32, device=q.device)
    else:
        cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    q, k, v = (x.flatten(0, 1) for x in _pad_to_one_width(q, k, v))
    # The window (any past, no future) is the causal mask.
    out = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(-1, 0)
    )
    return cast(Tensor, out)[..., :v_head_dim].unflatten(0, (batch, sequence))  # type: ignore[no-any-return]


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments | None) -> Tensor:
    """Attend by flex_attention under a block mask: compiled on CUDA; forward only on CPU.

    Without compilation it computes all scores, slowly and in full. On CPU compilation is left to compile=on.
    """
    whole_rows = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    mask = document_mask(whole_rows) if segments is None else segments.block_mask
    attend = compiled_on_cuda(q.device.type)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return cast(Tensor, attend(q, k, v, block_mask=mask, scale=scale)).transpose(1, 2)


@functools.cache
def compiled_on_cuda(device_type: str) -> Callable[..., object]:
    """Return flex_attention, compiled if the device type is cuda."""
    attend = cast(Callable[..., object], flex_attention)
    return torch.compile(attend) if device_type == "cuda" else attend


def document_mask(starts: Tensor) -> BlockMask:
    """Build flex_attention's causal mask in which a token sees nothing before its document.

    starts: [B, T], where in its row a token's document begins. The mask is made block by block:
    create_block_mask would write all T x T entries first.
    """
    sequence = starts.shape[1]
    number = torch.arange(-(-sequence // BLOCK), device=starts.device)
    first = number * BLOCK
    last = (first + BLOCK).clamp(max=sequence) - 1
    # The earliest document in a block of queries decides which blocks of keys it reaches; its latest
    # document decides which of them all its queries see in full.
    reached = (last >= starts[:, first, None]) & (number <= number[:, None])
    full = (first >= starts[:, last, None]) & (number < number[:, None])

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[batch, query])

    return BlockMask.from_kv_blocks(
        *_block_lists(reached & ~full),
        *_block_lists(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(sequence, sequence),
    )


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Turn bool `blocks` [B, query blocks, key blocks] into counts per query block and block numbers."""
    blocks = blocks.unsqueeze(1).int()
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(stable=True, dim=-1, descending=True).int()


def attend_to_prefix(
    q: Tensor, k: Tensor, v: Tensor, scale: float, start: int, segments: Segments | None
) -> Tensor:
    """Attend from consecutive queries, the first at position `start` of its row, to all keys up to each.

    q is [B, queries, H, qk_head_dim]. k and v begin at their row's first token and reach at least the last
    query. With `segments` of the whole rows a query sees only its own document. Context parallelism uses it.
    """
    end = start + q.shape[1]
    if segments is None:
        return _lower_right(q, k[:, :end], v[:, :end], scale)
    return cast(Tensor, _prefix_by_document(q, k, v, scale, start, segments))


# Compiled, every new set of lengths would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _prefix_by_document(
    q: Tensor, k: Tensor, v: Tensor, scale: float, start: int, segments: Segments
) -> Tensor:
    rows = []
    for row, documents in enumerate(segments.spans_by_row(q.shape[0])):
        parts = [
            _lower_right(
                q[row : row + 1, max(begin, start) - start : end - start],
                k[row : row + 1, begin : min(end, start + q.shape[1])],
                v[row : row + 1, begin : min(end, start + q.shape[1])],
                scale,
            )
            for begin, end in documents
            if begin < start + q.shape[1] and end > start
        ]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def _lower_right(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend causally if the queries are the last tokens of the keys'."""
    if not q.is_cuda:
        return cast(Tensor, blocked_attention(q, k, v, scale)[0])
    v_head_dim = v.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in _fit_head_dims(q, k, v))
    bias = causal_lower_right(q.shape[2], k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2)[..., :v_head_dim]


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if not q.is_cuda:
        return cast(Tensor, blocked_attention(q, k, v, scale)[0])
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


# Compiled, every new set of lengths would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_document(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments) -> Tensor:
    # Splitting costs one concatenation in the backward pass; slicing costs a tensor of zeros per document.
    qs, ks, vs = (x.flatten(0, 1).unsqueeze(0).split(segments.lengths, dim=1) for x in (q, k, v))
    out = [_causal(*heads, scale) for heads in zip(qs, ks, vs, strict=True)]
    return torch.cat(out, dim=1).view(*q.shape[:-1], -1)


def _fit_head_dims(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the heads as SDPA's fastest backend takes them: padded to one width unless it takes two widths.

    FlashAttention takes one width only. cuDNN on Hopper and Blackwell takes 192 and 128 as they are, but
    no v that is a view of a wider tensor. In fp32 CUDA has only the memory-efficient kernel, which takes
    both.
    """
    if q.shape[-1] == v.shape[-1]:
        return q, k, v
    v_head_dim = v.shape[-1]
    if q.is_cuda and (q.dtype not in HALF or _cudnn_takes(q.device, q.dtype, q.shape[-1], v_head_dim)):
        return q, k, v.contiguous()
    return _pad_to_one_width(q, k, v)


def _pad_to_one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the narrower heads with zeros: they add nothing to q k^T, and only zero columns to the result."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cudnn_takes(device: torch.device, dtype: torch.dtype, qk_head_dim: int, v_head_dim: int) -> bool:
    """Ask PyTorch, with small tensors, if cuDNN attends with heads of two widths, backward too."""
    q, v = (
        torch.empty(1, 1, BLOCK, dim, device=device, dtype=dtype, requires_grad=True)
        for dim in (qk_head_dim, v_head_dim)
    )
    return can_use_cudnn_attention(SDPAParams(q, q, v, None, 0.0, True, False))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _flash_takes(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Tell if FlashAttention runs on the CUDA `device` (Ampere or newer) at head dim `width`."""
    able = is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    return able and dtype in HALF and width <= FLASH_HEAD_DIM
