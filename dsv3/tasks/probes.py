"""Time the operators of a training step on this rank's device, while all ranks of the node do so.

The sizes follow from one width, that of the largest matmul. A figure is the median over as many repetitions
as fit into its share of the time, of the slowest rank: the ranks of a CPU share cores and memory bandwidth.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dsv3.config.model import AttentionKernel, ModelConfig
from dsv3.config.optimizer import AdamWConfig
from dsv3.config.parallel import RecomputeConfig
from dsv3.config.precision import ComputeType
from dsv3.config.root import Config
from dsv3.data.batch import Batch
from dsv3.distributed.heartbeat import HEARTBEAT
from dsv3.distributed.process_group import RankContext
from dsv3.model.attention_kernels import attention_kernel
from dsv3.model.moe import grouped_linear
from dsv3.parallel.parallelize import build_model
from dsv3.planning.calibration_fit import CollectiveTime, Measurements, OperatorTime, PassTime
from dsv3.planning.operators import Kind, attention_work
from dsv3.planning.step_shape import StateBytes, StepShape
from dsv3.training.loss import LossDenominators
from dsv3.training.optimizer import build_optimizer, gradient_norm, scale_gradients
from dsv3.training.schedule import StepHyperparameters
from dsv3.training.step import LocalForwardBackward

HEADS = 16
KEYS, VALUES = 192, 128
"""Widths of MLA's heads, of queries and keys and of values."""

EXPERTS, TOP_K = 8, 2

PASS_SHARE = 6
"""A pass through a model gets as much time as so many operators."""


