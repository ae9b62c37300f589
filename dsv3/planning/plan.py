"""The plan of a run: memory, traffic and bubble of a layout, before anything is started."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from dsv3.config.hardware import HardwareConfig, is_hopper
from dsv3.config.model import AttentionKernel, ModelConfig
from dsv3.config.optimizer import OptimizerConfig
from dsv3.config.parallel import DispatchBackend, ParallelConfig, PipelineConfig, SavedOp
from dsv3.config.precision import FP8Engine, MatmulPrecision, MomentType
from dsv3.config.root import Config
from dsv3.planning import parameters
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.planning.between_steps import BetweenSteps, Upkeep
from dsv3.planning.collective_time import CollectiveTimes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.memory import MemoryBytes, rank_memory
from dsv3.planning.parameters import (
    FlopsConvention,
    training_flops_by_component,
    training_flops_per_token,
)
from dsv3.planning.pipeline_schedules import bubble
from dsv3.planning.pipeline_stages import PipelineShape, reshard_after_forward, stages_per_rank
from dsv3.planning.step_shape import FP8Shape, StateBytes, StepShape
from dsv3.planning.step_time import StepTime, matmul_peak, step_time
from dsv3.planning.traffic import TrafficBytes, rank_traffic

COMPUTE_BYTES = {"fp32": 4, "bf16": 2}

ASSUMED_STATE_BYTES = 8
"""Optimizer state per parameter of an optimizer that the config does not know: that of AdamW in fp32."""


@dataclass(frozen=True)
class Plan:
    """Layout, sizes and costs of a run."""

    model: ModelConfig
    degrees: ParallelDims
    hardware: HardwareConfig
    """As detected."""
    shape: StepShape
    memory: MemoryBytes
    """That of the fullest rank."""
    traffic: TrafficBytes
    """That of the rank that sends most."""
    precision: str = ""
    """Number format of the matmuls: fp32, bf16 or fp8."""
    precision_reason: str = ""
    upkeep: Upkeep = field(default_factory=Upkeep)
    """What happens between two steps."""
    batch: BatchSchedule | None = None
    """The batch sizes of a run, of which `shape` has the last; None where no run is planned."""
    steps: int = 0
    """Steps of the run."""

    @property
    def between_steps(self) -> BetweenSteps:
        """Return the costs of evaluations and samples."""
        return BetweenSteps(self.model, self.degrees, self.shape, self.hardware, self.upkeep)

    @property
    def world_size(self) -> int:
        """Ranks of the layout."""
        return self.degrees.world_size

    @property
    def ranks_on_node(self) -> int:
        """Ranks that share a node."""
        return min(self.world_size, self.shape.ranks_per_node or self.world_size)

    @property
    def fits(self) -> bool | None:
        """True if the fullest rank fits its device; None if the device's memory is unknown."""
        limit = self.hardware.memory_bytes
        return None if limit is None else self.memory.total <= limit

    @property
    def between_nodes(self) -> dict[str, float]:
        """Return the share of each axis's traffic that leaves a node."""
        links = CollectiveTimes(self.hardware, self.degrees, self.shape)
        return links.shares_between_nodes(self.model)

    @property
    def bubble(self) -> float:
        """Share of a step, from 0 to 1, in which a pipeline rank waits for others."""
        p = self.shape.pipelining
        return bubble(p.schedule, self.degrees.pp, p.per_rank, self.shape.microbatches)

    @cached_property
    def time(self) -> StepTime | None:
        """Return the time of a step; None where the hardware's peaks are unknown."""
        return step_time(self.model, self.degrees, self.shape, self.hardware)

    def mfu(self, convention: FlopsConvention) -> float | None:
        """Return the model's FLOPs per second over the peak of the matmuls' format; None if unknown."""
        peak = matmul_peak(self.hardware, self.shape)
        if self.time is None or peak is None:
            return None
        return self.time.tokens_per_second_per_gpu * self.flops_per_token(convention) / peak

    @property
    def tokens(self) -> int:
        """Return the tokens of the run."""
        return self.batch.samples_after(0, self.steps) * self.shape.sequence_length if self.batch else 0

    def first_step(self) -> tuple[int, float]:
        """Return the microbatches and the bubble of the first step, where the batch ramps up to `shape`."""
        assert self.batch is not None
        count, p = self.batch.first * self.shape.microbatches // self.batch.final, self.shape.pipelining
        return count, bubble(p.schedule, self.degrees.pp, p.per_rank, count)

    def flops_per_token(self, convention: FlopsConvention) -> int:
        """Return training FLOPs per token, with the MTP depths."""
        return training_flops_per_token(self.model, self.shape.sequence_length, convention)

    def to_json(self) -> dict[str, object]:
        """Return the contract of `task=plan task.format=json`; values that are not computed yet are None."""
        evaluation = self.between_steps.evaluation()
        return {
            "degrees": self.degrees.to_json(),
            "world_size": self.world_size,
            "parameters": parameters.total(self.model),
            "parameters_active": parameters.active(self.model),
            "memory_bytes": self.memory.to_json(),
            "device_memory_bytes": self.hardware.memory_bytes,
            "fits": self.fits,
            "traffic_bytes": self.traffic.to_json(),
            "traffic_between_nodes": self.between_nodes,
            "bubble": self.bubble,
            "tokens_per_second_per_gpu": self.time and self.time.tokens_per_second_per_gpu,
            "mfu": self.mfu(FlopsConvention.causal),
            "mfu_full_square": self.mfu(FlopsConvention.full_square),
            "time": self.time and self.time.to_json(),
            "time_source": self.hardware.told_source,
            "flops_per_token": {
                convention.value: training_flops_by_component(
                    self.model, self.shape.sequence_length, convention
                )
                for convention in FlopsConvention
            },
            "precision": self.precision,
            "precision_reason": self.precision_reason,
            "between_steps": {
                "evaluation": evaluation and evaluation.to_json(),
                "sample": self.between_steps.sample().to_json(),
                "never": self.upkeep.never(),
            },
            "run": self._run_to_json(),
        }

    def _run_to_json(self) -> dict[str, object] | None:
        """Return the batch of the last step, the ramp that leads to it, and how far the run goes."""
        batch, length = self.batch, self.shape.sequence_length
        if batch is None:
            return None
        count, idle = self.first_step()
        ramp = {
            "start_sequences": batch.first,
            "increment_sequences": batch.increment,
            "tokens": batch.tokens,
            "steps": batch.ramp_steps,
            "first_microbatches": count,
            "first_bubble": idle,
        }
        return {
            "batch_sequences": batch.final,
            "batch_tokens": batch.final * length,
            "batch_ramp": None if batch.start is None else ramp,
            "steps": self.steps,
            "tokens": self.tokens,
        }


