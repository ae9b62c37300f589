"""FP8 matmuls and their gradients against their quantized operands, expert by expert."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv3.fp8.matmul import MATMUL_ENGINES
from dsv3.fp8.operands import FP8Recipe, QuantizedOperand
from dsv3.fp8.ops import fp8_grouped_linear, fp8_linear
from dsv3.parallel.compile import has_compiler
from tests.fp8.plain import assert_within, decoded, multiplied
from tests.fp8.test_operands import numbers

ENDS = (130, 130, 131, 300)
"""Rows of four experts: more than a tile, none, one, more than a tile again."""
ROWS, IN, OUT = ENDS[-1], 200, 140
RECIPES = [FP8Recipe(), FP8Recipe(power_of_two=True), FP8Recipe(tile=0)]
OPTIONS = ("emulated", 128, False)


def product(
    x: Tensor, weight: Tensor, ends: Tensor | None, probe: Tensor, recipe: FP8Recipe = RECIPES[0]
) -> Tensor:
    out: Tensor
    if ends is None:
        out = fp8_linear(x, weight[0], None, probe, "emulated", *recipe)
    else:
        out = fp8_grouped_linear(x, weight, None, ends, probe, "emulated", *recipe)
    return out


class Case:
    """Inputs that need gradients, and the gradient of the result."""

    def __init__(self, ends: tuple[int, ...] | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        self.ends = None if ends is None else torch.tensor(ends, dtype=torch.int32)
        experts = 1 if ends is None else len(ends)
        self.x = numbers((ROWS, IN)).to(dtype).requires_grad_()
        self.weight = torch.stack([numbers((OUT, IN), 1 + n) for n in range(experts)]).requires_grad_()
        self.gradient = numbers((ROWS, OUT), 20).to(dtype)
        self.probe = torch.zeros((), requires_grad=True)

    def run(self, recipe: FP8Recipe = RECIPES[0]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result, and the gradients of the rows and of the weights."""
        out = product(self.x, self.weight, self.ends, self.probe, recipe)
        of_x, of_weight, broken = torch.autograd.grad(out, [self.x, self.weight, self.probe], self.gradient)
        assert float(broken) == 0.0
        return out.detach(), of_x, of_weight

    def experts(self) -> list[slice]:
        """Return each expert's rows."""
        ends = [ROWS] if self.ends is None else self.ends.tolist()
        return [slice(*pair) for pair in zip([0, *ends], ends, strict=False)]


def assert_product(found: Tensor, a: QuantizedOperand, b: QuantizedOperand) -> None:
    """Assert the matmul of two operands, within the order of its sums and one rounding to its dtype."""
    expected, bound = multiplied(a, b)
    if found.dtype is torch.bfloat16:
        bound = bound + 2.0**-8 * (expected.abs() + bound)
    assert_within(found, expected, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("ends", [None, ENDS])
def test_results_and_gradients_are_products_of_what_the_operands_stand_for(
    ends: tuple[int, ...] | None, recipe: FP8Recipe, dtype: torch.dtype
) -> None:
    case = Case(ends, dtype)
    out, of_x, of_weight = case.run(recipe)
    assert (out.dtype, of_x.dtype, of_weight.dtype) == (dtype, dtype, torch.float32)
    for expert, own in enumerate(case.experts()):
        x, gradient = case.x.detach()[own], case.gradient[own]
        weight = recipe.quantize_weight(case.weight.detach()[expert].to(dtype))
        if len(x) == 0:
            assert torch.equal(of_weight[expert], torch.zeros(OUT, IN))
            continue
        assert_product(out[own], recipe.quantize_activations(x), weight)
        assert_product(of_x[own], recipe.quantize_activations(gradient), weight.transpose())
        assert_product(
            of_weight[expert], recipe.quantize_along_tokens(gradient), recipe.quantize_along_tokens(x)
        )


def test_rows_are_quantised_along_features_forward_and_along_tokens_for_the_weight() -> None:
    """With these values the other tiles would not pass: their error is far above the tolerance."""
    case, recipe = Case(), RECIPES[0]
    _, _, of_weight = case.run()
    gradient, x = case.gradient, case.x.detach()
    wrong = decoded(recipe.quantize_activations(gradient)).T @ decoded(recipe.quantize_activations(x))
    expected, bound = multiplied(recipe.quantize_along_tokens(gradient), recipe.quantize_along_tokens(x))
    assert ((wrong - expected).abs() > 100 * bound).double().mean() > 0.9
    assert_within(of_weight, expected[None], bound[None])


def test_a_bf16_weight_has_a_bf16_gradient() -> None:
    case = Case(ENDS)
    expected = case.run()
    case.weight = case.weight.detach().bfloat16().requires_grad_()
    found = case.run()
    assert found[2].dtype is torch.bfloat16
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2].bfloat16())


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Return integers, which E4M3 holds for every scale that is a power of two: quantizing is exact."""
    return torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("ends", [None, (70, 70, 150)])
def test_gradients_are_finite_differences_where_quantising_changes_nothing(
    ends: tuple[int, ...] | None,
) -> None:
    places = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    x, weight = whole_numbers(150, 140, seed=0), whole_numbers(1 if ends is None else 3, 130, 140, seed=1)
    gradient, probe = whole_numbers(150, 130, seed=2), torch.zeros(())

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return (product(x, weight, places, probe, FP8Recipe(power_of_two=True)) * gradient).sum(
            dtype=torch.float64
        )

    inputs = [x.requires_grad_(), weight.requires_grad_()]
    found = torch.autograd.grad(loss(*inputs), inputs)
    for n, place in ((0, (3, 5)), (0, (140, 139)), (1, (0, 129, 7)), (1, (len(weight) - 1, 2, 130))):
        ends_of_step = []
        for step in (1.0, -1.0):
            moved = [tensor.detach().clone() for tensor in inputs]
            moved[n][place] += step
            ends_of_step.append(float(loss(*moved)))
        assert (ends_of_step[0] - ends_of_step[1]) / 2 == float(found[n][place])


def test_experts_are_strangers() -> None:
    """Each expert's results equal, bit for bit, those of the expert alone, whatever its neighbours hold."""
    case = Case(ENDS)
    with torch.no_grad():
        case.x[:130] *= 1e6
        case.x[200] *= 1e-6
        case.gradient[130] *= 1e8
        case.weight[1] = math.nan  # has no rows
    out, of_x, of_weight = case.run()
    for expert, own in enumerate(case.experts()):
        if own.start == own.stop:
            continue
        alone = Case()
        alone.x, alone.gradient = case.x.detach()[own].requires_grad_(), case.gradient[own]
        alone.weight = case.weight.detach()[expert, None].requires_grad_()
        found = alone.run()
        assert all(map(torch.equal, found, (out[own], of_x[own], of_weight[expert, None])))


