"""The plan of a run: what a layout costs before anything is started."""

from dataclasses import dataclass

from dsv3.config.hardware import HardwareConfig
from dsv3.config.model import ModelConfig
from dsv3.config.parallel import ExchangeBackend, Kept, ParallelConfig, PipelineConfig
from dsv3.config.precision import PrecisionConfig
from dsv3.config.root import Config
from dsv3.planning import parameters
from dsv3.planning.layout import ParallelDims
from dsv3.planning.memory import MemoryBytes, rank_memory
from dsv3.planning.parameters import FlopsConvention, training_flops_per_token
from dsv3.planning.pipeline_schedules import bubble
from dsv3.planning.pipeline_stages import Pipelining, reshard_after_forward, stages_per_rank
from dsv3.planning.step_shape import FP8Shape, StateBytes, StepShape
from dsv3.planning.traffic import TrafficBytes, rank_traffic

COMPUTE_BYTES = {"fp32": 4, "bf16": 2}

MOMENTS_BYTES = {"fp32": 8, "bf16": 4}


@dataclass(frozen=True)
class Plan:
    """Layout, sizes and costs of a run; `hardware` has been detected.

    `memory` is the fullest rank's, `traffic` that of the rank that sends most.
    """

    model: ModelConfig
    degrees: ParallelDims
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


def make_plan(config: Config, degrees: ParallelDims, hardware: HardwareConfig) -> Plan:
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


def plan_shape(model: ModelConfig, degrees: ParallelDims, hardware: HardwareConfig, shape: StepShape) -> Plan:
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


def _kept(config: Config) -> tuple[Kept, ...]:
    """What selective recomputation keeps; DeepEP's exchange is no operator of PyTorch, and is repeated."""
    expert = config.parallel.expert
    repeated = expert is not None and expert.backend is ExchangeBackend.deepep
    return tuple(kept for kept in config.recompute.keep if not (repeated and kept is Kept.exchange))


def _ranks_per_node(config: Config, hardware: HardwareConfig) -> int | None:
    """As typed for the experts, as launched, or as many as the hardware has; None is one node."""
    typed = config.parallel.expert and config.parallel.expert.ranks_per_node
    return typed or config.launch.nproc or hardware.devices_per_node