def make_plan(
    config: Config, degrees: ParallelDims, hardware: HardwareConfig, precision_reason: str = "as configured"
) -> Plan:
    """Plan a completed config on resolved `degrees` and detected `hardware`."""
    train, precision = config.train, config.precision
    plan = plan_from_shape(config.model, degrees, hardware, shape_of(config, degrees, hardware))
    upkeep = Upkeep(train.evaluate_tokens, train.evaluate_every, train.generate_every, train.generate_seconds)
    return replace(
        plan,
        precision=precision.label,
        precision_reason=precision_reason,
        upkeep=upkeep,
        batch=BatchSchedule.of(train) if config.task.trains else None,
        steps=train.steps,
    )


def shape_of(config: Config, degrees: ParallelDims, hardware: HardwareConfig) -> StepShape:
    """Return what the plan reads from a completed config besides the model, on resolved `degrees`."""
    train, parallel, expert = config.train, config.parallel, config.parallel.expert
    precision, on_cpu = config.precision, hardware.name == "cpu"
    # DeepEP's exchange is no operator of PyTorch, so activation checkpointing cannot keep its result.
    deepep = expert is not None and expert.backend is DispatchBackend.deepep
    # Neither is compiled flex_attention one, which trains on GPUs alone.
    flex = config.model.attention.kernel is AttentionKernel.flex
    unseen = [SavedOp.exchange] * deepep + [SavedOp.attention] * flex
    keep = tuple(op for op in config.recompute.keep if op not in unseen)
    # As configured for the experts, as launched, or as many as the hardware has; None is one node.
    configured = expert and expert.ranks_per_node
    return StepShape(
        microbatch_size=train.microbatch,
        sequence_length=train.length,
        microbatches=train.batch // (train.microbatch * degrees.data_parallel),
        recompute=config.recompute.mode,
        reshard_after_forward=reshard_after_forward(parallel, degrees.pp),
        state=state_bytes(config.optimizer, precision.moments, COMPUTE_BYTES[precision.compute.name]),
        fused_kernels=not on_cpu,
        keep=keep,
        pipelining=_pipeline_shape(parallel, degrees.pp),
        cpu_offload=parallel.fsdp is not None and parallel.fsdp.cpu_offload and not on_cpu,
        host_copies=config.checkpoint.async_save and on_cpu,
        pinned_copies=config.checkpoint.async_save and not on_cpu,
        ranks_per_node=configured or config.launch.nproc or hardware.devices_per_node,
        fp8=_fp8_shape(config, hardware),
        compiled=config.compile.enabled,
        tf32=precision.compute.name == "fp32" and precision.matmul is MatmulPrecision.high and not on_cpu,
        dispatch=DispatchBackend.all_to_all if expert is None else expert.backend,
    )


def _fp8_shape(config: Config, hardware: HardwareConfig) -> FP8Shape | None:
    """Return the FP8 settings; every device but Hopper emulates the matmuls."""
    fp8 = config.precision.fp8
    if fp8 is None:
        return None
    emulated = fp8.engine is FP8Engine.emulated or not is_hopper(hardware.name)
    return FP8Shape(fp8.dispatch, fp8.gather, emulated)


def plan_from_shape(
    model: ModelConfig, degrees: ParallelDims, hardware: HardwareConfig, shape: StepShape
) -> Plan:
    """Plan `model` with steps of `shape` on `degrees` and detected `hardware`."""
    memory, traffic = rank_memory(model, degrees, shape), rank_traffic(model, degrees, shape)
    return Plan(model, degrees, hardware, shape, memory, traffic)


def state_bytes(optimizer: OptimizerConfig, moments: MomentType, compute: int) -> StateBytes:
    """Return the bytes per parameter with `optimizer`; one with unknown state counts as AdamW."""
    known = optimizer.state_bytes_per_parameter(moments)
    hidden = optimizer.state_bytes_per_hidden_parameter(moments)
    return StateBytes(
        optimizer=ASSUMED_STATE_BYTES if known is None else known,
        compute=compute,
        unknown_optimizer=optimizer._target_ if known is None else "",
        hidden=None if hidden == known else hidden,
        factored=optimizer.factored_state,
        frozen=tuple(optimizer.frozen),
    )


def _pipeline_shape(parallel: ParallelConfig, pp: int) -> PipelineShape:
    if pp == 1:
        return PipelineShape()
    pipeline = parallel.pipeline or PipelineConfig()
    split = None if pipeline.split is None else tuple(pipeline.split)
    return PipelineShape(parallel.schedule, stages_per_rank(parallel.schedule, pipeline), split)
