"""Attention kernels: softmax(scale * q k^T) v under a causal mask, behind one small interface.

A kernel is called as kernel(q, k, v, scale, segments). Without `segments` each row is one document; with them
a token attends only within its own document. No kernel builds a [T, T] tensor, except flex on CPU. The values
of MLA are narrower than its keys (128 and 192 in V3), which decides which backend is fast (`_fit_head_dims`).

Shapes: q, k [B, T, H, qk_head_dim], v [B, T, H, v_head_dim] -> [B, T, H, v_head_dim]
(B batch, T sequence, H heads).
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, is_flash_attention_available
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dsv3.config.model import AttentionConfig, AttentionKernel
from dsv3.errors import require
from dsv3.model.cpu_attention import blocked_attention
from dsv3.model.transfers import upload

HALF = (torch.bfloat16, torch.float16)

FLASH_HEAD_DIM = 256
"""Largest head dim of FlashAttention."""

BLOCK = 128
"""Queries and keys in one block of flex_attention's mask."""

LENGTHWISE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Backends of SDPA that take every length as it comes; cuDNN makes a new plan for each, in milliseconds."""

CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *LENGTHWISE]
"""The order for heads of two widths, which FlashAttention refuses; some releases ask cuDNN last."""


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
    by_prefix: dict[tuple[int, int], Any] = field(default_factory=dict)
    """What parallel/prefix_attention.py makes of them once for all layers."""

    def to(self, device: torch.device | str) -> "Segments":
        """Copy the tensors to a device, without waiting for it."""
        cu_seqlens, starts = upload(self.cu_seqlens, device), upload(self.starts, device)
        return replace(self, cu_seqlens=cu_seqlens, starts=starts, by_prefix={})

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

    The lengths are read on the host: it waits for a device that has the numbers, so call this before they are
    there (data/batch.py does).
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
    return documents_on_cuda and flash_takes(device, dtype, width)


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
        gathered = f"queries attend to the gathered keys of {cp} ranks (context parallelism); {each}"
        if _auto_takes_varlen(documents, device, dtype, width):
            return "varlen", gathered
        in_parts = not documents and cudnn_takes(device, dtype, config.qk_head_dim, config.v_head_dim)
        return (
            ("cudnn", f"{gathered}, those before the queries and those among them in two calls")
            if in_parts
            else ("sdpa", gathered)
        )
    if config.kernel is AttentionKernel.auto and _auto_takes_varlen(documents, device, dtype, width):
        return "varlen", f"{told}; {each}, and FlashAttention takes heads of {width}"
    return "sdpa", f"{told}; {each}"


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments | None) -> Tensor:
    """Attend by scaled_dot_product_attention, once per batch or document; by cpu_attention.py on CPU.

    There whole rows may have fewer queries than keys, whose last tokens they are.
    """
    if segments is not None:
        return cast(Tensor, _each_document(q, k, v, scale, segments))
    if not q.is_cuda:
        return _blocked(q, k, v, scale)
    return _causal_on_cuda(*_fit_head_dims(q, k, v), scale)[..., : v.shape[-1]]


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
    q, k, v = (x.flatten(0, 1) for x in pad_to_one_width(q, k, v))
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


def _blocked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return cast(Tensor, blocked_attention(q, k, v, scale)[0])


def _causal_on_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.shape[-1] == v.shape[-1] or q.dtype not in HALF:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


# Compiled, every new set of lengths would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _each_document(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments) -> Tensor:
    v_head_dim = v.shape[-1]
    backends: AbstractContextManager[object] = nullcontext()
    attend = _causal_on_cuda if q.is_cuda else _blocked
    if q.is_cuda:
        (q, k, v), backends = fit_one_width(q, k, v), sdpa_kernel(LENGTHWISE)
    # Splitting costs one concatenation in the backward pass; slicing costs a tensor of zeros per document.
    qs, ks, vs = (x.flatten(0, 1).unsqueeze(0).split(segments.lengths, dim=1) for x in (q, k, v))
    with backends:
        out = [attend(*heads, scale) for heads in zip(qs, ks, vs, strict=True)]
    return torch.cat(out, dim=1).view(*q.shape[:-1], -1)[..., :v_head_dim]


def _fit_head_dims(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the heads as SDPA's fastest backend takes them: padded to one width unless it takes two widths.

    FlashAttention takes one width only. cuDNN on Hopper and Blackwell takes 192 and 128 as they are, but
    no v that is a view of a wider tensor. In fp32 CUDA has only the memory-efficient kernel, which takes
    both.
    """
    if q.shape[-1] == v.shape[-1]:
        return q, k, v
    v_head_dim = v.shape[-1]
    if q.dtype not in HALF or cudnn_takes(q.device, q.dtype, q.shape[-1], v_head_dim):
        return q, k, v.contiguous()
    return pad_to_one_width(q, k, v)


def fit_one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the heads as backends other than cuDNN take them: padded to one width, in fp32 as they are."""
    return pad_to_one_width(q, k, v) if q.dtype in HALF else (q, k, v)


def pad_to_one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the narrower heads with zeros: they add nothing to q k^T, and only zero columns to the result."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cudnn_takes(device: torch.device, dtype: torch.dtype, qk_head_dim: int, v_head_dim: int) -> bool:
    """Tell if cuDNN attends with these head dims on `device`, backward too; never in deterministic mode."""
    return _ask_cudnn(device, dtype, qk_head_dim, v_head_dim, torch.are_deterministic_algorithms_enabled())


@functools.cache
def _ask_cudnn(
    device: torch.device, dtype: torch.dtype, qk_head_dim: int, v_head_dim: int, deterministic: bool
) -> bool:
    """Ask PyTorch with small tensors, once: every layer wants to know, in every pass."""
    q, v = (
        torch.empty(1, 1, BLOCK, dim, device=device, dtype=dtype, requires_grad=True)
        for dim in (qk_head_dim, v_head_dim)
    )
    return can_use_cudnn_attention(SDPAParams(q, q, v, None, 0.0, True, False))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def flash_takes(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Tell if FlashAttention runs on the CUDA `device` (Ampere or newer) at head dim `width`."""
    able = is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    return able and dtype in HALF and width <= FLASH_HEAD_DIM
