"""Codes and scales of every kind of operand, bit for bit, against E4M3's definition (plain.py)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.fp8.operands import FP8Recipe, QuantizedOperand
from dsv3.fp8.quantize import quantize, quantize_reference
from tests.fp8.plain import NAN, definition, quantized
from tests.fp8.test_quantize import assert_same

KINDS = ("activations", "along_tokens", "weight")
BLOCKS = {"activations": (1, 128), "along_tokens": (128, 1), "weight": (128, 128)}
DTYPES = (torch.float32, torch.bfloat16)
every_kind = pytest.mark.parametrize("kind", KINDS)
both_roundings = pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32", "ue8m0"])


def operand(x: Tensor, kind: str, power_of_two: bool = False) -> QuantizedOperand:
    found: QuantizedOperand = getattr(FP8Recipe(power_of_two=power_of_two), f"quantize_{kind}")(x)
    return found


def assert_defined(x: Tensor, kind: str, power_of_two: bool) -> None:
    """Assert that the operand has the codes, scales and tiles of the definition, transposed where it is."""
    found = operand(x, kind, power_of_two)
    found = found.transpose() if kind == "along_tokens" else found
    assert found.block == BLOCKS[kind]
    codes, scales = quantized(x, BLOCKS[kind], power_of_two)
    assert torch.equal(found.codes.view(torch.uint8), codes)
    assert torch.equal(found.scales, scales)


def numbers(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Return rows of many sizes, and columns too, so that neither kind of tile is like its neighbour."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape[0], 1, generator=draw) + torch.randn(shape[1], generator=draw)
    return torch.randn(shape, generator=draw) * torch.exp(2 * spread)


@both_roundings
@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576, 100), (130, 257), (1, 300), (300, 1), (1, 1), (0, 200), (200, 0)])
def test_codes_and_scales_are_the_definitions(
    shape: tuple[int, int], dtype: torch.dtype, kind: str, power_of_two: bool
) -> None:
    assert_defined(numbers(shape).to(dtype), kind, power_of_two)


# All of them at once in a tile, or with normal numbers: ties between codes for the scale 1 (448 is there),
# subnormals of bf16 and fp32, numbers that underflow, the ends of the range, and what is not finite.
TIES = [(definition(code) + definition(code + 1)) / 2 for code in (0, 1, 6, 7, 8, 0x30, 0x7D)]
STRANGE = [0.0, -0.0, 448.0, -448.0, *TIES, 2.0**-133, -(2.0**-127), 1e-45, 2.0**-126, 1e-30, 3e38, -1e30]
BROKEN = [math.inf, -math.inf, math.nan]


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.sampled_from([1, 2, 127, 129]), st.sampled_from([1, 100, 128, 131])),
    st.lists(st.sampled_from(STRANGE + BROKEN), max_size=12),
    st.sampled_from([0.0, 1e-40, 1.0, 1e30]),
    st.sampled_from(DTYPES),
    st.sampled_from(KINDS),
    st.booleans(),
    st.integers(0, 1 << 20),
)
def test_strange_numbers_too(
    shape: tuple[int, int],
    planted: list[float],
    size: float,
    dtype: torch.dtype,
    kind: str,
    power_of_two: bool,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw) * size
    for number in planted:
        x.view(-1)[torch.randint(x.numel(), (), generator=draw)] = number
    assert_defined(x.to(dtype), kind, power_of_two)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 140), st.integers(1, 140)),
    st.sampled_from([(1, 128), (128, 1), (128, 128)]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 1 << 20),
)
def test_fast_and_plain_forms_agree_on_what_is_not_finite(
    shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype, power_of_two: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw)
    x[torch.rand(shape, generator=draw) < 0.03] = BROKEN[seed % 3]
    x[torch.rand(shape, generator=draw) < 0.01] = -math.nan
    x = x.to(dtype)
    assert_same(
        quantize(x, block, power_of_two=power_of_two), quantize_reference(x, block, None, power_of_two)
    )


@both_roundings
@every_kind
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_number_is_nan_and_its_neighbours_are_what_they_would_be(
    broken: float, kind: str, power_of_two: bool
) -> None:
    x = numbers((130, 130))
    x[3, 7] = 0.0
    without = operand(x, kind, power_of_two)
    x[3, 7] = broken
    found = operand(x, kind, power_of_two)
    place = (7, 3) if kind == "along_tokens" else (3, 7)
    differ = found.codes.view(torch.uint8) != without.codes.view(torch.uint8)
    assert differ.nonzero().tolist() == [list(place)]
    assert found.codes.view(torch.uint8)[place] == NAN
    assert torch.equal(found.scales, without.scales)
    assert (float(without.nonfinite_tiles()), float(found.nonfinite_tiles())) == (0.0, 1.0)


@every_kind
def test_broken_tiles_are_counted_not_numbers(kind: str) -> None:
    x = numbers((300, 300))
    x[0, :5] = math.nan  # a row: one tile of 1 x 128, five of 128 x 1
    x[299, 299] = math.inf
    assert (
        float(operand(x, kind).nonfinite_tiles()) == {"activations": 2, "along_tokens": 6, "weight": 2}[kind]
    )


@every_kind
def test_a_scale_below_the_smallest_normal_number_is_held_there(kind: str) -> None:
    x = torch.full((128, 128), 2.0**-127)
    found = operand(x, kind)
    assert set(found.scales.flatten().tolist()) == {2.0**-126}
    assert set(found.codes.float().flatten().tolist()) == {0.5}


@every_kind
def test_a_tile_of_zeros_has_the_scale_1_and_keeps_its_signs(kind: str) -> None:
    x = torch.zeros(128, 128)
    x[:, ::2] = -0.0
    found = operand(x, kind)
    assert set(found.scales.flatten().tolist()) == {1.0}
    assert set(found.codes.view(torch.uint8).flatten().tolist()) == {0x00, 0x80}


@both_roundings
@every_kind
def test_without_tiles_the_whole_tensor_has_one_scale(kind: str, power_of_two: bool) -> None:
    x = numbers((200, 130))
    found: QuantizedOperand = getattr(FP8Recipe(0, power_of_two), f"quantize_{kind}")(x)
    found = found.transpose() if kind == "along_tokens" else found
    codes, scales = quantized(x, (200, 130), power_of_two)
    assert torch.equal(found.codes.view(torch.uint8), codes)
    assert torch.equal(found.scales, scales)


def test_turned_twice_is_the_same_operand() -> None:
    found = operand(numbers((200, 130)), "weight")
    turned = found.transpose()
    assert turned.codes.shape == (130, 200)
    assert turned.scales.shape == (2, 2)
    assert torch.equal(turned.scales, found.scales.T)
    assert turned.transpose().codes.data_ptr() == found.codes.data_ptr()
