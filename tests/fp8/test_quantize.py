"""Block-wise FP8 against E4M3's definition, the fast forms against the reference, and round trips."""

import math
from collections.abc import Callable
from itertools import pairwise
from threading import Thread
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.fp8 import quantize as quantize_module
from dsv3.fp8.quantize import dequantize, quantize, quantize_reference
from tests.fp8.plain import definition, dequantize_reference
from tests.reference import normal

Pair = tuple[int, int]
DTYPES = (torch.float32, torch.bfloat16)
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
FINITE = CODES[(CODES.view(torch.uint8) & 0x7F) != 0x7F]
SQUARE = (128, 128)
BLOCKS = [SQUARE, (1, 128), (128, 1)]
# Partial blocks, and more than one tile in either direction.
SHAPES = [(1, 1), (128, 128), (129, 127), (576, 300), (300, 2500)]
FACTORS = [1.0, -0.3, 7e-5, 2.0**-20, 2.0**-126, 1e-38, -1e-44, 2.0**119, -(2.0**120), 3e38, 0.0]
FACTORS += [math.inf, math.nan]


def bits(x: Tensor) -> Tensor:
    """Return the bits as integers; every NaN of more than 8 bits is the same."""
    if x.element_size() == 1:
        return x.view(torch.uint8)
    x = x.where(~x.isnan(), math.nan).contiguous()
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, right in zip(found, expected, strict=True):
        assert mine.dtype is right.dtype
        assert torch.equal(bits(mine), bits(right))


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_codes(shape: Pair, seed: int = 0, known: Tensor = FINITE) -> Tensor:
    return known[torch.randint(len(known), shape, generator=random(seed))]


