"""Initialize weights: normal with one standard deviation (0.006 in V3), norms at 1 (report section 4.2).

A weight's value is a function of the run's seed, the parameter's name (and expert number), its row and its
column, and of nothing else: not of the order of modules, of the matrix's size, or of the layout. Any box of a
matrix is computed alone, so that a rank computes its shard and no more, and every layout starts from the same
numbers. The generator is a counter that is mixed, SplitMix64 (Steele, Lea and Flood 2014), and Box-Muller's
transform:

    pair  = row * 2^32 + column // 2
    bits  = mix(key + increment * pair)           64 bits; hashed from the seed and names
    a, b  = the low and the high half of `bits`, as signed integers of 32 bits
    value = std * sqrt(-2 ln(max(|a|, 1/2) / 2^31)) * cos(pi b / 2^31)    sin in odd columns

`torch.Generator` was not taken: on a CPU it keeps 32 bits of a seed, so that many of 671b's 100 million rows
would be equal if each had a generator of its own, and it cannot begin in the middle of a matrix.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dsv3.model.transformer import Transformer

Shard = tuple[Tensor, tuple[int, ...]]
"""A box of a parameter: where its values are stored, and its place in the whole parameter."""

_PAIRS = 2**15
"""Pairs of values that are computed at once: their 0.9 MB of scratch memory stays in a core's cache."""

_LANES = 16
"""Rows are cut at multiples of so many pairs, a whole number of the CPU's vectors.

A value is then computed by the same instruction in every box that holds it.
"""

_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""SplitMix64's rounds: shift right by so much, xor, multiply by."""


def whole(parameter: Tensor) -> Shard:
    """Return a parameter that is not sharded as the one box of itself."""
    return parameter, (0,) * parameter.ndim


@torch.no_grad()
def initialize(
    model: Transformer,
    seed: int,
    shard_of: Callable[[Tensor], Shard] = whole,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Fill every parameter of a materialized `model`, and set its buffers (expert bias, load) to 0.

    `shard_of` returns the box of a parameter that is to be filled, on any device. `advance` is told how many
    values have been written since it was last called.
    """
    draw = NormalValues(model.config.init_std, seed)
    for name, parameter in model.named_parameters():
        values, offset = shard_of(parameter)
        draw.fill(values, offset, name, advance)
    for buffer in model.buffers():
        buffer.zero_()


class NormalValues:
    """Computes boxes of initial values; holds 0.9 MB of scratch memory on the CPU."""

    def __init__(self, std: float, seed: int) -> None:
        self.std = std
        self.seed = seed
        self._bits, self._shifted = (torch.empty(_PAIRS, dtype=torch.int64, device="cpu") for _ in range(2))
        self._radius, self._angle, self._cosine = (
            torch.empty(_PAIRS, dtype=torch.float32, device="cpu") for _ in range(3)
        )

    def fill(
        self,
        out: Tensor,
        offset: tuple[int, ...],
        name: str,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Fill `out`, the box at `offset` of parameter `name`, with its initial values.

        One-dimensional parameters are norm weights. Of a stack of experts [experts, out, in] each is a matrix
        of its own, so that its values do not depend on their number.
        """
        if out.ndim == 1:
            out.fill_(1.0)
            advance(out.numel())
        elif out.ndim == 2:
            self._fill_stack(out.unsqueeze(0), offset, [name], name, advance)
        else:
            experts = [f"{name}.{number}" for number in range(offset[0], offset[0] + len(out))]
            self._fill_stack(out, offset[1:], experts, name, advance)

    def _fill_stack(
        self,
        out: Tensor,
        offset: tuple[int, ...],
        matrices: list[str],
        name: str,
        advance: Callable[[int], object],
    ) -> None:
        """Fill the same box of several matrices; small ones are computed together."""
        if not out.numel():
            return
        increment = self._increment(name)
        (first_row, first), (_, rows, columns) = offset, out.shape
        last = first + columns
        begin, end = first // (2 * _LANES) * _LANES, -(-last // (2 * _LANES)) * _LANES  # in pairs
        keys = torch.tensor([_signed(self._hash(matrix)) for matrix in matrices], device="cpu")
        row_starts = torch.arange(first_row, first_row + rows, device="cpu") * _signed(increment << 32)
        for left in range(begin, end, _PAIRS):
            width = min(_PAIRS, end - left)
            steps = torch.arange(left, left + width, device="cpu") * _signed(increment)
            left_column, right_column = max(2 * left, first), min(2 * (left + width), last)
            height = min(rows, _PAIRS // width)
            for matrix in range(0, len(out), together := max(1, _PAIRS // (width * rows))):
                for top in range(0, rows, height):
                    target = out[matrix : matrix + together, top : top + height, left_column - first :]
                    starts = keys[matrix : matrix + together, None] + row_starts[top : top + height]
                    values = self._values(starts, steps)[..., left_column - 2 * left :]
                    kept = right_column - left_column
                    target[..., :kept].copy_(values[..., :kept])
                    advance(len(target) * target.shape[1] * kept)

    def _increment(self, name: str) -> int:
        """Return the increment of a parameter's matrices.

        One of its own keeps the sequences of two parameters apart. It is odd, so that no value comes twice,
        and not regular in its bits, which SplitMix64 asks for.
        """
        increment = self._hash(f"increment of {name}") | 1
        return increment if (increment ^ increment >> 1).bit_count() >= 24 else increment ^ 0xAAAAAAAAAAAAAAAA

    def _hash(self, name: str) -> int:
        """Return 64 bits that depend on the seed and a name."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "big")

    def _values(self, starts: Tensor, steps: Tensor) -> Tensor:
        """Return the values [.., 2 * pairs] of counters starts [..] plus steps, valid until the next call."""
        count = starts.numel() * len(steps)
        bits, shifted = self._bits[:count], self._shifted[:count]
        radius, angle, cosine = self._radius[:count], self._angle[:count], self._cosine[:count]
        torch.add(starts.unsqueeze(-1), steps, out=bits.view(*starts.shape, len(steps)))
        for shift, factor in _MIX:  # integers wrap around
            torch.bitwise_right_shift(bits, shift, out=shifted)
            bits.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - shift) - 1))  # a shift that brings in zeros
            if factor != 1:
                bits.mul_(_signed(factor))
        low, high = bits.view(torch.int32).view(count, 2).unbind(1)
        radius.copy_(low).abs_().clamp_(min=0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_().mul_(self.std)
        angle.copy_(high).mul_(math.pi * 2.0**-31)
        torch.cos(angle, out=cosine)
        values = shifted.view(torch.float32).view(count, 2)  # the shifts are done with
        torch.mul(radius, cosine, out=values[:, 0])
        torch.mul(radius, angle.sin_(), out=values[:, 1])
        return values.view(*starts.shape, 2 * len(steps))


def _signed(value: int) -> int:
    """Return `value` mod 2^64 as the signed integer that has these bits."""
    return (value + 2**63) % 2**64 - 2**63
