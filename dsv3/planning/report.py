"""The plan of a run: what a layout costs before anything is started."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsv3.metrics.flops import FlopsConvention, training_flops_per_token
from dsv3.model.config import ModelConfig
from dsv3.parallel.config import ExchangeBackend, Kept, ParallelConfig, PipelineConfig, Recomputed
from dsv3.parallel.degrees import Degrees
from dsv3.parallel.stages import reshard_after_forward, stages_per_rank
from dsv3.planning import parameters
from dsv3.planning.fp8 import fp8_rows
from dsv3.planning.hardware import HardwareConfig
from dsv3.planning.memory import MemoryBytes, rank_memory
from dsv3.planning.partition import Pipelining
from dsv3.planning.shape import FP8Shape, StateBytes, StepShape
from dsv3.planning.time import bubble
from dsv3.planning.traffic import TrafficBytes, rank_traffic
from dsv3.precision.config import PrecisionConfig
from dsv3.runtime.errors import UserError

if TYPE_CHECKING:
    from dsv3.config import Config  # it imports hydra, which a plan does without

GIB = 2**30
COMPUTE_BYTES = {"fp32": 4, "bf16": 2}
MOMENTS_BYTES = {"fp32": 8, "bf16": 4}
# More shards than any cluster has ranks: what does not fit there fits nowhere.
MOST_SHARDS = 2**16


@dataclass(frozen=True)
class Plan:
    """Layout, sizes and costs of a run; `hardware` has been detected.

    `memory` is the fullest rank's, `traffic` that of the rank that sends most.
    """

    model: ModelConfig
    degrees: Degrees
    hardware: HardwareConfig
    shape: StepShape
    memory: MemoryBytes
    traffic: TrafficBytes

    @property
    def world_size(self) -> int:
        """Ranks of the layout."""
        return self.degrees.world_size

    @property
    def fits(self) -> bool | None:
        """Whether the fullest rank fits its device; None where the device's memory is unknown."""
        limit = self.hardware.memory_bytes
        return None if limit is None else self.memory.total <= limit

    @property
    def bubble(self) -> float:
        """The share of a step in which a pipeline rank waits for others."""
        p = self.shape.pipelining
        return bubble(p.schedule, self.degrees.pp, p.per_rank, self.shape.microbatches)

    def flops_per_token(self, convention: FlopsConvention) -> int:
        """Training FLOPs a token with the MTP depths."""
        return training_flops_per_token(self.model, self.shape.sequence_length, convention)

    def to_json(self) -> dict[str, object]:
        """The contract of `task=plan task.format=json`; what is not computed yet is None."""
        return {
            "degrees": self.degrees.to_json(),
            "world_size": self.world_size,
            "parameters": parameters.total(self.model),
            "parameters_active": parameters.active(self.model),
            "memory_bytes": self.memory.to_json(),
            "device_memory_bytes": self.hardware.memory_bytes,
            "fits": self.fits,
            "traffic_bytes": self.traffic.to_json(),
            "bubble": self.bubble,
            "tokens_per_second_per_gpu": None,
            "mfu": None,
        }

    def to_text(self) -> str:
        """A table for people, without a line feed at its end."""
        parts = (self._model_rows(), self._memory_rows(), self._time_rows(), self._verdict_rows())
        rows = [row for part in parts for row in (*part, ("", ""))][:-1]
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:<{width}}{value}".rstrip() for name, value in rows)

    def _model_rows(self) -> list[tuple[str, str]]:
        model, moe, shape = self.model, self.model.moe, self.shape
        layers = f"{model.num_layers} layers ({model.num_dense_layers} dense) + {model.mtp_depths} MTP"
        causal, square = (self.flops_per_token(convention) / 1e9 for convention in FlopsConvention)
        axes = " x ".join(f"{axis} {n}" for axis, n in self.degrees.to_json().items() if axis != "ep")
        batch = f"{shape.microbatch_size} x {shape.sequence_length:,} tokens, {shape.microbatches} a step"
        return [
            ("model", f"{layers}, dim {model.dim:,}, top {moe.top_k} of {moe.num_experts} experts"),
            ("parameters", f"{parameters.total(model):,}"),
            ("active parameters", f"{parameters.active(model):,}"),
            ("FLOPs a token", f"{causal:,.3f} G causal, {square:,.3f} G full square"),
            ("hardware", self.hardware.name),
            ("layout", f"{self.world_size:,} ranks = {axes}; ep {self.degrees.ep}"),
            *self._pipeline_rows(),
            ("microbatch", f"{batch}, recompute {shape.recompute.value}"),
            ("bytes a parameter", shape.state.to_text()),
            *fp8_rows(model, self.degrees, shape.fp8),
        ]

    def _pipeline_rows(self) -> list[tuple[str, str]]:
        if self.degrees.pp == 1:
            return []
        p = self.shape.pipelining
        return [("schedule", f"{p.schedule.name}, {self.degrees.pp} ranks x {p.per_rank} stages")]

    def _time_rows(self) -> list[tuple[str, str]]:
        sent = {name: value for name, value in vars(self.traffic).items() if value}
        sent["all axes"] = self.traffic.total
        rows = [(f"  {name}", f"{value / GIB:>10,.2f}") for name, value in sent.items()]
        return [("sent in a step", f"{'GiB':>10}"), *rows, ("bubble", f"{self.bubble:>10.1%}")]

    def _memory_rows(self) -> list[tuple[str, str]]:
        parts = {name.replace("_", " "): value for name, value in vars(self.memory).items()}
        on_host = parts.pop("offloaded")
        if not self.shape.staged:
            del parts["save copies"]
        parts["total"] = self.memory.total
        if on_host:
            parts["on the host"] = on_host
        rows = [(f"  {name}", f"{value / GIB:>10,.2f}") for name, value in parts.items()]
        limit = self.hardware.memory_bytes
        device = f"{'unknown':>10}" if limit is None else f"{limit / GIB:>10,.2f}"
        return [("memory a rank", f"{'GiB':>10}"), *rows, ("  device memory", device)]

    def _verdict_rows(self) -> list[tuple[str, str]]:
        if self.fits is None:
            return [("verdict", "unknown: hardware.memory_bytes is not known")]
        if self.fits:
            return [("verdict", "fits")]
        rows = [("verdict", f"does not fit: {needs(self)}")]
        smallest = smallest_dp_shard(self)
        return [
            *rows,
            ("nearest fix", advice(self)) if smallest is None else ("would fit", _shards(smallest)),
        ]