@pytest.mark.parametrize("ends", [None, (0, 0)])
def test_no_rows_at_all(ends: tuple[int, ...] | None) -> None:
    places = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    x, weight = (
        torch.zeros(0, IN, requires_grad=True),
        torch.ones(2 if ends else 1, OUT, IN, requires_grad=True),
    )
    out = product(x, weight, places, torch.zeros(()))
    out.sum().backward()
    assert out.shape == (0, OUT)
    assert x.grad is not None
    assert x.grad.shape == (0, IN)
    assert weight.grad is not None
    assert not weight.grad.any()


def broken_of(case: Case, run: Callable[..., Tensor] = product) -> float:
    """Return what a pass adds to the probe's gradient."""
    case.probe = torch.zeros((), requires_grad=True)
    run(case.x, case.weight, case.ends, case.probe).backward(case.gradient)
    return of_probe(case)


def of_probe(case: Case) -> float:
    assert case.probe.grad is not None
    return float(case.probe.grad)


def test_broken_tiles_of_backward_operands_are_counted() -> None:
    case = Case(ENDS)
    assert broken_of(case) == 0.0
    case.gradient[[2, 5]] = math.nan
    # Both rows have 2 tiles of features, and all of the columns 1 tile of tokens.
    assert broken_of(case) == 2 * 2 + OUT
    case.gradient[299, 0] = -math.inf
    assert broken_of(case) == 2 * 2 + OUT + 2
    with torch.no_grad():
        case.x[131, :3] = math.inf
        case.weight[3, 0, 0] = math.nan
    assert broken_of(case) == 2 * 2 + OUT + 2 + 3 + 1


def test_what_nobody_differentiates_is_not_counted() -> None:
    case = Case()
    case.gradient[0] = math.nan
    case.weight = case.weight.detach()
    assert broken_of(case) == 2.0  # the tiles of 1 x 128 alone


def test_recomputation_counts_once_and_microbatches_add_up() -> None:
    case = Case(ENDS)
    case.gradient[0, 0] = math.nan

    def recomputed(*inputs: Any) -> Tensor:
        out: Tensor = checkpoint(product, *inputs, use_reentrant=False)
        return out

    assert broken_of(case, recomputed) == 2.0
    recomputed(case.x, case.weight, case.ends, case.probe).backward(case.gradient)
    assert of_probe(case) == 4.0


@pytest.mark.parametrize("name", sorted(MATMUL_ENGINES))
def test_every_engine_that_the_config_names_is_there(name: str) -> None:
    assert callable(MATMUL_ENGINES[name].matmul)


def test_pytorch_finds_no_fault_with_the_operators() -> None:
    x, weight = numbers((20, 130)).requires_grad_(), numbers((40, 130)).requires_grad_()
    ends, probe = torch.tensor([20], dtype=torch.int32), torch.zeros((), requires_grad=True)
    torch.library.opcheck(fp8_linear, (x, weight, None, probe, *OPTIONS))
    stack = weight.detach()[None].requires_grad_()
    torch.library.opcheck(fp8_grouped_linear, (x, stack, None, ends, probe, *OPTIONS))


@pytest.mark.slow
@pytest.mark.parametrize(("ends", "backend"), [(None, "aot_eager"), (ENDS, "aot_eager"), (ENDS, "inductor")])
def test_compiled_products_are_the_same_bits(ends: tuple[int, ...] | None, backend: str) -> None:
    if backend == "inductor" and not has_compiler():
        pytest.skip("inductor needs a C++ compiler")
    case = Case(ends)
    expected = case.run()
    case.gradient[0, 0] = math.nan
    torch.compiler.reset()
    compiled = torch.compile(product, backend=backend)
    assert broken_of(case, compiled) == 2.0
    case.gradient = Case(ends).gradient
    out = compiled(case.x, case.weight, case.ends, case.probe)
    found = (out.detach(), *torch.autograd.grad(out, [case.x, case.weight], case.gradient))
    assert all(map(torch.equal, found, expected))
