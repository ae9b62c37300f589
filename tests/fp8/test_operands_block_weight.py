"""A weight held as codes and scales: FP8 matmuls take them, all other operators the dequantized weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.fp8.all_gather import FP8AllGather
from dsv3.fp8.convert_model import FP8GroupedLinear, FP8Linear
from dsv3.fp8.matmul import MATMUL_ENGINES
from dsv3.fp8.operands import FP8Recipe, QuantizedOperand, QuantizedWeight
from dsv3.fp8.quantize import BLOCK, quantize
from tests.fp8.plain import dequantize_reference
from tests.harness.operators import Operators

ROWS, IN, OUT, EXPERTS = 150, 200, 2 * BLOCK, 3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(torch.rand(shape, generator=generator).exp2())


def in_blocks(weight: Tensor, power_of_two: bool = False) -> QuantizedWeight:
    """Return `weight` in bf16 as it is after an all-gather in FP8."""
    codes, scales = quantize(weight.flatten(0, -2), (BLOCK, BLOCK), power_of_two=power_of_two)
    return QuantizedWeight(codes.view_as(weight), scales, weight.dtype)


def run(weight: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matmul of bf16 rows with a parameter that is `weight`, and both gradients."""
    parameter = nn.Parameter(weight)
    options = (torch.zeros((), requires_grad=True), "emulated", BLOCK, power_of_two)
    rows = numbers(ROWS, IN, seed=1).bfloat16().requires_grad_()
    if weight.ndim == 2:
        out = FP8Linear(*options)(rows, parameter)
    else:
        ends = torch.tensor([70, 70, ROWS], dtype=torch.int32)
        out = FP8GroupedLinear(*options)(rows, parameter, ends)
    out.backward(numbers(ROWS, OUT, seed=2).bfloat16())
    assert rows.grad is not None
    assert parameter.grad is not None
    return out.detach(), rows.grad, parameter.grad


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(OUT, IN), (EXPERTS, OUT, IN)])
def test_products_and_gradients_are_those_of_the_weight(shape: tuple[int, ...], power_of_two: bool) -> None:
    weight = numbers(*shape).bfloat16()
    expected = run(weight, power_of_two)
    with Operators() as seen:
        found = run(in_blocks(weight, power_of_two), power_of_two)
    assert all(map(torch.equal, found, expected))
    assert [type(tensor) for tensor in found] == [Tensor] * 3
    assert found[2].dtype is torch.bfloat16
    assert seen.names["fp8_linear"] + seen.names["fp8_grouped_linear"] == 1


def test_a_product_takes_the_codes_that_are_there() -> None:
    """Quantizing again would give other codes, because each scale is three times as large as needed."""
    weight = numbers(OUT, IN).bfloat16()
    scales = 3 * quantize(weight, (BLOCK, BLOCK))[1]
    coarse = (weight.float() / scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:, :IN]).to(
        torch.float8_e4m3fn
    )
    blocks = QuantizedOperand(coarse, scales, (BLOCK, BLOCK))
    rows, gradient = (numbers(ROWS, n, seed=s).bfloat16() for n, s in ((IN, 1), (OUT, 2)))
    out, spans_by_row, _ = run(QuantizedWeight(coarse, scales, torch.bfloat16))
    multiply, recipe = MATMUL_ENGINES["emulated"].matmul, FP8Recipe()
    assert torch.equal(out, multiply(recipe.quantize_activations(rows), blocks, torch.bfloat16))
    expected = multiply(recipe.quantize_activations(gradient), blocks.transpose(), torch.bfloat16)
    assert torch.equal(spans_by_row, expected)


def test_a_weight_that_is_filled_anew_is_the_new_one() -> None:
    weight = numbers(OUT, IN).bfloat16()
    codes, scales = quantize(weight / 4, (BLOCK, BLOCK))
    wide = QuantizedWeight(codes, 4 * scales, torch.bfloat16)
    small = QuantizedWeight(codes, scales, torch.bfloat16)
    assert torch.equal(run(wide)[0], 4 * run(small)[0])
    codes.copy_(quantize(weight, (BLOCK, BLOCK))[0])
    scales.copy_(quantize(weight, (BLOCK, BLOCK))[1])
    assert torch.equal(run(small)[0], run(weight)[0])


def test_all_other_operators_see_the_numbers() -> None:
    weight = numbers(OUT, IN).bfloat16()
    held = in_blocks(weight)
    stands_for = dequantize_reference(held.codes, held.scales, dtype=torch.bfloat16)
    x = numbers(4, IN).bfloat16()
    assert (held.shape, held.dtype, held.stride()) == (weight.shape, weight.dtype, weight.stride())
    assert torch.equal(held.float(), stands_for.float())
    assert torch.equal(F.linear(x, held), F.linear(x, stands_for))
    assert torch.equal(held.view(-1, 4, IN), stands_for.view(-1, 4, IN))
    assert torch.equal(held.as_strided((3, 2), (IN, 1), 5), stands_for.as_strided((3, 2), (IN, 1), 5))
    assert torch.equal(held.as_strided((OUT, IN), (1, OUT)), stands_for.as_strided((OUT, IN), (1, OUT)))
    assert "QuantizedWeight" in repr(held)


def test_nothing_is_written_to_a_copy() -> None:
    held = in_blocks(numbers(OUT, IN).bfloat16())
    with pytest.raises(RuntimeError, match=r"cannot be written to, and aten\.zero_"):
        held.zero_()


def test_it_stays_one_where_it_is_only_passed_on() -> None:
    held = in_blocks(numbers(OUT, IN).bfloat16())
    parameter = nn.Parameter(held)
    whole = torch.as_strided(held, held.shape, held.stride(), storage_offset=0)
    for one in (held.detach(), held.view_as(held), parameter, parameter.data, whole):
        assert isinstance(one, QuantizedWeight)
        assert one.codes is held.codes
        assert one.scales is held.scales
    assert isinstance(parameter, nn.Parameter)
    assert parameter.requires_grad


def test_what_was_gathered_is_taken_without_a_copy_and_filled_anew() -> None:
    first, second = numbers(OUT, IN).bfloat16(), numbers(OUT, IN, seed=3).bfloat16()
    gather = FP8AllGather(first, power_of_two=False)
    outputs = quantize(first, (BLOCK, BLOCK))
    codes, scales = outputs[0].view(torch.uint8), outputs[1]
    received = gather.post_all_gather((codes, scales), None, torch.bfloat16)
    assert received is not None
    weight, kept = received
    assert [tensor.data_ptr() for tensor in kept] == [codes.data_ptr(), scales.data_ptr()]
    assert torch.equal(run(weight)[0], run(first)[0])
    again = quantize(second, (BLOCK, BLOCK))
    codes.copy_(again[0].view(torch.uint8))
    scales.copy_(again[1])
    assert gather.post_all_gather((codes, scales), None, torch.bfloat16, out=nn.Parameter(weight)) is None
    assert torch.equal(run(weight)[0], run(second)[0])
