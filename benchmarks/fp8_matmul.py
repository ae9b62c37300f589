"""TFLOP/s of experts' grouped products in bf16 and FP8, at the shapes of a model's experts; needs Hopper.

bf16 is torch's grouped_mm; FP8 is the engine scaled_mm as training uses it, quantisation included, the same
with weights that were gathered in FP8, and its products alone. Rows are even over the experts. With
--device cpu the emulation runs, to try the script.

    python -m benchmarks.fp8_matmul
    python -m benchmarks.fp8_matmul --device cpu --tokens 256 --experts 2 --models debug
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.config.precision import FP8Engine
from dsv3.fp8.convert_model import FP8GroupedLinear, choose_engine
from dsv3.fp8.matmul import MATMUL_ENGINES
from dsv3.fp8.operands import WEIGHT_BLOCK, FP8Recipe, QuantizedWeight
from dsv3.fp8.quantize import quantize
from dsv3.model.moe import grouped_linear

JSON = Path(__file__).parent / "results" / "fp8_matmul.json"
SHAPES = {
    "debug": (128, 128),
    "16b": (2048, 1408),
    "671b": (7168, 2048),
}
"""A model's width and its experts' hidden width."""
REPEATS = 10


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of REPEATS runs, after two that do not count."""
    times = []
    for n in range(REPEATS + 2):
        _wait(device)
        start = perf_counter()
        work()
        _wait(device)
        if n > 1:
            times.append(perf_counter() - start)
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(rows: int, depth: int, out: int, experts: int, device: torch.device) -> dict[str, float]:
    """TFLOP/s of a grouped product [rows, depth] x [experts, out, depth], forward, and with backward."""
    x = torch.randn(rows, depth, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(experts, out, depth, device=device, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.arange(1, experts + 1, device=device).mul(rows // experts).int()
    engine = choose_engine(FP8Engine.auto, device)
    probe = torch.zeros((), device=device, requires_grad=True)
    in_fp8 = FP8GroupedLinear(probe, engine.name, 128, False)
    gradient = torch.randn(rows, out, device=device, dtype=torch.bfloat16)
    products = {
        "bf16": (grouped_linear, weight),
        "fp8": (in_fp8, weight),
        "fp8, gathered": (in_fp8, _gathered(weight)),
    }
    flops = 2 * rows * depth * out / 1e12
    found = {}
    for name, (product, w) in products.items():
        found[name] = flops / seconds(lambda p=product, w=w: p(x, w, ends), device)  # type: ignore[misc]
        both = seconds(lambda p=product, w=w: p(x, w, ends).backward(gradient), device)  # type: ignore[misc]
        found[f"{name} with backward"] = 3 * flops / both
    found["fp8 product alone"] = flops / seconds(_alone(x, weight, engine), device)
    return found


def _gathered(weight: Tensor) -> nn.Parameter:
    """The weight as FSDP hands it out with precision.fp8.gather=true."""
    codes, scales = quantize(weight.detach().flatten(0, 1), WEIGHT_BLOCK)
    return nn.Parameter(QuantizedWeight(codes.view_as(weight), scales, weight.dtype))


def _alone(x: Tensor, weight: Tensor, engine: FP8Engine) -> Callable[[], object]:
    """One expert's product at a time on operands that are quantised already."""
    recipe, rows = FP8Recipe(), x.shape[0] // weight.shape[0]
    with torch.no_grad():
        operands = [recipe.quantize_activations(part) for part in x.split(rows)]
        blocks = [recipe.quantize_weight(part) for part in weight]
    multiply = MATMUL_ENGINES[engine.name].matmul
    return lambda: [multiply(a, b, torch.bfloat16) for a, b in zip(operands, blocks, strict=True)]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=8192, help="rows of all experts together")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--models", nargs="*", default=["16b", "671b"], choices=list(SHAPES))
    parser.add_argument("--json", type=Path, default=JSON, help="written on a GPU alone")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --device cpu tries the script")
    lines: list[dict[str, Any]] = []
    for model in chosen.models:
        dim, hidden = SHAPES[model]
        for name, depth, out in (("gate and up", dim, 2 * hidden), ("down", hidden, dim)):
            found = measure(chosen.tokens, depth, out, chosen.experts, device)
            lines.append({"model": model, "product": name, "depth": depth, "out": out, **found})
            print(model, name, ", ".join(f"{key} {value:.3g}" for key, value in found.items()), flush=True)
    if device.type == "cuda":
        on = torch.cuda.get_device_name(device)
        told = {"device": on, "torch": torch.__version__, "host": platform.machine(), "tflops": lines}
        chosen.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
