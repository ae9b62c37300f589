"""Operands of FP8 matrix products: codes with one scale a tile, quantised online (report, section 3.3.2)."""

from typing import NamedTuple

from torch import Tensor

from dsv3.precision.blocks import BLOCK, broken_blocks, quantize


class Recipe(NamedTuple):
    """How operands are quantised: numbers of a tile's long side (0: a whole tensor has one scale)."""

    tile: int = BLOCK
    power_of_two: bool = False

    def activations(self, x: Tensor) -> "Tiles":
        """`x` [tokens, features] in tiles of 1 x 128: its products add up over the features."""
        return self._quantize(x, (1, self.tile))

    def along_tokens(self, x: Tensor) -> "Tiles":
        """`x` [tokens, features] in tiles of 128 x 1, turned to [features, tokens] for sums over tokens."""
        return self._quantize(x, (self.tile, 1)).turned()

    def weight(self, weight: Tensor) -> "Tiles":
        """A weight [out, in] in blocks of 128 x 128."""
        return self._quantize(weight, (self.tile, self.tile))

    def _quantize(self, x: Tensor, block: tuple[int, int]) -> "Tiles":
        whole = max(x.shape[0], 1), max(x.shape[1], 1)
        block = block if self.tile else whole
        return Tiles(*quantize(x, block, power_of_two=self.power_of_two), block)


class Tiles(NamedTuple):
    """An operand [rows, depth] of a product that adds up over `depth`."""

    codes: Tensor
    """[rows, depth] E4M3."""
    scales: Tensor
    """fp32, one a block: [ceil(rows / block[0]), ceil(depth / block[1])]."""
    block: tuple[int, int]

    def turned(self) -> "Tiles":
        """The operand's transpose, as views."""
        return Tiles(self.codes.t(), self.scales.t(), (self.block[1], self.block[0]))

    def broken(self) -> Tensor:
        """How many tiles hold numbers that are not finite; an fp32 scalar."""
        return broken_blocks(self.codes, self.block)
