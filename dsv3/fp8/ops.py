"""FP8 linear maps, plain and grouped by expert, forward and backward, as PyTorch operators.

As operators, compilation and selective activation checkpointing see each as a whole. The forward matmul and
the gradient of the input use tiles of 1 x 128 and blocks of 128 x 128. The gradient of a weight sums over
tokens, so both its operands are quantized again along the tokens, within the rows of one expert.

Common arguments:
    rows: [rows, in].
    weight: [out, in] for all rows, or a stack [experts, out, in] of one weight per expert.
    scales: None where `weight` is quantized for each matmul; else `weight` is E4M3 codes
        (operands.QuantizedWeight) and these are its scales.
    ends: [experts] int32, the row number at which each expert's rows end (exclusive). The host reads them in
        the forward and in the backward pass, so they had better be on the CPU already.
    probe: a scalar 0 whose gradient counts the tiles of backward operands that were not finite. Autograd
        thereby adds the counts over layers and microbatches, once however often activation checkpointing
        repeats a forward pass. A probe without requires_grad counts nothing.
    engine: a name of matmul.MATMUL_ENGINES.
    tile, power_of_two: the FP8Recipe.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from dsv3.distributed.torch_private import backward_reaches
from dsv3.fp8.matmul import MATMUL_ENGINES
from dsv3.fp8.operands import FP8Recipe, QuantizedOperand
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
    """Return rows W^T [rows, out] in the dtype of the rows, to which the weight is rounded before FP8."""
    return _forward(rows, weight, scales, None, engine, FP8Recipe(tile, power_of_two))


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
    """Return rows W_e^T [rows, out], each expert's weight for its own rows."""
    return _forward(rows, weight, scales, ends, engine, FP8Recipe(tile, power_of_two))


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
    """Return the gradient of the rows [rows, in] in the dtype of `gradient` [rows, out].

    The second value is the number of tiles that were not finite, an fp32 scalar.
    """
    recipe, dtype = FP8Recipe(tile, power_of_two), gradient.dtype
    out, nonfinite = gradient.new_zeros(gradient.shape[0], weight.shape[-1]), _zero_count(gradient)
    for expert, own in _expert_rows(ends, gradient):
        operand = recipe.quantize_activations(gradient[own])
        blocks = _weight_operand(weight, scales, expert, recipe, dtype)
        out[own] = MATMUL_ENGINES[engine].matmul(operand, blocks.transpose(), dtype)
        nonfinite += operand.nonfinite_tiles() + blocks.nonfinite_tiles()
    return out, nonfinite


