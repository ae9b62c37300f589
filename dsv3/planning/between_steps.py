"""Costs between optimizer steps, as closed forms: evaluations and samples, in seconds, bytes and all-gathers.

Both are forward passes. An evaluation passes whole microbatches; a sample passes one token per row and pass,
from the KV cache (parallel/parallel_model.py). Under FSDP each pass all-gathers every layer, however few its
tokens are: at 671b a sample of 120 tokens gathers 120 times 1.3 TB.

Seconds come from the same rates as those of a step (stage_time.py): the operators of a forward pass, the
reading of weights, the launches of kernels, and the collectives. They decide if a run samples by default, and
show what is out of proportion.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from dsv3.config.hardware import CPU, HardwareConfig, NetworkConfig
from dsv3.config.model import ModelConfig
from dsv3.config.task import SamplingConfig
from dsv3.config.training import EVALUATE_TOKENS, TrainConfig
from dsv3.planning.group_bytes import GroupBytes, stage_bytes
from dsv3.planning.kernel_time import KernelTimes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.pipeline_stages import StageLayers
from dsv3.planning.stage_time import StageTimes, exposed
from dsv3.planning.step_shape import StepShape
from dsv3.planning.step_time import step_time
from dsv3.planning.traffic import forward_traffic, once_gathered_traffic

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
    network=NetworkConfig(intra_seconds=4e-4, inter_seconds=4e-4),
)
"""The numbers of one rank on a CPU that has not been measured; its collectives are gloo's."""


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
        found = step_time(self.model, self.degrees, replace(self.shape, cpu_offload=False), self._known)
        assert found is not None
        return found.seconds

    def _cost(self, tokens: int, passes: int, shape: StepShape, every: int, decodes: bool) -> UpkeepCost:
        """Return the cost of `passes` forward passes of `shape`, one after another where it `decodes`."""
        seconds: list[float] = []
        sent: list[int] = []
        first: list[float] = []
        times = self._times(shape)
        for stages in self._stages():
            each = [forward_traffic(self.model, self.degrees, shape, stage, decodes) for stage in stages]
            kept = sum(once_gathered_traffic(self.model, self.degrees, shape, stage) for stage in stages)
            if not shape.reshard_after_forward:
                kept += sum(traffic.dp for traffic in each)
                each = [replace(traffic, dp=0) for traffic in each]
            seconds.append(sum(self._pass_seconds(times, stage) for stage in stages))
            first.append(sum(self._first_seconds(times, stage) for stage in stages))
            sent.append(kept + passes * sum(traffic.total for traffic in each))
        # Passes that do not wait for one another fill the pipeline.
        through = passes * sum(seconds) if decodes else sum(seconds) + (passes - 1) * max(seconds)
        through += max(first)
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

    def _times(self, shape: StepShape) -> StageTimes:
        """Return the seconds of forward passes of `shape`."""
        kernels = KernelTimes.of(self._known, shape)
        assert kernels is not None
        return StageTimes(self.model, self.degrees, shape, self._known, kernels)

    def _pass_seconds(self, times: StageTimes, stage: StageLayers) -> float:
        """Return the seconds of one pass through a stage, which leaves its MTP depths out."""
        computing = sum(times.scoring(replace(stage, mtp_depths=0)).values())
        if times.shape.reshard_after_forward:
            blocks = self._groups(times, stage)[1 : 1 + len(stage.dense)]
            gathers = sum(map(times.gather_seconds, blocks))
            computing += exposed(gathers, self._known.overlap.dp, computing)
        return computing + (0 if stage.is_last or self.degrees.pp == 1 else times.send_seconds())

    def _first_seconds(self, times: StageTimes, stage: StageLayers) -> float:
        """Return the seconds to gather what FSDP keeps between passes."""
        root, *blocks = self._groups(times, stage)
        layers = len(stage.dense)
        kept = blocks[layers:][:1] if times.shape.reshard_after_forward else blocks
        return sum(map(times.gather_seconds, [root, *kept]))

    def _groups(self, times: StageTimes, stage: StageLayers) -> list[GroupBytes]:
        shape = times.shape
        return stage_bytes(self.model, stage, self.degrees, shape.state, shape.gathers_in_fp8)

    @cached_property
    def _known(self) -> HardwareConfig:
        """Return the hardware, with the numbers of hardware of its kind where it does not tell its own."""
        assumed = ASSUMED_CPU if self.hardware.name == CPU else ASSUMED_GPU
        missing = {key: value for key, value in vars(assumed).items() if getattr(self.hardware, key) is None}
        known = replace(self.hardware, **missing)
        if known.peak_flops_fp8 is None:
            known = replace(known, peak_flops_fp8=known.peak_flops_bf16)
        if known.peak_flops_tf32 is None:
            known = replace(known, peak_flops_tf32=known.peak_flops_fp32)
        unmeasured = self.hardware.peak_flops_fp32 is None
        return replace(known, network=ASSUMED_CPU.network) if known.name == CPU and unmeasured else known


def cache_bytes(model: ModelConfig, layers: int, tokens: int, compute: int) -> int:
    """Return the bytes of the KV cache of `layers` for so many `tokens`, over all rows."""
    width = model.attention.kv_lora_rank + model.attention.qk_rope_head_dim
    return layers * tokens * width * compute
