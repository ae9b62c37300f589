"""Costs between optimizer steps, as closed forms: evaluations and samples, in seconds, bytes and all-gathers.

Both are forward passes. An evaluation passes whole microbatches; a sample passes one token per row and pass,
from the KV cache (parallel/parallel_model.py). Under FSDP each pass all-gathers every layer, however few its
tokens are: at 671b a sample of 120 tokens gathers 120 times 1.3 TB.

Seconds are estimates, within a factor of about three: they decide if a run samples by default, and show what
is out of proportion. A pass takes the longest of its matmuls, the reading of its weights and their
all-gathers, and then its other collectives and the latency of its kernels, which do not overlap.
"""

import math
from dataclasses import dataclass, replace

from dsv3.config.hardware import CPU, HardwareConfig
from dsv3.config.model import ModelConfig
from dsv3.config.task import SamplingConfig
from dsv3.config.training import EVALUATE_TOKENS, TrainConfig
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import (
    Component,
    Weight,
    active_matmul_parameters,
    training_flops_per_token,
)
from dsv3.planning.pipeline_schedules import bubble
from dsv3.planning.pipeline_stages import StageLayers, stage_weights
from dsv3.planning.sharding import gathered_bytes
from dsv3.planning.step_shape import StepShape
from dsv3.planning.traffic import TrafficBytes, forward_traffic, once_gathered_traffic, rank_traffic

EFFICIENCY = 0.4
"""Share of the peak that matmuls of training reach: the published MFU of this family is 0.28 to 0.39."""

LAYER_SECONDS = 5e-4
"""Time to launch the kernels of one layer's forward pass, about 50 of 10 microseconds."""

COLLECTIVE_SECONDS = 2e-5
"""Latency of a collective over two GPUs; it grows with the logarithm of the ranks."""

ASSUMED_GPU = HardwareConfig(
    name="an A100",
    memory_bandwidth=2e12,
    peak_flops_bf16=312e12,
    peak_flops_fp32=19.5e12,
    intra_node_bandwidth=300e9,
    inter_node_bandwidth=25e9,
)
"""The numbers of a GPU that does not tell its own."""

ASSUMED_CPU = HardwareConfig(
    name="a CPU of two cores",
    memory_bandwidth=1e10,
    peak_flops_bf16=2e11,
    peak_flops_fp32=2e11,
    intra_node_bandwidth=1e9,
    inter_node_bandwidth=1e9,
)
"""The numbers of one rank on a CPU. Its collectives (gloo) are slower by CPU_LATENCY."""

CPU_LATENCY = 20


@dataclass(frozen=True)
class Upkeep:
    """The settings of what a run does between its steps; see config/training.py."""

    evaluate_tokens: int | None = EVALUATE_TOKENS
    evaluate_every: int = TrainConfig.evaluate_every
    generate_every: int | None = None
    generate_seconds: float = TrainConfig.generate_seconds
    generate_reason: str = ""
    """Why generate_every is what it is, where it was filled in."""

    def never(self) -> dict[str, str]:
        """Return why a run has no evaluations or no samples, by `evaluation` and `sample`."""
        found = {}
        if self.evaluate_every == 0:
            found["evaluation"] = "train.evaluate_every=0"
        if self.generate_every == 0:
            found["sample"] = self.generate_reason or "train.generate_every=0"
        return found


@dataclass(frozen=True)
class UpkeepCost:
    """One evaluation or sample, on the rank that sends most."""

    tokens: int
    """Tokens that are scored over all ranks, or sampled."""
    passes: int
    """Forward passes of each rank."""
    gathers: int
    """All-gathers of every layer that a rank computes; 0 without FSDP."""
    sent: int
    """Bytes that the rank sends."""
    seconds: float
    share: float | None
    """Seconds over those of the training between two; None where there is none."""
    cache: int = 0
    """Bytes of the KV cache."""

    def to_json(self) -> dict[str, float | int | None]:
        """Return the numbers by name."""
        named = {"sent": "sent_bytes", "share": "share_of_training", "cache": "cache_bytes"}
        return {named.get(key, key): value for key, value in vars(self).items()}


