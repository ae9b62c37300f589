"""Bytes of the tensors that live at the peak of a training step, beside what the plan counts.

The model is on the meta device: a step runs whole, forward and backward, without arithmetic, so that layers
of 671b take a second. A dispatch mode sees every tensor come, and a finalizer sees its storage go. Counted is
what a step adds to parameters, gradients and optimizer state: activations, casts of weights, gradients on
their way. Not seen is what a kernel holds while it runs, and the allocator's gaps.

    python -m benchmarks.live_memory               every case; writes benchmarks/results/live_memory.json
    python -m benchmarks.live_memory --show 12 --microbatch 4 --length 4096 model=16b precision=bf16

`--show N` lists what lives at the peak. The plan is that of a CPU, whose RMSNorm saves its normalized input;
a GPU's counts one tensor less per norm. Rows are one document each unless a case masks four per row.
"""

import argparse
import json
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3.config.hardware import HardwareConfig
from dsv3.config.parallel import SavedOp
from dsv3.config.root import Config
from dsv3.data.batch import Batch
from dsv3.fp8.convert_model import FP8Matmul
from dsv3.library import compose
from dsv3.model import moe
from dsv3.parallel.activation_checkpoint import SAC_SAVE_LIST
from dsv3.parallel.parallelize import build_on_meta, parallelize
from dsv3.planning.layout import ParallelDims
from dsv3.planning.memory import rank_memory
from dsv3.planning.plan import make_plan
from dsv3.training.loss import LossDenominators
from dsv3.training.schedule import StepHyperparameters
from dsv3.training.step import LocalForwardBackward

RESULT = Path(__file__).resolve().parent / "results" / "live_memory.json"
GIB = 2**30
META, CPU = torch.device("meta"), torch.device("cpu")


@dataclass
class Block:
    """One storage that lives."""

    bytes: int
    origin: str
    """Operator, shape and dtype of the first tensor in it."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators have made and that something still refers to."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        """Storages that do not count."""
        self.live: dict[int, Block] = {}
        self.now = self.peak = 0
        self.operators = 0
        self.peak_at = 0
        """Number of the operator after which the most lived."""
        self.stop_at: int | None = None
        """Number of an operator after which to keep `snapshot`."""
        self.snapshot: list[Block] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == META:
                self._add(func, tensor)
        if self.now > self.peak:
            self.peak, self.peak_at = self.now, self.operators
        if self.operators == self.stop_at:
            self.snapshot = list(self.live.values())
        return result

    def _add(self, func: Any, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or key in self.known:
            return
        name = func._schema.name.split("::")[-1]
        self.live[key] = Block(storage.nbytes(), f"{name} {list(tensor.shape)} {str(tensor.dtype)[6:]}")
        self.now += storage.nbytes()
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.live.pop(key).bytes


@dataclass
class Measured:
    """One step, live and as planned; bytes besides parameters, gradients and optimizer state."""

    live: int
    planned: int
    at: str
    """Operator at the peak."""
    largest: list[tuple[int, int, str]] = field(default_factory=list)
    """Bytes, count and origin of what lives at the peak, the largest first."""

    @property
    def ratio(self) -> float:
        """Planned over live."""
        return self.planned / self.live


def measure(config: Config, show: int = 0) -> Measured:
    """Run one step of `config` on the meta device, and plan it."""
    mode = _run(config, None)
    largest: Counter[str] = Counter()
    count: Counter[str] = Counter()
    if show:
        again = _run(config, mode.peak_at)
        for block in again.snapshot:
            largest[block.origin] += block.bytes
            count[block.origin] += 1
    plan = make_plan(config, ParallelDims(), HardwareConfig(name="cpu"))
    # Gradients are dropped as they come: those of the state are there from the second microbatch on.
    memory = rank_memory(plan.model, plan.degrees, replace(plan.shape, microbatches=2))
    return Measured(
        mode.peak,
        memory.activations + memory.weight_copies,
        f"{mode.peak_at} of {mode.operators}",
        [(bytes_, count[origin], origin) for origin, bytes_ in largest.most_common(show)],
    )


def _run(config: Config, stop_at: int | None) -> LiveBytes:
    model = build_on_meta(config, CPU)
    parallelize(model, model, config, None, CPU)
    model.train()
    for matmul in (getattr(module, "matmul", None) for module in model.modules()):
        if isinstance(matmul, FP8Matmul):
            matmul.probe = torch.zeros((), device=META, requires_grad=True)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    known = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}
    rows, length = config.train.microbatch, config.train.length
    tokens, targets, documents = (
        torch.empty(rows, length, dtype=dtype, device=META)
        for dtype in (torch.int64, torch.int64, torch.int32)
    )
    # Four documents per row, where the config masks them.
    on_host = torch.arange(length, dtype=torch.int32).mul(4).div(length, rounding_mode="floor").int()
    batch = Batch(tokens, targets, documents, on_host.expand(rows, -1))
    denominators = LossDenominators(torch.ones((), device=META), rows)
    step = StepHyperparameters(lr=0.0, mtp_weight=0.3, balance_weight=1e-4, bias_speed=0.0)
    mode = LiveBytes(known)
    mode.stop_at = stop_at
    with _meta_operators(), mode:
        LocalForwardBackward(model, config.data.document_mask).train([batch], denominators, step)
    return mode


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@torch.library.custom_op("live_memory::grouped_linear", mutates_args=())
def _grouped_linear(rows: Tensor, weight: Tensor) -> Tensor:
    """Stand for a grouped matmul, of which PyTorch has none in fp32 on the meta device."""
    raise NotImplementedError


@_grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _grouped_linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    rows, weight = ctx.saved_tensors
    return torch.empty_like(rows), torch.empty_like(weight)


_grouped_linear.register_autograd(
    _grouped_linear_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@contextmanager
def _meta_operators() -> Iterator[None]:
    """Stand in for what the meta device lacks: grouped matmuls, and row counts on the host."""

    def grouped_linear(self: object, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return _grouped_linear(rows, weight.to(rows.dtype))  # type: ignore[no-any-return]

    def ends(self: moe.RowCounts, on_host: bool) -> Tensor:
        return self.on_device.cumsum(0, dtype=torch.int32)

    kept = {SavedOp.experts: [*SAC_SAVE_LIST[SavedOp.experts], "live_memory.grouped_linear"]}
    with (
        mock.patch.object(moe.GroupedLinear, "__call__", grouped_linear),
        mock.patch.object(moe.RowCounts, "ends", ends),
        mock.patch.dict(SAC_SAVE_LIST, kept),
    ):
        yield


def configured(microbatch: int, length: int, overrides: list[str]) -> Config:
    """Compose a config of one process on a CPU."""
    batch = [f"train.microbatch_size={microbatch}", f"train.global_batch_size={microbatch}"]
    if not any(override.startswith("data.document_mask=") for override in overrides):
        batch.append("data.document_mask=false")
    config = compose([*batch, f"train.sequence_length={length}", *overrides])
    return replace(config, precision=config.precision.on("cpu"))


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    microbatch: int
    length: int
    overrides: str

    def config(self) -> Config:
        """Compose the case's config."""
        return configured(self.microbatch, self.length, self.overrides.split())


