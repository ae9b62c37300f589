"""The arguments of torch.nn.functional.scaled_mm, which only a Hopper GPU runs.

PyTorch's own checks accept them, and read as the layouts are documented they give the emulated result.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.fp8 import matmul
from dsv3.fp8.matmul import EmulatedEngine, ScaledMMEngine
from dsv3.fp8.operands import FP8Recipe, QuantizedOperand
from tests.fp8.plain import assert_within, multiplied
from tests.fp8.test_operands import numbers

SHAPES = [(1, 1, 1), (3, 130, 5), (128, 128, 128), (129, 257, 300), (300, 640, 129), (16, 513, 2)]
"""Rows of the first operand, depth, rows of the second."""


def operands(m: int, depth: int, n: int) -> Iterator[tuple[QuantizedOperand, QuantizedOperand]]:
    """Yield the operands of the three matmuls: forward, gradient of the rows, gradient of the weight."""
    recipe = FP8Recipe()
    yield recipe.quantize_activations(numbers((m, depth))), recipe.quantize_weight(numbers((n, depth), 1))
    yield (
        recipe.quantize_activations(numbers((m, depth), 2)),
        recipe.quantize_weight(numbers((depth, n), 3)).transpose(),
    )
    yield (
        recipe.quantize_along_tokens(numbers((depth, m), 4)),
        recipe.quantize_along_tokens(numbers((depth, n), 5)),
    )


def on_meta(operand: QuantizedOperand) -> QuantizedOperand:
    """Return shapes and strides without values, which PyTorch checks as it would those of a CUDA tensor."""
    return QuantizedOperand(operand.codes.to("meta"), operand.scales.to("meta"), operand.block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_pytorch_takes_the_layouts(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for a, b in operands(*shape):
        out = ScaledMMEngine().matmul(on_meta(a), on_meta(b), dtype)
        assert (out.shape, out.dtype, out.device.type) == ((shape[0], shape[2]), dtype, "meta")


@pytest.mark.parametrize(
    ("step", "left_out"), [("_cublas_scales", lambda t: t.scales), ("_pad", lambda t: t)]
)
def test_those_checks_refuse_other_layouts(
    step: str,
    left_out: Callable[[QuantizedOperand], Tensor | QuantizedOperand],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul, step, left_out)
    for a, b in operands(129, 257, 300):
        with pytest.raises(RuntimeError):
            ScaledMMEngine().matmul(on_meta(a), on_meta(b), torch.float32)


def documented(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    kind_a: F.ScalingType,
    scale_b: Tensor,
    kind_b: F.ScalingType,
    output_dtype: torch.dtype,
) -> Tensor:
    """Return a [M, K] b [K, N] with scales where cuBLAS looks for them in memory.

    Scales of tiles are at [block of the depth][row], scales of blocks at [block of rows][block of the depth,
    padded to 4].
    """
    blocks = a.shape[1] // 128
    factors = []
    for scale, kind, rows in ((scale_a, kind_a, a.shape[0]), (scale_b, kind_b, b.shape[1])):
        memory = torch.as_strided(scale, (scale.numel(),), (1,))
        if kind is F.ScalingType.BlockWise1x128:
            by_row = memory.view(blocks, rows).T
        else:
            by_row = memory.view(rows // 128, -(-blocks // 4) * 4)[:, :blocks].repeat_interleave(128, 0)
        factors.append(by_row.double())
    left, right = (codes.float().double().unflatten(1, (-1, 128)) for codes in (a, b.t()))
    sums = torch.einsum("mkd,nkd->mnk", left, right)
    out = torch.einsum("mnk,mk,nk->mn", sums, *factors)
    return out.to(output_dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_read_as_documented_it_is_the_emulated_product(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "scaled_mm", documented)
    for a, b in operands(*shape):
        found = ScaledMMEngine().matmul(a, b, torch.float32)
        expected, bound = multiplied(a, b)
        assert_within(found, expected, bound)
        assert_within(found, EmulatedEngine().matmul(a, b, torch.float32).double(), 2 * bound)


@pytest.mark.parametrize("shape", [(0, 128, 3), (3, 0, 2), (3, 128, 0)])
def test_nothing_is_not_handed_over(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "scaled_mm")
    for a, b in operands(*shape):
        assert torch.equal(ScaledMMEngine().matmul(a, b, torch.float32), torch.zeros(shape[0], shape[2]))


def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not has_hopper(), reason="block-wise scaled_mm needs a Hopper GPU")
def test_hopper_multiplies_as_the_emulation_does() -> None:
    """Within each 128 of the depth its tensor cores keep some 14 bits of a sum (report, section 3.5.2)."""
    for a, b in (pair for shape in SHAPES for pair in operands(*shape)):
        left, right = (QuantizedOperand(t.codes.cuda(), t.scales.cuda(), t.block) for t in (a, b))
        expected, _ = multiplied(a, b)
        for dtype, tolerance in ((torch.float32, 2.0**-11), (torch.bfloat16, 2.0**-8)):
            found = ScaledMMEngine().matmul(left, right, dtype).cpu()
            assert found.dtype is dtype
            assert (found.double() - expected).norm() < tolerance * expected.norm()