def make_plan(config: "Config", degrees: Degrees, hardware: HardwareConfig) -> Plan:
    """The plan of a completed config on resolved `degrees` of detected `hardware`."""
    train, parallel, on_cpu = config.train, config.parallel, hardware.name == "cpu"
    shape = StepShape(
        microbatch_size=train.microbatch,
        sequence_length=train.length,
        microbatches=train.batch // (train.microbatch * degrees.data_parallel),
        recompute=config.recompute.mode,
        reshard_after_forward=reshard_after_forward(parallel, degrees.pp),
        state=_state_bytes(config.precision),
        fused_kernels=not on_cpu,
        keep=_kept(config),
        pipelining=_pipelining(parallel, degrees.pp),
        cpu_offload=parallel.fsdp is not None and parallel.fsdp.cpu_offload and not on_cpu,
        staged=config.checkpoint.async_save and on_cpu,
        ranks_per_node=_ranks_per_node(config, hardware),
        fp8=_fp8(config.precision),
    )
    return plan_shape(config.model, degrees, hardware, shape)


def plan_shape(model: ModelConfig, degrees: Degrees, hardware: HardwareConfig, shape: StepShape) -> Plan:
    """The plan of `model` in steps of `shape` on `degrees` of detected `hardware`."""
    memory, traffic = rank_memory(model, degrees, shape), rank_traffic(model, degrees, shape)
    return Plan(model, degrees, hardware, shape, memory, traffic)


def _state_bytes(precision: PrecisionConfig) -> StateBytes:
    moments, compute = MOMENTS_BYTES[precision.moments.name], COMPUTE_BYTES[precision.compute.name]
    return StateBytes(optimizer=moments, compute=compute)


