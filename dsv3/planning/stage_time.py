"""Seconds of one microbatch in one pipeline stage, by cause: kernels, recomputation, host, traffic."""

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from dsv3.config.hardware import HardwareConfig
from dsv3.config.model import ModelConfig
from dsv3.config.parallel import DispatchBackend, RecomputeMode, SavedOp, Schedule
from dsv3.planning.collective_time import CollectiveTimes
from dsv3.planning.group_bytes import GroupBytes, Sent
from dsv3.planning.kernel_time import KernelTimes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.operators import Kind, Operators, Passes, Work, recomputed
from dsv3.planning.pipeline_stages import StageLayers
from dsv3.planning.sharding import FP8_BLOCK, FP32, fp8_bytes
from dsv3.planning.step_shape import StepShape


class Cause(Enum):
    """A cause for which a step takes time."""

    matmuls = "matmuls"
    attention = "attention"
    other_operators = "other operators"
    recomputation = "recomputation"
    host = "host"
    dp = "exposed FSDP traffic"
    tp = "exposed tp traffic"
    cp = "exposed cp traffic"
    ep = "exposed all-to-all"
    pp = "exposed pp sends"
    bubble = "pipeline bubble"
    optimizer = "optimizer"


_CAUSES = {
    Kind.memory: Cause.other_operators,
    Kind.attention: Cause.attention,
    Kind.attention_backward: Cause.attention,
}

Seconds = dict[Cause, float]


class PassSeconds(NamedTuple):
    """Seconds by cause of the forward pass and of the two halves of the backward pass."""

    forward: Seconds
    inputs: Seconds
    weights: Seconds

    def plus(self, other: "PassSeconds", times: float = 1) -> "PassSeconds":
        """Return the sum with `times` another's."""
        return PassSeconds(*(add(a, b, times) for a, b in zip(self, other, strict=True)))


def add(a: Seconds, b: Seconds, times: float = 1) -> Seconds:
    """Return the sum of two tables of seconds, the second `times` over."""
    total = dict(a)
    for cause, seconds in b.items():
        total[cause] = total.get(cause, 0.0) + times * seconds
    return total


def none() -> PassSeconds:
    """Return no seconds at all."""
    return PassSeconds({}, {}, {})


