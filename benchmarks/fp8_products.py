"""Errors of FP8 products, beside those of bf16, in the shapes of the debug model and of 16b's layers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.distributions import DISTRIBUTIONS
from benchmarks.e4m3 import expected
from dsv3.fp8.convert_model import FP8GroupedLinear, FP8Linear
from dsv3.fp8.operands import FP8Recipe
from dsv3.model.layers import linear
from dsv3.model.moe import grouped_linear

RECIPES = {"tiles": FP8Recipe(), "tiles, 2^n": FP8Recipe(power_of_two=True), "tensor": FP8Recipe(tile=0)}
PRODUCTS = ("forward", "input gradient", "weight gradient")
DATA = {
    "normal": (1.0, 1.0),
    "channels x 100": (100.0, 1.0),
    "channels x 1000": (1000.0, 1.0),
    "channels x 100000": (1e5, 1.0),
    "tokens x 1000": (1.0, 1000.0),
}
"""How much larger some channels and some tokens of the rows are."""
CHANNELS, TOKENS = slice(5, None, 512), slice(5, None, 64)
"""Which ones."""


@dataclass
class Shape:
    """A linear map, or one an expert."""

    name: str
    rows: list[int]
    """Of each expert; one number where there are none."""
    width: int
    out: int


SHAPES = [
    Shape("debug dense", [512], 128, 512),
    Shape("debug experts", [100, 28, 129], 128, 256),
    Shape("16b shared gate", [192], 2048, 2816),
    Shape("16b expert down", [192], 1408, 2048),
    Shape("16b experts gate and up", [40, 88], 2048, 2816),
]


class Inputs:
    """Rows, weights and the gradient of the result in fp32, as they are before any rounding."""

    def __init__(self, shape: Shape, data: str) -> None:
        draw = torch.Generator().manual_seed(0)
        self.shape, rows = shape, sum(shape.rows)
        self.ends = torch.tensor(shape.rows).cumsum(0).to(torch.int32)
        self.weight = torch.randn(len(shape.rows), shape.out, shape.width, generator=draw) * 0.02
        self.x = torch.randn(rows, shape.width, generator=draw)
        self.gradient = torch.randn(rows, shape.out, generator=draw)
        channel, token = DATA[data]
        self.x[:, CHANNELS] *= channel
        self.x[TOKENS] *= token
        self.channels, self.tokens = (torch.ones(n, dtype=torch.bool) for n in (shape.width, rows))
        self.channels[CHANNELS], self.tokens[TOKENS] = channel == 1.0, token == 1.0

    def exact(self) -> list[Tensor]:
        """The three products in fp64."""
        return self._passed(lambda x, w: x.double() @ w.double().mT, torch.float64)

    def bf16(self) -> list[Tensor]:
        """The three products of the model's own layers under bf16."""
        x, weight = self._leaves(torch.bfloat16)
        one = len(self.shape.rows) == 1
        out = linear(x, weight[0]) if one else grouped_linear(x, weight, self.ends)
        return [out.detach(), *torch.autograd.grad(out, [x, weight], self.gradient.bfloat16())]

    def fp8(self, recipe: FP8Recipe) -> list[Tensor]:
        """The three products in FP8 of numbers that are bf16 before."""
        x, weight = self._leaves(torch.bfloat16)
        options = (torch.zeros(()), "emulated", *recipe)
        one = len(self.shape.rows) == 1
        out = FP8Linear(*options)(x, weight[0]) if one else FP8GroupedLinear(*options)(x, weight, self.ends)
        return [out.detach(), *torch.autograd.grad(out, [x, weight], self.gradient.bfloat16())]

    def _passed(self, product: Any, dtype: torch.dtype) -> list[Tensor]:
        x, weight = self._leaves(dtype)
        parts = zip(x.split(self.shape.rows), weight, strict=True)
        out = torch.cat([product(rows, of_expert) for rows, of_expert in parts])
        return [out.detach(), *torch.autograd.grad(out, [x, weight], self.gradient.to(dtype))]

    def _leaves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight = self.weight.double() if dtype is torch.float64 else self.weight
        return self.x.to(dtype).requires_grad_(), weight.clone().requires_grad_()

    def elsewhere(self, product: str, result: Tensor) -> Tensor:
        """The part of a result that belongs to no outlying channel or token."""
        return result[:, :, self.channels] if product == "weight gradient" else result[self.tokens]


def products() -> Iterator[dict[str, Any]]:
    """Errors of each product by data and shape: of the whole result, and away from outliers."""
    for data in DATA:
        for shape in SHAPES:
            inputs = Inputs(shape, data)
            right = inputs.exact()
            found = {"bf16": inputs.bf16()} | {name: inputs.fp8(recipe) for name, recipe in RECIPES.items()}
            for n, product in enumerate(PRODUCTS):
                errors = {name: _error(results[n], right[n]) for name, results in found.items()}
                rest = {
                    f"{name}, elsewhere": _error(
                        *(inputs.elsewhere(product, t) for t in (results[n], right[n]))
                    )
                    for name, results in found.items()
                    if name in ("tiles", "tensor")
                }
                yield {"data": data, "shape": shape.name, "product": product} | errors | rest


def _error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def summary(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The smallest and largest error of all shapes, by data and product."""
    for data in DATA:
        for product in PRODUCTS:
            own = [line for line in lines if (line["data"], line["product"]) == (data, product)]
            names = [name for name, value in own[0].items() if isinstance(value, float)]
            ranges = {name: sorted(line[name] for line in own) for name in names}
            yield {"data": data, "product": product} | {
                name: f"{errors[0]:.2%} to {errors[-1]:.2%}" for name, errors in ranges.items()
            }


def levels() -> Iterator[dict[str, Any]]:
    """The error of a product whose operands' errors are independent, of normal numbers in whole tiles:
    the root of the sum of their squares, bf16's roundings left out."""
    normal = next(d for d in DISTRIBUTIONS if d.name == "normal")
    for power_of_two in (False, True):
        tile, block, tensor = (expected(normal, n, power_of_two).error for n in (128, 128**2, 1024**2))
        yield {
            "scales": "2^n" if power_of_two else "fp32",
            "forward, input gradient": math.hypot(tile, block),
            "weight gradient": math.hypot(tile, tile),
            "tensor": math.hypot(tensor, tensor),
        }