def _fp8(precision: PrecisionConfig) -> FP8Shape | None:
    chosen = precision.fp8
    return None if chosen is None else FP8Shape(chosen.dispatch, chosen.gather)


def _pipelining(parallel: ParallelConfig, pp: int) -> Pipelining:
    if pp == 1:
        return Pipelining()
    pipeline = parallel.pipeline or PipelineConfig()
    per_rank = stages_per_rank(parallel.schedule, pipeline)
    return Pipelining(parallel.schedule, per_rank, None if pipeline.split is None else tuple(pipeline.split))


def _kept(config: "Config") -> tuple[Kept, ...]:
    """What selective recomputation keeps; DeepEP's exchange is no operator of PyTorch, and is repeated."""
    expert = config.parallel.expert
    repeated = expert is not None and expert.backend is ExchangeBackend.deepep
    return tuple(kept for kept in config.recompute.keep if not (repeated and kept is Kept.exchange))


def _ranks_per_node(config: "Config", hardware: HardwareConfig) -> int | None:
    """As typed for the experts, as launched, or as many as the hardware has; None is one node."""
    typed = config.parallel.expert and config.parallel.expert.ranks_per_node
    return typed or config.launch.nproc or hardware.devices_per_node


def require_fits(plan: Plan) -> None:
    """Raise UserError, in two lines with the numbers and the nearest fix, for a plan that does not fit."""
    if plan.fits is False:
        model = f"{parameters.total(plan.model):,} parameters"
        layout = f"{model} on {plan.world_size:,} ranks of hardware={plan.hardware.name}"
        raise UserError(f"{layout} do not fit: a rank {needs(plan)}\n{advice(plan)}")


def needs(plan: Plan) -> str:
    """`needs X GiB, has Y GiB` of a plan whose device memory is known."""
    return f"needs {plan.memory.total / GIB:,.2f} GiB, has {(plan.hardware.memory_bytes or 0) / GIB:,.2f} GiB"


def advice(plan: Plan) -> str:
    """The nearest change that makes a plan fit: on the same ranks, with more shards, or both."""
    if plan.shape.staged:
        waiting = _with(plan, replace(plan.shape, staged=False), plan.degrees)
        if waiting.fits:
            return "checkpoint.async_save=false fits on the same ranks"
        return advice(waiting)
    for mode in (Recomputed.selective, Recomputed.full):
        recomputing = _with(plan, replace(plan.shape, recompute=mode), plan.degrees)
        if recomputing.fits:
            return f"recompute={mode.value} fits on the same ranks"
    smallest = smallest_dp_shard(plan)
    if smallest is not None:
        return _shards(smallest)
    smallest = smallest_dp_shard(recomputing)
    if smallest is not None:
        return f"recompute=full and {_shards(smallest)}"
    within = recomputing.memory.to_json()["activations"] / GIB
    shape = plan.shape
    sizes = f"train.microbatch_size={shape.microbatch_size} or sequence_length={shape.sequence_length}"
    return (
        f"no dp_shard helps, {within:,.2f} GiB live within a step under recompute=full: "
        f"lower {sizes}, or raise parallel.degrees.ep, tp or pp"
    )


def smallest_dp_shard(plan: Plan) -> Degrees | None:
    """Degrees with the smallest power-of-two multiple of dp_shard, the world growing with it, that fit.

    None where no number of ranks does, as when activations alone are too large.
    """
    degrees = plan.degrees
    while degrees.dp_shard < MOST_SHARDS:
        degrees = replace(degrees, dp_shard=2 * degrees.dp_shard)
        if _with(plan, plan.shape, degrees).fits:
            return degrees
    return None


def _with(plan: Plan, shape: StepShape, degrees: Degrees) -> Plan:
    """The same plan on other degrees or of another shape; what is sent is left as it was."""
    memory = rank_memory(plan.model, degrees, shape)
    return replace(plan, shape=shape, degrees=degrees, memory=memory)


def _shards(degrees: Degrees) -> str:
    world = f"launch.nproc x launch.nnodes = {degrees.world_size:,} ranks"
    return f"parallel.degrees.dp_shard={degrees.dp_shard} fits, with {world}"
