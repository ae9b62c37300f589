import json
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from dsv3.config.hardware import HardwareConfig
from dsv3.config.optimizer import AdamWConfig, OptimizerConfig
from dsv3.config.parallel import (
    ExpertParallelConfig,
    FullyShardConfig,
    ParallelConfig,
    PipelineConfig,
    RecomputeMode,
    SavedOp,
    Schedule,
)
from dsv3.config.precision import ComputeType, MomentType
from dsv3.planning.layout import ParallelDims
from dsv3.planning.pipeline_stages import PipelineShape
from dsv3.planning.plan import COMPUTE_BYTES, make_plan, plan_from_shape
from dsv3.planning.report import format_plan
from dsv3.planning.step_shape import StateBytes, StepShape
from tests.planning.plans import H800, SHAPE, config_of, plan_16b
from tests.planning.presets import preset

KEYS = """
degrees world_size parameters parameters_active memory_bytes device_memory_bytes fits traffic_bytes
traffic_between_nodes bubble tokens_per_second_per_gpu mfu mfu_full_square time time_source flops_per_token
precision precision_reason between_steps run
"""


def test_json_is_the_contract() -> None:
    told = json.loads(
        json.dumps(plan_from_shape(preset("671b"), ParallelDims(dp_shard=2), H800, SHAPE).to_json())
    )
    assert list(told) == KEYS.split()
    assert told["degrees"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1, "ep": 1}
    assert (told["world_size"], told["parameters"]) == (2, 682_636_472_320)
    assert told["parameters_active"] == 37_552_282_624
    assert (told["device_memory_bytes"], told["fits"]) == (80 * 10**9, False)
    assert list(told["traffic_bytes"]) == ["dp", "dp_replicate", "tp", "cp", "ep", "pp", "total"]
    assert told["traffic_bytes"]["total"] == told["traffic_bytes"]["dp"] > 0
    assert told["bubble"] == 0
    assert told["tokens_per_second_per_gpu"] is told["mfu"] is None


def test_a_plan_fits_up_to_the_last_byte() -> None:
    need = plan_16b().memory.total
    for spare, fits in ((0, True), (-1, False)):
        assert plan_16b(hardware=HardwareConfig(name="x", memory_bytes=need + spare)).fits is fits


def test_a_save_in_the_background_needs_its_copies_where_there_is_one_memory() -> None:
    """On CPU a run that only just fits would die at its first checkpoint."""
    cpu = HardwareConfig(name="cpu")
    waiting = make_plan(config_of(ParallelConfig(), async_save=False), ParallelDims(), cpu)
    aside = make_plan(config_of(ParallelConfig()), ParallelDims(), cpu)
    copies = waiting.memory.parameters + waiting.memory.optimizer
    assert aside.memory.save_copies == copies == aside.memory.total - waiting.memory.total
    assert make_plan(config_of(ParallelConfig()), ParallelDims(), H800).memory.save_copies == 0
    tight = replace(cpu, memory_bytes=waiting.memory.total)
    plan = make_plan(config_of(ParallelConfig()), ParallelDims(), tight)
    assert not plan.fits


def test_a_config_is_read_into_the_shape_of_a_step() -> None:
    config = config_of(ParallelConfig(reshard_after_forward=False))
    plan = make_plan(config, ParallelDims(dp_replicate=2, dp_shard=2), H800)
    keep = (SavedOp.attention, SavedOp.experts, SavedOp.exchange)
    expected = StepShape(
        2, 512, 3, RecomputeMode.full, False, StateBytes(compute=2), True, keep=keep, pinned_copies=True
    )
    assert plan.shape == expected
    assert plan.world_size == 4
    assert not make_plan(config, ParallelDims(), HardwareConfig(name="cpu")).shape.fused_kernels


def test_a_pipeline_is_read_with_what_its_schedule_forces() -> None:
    pipeline = PipelineConfig(split=[1, 2, 3])
    config = config_of(ParallelConfig(schedule=Schedule.ZBVZeroBubble, pipeline=pipeline))
    shape = make_plan(config, ParallelDims(pp=2, dp_shard=2), H800).shape
    assert shape.pipelining == PipelineShape(Schedule.ZBVZeroBubble, 2, (1, 2, 3))
    assert not shape.reshard_after_forward
    alone = make_plan(config, ParallelDims(dp_shard=2), H800).shape
    assert (alone.pipelining, alone.reshard_after_forward) == (PipelineShape(), True)


def test_nodes_are_as_typed_as_launched_or_as_the_hardware_has_them() -> None:
    eight = replace(H800, devices_per_node=8)
    typed = ParallelConfig(expert=ExpertParallelConfig(ranks_per_node=2))
    found = [
        make_plan(config, ParallelDims(), eight).shape.ranks_per_node
        for config in (config_of(typed, 4), config_of(ParallelConfig(), 4), config_of(ParallelConfig()))
    ]
    assert found == [2, 4, 8]
    assert make_plan(config_of(ParallelConfig()), ParallelDims(), H800).shape.ranks_per_node is None