class Stopwatch:
    """Times functions on all ranks at once."""

    def __init__(self, ranks: RankContext, seconds: float) -> None:
        self.ranks, self.seconds = ranks, seconds
        """Of one operator's repetitions."""

    def time(self, function: Callable[[], object], share: float = 1.0) -> float:
        """Return the seconds of `function`: the median of this rank's repetitions, of the slowest rank."""
        function()
        self._wait()
        self.ranks.meet()
        taken: list[float] = []
        begin = time.perf_counter()
        while len(taken) < 2 or time.perf_counter() - begin < share * self.seconds:
            started = time.perf_counter()
            function()
            self._wait()
            taken.append(time.perf_counter() - started)
        HEARTBEAT.beat()
        slowest = self.ranks.max(torch.tensor(median(taken), dtype=torch.float64, device=self.ranks.device))
        return float(slowest.item())

    def time_together(self, function: Callable[[], object], repetitions: int) -> float:
        """Return the seconds of a collective, which all ranks repeat equally often."""
        function()
        self._wait()
        self.ranks.meet()
        started = time.perf_counter()
        for _ in range(repetitions):
            function()
        self._wait()
        taken = (time.perf_counter() - started) / repetitions
        HEARTBEAT.beat()
        slowest = self.ranks.max(torch.tensor(taken, dtype=torch.float64, device=self.ranks.device))
        return float(slowest.item())

    def _wait(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()


def shares_of_time() -> int:
    """Return the times of an operator that the probes of one device take together."""
    of_a_dtype = 3 * len(MATMULS) + 2 * 3 + 2 * 2 + 2 * PASS_SHARE
    return 2 * of_a_dtype + 2 + 2


def measure(config: Config, ranks: RankContext, size: int, seconds: float) -> Measurements:
    """Time everything with matmuls of up to `size` values wide, in about `seconds`."""
    watch = Stopwatch(ranks, seconds / shares_of_time())
    found = Measurements()
    began, waited = time.perf_counter(), waited_seconds()
    found.copies += copies(watch, size)
    for dtype in (torch.float32, torch.bfloat16):
        found.operators += list(matmuls(watch, size, dtype))
        found.operators += list(grouped(watch, size, dtype))
        found.operators += list(attention(watch, size, dtype))
        found.passes += list(passes(config, watch, size, dtype))
    found.updates.append(update(config, watch, size))
    if ranks.device.type == "cuda":
        found.launch_seconds, found.sync_seconds = host_seconds(watch)
    if ranks.world > 1:
        found.collectives += list(collectives(watch, size))
    share = (waited_seconds() - waited) / (time.perf_counter() - began)
    found.waiting = float(ranks.max(torch.tensor(share, dtype=torch.float64, device=ranks.device)).item())
    return found


def waited_seconds() -> float:
    """Return how long this process has been ready to run without a core; 0 where no kernel tells."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def copies(watch: Stopwatch, size: int) -> list[tuple[float, float]]:
    """Time copies of a tensor that caches hold and of one that they do not."""
    found = []
    for values in (size * size // 4, 16 * size * size):
        source = torch.ones(values, device=watch.ranks.device)
        target = torch.empty_like(source)
        found.append((2.0 * source.nbytes, watch.time(lambda: target.copy_(source))))  # noqa: B023
    return found


MATMULS = ((1, 1, 1), (1, 2, 0.25), (0.5, 0.25, 0.5), (1, 0.5, 0.125))
"""Rows, columns and depth of matmuls as shares of the width: square, and those of a layer's projections."""


def matmuls(watch: Stopwatch, size: int, dtype: torch.dtype) -> Iterator[OperatorTime]:
    """Time a linear layer's forward pass and both of its gradients."""
    device, c = watch.ranks.device, dtype.itemsize
    for shares in MATMULS:
        rows, columns, depth = (int(share * size) for share in shares)
        x, weight, gradient = (
            torch.randn(*shape, device=device).to(dtype)
            for shape in ((rows, depth), (columns, depth), (rows, columns))
        )
        flops, bytes_ = 2.0 * rows * columns * depth, c * (x.numel() + weight.numel() + gradient.numel())
        for name, function in (
            ("forward", lambda: F.linear(x, weight)),  # noqa: B023
            ("input gradient", lambda: gradient @ weight),  # noqa: B023
            ("weight gradient", lambda: gradient.t() @ x),  # noqa: B023
        ):
            told = f"matmul {rows} x {columns} x {depth}, {name}"
            yield OperatorTime(told, Kind.matmul, c, flops, bytes_, watch.time(function))


def grouped(watch: Stopwatch, size: int, dtype: torch.dtype) -> Iterator[OperatorTime]:
    """Time the experts' grouped matmul with equal loads, forward, and its two gradients together."""
    device, c = watch.ranks.device, dtype.itemsize
    rows = 2 * size
    for columns, depth in ((size // 2, size // 4), (size // 4, size // 4)):
        x = torch.randn(rows, depth, device=device).to(dtype).requires_grad_()
        weight = torch.randn(EXPERTS, columns, depth, device=device).to(dtype).requires_grad_()
        step = rows // EXPERTS
        ends = torch.arange(step, rows + 1, step, dtype=torch.int32, device=device)
        flops = 2.0 * rows * columns * depth
        bytes_ = float(c * (x.numel() + weight.numel() + rows * columns))
        told = f"{EXPERTS} experts' matmul {rows} x {columns} x {depth}"
        with torch.no_grad():
            seconds = watch.time(lambda: grouped_linear(x, weight, ends))  # noqa: B023
        yield OperatorTime(f"{told}, forward", Kind.grouped, c, flops, bytes_, seconds)
        out = grouped_linear(x, weight, ends)
        gradient = torch.randn_like(out)
        seconds = watch.time(lambda: torch.autograd.grad(out, (x, weight), gradient, retain_graph=True), 2)  # noqa: B023
        yield OperatorTime(f"{told}, gradients", Kind.grouped, c, 2 * flops, 2 * bytes_, seconds, 2)


def attention(watch: Stopwatch, size: int, dtype: torch.dtype) -> Iterator[OperatorTime]:
    """Time causal attention of MLA's widths, forward and backward."""
    device, c = watch.ranks.device, dtype.itemsize
    on_gpu = device.type != "cpu"
    attend = attention_kernel(AttentionKernel.auto)
    for length in (size // 2, size):
        rows = max(1, size // 2 // length)
        q, k = (
            torch.randn(rows, length, HEADS, KEYS, device=device).to(dtype).requires_grad_() for _ in range(2)
        )
        v = torch.randn(rows, length, HEADS, VALUES, device=device).to(dtype).requires_grad_()
        work = attention_work(HEADS, rows, length, (KEYS, VALUES), c, on_gpu)
        told = f"attention, {rows} x {length} tokens, {HEADS} heads"
        with torch.no_grad():
            seconds = watch.time(lambda: attend(q, k, v, KEYS**-0.5, None))  # noqa: B023
        yield OperatorTime.of(f"{told}, forward", c, work[0], seconds)
        out = attend(q, k, v, KEYS**-0.5, None)
        gradient = torch.randn_like(out)
        seconds = watch.time(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))  # noqa: B023
        yield OperatorTime.of(f"{told}, backward", c, work[1], seconds)


def probe_model(model: ModelConfig, dim: int) -> ModelConfig:
    """Return a small model of both kinds of layers, MLA's own widths and eight experts."""
    attention = replace(
        model.attention, heads=max(1, HEADS * dim // 256), q_lora_rank=None, kv_lora_rank=2 * dim,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    )  # fmt: skip
    moe = replace(
        model.moe, num_experts=EXPERTS, top_k=TOP_K, num_groups=1, top_k_groups=1, hidden_dim=dim,
        num_shared_experts=1,
    )  # fmt: skip
    return replace(
        model, vocab_size=8 * dim, dim=dim, num_layers=3, num_dense_layers=1, dense_hidden_dim=4 * dim,
        mtp_depths=0, attention=attention, moe=moe,
    )  # fmt: skip


def passes(config: Config, watch: Stopwatch, size: int, dtype: torch.dtype) -> Iterator[PassTime]:
    """Time forward and backward passes of whole models of two sizes."""
    device, compute = watch.ranks.device, ComputeType.bf16 if dtype == torch.bfloat16 else ComputeType.fp32
    for dim, length in ((size // 8, size // 4), (size // 4, size // 2)):
        model_config = probe_model(config.model, dim)
        precision = replace(config.precision, compute=compute, fp8=None)
        own = replace(config, model=model_config, precision=precision, recompute=RecomputeConfig())
        model = build_model(own, None, device).train()
        run = LocalForwardBackward(model, document_mask=False)
        shape = StepShape(
            1, length, state=StateBytes(compute=dtype.itemsize), fused_kernels=device.type != "cpu"
        )
        tokens = torch.randint(0, model_config.vocab_size, (1, length), device=device)
        batch = Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens))
        counts = LossDenominators(torch.tensor(float(length), device=device), 1)
        weights = StepHyperparameters(lr=0.0, mtp_weight=0.0, balance_weight=1e-4, bias_speed=0.0)

        def both() -> None:
            run.train([batch], counts, weights)  # noqa: B023
            model.zero_grad(set_to_none=True)  # noqa: B023

        told = f"model of {dim} x {model_config.num_layers} layers, {length} tokens, forward and backward"
        yield PassTime(told, model_config, shape, watch.time(both, PASS_SHARE))


def update(config: Config, watch: Stopwatch, size: int) -> tuple[float, float]:
    """Time clipping and AdamW's step; the bytes are those that the time model counts."""
    device = watch.ranks.device
    model_config = probe_model(config.model, size // 4)
    own = replace(config, model=model_config, recompute=RecomputeConfig())
    model = build_model(own, None, device)
    optimizer = build_optimizer(AdamWConfig(), [model])
    alone = RankContext(0, 0, 1, device)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)

    def step() -> None:
        scale_gradients([model], gradient_norm([model], alone), 1.0)
        optimizer.step()

    elements = sum(parameter.numel() for parameter in model.parameters())
    state = StateBytes()
    moved = elements * (4 * 4 + 2 * state.parameter + 2 * state.optimizer)
    return float(moved), watch.time(step, 2)


def host_seconds(watch: Stopwatch, kernels: int = 1000) -> tuple[float, float]:
    """Return the seconds of the host per kernel launch, and those to read a value from the device."""
    value = torch.zeros((), device=watch.ranks.device)

    def launch() -> None:
        for _ in range(kernels):
            value.add_(1.0)

    return watch.time(launch) / kernels, watch.time(lambda: value.item())


def collectives(watch: Stopwatch, size: int) -> Iterator[CollectiveTime]:
    """Time the collectives by the size of their group: within a node, and over all ranks of several."""
    ranks, here = watch.ranks, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    sizes = [n for n in (2, 4, 8, 16, 32, 64) if n <= here and here % n == 0]
    groups = [(n, False) for n in sizes] or [(here, False)] * (here > 1)
    if ranks.world > here:
        groups.append((ranks.world, True))
    for n, crosses in groups:
        members = [list(range(first, first + n)) for first in range(0, ranks.world, n)]
        own = [dist.new_group(part) for part in members][ranks.rank // n]
        for values in (256, size * size // 16, size * size):
            yield from _collectives_of(watch, own, n, max(n, values // n * n), crosses)


def _collectives_of(
    watch: Stopwatch, group: dist.ProcessGroup, n: int, values: int, crosses: bool
) -> Iterator[CollectiveTime]:
    device, rank = watch.ranks.device, watch.ranks.rank % n
    whole, part, other = (torch.ones(count, device=device) for count in (values, values // n, values))
    peer = dist.get_global_rank(group, rank ^ 1) if rank ^ 1 < n else None

    def exchange() -> None:
        if peer is None:
            return
        first, second = (dist.send, dist.recv) if rank % 2 == 0 else (dist.recv, dist.send)
        first(part, peer, group=group)
        second(part, peer, group=group)

    sent = part.nbytes * (n - 1.0)
    repetitions = 20 if values <= 1024 else 4
    for kind, bytes_, function, times in (
        ("ring", sent, lambda: dist.all_gather_into_tensor(whole, part, group=group), 1),
        ("ring", sent, lambda: dist.reduce_scatter_tensor(part, whole, group=group), 1),
        ("all_to_all", sent, lambda: dist.all_to_all_single(other, whole, group=group), 1),
        ("send", float(part.nbytes), exchange, 2),
    ):
        seconds = watch.time_together(function, repetitions) / times
        yield CollectiveTime(kind, n, bytes_, seconds, crosses)
