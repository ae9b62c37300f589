"""Times ways of computing MLA's attention against each other, forward and backward.

Three questions decide what dsv3/model/attention_kernels.py does:

- widths: values (128) narrower than keys (192) as they are, or padded to one width, which is what
  the flash kernels of PyTorch take;
- documents: one call a document on slices of the batch, or on pieces it was split into at once;
- kernels (CUDA only): one call a document, or one varlen call for all.

The two variants of a question run in turns on the same tensors, so that a neighbour on the machine
disturbs both; the speed-up is the median of the ratios of such pairs.

    python benchmarks/attention_kernels.py
    python benchmarks/attention_kernels.py --device cuda --json benchmarks/results/attention_kernels_cuda.json
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.model.attention_kernels import Segments, document_segments, sdpa, varlen

RESULT = Path(__file__).resolve().parent / "results" / "attention_kernels.json"
SCALE = 0.1
LEAST_SECONDS = 3.0
Heads = tuple[Tensor, Tensor, Tensor]
Variant = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Shape:
    """What is attended to."""

    rows: int
    sequence: int
    heads: int
    qk_head_dim: int
    v_head_dim: int
    document: int | None = None
    """Tokens a document; None where a row is one."""

    def draw(self, dtype: torch.dtype, device: str) -> Heads:
        """Random q, k, v [rows, sequence, heads, ...] that want gradients."""
        size = (self.rows, self.sequence, self.heads)
        widths = (self.qk_head_dim, self.qk_head_dim, self.v_head_dim)
        q, k, v = (torch.randn(*size, width, device=device).to(dtype).requires_grad_() for width in widths)
        return q, k, v

    def segments(self, device: str) -> Segments:
        """Documents all of one length, but for the last of a row."""
        numbers = torch.arange(self.sequence, device=device) // (self.document or self.sequence)
        found = document_segments(numbers.expand(self.rows, -1))
        assert found is not None
        return found


@dataclass
class Result:
    """One pair of variants; times are medians in milliseconds."""

    question: str
    before: str
    after: str
    dtype: str
    shape: Shape
    before_ms: float
    after_ms: float
    speedup: float
    """Median of the ratios of neighbouring runs, above 1 where the second variant is faster."""


SEQUENCES = (256, 512, 1024, 2048)
V3 = [Shape(1, sequence, 16, 192, 128) for sequence in SEQUENCES]
DEBUG = Shape(4, 256, 4, 48, 32)
PACKED = [Shape(1, 2048, 16, 192, 128, document) for document in (64, 512)]


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on the heads as they are."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE).transpose(1, 2)


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on values with zeros behind them."""
    return whole(q, k, F.pad(v, (0, q.shape[-1] - v.shape[-1])))[..., : v.shape[-1]]


def sliced(segments: Segments) -> Variant:
    """One call a document, on slices and into a slice."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(v)
        places = zip(segments.cu_seqlens.tolist(), segments.lengths, strict=False)
        for begin, length in places:
            row, start = divmod(begin, q.shape[1])
            part = (slice(row, row + 1), slice(start, start + length))
            out[part] = padded(q[part], k[part], v[part])
        return out

    return attend


def pairs(device: str) -> Iterator[tuple[str, Shape, tuple[str, Variant], tuple[str, Variant]]]:
    """The questions that the device can answer."""
    for shape in [*V3, DEBUG]:
        yield "widths", shape, ("two widths", whole), ("padded", padded)
    for shape in PACKED:
        segments = shape.segments(device)

        def split(q: Tensor, k: Tensor, v: Tensor, segments: Segments = segments) -> Tensor:
            return sdpa(q, k, v, SCALE, segments)

        def at_once(q: Tensor, k: Tensor, v: Tensor, segments: Segments = segments) -> Tensor:
            return varlen(q, k, v, SCALE, segments)

        yield "documents", shape, ("sliced", sliced(segments)), ("split", split)
        if device == "cuda":
            yield "kernels", shape, ("sdpa", split), ("varlen", at_once)


def milliseconds(attend: Variant, heads: Heads) -> float:
    """Forward and backward once."""
    wait(heads)
    began = time.perf_counter()
    out = attend(*heads)
    torch.autograd.grad(out, heads, torch.ones_like(out))
    wait(heads)
    return 1000 * (time.perf_counter() - began)


def wait(heads: Heads) -> None:
    """Until the GPU has done all it was asked for."""
    if heads[0].is_cuda:
        torch.cuda.synchronize()


def measure(
    before: Variant, after: Variant, heads: Heads, rounds: int, least: float
) -> tuple[float, float, float]:
    """Medians of both and of their ratio, of as many `rounds` and seconds at `least`."""
    times: list[tuple[float, float]] = []
    milliseconds(before, heads), milliseconds(after, heads)  # warms up
    began = time.monotonic()
    while len(times) < rounds or time.monotonic() - began < least:
        times.append((milliseconds(before, heads), milliseconds(after, heads)))
    firsts, seconds = zip(*times, strict=True)
    ratio = statistics.median(a / b for a, b in times)
    return statistics.median(firsts), statistics.median(seconds), ratio


def run(device: str, rounds: int, seconds: float) -> Iterator[Result]:
    """Every question in fp32 and bf16; varlen in bf16 alone."""
    for dtype in (torch.float32, torch.bfloat16):
        for question, shape, (before, first), (after, second) in pairs(device):
            if question == "kernels" and dtype is torch.float32:
                continue
            figures = measure(first, second, shape.draw(dtype, device), rounds, seconds)
            yield Result(question, before, after, str(dtype).removeprefix("torch."), shape, *figures)


def show(result: Result) -> None:
    """One line of the table."""
    s = result.shape
    documents = "" if s.document is None else f", documents of {s.document}"
    print(
        f"{result.question:10} {result.dtype:9} {s.rows} x {s.sequence:4}, {s.heads:2} heads of "
        f"{s.qk_head_dim}/{s.v_head_dim}{documents:18} {result.before:>10} {result.before_ms:8.1f} ms  "
        f"{result.after:>7} {result.after_ms:8.1f} ms  {result.speedup:5.2f}x",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=LEAST_SECONDS, help="least of each pair")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    results = []
    for result in run(options.device, options.rounds, options.seconds):
        show(result)
        results.append(result)
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu"
    figures: dict[str, object] = {
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "load_average_before_and_after": [load, os.getloadavg()[0]],
        "results": [asdict(result) for result in results],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
