"""The emulated engine against a loop in fp64, and the place of the scales in its sums."""

import math

import pytest
import torch
from torch import Tensor

from dsv3.fp8.matmul import EmulatedEngine
from dsv3.fp8.operands import FP8Recipe, QuantizedOperand
from tests.fp8.plain import assert_within, multiplied
from tests.fp8.test_operands import numbers

ENGINE = EmulatedEngine()
SHAPES = [(1, 1, 1), (3, 130, 5), (128, 128, 128), (129, 257, 300), (300, 100, 129)]
"""Rows of the first operand, depth, rows of the second."""


def fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


def rows_of(codes: list[list[float]], scales: list[list[float]]) -> QuantizedOperand:
    """Return an operand in tiles of 1 x 128."""
    return QuantizedOperand(fp8(torch.tensor(codes)), torch.tensor(scales), (1, 128))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", [128, 0])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_a_loop_over_blocks(
    shape: tuple[int, int, int], tile: int, power_of_two: bool
) -> None:
    m, depth, n = shape
    recipe = FP8Recipe(tile, power_of_two)
    rows, weight = (
        recipe.quantize_activations(numbers((m, depth))),
        recipe.quantize_weight(numbers((n, depth), seed=1)),
    )
    gradient, turned = (
        recipe.quantize_activations(numbers((m, depth), 2)),
        recipe.quantize_weight(numbers((depth, n), 3)).transpose(),
    )
    left, right = (
        recipe.quantize_along_tokens(numbers((depth, m), 4)),
        recipe.quantize_along_tokens(numbers((depth, n), 5)),
    )
    for a, b in ((rows, weight), (gradient, turned), (left, right)):
        found = ENGINE.matmul(a, b, torch.float32)
        assert_within(found, *multiplied(a, b))
        assert torch.equal(ENGINE.matmul(a, b, torch.bfloat16), found.bfloat16())


def test_scales_come_after_the_sum_of_a_block() -> None:
    # 15 x 8 = 10 x 12 cancels in codes; once each is a rounded multiple of 0.7 it would not.
    a = rows_of([[15.0, -10.0] + 126 * [0.0]], [[0.7]])
    b = rows_of([[8.0, 12.0] + 126 * [0.0]], [[0.7]])
    before = (a.codes.float() * 0.7) @ (b.codes.float() * 0.7).T
    assert float(before) != 0.0
    assert float(ENGINE.matmul(a, b, torch.float32)) == 0.0


def test_scales_of_each_block_come_before_the_sum_over_blocks() -> None:
    a = rows_of([128 * [1.0] + 128 * [-1.0]], [[4.0, 0.5]])
    b = rows_of([256 * [2.0]], [[0.25, 8.0]])
    assert float(ENGINE.matmul(a, b, torch.float32)) == 256.0 * (4.0 * 0.25) - 256.0 * (0.5 * 8.0)


def test_a_block_is_summed_in_fp32() -> None:
    # Past the largest number of fp16, and more digits than bf16 has; all of it is exact in fp32.
    a = rows_of([82 * [448.0] + [1.0] + 45 * [0.0]], [[1.0]])
    b = rows_of([82 * [448.0] + [1.0] + 45 * [0.0]], [[1.0]])
    assert float(ENGINE.matmul(a, b, torch.float32)) == 82 * 448**2 + 1


def test_blocks_are_added_up_in_fp32() -> None:
    a = rows_of([[1.0] + 127 * [0.0] + [1.0] + 127 * [0.0]], [[1.0, 2.0**-20]])
    b = rows_of([256 * [1.0]], [[1.0, 1.0]])
    assert float(ENGINE.matmul(a, b, torch.float32)) == 1 + 2.0**-20


@pytest.mark.parametrize("shape", [(0, 128, 3), (3, 0, 2), (3, 128, 0)])
def test_nothing_gives_nothing(shape: tuple[int, int, int]) -> None:
    m, depth, n = shape
    a, b = (
        FP8Recipe().quantize_activations(torch.ones(m, depth)),
        FP8Recipe().quantize_weight(torch.ones(n, depth)),
    )
    assert torch.equal(ENGINE.matmul(a, b, torch.float32), torch.zeros(m, n))


def test_nan_reaches_its_row_alone() -> None:
    x, weight = numbers((4, 200)), numbers((3, 200), 1)
    whole = ENGINE.matmul(
        FP8Recipe().quantize_activations(x), FP8Recipe().quantize_weight(weight), torch.float32
    )
    x[1, 150] = math.inf
    found = ENGINE.matmul(
        FP8Recipe().quantize_activations(x), FP8Recipe().quantize_weight(weight), torch.float32
    )
    assert found.isnan().any(1).tolist() == [False, True, False, False]
    assert torch.equal(found[[0, 2, 3]], whole[[0, 2, 3]])