class StageTimes:
    """The seconds of a microbatch in the layers and stages of a layout."""

    def __init__(
        self,
        config: ModelConfig,
        degrees: ParallelDims,
        shape: StepShape,
        hardware: HardwareConfig,
        kernels: KernelTimes,
    ) -> None:
        self.config, self.degrees, self.shape, self.hardware = config, degrees, shape, hardware
        self.kernels = kernels
        self.links = CollectiveTimes(hardware, degrees, shape)
        self.operators = Operators(config, degrees, shape)
        self.layers = {dense: self._layer(dense) for dense in self._kinds()}
        self._stages: dict[tuple[int, ...], PassSeconds] = {}

    def _kinds(self) -> set[bool]:
        kinds = {True} if self.config.num_dense_layers else set()
        return kinds | ({False} if self.config.num_moe_layers else set())

    def stage(self, stage: StageLayers) -> PassSeconds:
        """Return the seconds of one microbatch in a stage, without FSDP's traffic."""
        kinds = stage.block_kinds
        key = (kinds.count(True), len(kinds), stage.embeds, stage.predictions, stage.mtp_depths)
        if key not in self._stages:
            self._stages[key] = self._stage(stage, kinds)
        return self._stages[key]

    def _stage(self, stage: StageLayers, kinds: list[bool]) -> PassSeconds:
        total = none()
        for dense in set(kinds):
            total = total.plus(self.layers[dense], kinds.count(dense))
        ends = [(self.operators.embedding, stage.embeds), (self.operators.head, stage.predictions)]
        ends.append((self.operators.mtp_join, stage.mtp_depths))
        for part, times in ends:
            if times:
                total = total.plus(self._passes(part(), None), times)
        hidden = 2 * self.shape.tokens(self.degrees) * self.config.dim * self.shape.state.compute
        sent = hidden * (self.degrees.tp - 1) / self.degrees.tp
        seconds = self.links.ring(self.links.tp, sent / 2) * (1 - self.hardware.overlap.tp)
        if seconds:
            times = stage.embeds + stage.predictions
            total = total.plus(PassSeconds({Cause.tp: seconds}, {Cause.tp: seconds}, {}), times)
        return total

    def _layer(self, dense: bool) -> PassSeconds:
        """Return the seconds of a layer, with what activation checkpointing repeats."""
        passes = self.operators.layer(dense)
        repeated: list[Work] = []
        if self.shape.recompute is not RecomputeMode.none:
            keep = self.shape.keep if self.shape.recompute is RecomputeMode.selective else None
            repeated = list(recomputed(passes, keep))
        seconds = self._passes(passes, repeated)
        return self._with_traffic(seconds, dense)

    def _passes(self, passes: Passes, repeated: Iterable[Work] | None) -> PassSeconds:
        forward, inputs, weights = (
            self._works(part) for part in (passes.forward, passes.inputs, passes.weights)
        )
        if repeated:
            again = self._works(repeated)
            inputs = add(inputs, {Cause.recomputation: sum(again.values())})
        return PassSeconds(forward, inputs, weights)

    def _works(self, works: Iterable[Work]) -> Seconds:
        """Return the seconds of operators by cause; a host that launches more slowly counts the rest."""
        works = list(works)
        total: Seconds = {}
        for work in works:
            cause = _CAUSES.get(work.kind, Cause.matmuls)
            total[cause] = total.get(cause, 0.0) + self.kernels.of_work(work)
        late = self.kernels.launches(works) - sum(total.values())
        if late > 0:
            total[Cause.host] = late
        return total

    def _with_traffic(self, seconds: PassSeconds, dense: bool) -> PassSeconds:
        """Add a layer's exchanges on tp, cp and ep, each as far as it is exposed."""
        overlap, shape = self.hardware.overlap, self.shape
        repeats = 0 if shape.recompute is RecomputeMode.none else 1
        hides_ep = overlap.ep
        if shape.pipelining.schedule is Schedule.DualPipeV and self.degrees.pp > 1:
            hides_ep = max(hides_ep, overlap.ep_paired)
        axes = [(Cause.tp, self._tensor_seconds(dense), overlap.tp, repeats)]
        axes.append((Cause.cp, self._context_seconds(), overlap.cp, repeats))
        if not dense:
            kept = shape.recompute is RecomputeMode.selective and SavedOp.exchange in shape.keep
            axes.append((Cause.ep, self._dispatch_seconds(), hides_ep, 0 if kept else repeats))
            wait = self.kernels.sync_seconds * (self.degrees.ep > 1)
            seconds = seconds.plus(PassSeconds({Cause.host: wait}, {Cause.host: wait * repeats}, {}))
        forward = sum(seconds.forward.values())
        inputs = sum(seconds.inputs.values()) + sum(seconds.weights.values())
        for cause, exchanged, share, again in axes:
            if exchanged:
                there = exposed(exchanged, share, forward, overlap.cost)
                back = exposed(exchanged * (1 + again), share, inputs, overlap.cost)
                seconds = seconds.plus(PassSeconds({cause: there}, {cause: back}, {}))
        return seconds

    def _tensor_seconds(self, dense: bool) -> float:
        """Return the seconds of a layer's exchanges over tp in one pass."""
        a, config = self.config.attention, self.config
        latents = (a.q_lora_rank or config.dim) + a.kv_lora_rank + a.qk_rope_head_dim
        values = latents + config.dim + 2 * config.dim * dense
        sent = self.shape.tokens(self.degrees) * values * self.shape.state.compute
        return self.links.ring(
            self.links.tp, sent * (self.degrees.tp - 1) / self.degrees.tp, starts=2 + 2 * dense
        )

    def _context_seconds(self) -> float:
        """Return the seconds of a layer's all-gather over cp in one pass."""
        a, cp = self.config.attention, self.degrees.cp
        row = (a.kv_lora_rank + a.qk_rope_head_dim) * self.shape.state.compute
        return self.links.ring(self.links.cp, self.shape.tokens(self.degrees) * row * (cp - 1))

    def _dispatch_seconds(self) -> float:
        """Return the seconds of a layer's exchanges of rows to experts and back in one pass."""
        shape, moe, node = self.shape, self.config.moe, self.links.node
        tokens = shape.tokens(self.degrees) / self.degrees.tp
        row = self.config.dim * shape.state.compute
        in_fp8 = shape.fp8 is not None and shape.fp8.dispatch
        outward = fp8_bytes((1, self.config.dim), (1, FP8_BLOCK)) if in_fp8 else row
        levels = shape.dispatch_levels(moe, self.degrees)
        # Rows there and back; all_to_all sends the counts and the weights by themselves.
        starts = 2 if shape.dispatch is DispatchBackend.deepep else 4
        total = 0.0
        for number, level in enumerate(levels):
            sent = tokens * level.sent * (outward + row + 2 * FP32 * level.experts)
            crosses = len(levels) == 2 and number == 0
            if len(levels) == 1 and level.ranks > node:
                # One exchange over several nodes: the rows for this node take other links at the same time.
                sent *= (level.ranks - node) / (level.ranks - 1)
                crosses = True
            total += self.links.dispatch(level.ranks, sent, starts, crosses)
        return total

    def scoring(self, stage: StageLayers) -> Seconds:
        """Return the seconds of a pass through a stage without gradients, as in an evaluation or a sample."""
        total: Seconds = {}
        for dense in stage.dense:
            total = add(total, self.layers[dense].forward)
        if stage.is_first:
            total = add(total, self._works(self.operators.embedding().forward))
        if stage.is_last:
            total = add(total, self._works(self.operators.scores()))
        return total

    def send_seconds(self) -> float:
        """Return the seconds of a microbatch's hidden states from one stage to another rank's."""
        tokens = self.shape.tokens(self.degrees) // self.degrees.tp
        return self.links.send(tokens * self.config.dim * self.shape.state.compute)

    def gather_seconds(self, group: GroupBytes) -> float:
        """Return the seconds of FSDP's all-gather of a group of weights."""
        return self._rings(group.all_gather)

    def reduce_seconds(self, group: GroupBytes) -> float:
        """Return the seconds of the reduce-scatter of a group's gradients, and of their sum over replicas."""
        n, shards = self.degrees.dp_replicate, group.gradients // self.shape.state.gradient * FP32
        summed = self.links.ring(self.links.replicas, 2 * shards * (n - 1) / n, starts=bool(shards))
        return self._rings(group.reduce_scatter) + summed

    def _rings(self, sent: Sent) -> float:
        return sum(self.links.ring(self.links.shards(ranks), size) for ranks, size in sent)


def exposed(seconds: float, share: float, computing: float, cost: float = 0.0) -> float:
    """Return the seconds that traffic adds to `computing`, which hides at most `share` and what it lasts for.

    Hidden traffic slows computing by `cost` of its own seconds.
    """
    hidden = min(share * seconds, computing)
    return seconds - hidden * (1 - cost)