@torch.library.custom_op("dsv3::fp8_weight_gradient", mutates_args=())
def _weight_gradient(
    gradient: Tensor, rows: Tensor, ends: Tensor | None, engine: str, tile: int, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the weights [experts, out, in] in fp32, 0 for an expert without rows.

    The second value is the number of tiles that were not finite, an fp32 scalar.
    """
    recipe, experts = FP8Recipe(tile, power_of_two), 1 if ends is None else ends.shape[0]
    shape = (experts, gradient.shape[1], rows.shape[1])
    out, nonfinite = gradient.new_zeros(shape, dtype=torch.float32), _zero_count(gradient)
    for expert, own in _expert_rows(ends, rows):
        left, right = recipe.quantize_along_tokens(gradient[own]), recipe.quantize_along_tokens(rows[own])
        out[expert] = MATMUL_ENGINES[engine].matmul(left, right, torch.float32)
        nonfinite += left.nonfinite_tiles() + right.nonfinite_tiles()
    return out, nonfinite


def _forward(
    rows: Tensor, weight: Tensor, scales: Tensor | None, ends: Tensor | None, engine: str, recipe: FP8Recipe
) -> Tensor:
    out = rows.new_zeros(rows.shape[0], weight.shape[-2])
    for expert, own in _expert_rows(ends, rows):
        operand = recipe.quantize_activations(rows[own])
        blocks = _weight_operand(weight, scales, expert, recipe, rows.dtype)
        out[own] = MATMUL_ENGINES[engine].matmul(operand, blocks, rows.dtype)
    return out


def _weight_operand(
    weight: Tensor, scales: Tensor | None, expert: int, recipe: FP8Recipe, dtype: torch.dtype
) -> QuantizedOperand:
    """Return one expert's weight as an operand, quantized here unless it comes with scales."""
    one = weight[expert] if weight.ndim == 3 else weight
    if scales is None:
        return recipe.quantize_weight(one.to(dtype))
    own = slice(expert * one.shape[0] // BLOCK, (expert + 1) * one.shape[0] // BLOCK)
    return QuantizedOperand(one, scales[own], (BLOCK, BLOCK))


def _expert_rows(ends: Tensor | None, rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and the slice of its rows; without `ends` expert 0 has all."""
    first = 0
    for expert, end in enumerate([rows.shape[0]] if ends is None else ends.tolist()):
        if end > first:
            yield expert, slice(first, end)
        first = end


def _zero_count(like: Tensor) -> Tensor:
    return like.new_zeros((), dtype=torch.float32)


@fp8_linear.register_fake
@fp8_grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[-2])


@_rows_gradient.register_fake
def _(gradient: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return gradient.new_empty(gradient.shape[0], weight.shape[-1]), _zero_count(gradient)


@_weight_gradient.register_fake
def _(gradient: Tensor, rows: Tensor, ends: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    shape = (1 if ends is None else ends.shape[0], gradient.shape[1], rows.shape[1])
    return gradient.new_empty(shape, dtype=torch.float32), _zero_count(gradient)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rows, weight, scales, *ends, _, engine, tile, power_of_two = inputs
    ctx.options = (engine, tile, power_of_two)
    ctx.save_for_backward(rows, weight, scales, *ends)


def _linear_backward(ctx, gradient):  # type: ignore[no-untyped-def]
    rows, weight, scales = ctx.saved_tensors
    rows_gradient, weight_gradient, nonfinite = _gradients(ctx, gradient, rows, weight, scales, None)
    # One value per argument: rows, weight, scales, probe, engine, tile, power_of_two.
    return rows_gradient, weight_gradient, None, nonfinite, None, None, None


def _grouped_linear_backward(ctx, gradient):  # type: ignore[no-untyped-def]
    rows, weight, scales, ends = ctx.saved_tensors
    rows_gradient, weight_gradient, nonfinite = _gradients(ctx, gradient, rows, weight, scales, ends)
    # One value per argument: rows, weight, scales, ends, probe, engine, tile, power_of_two.
    return rows_gradient, weight_gradient, None, None, nonfinite, None, None, None


def _gradients(
    ctx: Any, gradient: Tensor, rows: Tensor, weight: Tensor, scales: Tensor | None, ends: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return the gradients of rows and weight, None for one that is not asked for, and of the probe."""
    rows_gradient, weight_gradient = None, None
    nonfinite = _zero_count(gradient)
    if ctx.needs_input_grad[0] and _is_asked_for(ctx.next_functions[0][0]):
        rows_gradient, count = _rows_gradient(gradient, weight, scales, ends, *ctx.options)
        nonfinite = nonfinite + count
    if ctx.needs_input_grad[1] and _is_asked_for(ctx.next_functions[1][0]):
        weight_gradient, count = _weight_gradient(gradient, rows, ends, *ctx.options)
        weight_gradient = weight_gradient.view(weight.shape).to(weight.dtype)
        nonfinite = nonfinite + count
    probe = ctx.next_functions[-1][0]  # the last of the tensors
    if probe is not None and not _is_asked_for(probe):
        # A split backward pass asks for gradients of inputs and parameters only: nobody else would add it.
        leaf = probe.variable
        leaf.grad = nonfinite if leaf.grad is None else leaf.grad + nonfinite
    return rows_gradient, weight_gradient, nonfinite


def _is_asked_for(source: Node) -> bool:
    """Return whether the running backward pass goes on to `source`.

    A pipeline schedule that splits the backward pass asks for inputs first and for weights later. Without
    this question both gradients would be computed twice.
    """
    try:
        return backward_reaches(source)
    except RuntimeError:  # a leaf that torch.autograd.grad was given
        return True


fp8_linear.register_autograd(_linear_backward, setup_context=_save_for_backward)


fp8_grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_save_for_backward)
