"""What FP8 costs in exactness: of numbers, of matrix products, and without fine-grained scales.

- numbers: the error of every tile scheme for known distributions, against its closed form (e4m3.py);
- products: forward, input gradient and weight gradient of dsv3/fp8/ops.py beside bf16, the
  exact product of the unrounded numbers being right; for normal data and for some with outliers;
- outliers: what becomes of all other numbers as a few channels grow, with tiles and without.

Errors are relative: the norm of what is wrong over the norm of what is right. Everything is drawn from
fixed seeds and computed on CPU; the figures go to docs/images. Exit code 1 where a number's error is more
than 3 % from its closed form for the maxima that were drawn.

    python -m benchmarks.precision
    python -m benchmarks.precision --only products
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.distributions import DISTRIBUTIONS, Distribution
from benchmarks.e4m3 import binade, decibels, expected
from benchmarks.fp8_figures import draw_levels, draw_outliers
from benchmarks.fp8_products import levels, products, summary
from dsv3.fp8.operands import FP8Recipe, QuantizedOperand

RESULT = Path(__file__).resolve().parent / "results" / "precision.json"
IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
SIDE = 1024
Scheme = Callable[[Tensor, bool], QuantizedOperand]
SCHEMES: dict[str, tuple[int, Scheme]] = {
    "1 x 128": (128, lambda x, power_of_two: FP8Recipe(128, power_of_two).quantize_activations(x)),
    "128 x 1": (
        128,
        lambda x, power_of_two: FP8Recipe(128, power_of_two).quantize_along_tokens(x).transpose(),
    ),
    "128 x 128": (128 * 128, lambda x, power_of_two: FP8Recipe(128, power_of_two).quantize_weight(x)),
    "tensor": (SIDE * SIDE, lambda x, power_of_two: FP8Recipe(0, power_of_two).quantize_activations(x)),
}
"""Numbers that share a scale, and the operand."""
OUTLIERS = [2.0**n for n in range(23)]
CHANNELS = 4


def spreads() -> Iterator[dict[str, Any]]:
    """Numbers spread over a binade."""
    for name, logarithmic in (("evenly", False), ("evenly in their logarithm", True)):
        norm, each = binade(logarithmic)
        yield {"over a binade": name, "error": norm, "decibels": decibels(norm), "of each, rms": each}


def numbers() -> Iterator[dict[str, Any]]:
    """Every distribution in every scheme, with fp32 scales and with powers of two."""
    for seed, distribution in enumerate(DISTRIBUTIONS):
        drawn = distribution.draw(np.random.default_rng(seed), (SIDE, SIDE))
        for scheme in SCHEMES:
            for power_of_two in (False, True):
                yield _numbers(distribution, torch.from_numpy(drawn).float(), scheme, power_of_two)


def _numbers(distribution: Distribution, x: Tensor, scheme: str, power_of_two: bool) -> dict[str, Any]:
    size, quantize = SCHEMES[scheme]
    found = quantize(x, power_of_two)
    maxima = _maxima(x, found.block).flatten().numpy()
    error = relative(numbers_of(found), x)
    predicted = expected(distribution, size, power_of_two)
    given = expected(distribution, size, power_of_two, maxima)
    return {
        "distribution": distribution.name,
        "scheme": scheme,
        "scales": "2^n" if power_of_two else "fp32",
        "error": error,
        "decibels": decibels(error),
        "predicted": predicted.error,
        "given_maxima": given.error,
        "zeros": zeros(found),
        "zeros_predicted": given.zeros,
    }


def numbers_of(operand: QuantizedOperand) -> Tensor:
    """What an operand stands for, fp64."""
    scales = operand.scales.double().repeat_interleave(operand.block[0], 0)
    scales = scales.repeat_interleave(operand.block[1], 1)
    rows, columns = operand.codes.shape
    return operand.codes.double() * scales[:rows, :columns]


def relative(found: Tensor, right: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((found.double() - right.double()).norm() / right.double().norm())


def zeros(operand: QuantizedOperand) -> float:
    """The share of codes that are 0."""
    return float((operand.codes.float() == 0).double().mean())


def _maxima(x: Tensor, block: tuple[int, int]) -> Tensor:
    blocks = x.abs().view(SIDE // block[0], block[0], SIDE // block[1], block[1])
    return blocks.amax((1, 3)).double()


def outliers() -> Iterator[dict[str, Any]]:
    """Normal numbers of which a few channels, far from each other, are so many times larger."""
    x = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    channels = torch.arange(CHANNELS) * (SIDE // CHANNELS)
    others = torch.ones(SIDE, dtype=torch.bool).index_fill(0, channels, False)
    for size in OUTLIERS:
        larger = x.index_copy(1, channels, x[:, channels] * size)
        for scheme, (_, quantize) in SCHEMES.items():
            found = quantize(larger, False)
            rest = QuantizedOperand(found.codes[:, others], found.scales, found.block)
            yield {
                "size": size,
                "scheme": scheme,
                "error": relative(numbers_of(found)[:, others], larger[:, others]),
                "zeros": zeros(rest),
            }


def by_size(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every third size in a line, with all schemes beside each other."""
    for size in OUTLIERS[::3]:
        own = [line for line in lines if line["size"] == size]
        errors = {line["scheme"]: line["error"] for line in own}
        yield {"times": f"{size:,.0f}"} | errors | {f"{line['scheme']}, zeros": line["zeros"] for line in own}


def show(lines: Iterable[dict[str, Any]]) -> None:
    """A table in Markdown; errors in per cent."""
    lines = list(lines)
    print("\n| " + " | ".join(lines[0]) + " |\n|" + "---|" * len(lines[0]))
    for line in lines:
        print("| " + " | ".join(_cell(name, value) for name, value in line.items()) + " |", flush=True)


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1f}" if name == "decibels" else f"{value:.3%}"


def main() -> int:
    """Compute every part, print its table, write JSON and figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parts = {"numbers": numbers, "products": products, "outliers": outliers}
    parser.add_argument("--only", choices=parts, help="this part, without writing anything")
    chosen = parser.parse_args().only
    shown = {"products": summary, "outliers": by_size}
    results: dict[str, list[dict[str, Any]]] = {"binade": list(spreads()), "levels": list(levels())}
    for part, compute in parts.items():
        if chosen in (None, part):
            results[part] = list(compute())
    for part, lines in results.items():
        show(shown.get(part, iter)(lines))
    if chosen is None:
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
        draw_levels(IMAGES / "fp8_error.png")
        draw_outliers(results["outliers"], IMAGES / "fp8_outliers.png")
    apart = [abs(line["error"] / line["given_maxima"] - 1) for line in results.get("numbers", [])]
    return 0 if all(difference < 0.03 for difference in apart) else 1


if __name__ == "__main__":
    sys.exit(main())
