"""Padding: the positions at the end of a row that hold no token, which are not routed.

A padded batch has the loss, the gradients and the expert load of the same rows cut to their tokens:
- Attention needs no mask: it is causal, and no token stands behind padding.
- The head gives padding no loss, for it has no targets, so nothing flows back from it.
- The router leaves it out of load, balance loss and z-loss, and token dispatch sends it to no expert
  (router.py, moe.py).
- MTP wraps a row around behind its last token, not behind its padding (`transformer.shift_tokens`).
What computes each position by itself (projections, norms, dense feed-forward, shared experts) computes
padding as well, and nobody reads it. Only FP8 notices it, where one scale covers several tokens
(docs/precision.md).

A batch without padding has no mask, and costs nothing more. Every collective is called with a mask as it is
without one, so one rank may have one and another none; the ranks that share a row have the same rows.

Shapes: B batch, T sequence, N = B x T positions, D dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.model.transfers import upload


@dataclass(frozen=True, eq=False)
class PaddingMask:
    """The tokens among the positions whose hidden states this rank has, on the device of these."""

    is_token: Tensor
    """[B, T] bool, false for padding."""
    places: Tensor
    """[tokens] int64, the numbers of the tokens among the N positions. The host knows how many they are."""
    lengths: Tensor
    """[B] int64, tokens per row; of whole rows, where sequences are sharded over ranks."""

    @property
    def num_sequences(self) -> Tensor:
        """Return the number of rows with a token, at least 1; a scalar."""
        return (self.lengths > 0).sum().clamp(min=1)


def padding_mask(lengths: Sequence[int], positions: Tensor, device: torch.device) -> PaddingMask:
    """Return the mask of rows that begin with `lengths` tokens, made on the host and copied to `device`.

    positions: [T] on the host, the places in a row of the hidden states that this rank has.
    """
    of_rows = torch.tensor(lengths, device="cpu")
    is_token = positions < of_rows.unsqueeze(1)
    places = is_token.flatten().nonzero().squeeze(1)
    return PaddingMask(*(upload(x, device) for x in (is_token, places, of_rows)))


class _TakeTokens(torch.autograd.Function):
    """Index by distinct numbers, whose gradient is written rather than added up by atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.positions = len(x)
        return x[places]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _put(gradients[0], ctx.saved_tensors[0], ctx.positions), None


class _PutTokens(torch.autograd.Function):
    """The transpose of _TakeTokens; index_copy would keep its rows for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, positions: int) -> Tensor:
        ctx.save_for_backward(places)
        return _put(rows, places, positions)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.saved_tensors[0]], None, None


def take_tokens(x: Tensor, padding: PaddingMask) -> Tensor:
    """Return the rows [tokens, D] of `x` [N, D] that are tokens."""
    return _TakeTokens.apply(x, padding.places)  # type: ignore[no-any-return, no-untyped-call]


def put_tokens(rows: Tensor, padding: PaddingMask) -> Tensor:
    """Return [N, D] with the `rows` [tokens, D] of the tokens, and zeros for padding."""
    return _PutTokens.apply(rows, padding.places, padding.is_token.numel())  # type: ignore[no-any-return, no-untyped-call]


def _put(rows: Tensor, places: Tensor, positions: int) -> Tensor:
    return rows.new_zeros(positions, *rows.shape[1:]).index_copy(0, places, rows)