def test_offloaded_state_is_the_hosts_but_on_cpu_there_is_one_memory() -> None:
    config = config_of(ParallelConfig(fsdp=FullyShardConfig(cpu_offload=True)))
    kept, offloaded = (
        make_plan(c, ParallelDims(dp_shard=2), H800) for c in (config_of(ParallelConfig()), config)
    )
    state = kept.memory.parameters + kept.memory.gradients + kept.memory.optimizer
    assert state == kept.memory.total - offloaded.memory.total < offloaded.memory.offloaded
    assert "on the host" in format_plan(offloaded)
    assert "pinned memory" in format_plan(kept)
    assert "on the host" not in format_plan(kept)
    assert make_plan(config, ParallelDims(dp_shard=2), HardwareConfig(name="cpu")).memory.offloaded == 0


def test_every_compute_type_has_its_bytes() -> None:
    # `auto` is replaced by one of the others before anything is planned.
    assert set(COMPUTE_BYTES) == {compute.name for compute in ComputeType} - {"auto"}


def test_bf16_moments_are_half_the_optimizer_state_and_nothing_else() -> None:
    cpu, degrees = HardwareConfig(name="cpu"), ParallelDims(dp_shard=2)
    for hardware in (H800, cpu):
        full, half = (
            make_plan(config_of(ParallelConfig(), moments=moments), degrees, hardware)
            for moments in MomentType
        )
        saved = full.memory.parameters  # 4 of a parameter's 8 bytes, and it is 4 itself
        assert full.memory.optimizer == 2 * half.memory.optimizer == 2 * saved
        # On CPU a save in the background copies the moments too.
        copies = saved if hardware is cpu else 0
        assert full.memory.save_copies - half.memory.save_copies == copies
        assert full.memory.total - half.memory.total == saved + copies
        assert full.to_json().keys() == half.to_json().keys()


@dataclass
class MomentumConfig(OptimizerConfig):
    """A user's schema of SGD with momentum."""

    _target_: str = "torch.optim.SGD"
    momentum: float = 0.9


@dataclass
class OwnConfig(OptimizerConfig):
    """A user's schema that knows its optimizer's state."""

    _target_: str = "mine.Lion"

    def state_bytes_per_parameter(self, moments: MomentType) -> int:
        return 2 if moments is MomentType.bf16 else 4


@pytest.mark.parametrize(
    ("optimizer", "moments", "state"),
    [
        (AdamWConfig(), MomentType.fp32, 8),
        (AdamWConfig(), MomentType.bf16, 4),
        (AdamWConfig(_target_="torch.optim.Adam"), MomentType.fp32, 8),
        (OptimizerConfig(_target_="torch.optim.SGD"), MomentType.fp32, 0),
        (MomentumConfig(momentum=0.0), MomentType.fp32, 0),
        (MomentumConfig(), MomentType.fp32, 4),
        (OwnConfig(), MomentType.fp32, 4),
    ],
)
@pytest.mark.parametrize("hardware", ["cpu", "h800"])
def test_the_optimizer_says_how_much_state_it_keeps(
    optimizer: OptimizerConfig, moments: MomentType, state: int, hardware: str
) -> None:
    config = config_of(ParallelConfig(), moments=moments, optimizer=optimizer)
    plan = make_plan(config, ParallelDims(dp_shard=2), HardwareConfig(name=hardware))
    assert 4 * plan.memory.optimizer == state * plan.memory.parameters
    copies = plan.memory.parameters + plan.memory.optimizer if hardware == "cpu" else 0
    assert plan.memory.save_copies == copies
    text = format_plan(plan)
    assert f"bytes per parameter  master 4, gradient 4, optimizer {state}, compute copy 2\n" in text
    assert "assumed" not in text


@pytest.mark.parametrize("schema", [OptimizerConfig, AdamWConfig])
def test_the_state_of_an_unknown_optimizer_is_assumed_and_the_table_says_so(
    schema: type[OptimizerConfig],
) -> None:
    config = config_of(ParallelConfig(), optimizer=schema(_target_="mine.Lion"))
    plan = make_plan(config, ParallelDims(), H800)
    assert plan.memory.optimizer == 2 * plan.memory.parameters
    row = "master 4, gradient 4, optimizer 8 (assumed for mine.Lion), compute copy 2"
    assert f"bytes per parameter  {row}\n" in format_plan(plan)


def test_a_plan_travels_between_processes() -> None:
    assert pickle.loads(pickle.dumps(plan_16b())) == plan_16b()


def test_planning_imports_none_of_the_heavy_ones() -> None:
    program = (
        "import sys, dsv3.planning.report, dsv3.config.parallel, dsv3.planning.parameters; "
        "print({'torch', 'numpy', 'hydra', 'omegaconf', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