@dataclass(frozen=True)
class BetweenSteps:
    """The costs of a plan's evaluations and samples."""

    model: ModelConfig
    degrees: ParallelDims
    shape: StepShape
    hardware: HardwareConfig
    upkeep: Upkeep

    def evaluation(self) -> UpkeepCost | None:
        """Return the cost of an evaluation of train.evaluate_tokens; None where the data decides on it."""
        tokens, shape = self.upkeep.evaluate_tokens, self.shape
        if tokens is None:
            return None
        rows = max(1, tokens // shape.sequence_length)
        passes = -(-rows // (shape.microbatch_size * self.degrees.data_parallel))
        every = self.upkeep.evaluate_every
        return self._cost(rows * shape.sequence_length, passes, shape, every, decodes=False)

    def sample(self) -> UpkeepCost:
        """Return the cost of a sample as training shows it.

        Its share counts the seconds up to train.generate_seconds, where training cuts it off.
        """
        # The ranks of a tp group share a pass's tokens, and padding fills them up.
        one = replace(self.shape, microbatch_size=1, sequence_length=self.degrees.cp * self.degrees.tp)
        tokens, every = SamplingConfig.max_tokens, self.upkeep.generate_every or 0
        cost = self._cost(tokens, tokens, one, every, decodes=True)
        if cost.share is not None:
            cost = replace(cost, share=cost.share * min(1.0, self.upkeep.generate_seconds / cost.seconds))
        return replace(cost, cache=self.cache(tokens))

    def cache(self, tokens: int) -> int:
        """Return the bytes of the KV cache of so many tokens, on the rank that holds most layers."""
        layers = max(sum(len(stage.dense) for stage in held) for held in self._stages())
        return cache_bytes(self.model, layers, tokens, self.shape.state.compute)

    def step_seconds(self) -> float:
        """Return the seconds of a training step, by the same rates."""
        shape, degrees, p = self.shape, self.degrees, self.shape.pipelining
        tokens = shape.microbatch_size * shape.sequence_length * shape.microbatches * degrees.data_parallel
        flops = training_flops_per_token(self.model, shape.sequence_length) * tokens / degrees.world_size
        idle = bubble(p.schedule, degrees.pp, p.per_rank, shape.microbatches)
        traffic = rank_traffic(self.model, degrees, shape)
        latencies = [sum(self._latency(stage) for stage in stages) for stages in self._stages()]
        latency = 3 * shape.microbatches * max(latencies)
        computing = max(flops / self._flops_per_second() / (1 - idle), latency)
        return max(computing, self._sending(traffic, only_dp=True)) + self._sending(traffic)

    def _cost(self, tokens: int, passes: int, shape: StepShape, every: int, decodes: bool) -> UpkeepCost:
        """Return the cost of `passes` forward passes of `shape`, one after another where it `decodes`."""
        seconds: list[float] = []
        sent: list[int] = []
        once: list[int] = []
        for stages in self._stages():
            each = [forward_traffic(self.model, self.degrees, shape, stage, decodes) for stage in stages]
            kept = sum(once_gathered_traffic(self.model, self.degrees, shape, stage) for stage in stages)
            if not shape.reshard_after_forward:
                kept += sum(traffic.dp for traffic in each)
                each = [replace(traffic, dp=0) for traffic in each]
            pairs = zip(stages, each, strict=True)
            seconds.append(sum(self._stage_seconds(stage, shape, traffic) for stage, traffic in pairs))
            sent.append(kept + passes * sum(traffic.total for traffic in each))
            once.append(kept)
        # Passes that do not wait for one another fill the pipeline.
        through = passes * sum(seconds) if decodes else sum(seconds) + (passes - 1) * max(seconds)
        through += self._sending(TrafficBytes(dp=max(once)), only_dp=True)
        gathers = passes if shape.reshard_after_forward else 1
        return UpkeepCost(
            tokens=tokens,
            passes=passes,
            gathers=gathers if self.degrees.replicated_fsdp_size > 1 else 0,
            sent=max(sent),
            seconds=through,
            share=through / (every * self.step_seconds()) if every else None,
        )

    def _stages(self) -> list[list[StageLayers]]:
        """Return the stages of each pipeline rank."""
        return self.shape.stages_of_ranks(self.model, self.degrees)

    def _stage_seconds(self, stage: StageLayers, shape: StepShape, traffic: TrafficBytes) -> float:
        """Return the seconds of one pass through a stage, which leaves its MTP depths out."""
        stage = replace(stage, mtp_depths=0)
        weights = [weight for group in stage_weights(self.model, stage) for weight in group]
        tokens = shape.microbatch_size * shape.sequence_length
        flops = 2 * active_matmul_parameters(weights, self.model) * tokens
        flops += len(stage.dense) * self._attention_flops(shape)
        ranks = self.degrees.cp * self.degrees.tp
        read = sum(self._read(weight, tokens) for weight in weights)
        return (
            max(
                flops / ranks / self._flops_per_second(),
                read / self._rate("memory_bandwidth"),
                self._sending(traffic, only_dp=True),
            )
            + self._sending(traffic)
            + self._latency(stage)
        )

    def _attention_flops(self, shape: StepShape) -> int:
        """Return the FLOPs of one layer's attention over causal rows; one token's few are left out."""
        a, length = self.model.attention, shape.sequence_length
        return shape.microbatch_size * a.heads * (a.qk_head_dim + a.v_head_dim) * length**2

    def _read(self, weight: Weight, tokens: int) -> float:
        """Return the bytes of a weight that a pass reads: of routed experts those that tokens chose."""
        size = gathered_bytes(weight, self.degrees, self.shape.state.compute)
        if weight.component is Component.embedding:
            return 0.0
        if weight.component is not Component.experts:
            return size
        moe = self.model.moe
        return size * min(1.0, tokens * moe.top_k / moe.num_experts)

    def _latency(self, stage: StageLayers) -> float:
        """Return the seconds that launches and the starts of collectives take in one pass through a stage."""
        d = self.degrees
        collectives = 3 * _doublings(d.replicated_fsdp_size) + 3 * _doublings(d.tp)
        collectives += _doublings(d.cp) + 4 * _doublings(d.ep)
        slower = CPU_LATENCY if self.hardware.name == CPU else 1
        return len(stage.dense) * (LAYER_SECONDS + COLLECTIVE_SECONDS * slower * collectives)

    def _sending(self, traffic: TrafficBytes, only_dp: bool = False) -> float:
        """Return the seconds that the bytes of all axes but `dp` take on their links, or those of `dp`."""
        d, node = self.degrees, self.shape.ranks_per_node or self.degrees.world_size
        spans = {"tp": d.tp, "cp": d.cp * d.tp, "ep": d.ep, "dp": d.replicated_fsdp_size}
        sizes: dict[str, int] = vars(traffic)
        links = {axis: "intra" if spans.get(axis, d.world_size) <= node else "inter" for axis in sizes}
        return sum(
            size / self._rate(f"{links[axis]}_node_bandwidth")
            for axis, size in sizes.items()
            if (axis == "dp") is only_dp
        )

    def _flops_per_second(self) -> float:
        """Return the FLOP/s that matmuls reach."""
        fp8 = self.hardware.peak_flops_fp8 if self.shape.fp8 is not None else None
        peak = fp8 or self._rate("peak_flops_bf16" if self.shape.state.compute == 2 else "peak_flops_fp32")
        return EFFICIENCY * peak

    def _rate(self, name: str) -> float:
        """Return a rate of the hardware, or that of hardware of its kind where it is not known."""
        assumed = ASSUMED_CPU if self.hardware.name == CPU else ASSUMED_GPU
        return float(getattr(self.hardware, name) or getattr(assumed, name))


def cache_bytes(model: ModelConfig, layers: int, tokens: int, compute: int) -> int:
    """Return the bytes of the KV cache of `layers` for so many `tokens`, over all rows."""
    width = model.attention.kv_lora_rank + model.attention.qk_rope_head_dim
    return layers * tokens * width * compute


def _doublings(ranks: int) -> float:
    """Return how often two ranks must double to make `ranks`, and once more; 0 for one rank."""
    return 1 + math.log2(ranks) if ranks > 1 else 0.0