def cases() -> list[Case]:
    """Return every precision, recomputation and MTP at a small size, the presets, and shapes at the edges."""
    small = "model=16b model.dim=512 model.num_layers=4 model.vocab_size=8192"
    found = [
        Case(2, 512, f"{small} model.mtp_depths={depths} precision={precision} recompute={recompute}")
        for precision in ("fp32", "bf16", "fp8")
        for recompute in ("none", "selective", "full")
        for depths in (0, 1)
    ]
    for model in ("16b", "moonlight_16b"):
        for precision, recompute in (
            ("bf16", "none"),
            ("bf16", "selective"),
            ("bf16", "full"),
            ("fp8", "full"),
        ):
            found.append(Case(4, 4096, f"model={model} precision={precision} recompute={recompute}"))
    for model in ("236b model.num_layers=6", "671b model.num_layers=6", "kimi_k2 model.num_layers=3"):
        for precision, recompute in (("bf16", "none"), ("bf16", "full"), ("fp8", "selective")):
            found.append(Case(1, 4096, f"model={model} precision={precision} recompute={recompute}"))
    dense = "model=671b model.num_layers=3 model.num_dense_layers=3 model.mtp_depths=0 precision=bf16"
    return [
        *found,
        Case(1, 4096, f"{dense} recompute=none"),
        Case(1, 4096, f"{dense} recompute=full"),
        Case(8, 512, "model=debug precision=fp32"),
        Case(8, 512, "model=debug precision=bf16 data.document_mask=true"),
        Case(8, 512, "model=debug precision=bf16 recompute=full"),
        Case(8, 512, "model=debug precision=bf16 model.mtp_depths=3"),
        Case(16, 512, "model=debug precision=bf16 model.vocab_size=129280"),
        Case(16, 512, "model=debug precision=fp32 model.vocab_size=129280 recompute=full"),
        Case(32, 4096, "model=16b model.num_layers=2 model.vocab_size=512 precision=bf16 recompute=full"),
        Case(32, 4096, "model=16b model.num_layers=3 model.moe.num_experts=16 precision=bf16"),
    ]


def main() -> None:
    """Measure what the command line says, or every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--show", type=int, default=0)
    parser.add_argument("--microbatch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    if given.overrides:
        found = measure(configured(given.microbatch, given.length, given.overrides), given.show)
        print(f"live {found.live / GIB:.3f} GiB, planned {found.planned / GIB:.3f}, at operator {found.at}")
        for bytes_, count, origin in found.largest:
            print(f"  {bytes_ / GIB:8.3f} GiB {count:4d} x {origin}")
        return
    rows = []
    for case in cases():
        found = measure(case.config())
        ratio = round(found.ratio, 3)
        rows.append({**vars(case), "live": found.live, "planned": found.planned, "ratio": ratio})
        print(f"{ratio:.3f} {found.live / GIB:9.3f} GiB, {case.microbatch} x {case.length} {case.overrides}")
    stored = json.loads(RESULT.read_text())  # "ranks" are those of benchmarks/live_ranks.py
    stored |= {"torch": torch.__version__, "cases": rows}
    RESULT.write_text(json.dumps(stored, indent=2) + "\n")


if __name__ == "__main__":
    main()
