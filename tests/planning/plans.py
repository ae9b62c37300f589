"""Plans and configs that several tests look at."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from dsv3.config.hardware import HardwareConfig
from dsv3.config.optimizer import AdamWConfig, OptimizerConfig
from dsv3.config.parallel import CompileConfig, ParallelConfig, RecomputeConfig, RecomputeMode
from dsv3.config.precision import ComputeType, MomentType, PrecisionConfig
from dsv3.config.training import TrainConfig
from dsv3.planning.layout import ParallelDims
from dsv3.planning.plan import Plan, plan_from_shape
from dsv3.planning.step_shape import StateBytes, StepShape
from tests.planning.presets import preset

if TYPE_CHECKING:
    from dsv3.config.root import Config

H800 = HardwareConfig(name="h800", memory_bytes=80 * 10**9)
SHAPE = StepShape(1, 4096, recompute=RecomputeMode.full, state=StateBytes(compute=2))


def plan_16b(dp_shard: int = 8, hardware: HardwareConfig = H800, shape: StepShape = SHAPE) -> Plan:
    return plan_from_shape(preset("16b"), ParallelDims(dp_shard=dp_shard), hardware, shape)


def config_of(
    parallel: ParallelConfig,
    nproc: int | None = None,
    async_save: bool = True,
    moments: MomentType = MomentType.fp32,
    optimizer: OptimizerConfig | None = None,
) -> "Config":
    nodes = SimpleNamespace(
        task=SimpleNamespace(trains=True),
        model=preset("debug"),
        train=TrainConfig(microbatch_size=2, sequence_length=512, global_batch_size=24),
        recompute=RecomputeConfig(mode=RecomputeMode.full),
        compile=CompileConfig(),
        parallel=parallel,
        launch=SimpleNamespace(nproc=nproc),
        precision=PrecisionConfig(compute=ComputeType.bf16, moments=moments),
        optimizer=optimizer or AdamWConfig(),
        checkpoint=SimpleNamespace(async_save=async_save),
    )
    return cast("Config", nodes)
