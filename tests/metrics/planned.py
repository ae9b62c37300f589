"""A plan in pipeline stages, for the pictures of it."""

from dataclasses import replace

from dsv3.config.hardware import HardwareConfig
from dsv3.config.parallel import Schedule
from dsv3.planning.layout import ParallelDims
from dsv3.planning.pipeline_stages import PipelineShape
from dsv3.planning.plan import Plan, plan_from_shape
from tests.planning.plans import SHAPE
from tests.planning.presets import preset

GPU = HardwareConfig(
    name="gpu",
    memory_bytes=80 * 10**9,
    memory_bandwidth=3e12,
    peak_flops_bf16=1e15,
    intra_node_bandwidth=4e11,
    inter_node_bandwidth=5e10,
    devices_per_node=8,
)
"""Numbers of no GPU in particular."""


def plan_of_stages(
    schedule: Schedule = Schedule["1F1B"],
    pp: int = 4,
    microbatches: int = 16,
    hardware: HardwareConfig = GPU,
    model: str = "16b",
) -> Plan:
    """Return the plan of a step of so many microbatches."""
    per_rank = 1 if schedule in (Schedule["1F1B"], Schedule.GPipe) else 2
    shape = replace(SHAPE, microbatches=microbatches, pipelining=PipelineShape(schedule, per_rank, None))
    return plan_from_shape(preset(model), ParallelDims(pp=pp, dp_shard=2), hardware, shape)
