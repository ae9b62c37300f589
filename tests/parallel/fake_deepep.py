"""A stand-in for the package deep_ep 1.2.1 on gloo: the documented Buffer, by uneven all-to-all.

It asserts what DeepEP asserts of its arguments. The results of async calls are garbage until the caller
waits for their event.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64
made: list["Buffer"] = []
"""Buffers made in this process; tests count them."""


@contextmanager
def installed() -> Iterator[None]:
    """Make `import deep_ep` give this module."""
    with mock.patch.dict(sys.modules, deep_ep=sys.modules[__name__]):
        yield


class Config:
    def __init__(self, chunk: int) -> None:
        self.chunk = chunk

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks < 8 or num_ranks % 8 == 0
        return self.chunk * num_ranks * hidden_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        raise AssertionError("NVSHMEM is disable during compilation")


class EventOverlap:
    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self.event = finish

    def current_stream_wait(self) -> None:
        assert self.event is not None
        self.event()


class Buffer:
    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.rank, self.group_size = group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self._group = group
        self._groups_agree()
        made.append(self)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
        return Config(256)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
        return Config(128)

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == topk_idx_t
        assert topk_idx.is_contiguous()
        assert bool((topk_idx >= -1).all())
        # -1 is no expert: its column is cut off.
        column = topk_idx.masked_fill(topk_idx < 0, num_experts)
        chosen = torch.zeros(len(topk_idx), num_experts + 1, dtype=torch.bool).scatter(1, column, True)
        chosen = chosen[:, :num_experts]
        in_rank = chosen.unflatten(1, (self.group_size, -1)).any(-1)
        return in_rank.sum(0).int(), None, chosen.sum(0).int(), in_rank, EventOverlap()

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:
        parts = self._checked(x)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            in_rank, sent, received = handle
            assert len(in_rank) == len(parts[0])
            token = in_rank.t().nonzero()[:, 1]
            rows = [self._all_to_all(part[token], sent, received) for part in parts]
            assert not async_finish
            return _like(x, rows), None, None, None, None, EventOverlap()
        assert num_tokens_per_rank is not None
        assert num_tokens_per_expert is not None
        assert is_token_in_rank is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        assert topk_weights.shape == topk_idx.shape
        sent = num_tokens_per_rank.tolist()
        received = self._all_to_all(num_tokens_per_rank, [1] * len(sent), [1] * len(sent)).tolist()
        destination, token = is_token_in_rank.t().nonzero(as_tuple=True)
        rows = [self._all_to_all(part[token], sent, received) for part in parts]
        # Each rank gets the numbers of its own experts, counted from its first.
        here = len(num_tokens_per_expert) // self.group_size
        local = topk_idx[token] - here * destination.unsqueeze(1)
        elsewhere = (local < 0) | (local >= here)
        indices = self._all_to_all(local.masked_fill(elsewhere, -1), sent, received)
        weights = self._all_to_all(topk_weights[token].masked_fill(elsewhere, 0.0), sent, received)
        counts = torch.bincount(indices[indices >= 0], minlength=here).tolist()
        (*rows, indices, weights), event = _finished([*rows, indices, weights], async_finish)
        return _like(x, rows), indices, weights, counts, (is_token_in_rank, sent, received), event

    def combine(
        self, x: Tensor, handle: tuple[Any, ...], topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        self._checked(x)
        assert x.dtype == torch.bfloat16
        in_rank, sent, received = handle
        assert len(x) == sum(received)
        total = self._sum(x, in_rank, sent, received).to(x.dtype)
        if topk_weights is None:
            return total, None, EventOverlap()
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        assert len(topk_weights) == len(x)
        return total, self._sum(topk_weights, in_rank, sent, received), EventOverlap()

    def _sum(self, x: Tensor, in_rank: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sum in fp32, in the order of the ranks."""
        back = self._all_to_all(x, received, sent).split(sent)
        total = torch.zeros(len(in_rank), x.shape[1])
        for rank, part in enumerate(back):
            total[in_rank[:, rank]] += part.float()
        return total

    def _checked(self, x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Check rows in bf16, or codes with the scales of their tiles, and return them as a tuple."""
        parts = x if isinstance(x, tuple) else (x,)
        rows, *scales = parts
        assert rows.dim() == 2
        assert rows.is_contiguous()
        assert rows.dtype == (torch.float8_e4m3fn if scales else torch.bfloat16)
        assert rows.shape[1] * rows.element_size() % 16 == 0
        assert self.num_nvl_bytes >= 256 * self.group_size * rows.shape[1] * rows.element_size()
        for scale in scales:
            assert scale.dtype == torch.float32
            assert rows.shape[1] % 128 == 0
            assert scale.shape == (len(rows), rows.shape[1] // 128)
        return parts

    def _all_to_all(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = x.new_empty(sum(received), *x.shape[1:])
        whole = (x.contiguous(), out)
        # gloo does not know FP8.
        given, taken = (t.view(torch.uint8) for t in whole) if x.element_size() == 1 else whole
        dist.all_to_all_single(taken, given, received, sent, group=self._group)
        return out

    def _groups_agree(self) -> None:
        found: list[Any] = [None] * self.group_size
        dist.all_gather_object(found, (self.num_nvl_bytes, self.num_rdma_bytes), self._group)
        assert len(set(found)) == 1


def _like(x: Tensor | tuple[Tensor, Tensor], rows: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return tuple(rows) if isinstance(x, tuple) else rows[0]


def _finished(results: list[Tensor], later: bool) -> tuple[list[Tensor], EventOverlap]:
    """Return the results, or garbage that turns into them when the event is waited for."""
    if not later:
        return results, EventOverlap()
    garbage = [torch.full_like(r, 448 if r.element_size() == 1 else 1 << 30) for r in results]

    def finish() -> None:
        for shown, true in zip(garbage, results, strict=True):
            shown.detach().copy_(true)

    return garbage, EventOverlap(finish)
