"""Linear maps in FP8, one weight or one an expert, forward and backward, as operators of PyTorch.

Operators, so that compilation and selective recomputation see each as a whole. Forward products and the
gradients of inputs use tiles of 1 x 128 and blocks of 128 x 128; the gradient of a weight adds up over
tokens, so that both its operands are quantised again along the tokens, within an expert's own rows.

Rows are [rows, in]. A weight [out, in] takes them all; of a stack [experts, out, in] each takes its own,
`ends` [experts] int32 being the row numbers at which each expert's rows end. Where there are `scales`, the
weight is codes (block_weight.py), else it is quantised for each product. `engine` names one of
engine.ENGINES, `tile` and `power_of_two` are the Recipe. `probe` is a scalar 0 whose gradient counts the
tiles of backward operands that were not finite: so autograd adds it up over layers and microbatches, once
however often a forward pass is repeated. One without requires_grad counts nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from dsv3.fp8.matmul import ENGINES
from dsv3.fp8.operands import Recipe, Tiles
from dsv3.fp8.quantize import BLOCK


@torch.library.custom_op("dsv3::fp8_linear", mutates_args=())
def fp8_linear(
    rows: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    probe: Tensor,
    engine: str,
    tile: int,
    power_of_two: bool,
) -> Tensor:
    """rows W^T [rows, out] in the dtype of the rows, to which the weight is rounded before FP8."""
    return _product(rows, weight, scales, None, engine, Recipe(tile, power_of_two))


@torch.library.custom_op("dsv3::fp8_grouped_linear", mutates_args=())
def fp8_grouped_linear(
    rows: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    ends: Tensor,
    probe: Tensor,
    engine: str,
    tile: int,
    power_of_two: bool,
) -> Tensor:
    """rows W_e^T [rows, out] for each expert's own rows; the host reads `ends`."""
    return _product(rows, weight, scales, ends, engine, Recipe(tile, power_of_two))


@torch.library.custom_op("dsv3::fp8_rows_gradient", mutates_args=())
def _rows_gradient(
    gradient: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    ends: Tensor | None,
    engine: str,
    tile: int,
    power_of_two: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of the rows in the dtype of `gradient` [rows, out], and how many tiles were broken."""
    recipe, dtype = Recipe(tile, power_of_two), gradient.dtype
    out, broken = gradient.new_zeros(gradient.shape[0], weight.shape[-1]), _count(gradient)
    for expert, own in _experts(ends, gradient):
        operand = recipe.activations(gradient[own])
        blocks = _blocks(weight, scales, expert, recipe, dtype)
        out[own] = ENGINES[engine].multiply(operand, blocks.turned(), dtype)
        broken += operand.broken() + blocks.broken()
    return out, broken


@torch.library.custom_op("dsv3::fp8_weight_gradient", mutates_args=())
def _weight_gradient(
    gradient: Tensor, rows: Tensor, ends: Tensor | None, engine: str, tile: int, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of the weights in fp32, 0 for an expert without rows; and how many tiles were broken."""
    recipe, experts = Recipe(tile, power_of_two), 1 if ends is None else ends.shape[0]
    shape = (experts, gradient.shape[1], rows.shape[1])
    out, broken = gradient.new_zeros(shape, dtype=torch.float32), _count(gradient)
    for expert, own in _experts(ends, rows):
        left, right = recipe.along_tokens(gradient[own]), recipe.along_tokens(rows[own])
        out[expert] = ENGINES[engine].multiply(left, right, torch.float32)
        broken += left.broken() + right.broken()
    return out, broken


def _product(
    rows: Tensor, weight: Tensor, scales: Tensor | None, ends: Tensor | None, engine: str, recipe: Recipe
) -> Tensor:
    out = rows.new_zeros(rows.shape[0], weight.shape[-2])
    for expert, own in _experts(ends, rows):
        operand = recipe.activations(rows[own])
        blocks = _blocks(weight, scales, expert, recipe, rows.dtype)
        out[own] = ENGINES[engine].multiply(operand, blocks, rows.dtype)
    return out


def _blocks(weight: Tensor, scales: Tensor | None, expert: int, recipe: Recipe, dtype: torch.dtype) -> Tiles:
    """One expert's weight as an operand."""
    one = weight[expert] if weight.ndim == 3 else weight
    if scales is None:
        return recipe.weight(one.to(dtype))
    own = slice(expert * one.shape[0] // BLOCK, (expert + 1) * one.shape[0] // BLOCK)
    return Tiles(one, scales[own], (BLOCK, BLOCK))


def _experts(ends: Tensor | None, rows: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which rows."""
    first = 0
    for expert, end in enumerate([rows.shape[0]] if ends is None else ends.tolist()):
        if end > first:
            yield expert, slice(first, end)
        first = end


def _count(like: Tensor) -> Tensor:
    return like.new_zeros((), dtype=torch.float32)


@fp8_linear.register_fake
@fp8_grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[-2])


@_rows_gradient.register_fake
def _(gradient: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return gradient.new_empty(gradient.shape[0], weight.shape[-1]), _count(gradient)


@_weight_gradient.register_fake
def _(gradient: Tensor, rows: Tensor, ends: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    shape = (1 if ends is None else ends.shape[0], gradient.shape[1], rows.shape[1])
    return gradient.new_empty(shape, dtype=torch.float32), _count(gradient)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rows, weight, scales, *ends, _, engine, tile, power_of_two = inputs
    ctx.grouped, ctx.options = bool(ends), (engine, tile, power_of_two)
    ctx.save_for_backward(rows, weight, scales, *ends)


def _differentiate(ctx, gradient):  # type: ignore[no-untyped-def]
    rows, weight, scales, *ends = ctx.saved_tensors
    ends = ends[0] if ctx.grouped else None
    of_rows, of_weight, broken = None, None, _count(gradient)
    if ctx.needs_input_grad[0] and _asked_for(ctx.next_functions[0][0]):
        of_rows, count = _rows_gradient(gradient, weight, scales, ends, *ctx.options)
        broken = broken + count
    if ctx.needs_input_grad[1] and _asked_for(ctx.next_functions[1][0]):
        of_weight, count = _weight_gradient(gradient, rows, ends, *ctx.options)
        of_weight, broken = of_weight.view(weight.shape).to(weight.dtype), broken + count
    probe = ctx.next_functions[-1][0]  # the last of the tensors
    if probe is not None and not _asked_for(probe):
        # A split backward pass gives gradients to inputs and parameters alone, so nobody else would add it.
        leaf = probe.variable
        leaf.grad = broken if leaf.grad is None else leaf.grad + broken
    return of_rows, of_weight, None, *[None] * ctx.grouped, broken, *[None] * len(ctx.options)


def _asked_for(source: Node) -> bool:
    """Whether the backward pass that runs goes on to `source`.

    One that a pipeline schedule splits asks for inputs first and for weights later: both twice, if not asked.
    """
    try:
        return torch._C._will_engine_execute_node(source)
    except RuntimeError:  # a leaf that torch.autograd.grad was given
        return True


fp8_linear.register_autograd(_differentiate, setup_context=_save)


fp8_grouped_linear.register_autograd(_differentiate, setup_context=_save)