def some_scales(shape: Pair, block: Pair, seed: int = 0) -> Tensor:
    """Return a grid for a weight of that shape, with scales from 2^-20 to 1."""
    grid = [-(-length // size) for length, size in zip(shape, block, strict=True)]
    return torch.exp2(-20 * torch.rand(grid, generator=random(seed)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.3, -7e-5, 2.0**-130, 1e-44, 5e35, 3e38])
def test_numbers_are_the_definitions_times_the_scale_rounded(scale: float, dtype: torch.dtype) -> None:
    scales = torch.full((1, 2), scale)
    # 4 bits times 24 are exact in fp64; overflow to infinity and underflow happen on the way to fp32.
    exact = [definition(int(code)) * float(scales[0, 0]) for code in bits(FINITE)]
    expected = torch.tensor([exact], dtype=torch.float64).float().to(dtype)
    for form in (dequantize, dequantize_reference):
        assert_same((form(FINITE[None], scales, dtype=dtype),), (expected,))


def test_bf16_is_rounded_to_nearest_even() -> None:
    scales = torch.tensor([[1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-23]])
    codes = torch.ones(1, 3).to(torch.float8_e4m3fn)
    found = dequantize(codes, scales, (1, 1), dtype=torch.bfloat16)
    assert found.tolist() == [[1.0, 1 + 2.0**-6, 1 + 2.0**-7]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("known", [FINITE, CODES], ids=["finite", "nan"])
def test_fast_and_plain_numbers_are_the_same(
    shape: Pair, block: Pair, dtype: torch.dtype, known: Tensor
) -> None:
    codes, scales = some_codes(shape, known=known), some_scales(shape, block)
    expected = dequantize_reference(codes, scales, block, dtype=dtype)
    assert_same((dequantize(codes, scales, block, dtype=dtype),), (expected,))


@pytest.mark.parametrize("known", [FINITE, CODES], ids=["finite", "nan"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", FACTORS)
def test_every_code_and_kind_of_scale(factor: float, dtype: torch.dtype, known: Tensor) -> None:
    codes, scales = known[None].repeat(3, 1), torch.tensor([[factor, 1.0], [0.5, factor]])
    expected = dequantize_reference(codes, scales, (2, 128), dtype=dtype)
    assert_same((dequantize(codes, scales, (2, 128), dtype=dtype),), (expected,))


def test_subnormal_numbers_do_not_hang_on_how_the_processor_treats_them() -> None:
    codes, scales = FINITE[None], torch.ones(1, 2)
    expected = dequantize_reference(codes, scales)
    supported = torch.set_flush_denormal(True)
    try:
        found = dequantize(codes, scales)
    finally:
        torch.set_flush_denormal(False)
    assert supported
    assert_same((found,), (expected,))


lengths = st.integers(1, 40)
pairs = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(deadline=None, max_examples=150)
@given(st.tuples(lengths, lengths), pairs, st.tuples(lengths, lengths), pairs, st.data())
def test_a_slice_from_anywhere_is_that_slice_of_the_whole(
    shape: Pair, block: Pair, ends: Pair, tile: Pair, data: st.DataObject
) -> None:
    ends = (min(ends[0], shape[0]), min(ends[1], shape[1]))
    row, column = (data.draw(st.integers(0, end)) for end in ends)
    codes, scales = some_codes(shape, known=CODES if row % 2 else FINITE), some_scales(shape, block)
    whole = dequantize_reference(codes, scales, block)[row : ends[0], column : ends[1]]
    part = codes[row : ends[0], column : ends[1]]
    buffer = torch.full((shape[0], 2 * shape[1]), 7.0)
    with patch.dict(quantize_module.CHUNK_SHAPE, cpu=tile):
        out = buffer[row : ends[0], column * 2 : ends[1] * 2 : 2]
        assert dequantize(part, scales, block, (row, column), out=out) is out
    assert_same((out,), (whole,))
    assert_same((dequantize_reference(part, scales, block, (row, column)),), (whole,))
    assert int((buffer != 7.0).sum()) <= out.numel()


@pytest.mark.parametrize("block", [*BLOCKS, (64, 96)])
@pytest.mark.parametrize(
    ("rows", "columns"), [((60, 500), (0, 300)), ((5, 576), (77, 2500)), ((130, 131), (1, 2))]
)
def test_a_slice_of_several_blocks_may_begin_and_end_in_one(block: Pair, rows: Pair, columns: Pair) -> None:
    codes, scales = some_codes((576, 2500)), some_scales((576, 2500), block)
    place = slice(*rows), slice(*columns)
    found = dequantize(codes[place], scales, block, (rows[0], columns[0]))
    assert_same((found,), (dequantize_reference(codes, scales, block)[place],))


def test_threads_do_not_disturb_each_other() -> None:
    codes, scales = some_codes((512, 2048)), some_scales((512, 2048), SQUARE)
    expected = dequantize_reference(codes, scales, dtype=torch.bfloat16)
    out = torch.empty_like(expected)

    def work(first: int) -> None:
        for row in range(first, 512, 128):
            part = codes[row : row + 64], scales, SQUARE, (row, 0)
            dequantize(*part, out=out[row : row + 64])

    threads = [Thread(target=work, args=(first,)) for first in (0, 64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same((out,), (expected,))


def contents(shape: Pair, dtype: torch.dtype, seed: int) -> Tensor:
    """Return normal values of many sizes, with zeros of both signs and the odd infinity or NaN."""
    rows, columns = shape
    weight = normal(*shape, seed=seed).detach() * 10.0 ** torch.randint(
        -44, 38, (rows, 1), generator=random(seed)
    )
    chance = torch.rand(shape, generator=random(seed))
    weight[chance < 0.3] = 0.0
    weight[chance < 0.1] = -0.0
    for n, special in enumerate((math.nan, -math.nan, math.inf, -math.inf, 3e38, 1e-45)):
        if seed >> n & 1:
            weight[n % rows, n % columns] = special
    return weight.to(dtype)


@settings(deadline=None, max_examples=300)
@given(
    st.tuples(lengths, lengths),
    pairs,
    pairs,
    st.sampled_from(DTYPES),
    st.sampled_from(["none", "exact", "other", "strange"]),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_fast_and_plain_codes_are_the_same(
    shape: Pair, block: Pair, tile: Pair, dtype: torch.dtype, kind: str, power_of_two: bool, seed: int
) -> None:
    weight, scales = contents(shape, dtype, seed), None
    if kind != "none":
        scales = some_scales(shape, block, seed)
        if kind == "strange":
            which = torch.randint(len(FACTORS), scales.shape, generator=random(seed))
            scales = torch.tensor(FACTORS)[which]
        if kind != "other":
            codes = some_codes(shape, seed, CODES if seed >> 9 & 1 else FINITE)
            weight = dequantize_reference(codes, scales, block, dtype=dtype)
            if seed >> 10 & 1:
                weight[seed % shape[0], seed % shape[1]] = math.pi
    with patch.dict(quantize_module.CHUNK_SHAPE, cpu=tile):
        found = quantize(weight, block, scales, power_of_two)
    assert_same(found, quantize_reference(weight, block, scales, power_of_two))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fast_and_plain_codes_are_the_same_in_the_real_sizes(
    shape: Pair, block: Pair, dtype: torch.dtype
) -> None:
    weight = normal(*shape, seed=1).detach().to(dtype)
    if block == SQUARE or shape[1] < 1000:  # the plain form takes its time
        assert_same(quantize(weight, block), quantize_reference(weight, block))
    turned, mirrored = quantize(weight, block), quantize(weight.T, block[::-1])
    assert_same(turned, (mirrored[0].T, mirrored[1].T))


Form = Callable[..., tuple[Tensor, Tensor]]
both_forms = pytest.mark.parametrize("form", [quantize, quantize_reference])


@both_forms
@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**100])
def test_codes_are_the_nearest_and_ties_go_to_even(form: Form, scale: float) -> None:
    numbers = [definition(code) for code in range(0x7F)]
    tie = torch.tensor([(low + high) / 2 for low, high in pairwise(numbers)])
    below, above = (torch.nextafter(tie, torch.tensor(end)) for end in (0.0, 448.0))
    positive = torch.cat([torch.tensor(numbers), tie, below, above])
    expected = [*range(0x7F), *(code + code % 2 for code in range(0x7E)), *range(0x7E), *range(1, 0x7F)]
    codes, scales = form(torch.stack([positive, -positive]) * scale, (2, len(positive)))
    assert scales.tolist() == [[scale]]
    assert bits(codes).tolist() == [expected, [code | 0x80 for code in expected]]


@both_forms
def test_a_scale_is_the_largest_magnitude_over_448(form: Form) -> None:
    weight = torch.tensor([[-3.0, 1.0, 0.0, -0.0, 1e-40, 0.0, math.nan, 2.0, math.inf, -math.inf]])
    codes, scales = form(weight, (1, 2))
    three, two = (torch.tensor(x) / torch.tensor(448.0) for x in (3.0, 2.0))
    assert scales.tolist() == [[float(three), 1.0, 2.0**-126, float(two), 1.0]]
    # 149.33 is nearest to 144, that is 0x71; 1e-40 is 8.5e-3 of the smallest scale, nearest to 4 x 2^-9.
    assert bits(codes).tolist() == [[0xFE, 0x71, 0x00, 0x80, 0x04, 0x00, 0x7F, 0x7E, 0x7F, 0x7F]]


@both_forms
def test_powers_of_two_are_the_next_ones_up(form: Form) -> None:
    edges = 448 * torch.exp2(torch.arange(-126, 119).float())
    zero, top = torch.zeros(()), torch.tensor(math.inf)
    weight = torch.stack([torch.nextafter(edges, zero), edges, torch.nextafter(edges, top), 1.5 * edges])
    exponents = torch.arange(-126, 119).double()
    expected = torch.exp2(torch.stack([exponents, exponents, exponents + 1, exponents + 1])).float()
    codes, scales = form(weight, (1, 1), power_of_two=True)
    assert torch.equal(scales, expected)
    assert set(bits(codes)[1].tolist()) == {0x7E}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_not_trained_comes_back_to_the_same_bytes(
    shape: Pair, powers: bool, block: Pair, dtype: torch.dtype
) -> None:
    codes, scales = some_codes(shape), some_scales(shape, block)
    codes = torch.where(codes.float().abs() > 20, -0.0, codes.float()).to(codes.dtype)  # no 448
    codes[:130, :130] = torch.zeros((), dtype=codes.dtype)
    codes[-1, -1] = torch.tensor(-0.0).to(codes.dtype)
    scales = torch.exp2(scales.log2().round()) if powers else scales
    scales[-1] *= -1
    weight = dequantize(codes, scales, block, dtype=dtype)
    for power_of_two in (False, True):
        assert_same(quantize(weight, block, scales, power_of_two), (codes, scales))


# The smallest scale that keeps all codes apart, and the largest with which at most 448 overflows.
LIMITS = {
    torch.float32: (31 / 32 * 2.0**-140, float(torch.finfo(torch.float32).max) / 416),
    torch.bfloat16: (31 / 32 * 2.0**-124, float(torch.finfo(torch.bfloat16).max) / 416),
}


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(DTYPES), st.data(), st.booleans())
def test_every_scale_within_the_limits_gives_every_code_back(
    dtype: torch.dtype, data: st.DataObject, negative: bool
) -> None:
    low, high = LIMITS[dtype]
    scale = data.draw(st.floats(low, torch.tensor(high * 0.999).item(), width=32))
    scales = torch.tensor([[-scale if negative else scale]])
    block = (1, len(FINITE))
    weight = dequantize(FINITE[None], scales, block, dtype=dtype)
    assert_same(quantize(weight, block, scales), (FINITE[None], scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_past_the_limits_codes_are_lost_but_what_is_kept_has_the_same_numbers(dtype: torch.dtype) -> None:
    low, high = LIMITS[dtype]
    block = (1, len(FINITE))
    for scale in (low, high * 0.999, low * 0.99, high * 1.05):
        scales = torch.tensor([[scale]])
        weight = dequantize(FINITE[None], scales, block, dtype=dtype)
        codes, found = quantize(weight, block, scales)
        assert torch.equal(bits(codes), bits(FINITE[None])) is (low <= scale < high)
        if torch.equal(found, scales):
            assert_same((dequantize(codes, found, block, dtype=dtype),), (weight,))


def test_only_a_changed_block_gets_a_new_scale() -> None:
    codes, scales = some_codes((300, 500)), some_scales((300, 500), SQUARE)
    weight = dequantize(codes, scales)
    weight[140, 260] *= 1 + 2.0**-20
    found, chosen = quantize(weight, scales=scales)
    fresh = quantize(weight)
    place = slice(128, 256), slice(256, 384)
    assert (chosen != scales).nonzero().tolist() == [[1, 2]]
    assert chosen[1, 2] == fresh[1][1, 2]
    assert torch.equal(bits(found[place]), bits(fresh[0][place]))
    found[place] = codes[place]
    assert torch.equal(bits(found), bits(codes))


@both_forms
@pytest.mark.parametrize("past", [465.0, 480.0, 512.0, 1e9])
def test_a_number_past_448_of_the_kept_scale_gets_a_new_one(form: Form, past: float) -> None:
    # 480 would be the code 0x7f, if that were not NaN.
    weight = torch.tensor([[1.0, -2.0, past, 448.0, -448.0, 1.0]]) * 0.5
    codes, scales = form(weight, (1, 3), torch.full((1, 2), 0.5))
    assert scales.tolist() == [[float(weight[0, 2] / torch.tensor(448.0)), 0.5]]
    assert bits(codes)[0, 2:].tolist() == [0x7E, 0x7E, 0xFE, 0x38]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sign_of_a_zero_counts_as_a_change_of_codes(dtype: torch.dtype) -> None:
    codes, scales = torch.zeros(1, 128).to(torch.float8_e4m3fn), torch.full((1, 1), 0.3)
    weight = dequantize(codes, scales, dtype=dtype)
    weight[0, 5] = -0.0
    found, chosen = quantize(weight, scales=scales)
    assert torch.equal(chosen, scales)
    assert bits(found).nonzero().tolist() == [[0, 5]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_codes_stay_nan_and_leave_their_block_alone(dtype: torch.dtype) -> None:
    codes, scales = some_codes((130, 260), known=CODES), some_scales((130, 260), SQUARE)
    found, chosen = quantize(dequantize(codes, scales, dtype=dtype), scales=scales)
    expected = bits(codes).clone()
    expected[expected == 0xFF] = 0x7F
    assert torch.equal(chosen, scales)
    assert torch.equal(bits(found), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "kept"), [(math.inf, False), (math.nan, True)])
def test_scales_that_lose_their_codes(scale: float, kept: bool, dtype: torch.dtype) -> None:
    scales = torch.full((1, 2), scale)
    weight = dequantize(FINITE[None], scales, dtype=dtype)
    codes, chosen = quantize(weight, scales=scales)
    assert torch.equal(chosen, scales if kept else torch.ones(1, 2)) is not kept
    assert torch.equal(bits(chosen), bits(scales if kept else torch.ones(1, 2)))
    assert set(bits(codes)[0].tolist()) == {0x7F}


@both_forms
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_keep_the_scale_0_and_their_signs(form: Form, dtype: torch.dtype) -> None:
    codes = torch.tensor([[0x00, 0x80, 0x80, 0x00, 0x38, 0x00]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.tensor([[0.0, 2.0]])
    weight = dequantize(codes, scales, (1, 3), dtype=dtype)
    assert_same(form(weight, (1, 3), scales), (codes, scales))
    weight[0, 1] = 448.0
    assert form(weight, (1, 3), scales)[1].tolist() == [[1.0, 2.0]]


def test_wrong_grids_are_named() -> None:
    codes, weight = some_codes((200, 300)), torch.zeros(200, 300)
    with pytest.raises(ValueError, match=r"\[2, 2\].*\[200, 300\].*at least \[2, 3\]"):
        dequantize(codes, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[200, 300\] from \[57, 0\].*at least \[3, 3\]"):
        dequantize(codes, torch.ones(2, 3), origin=(57, 0))
    with pytest.raises(ValueError, match=r"\[6\]"):
        dequantize(codes, torch.ones(6))
    for other in (quantize, quantize_reference):
        for wrong in ((3, 3), (2, 2)):
            with pytest.raises(ValueError, match=rf"\[{wrong[0]}, {wrong[1]}\].*\[200, 300\].*\[2, 3\]"):
                other(weight, scales=torch.ones(wrong))
    with pytest.raises(ValueError, match=r"out has shape \[300, 300\], the codes \[200, 300\]"):
        dequantize(codes, torch.ones(2, 3), out=torch.zeros(300, 300))


def test_empty_weights_have_empty_grids() -> None:
    codes, scales = quantize(torch.zeros(0, 200))
    assert (codes.shape, scales.shape) == ((0, 200), (0, 2))
    assert dequantize(codes, scales).shape == (0, 200)
