"""How rows travel to their experts and back: as they are, or there in FP8 and back as they are.

In FP8 what goes to the experts is quantised, rows in the forward pass and the gradients of their results in
the backward pass; weighted sums and the gradients of rows come back in the compute dtype (DeepSeek-V3's
report, section 3.3.3).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.parallel.collectives import start_exchange, wait
from dsv3.precision.rows import pack, unpack


class Exchange(NamedTuple):
    """Rows from this rank to each rank of `group`, and to this rank from each."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup


class Transport(Protocol):
    """Carries rows."""

    def go(self, rows: Tensor, exchange: Exchange) -> Callable[[], Tensor]:
        """Start to send `rows` [sent rows, dim]; what comes out waits for the [received rows, dim]."""

    def back(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """Send results [received rows, dim] the way back: [sent rows, dim]."""


class PlainTransport:
    """Rows travel in the dtype they have."""

    def go(self, rows: Tensor, exchange: Exchange) -> Callable[[], Tensor]:
        """See Transport."""
        return partial(wait, start_exchange(rows, *exchange))

    def back(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """See Transport."""
        return wait(start_exchange(rows, *_reversed(exchange)))


class FP8Transport:
    """Rows and gradients of results travel to experts in FP8."""

    def __init__(self, power_of_two: bool) -> None:
        self.power_of_two = power_of_two

    def go(self, rows: Tensor, exchange: Exchange) -> Callable[[], Tensor]:
        """See Transport."""
        begun = start_exchange(pack(rows, self.power_of_two), *exchange)
        # Bytes have no gradient: `rows` go along to be what the result is differentiated by.
        return partial(_Arrive.apply, rows, begun, exchange)

    def back(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """See Transport."""
        return _Return.apply(rows, exchange, self.power_of_two)  # type: ignore[no-any-return, no-untyped-call]


def _reversed(exchange: Exchange) -> Exchange:
    return Exchange(exchange.received, exchange.sent, exchange.group)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, begun: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return unpack(wait(begun), rows.shape[1], rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return wait(start_exchange(gradients[0], *_reversed(ctx.exchange))), None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange, power_of_two: bool) -> Tensor:
        ctx.exchange, ctx.power_of_two = exchange, power_of_two
        return wait(start_exchange(rows, *_reversed(exchange)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        packed = wait(start_exchange(pack(gradient, ctx.power_of_two), *ctx.exchange))
        return unpack(packed, gradient.shape[1], gradient.dtype), None, None
