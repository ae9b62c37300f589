import json
import pickle
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from dsv3.parallel.config import (
    ExpertParallelConfig,
    FullyShardConfig,
    Kept,
    ParallelConfig,
    PipelineConfig,
    RecomputeConfig,
    Recomputed,
    Schedule,
)
from dsv3.parallel.degrees import Degrees
from dsv3.planning.hardware import HardwareConfig
from dsv3.planning.partition import Pipelining
from dsv3.planning.report import (
    COMPUTE_BYTES,
    GIB,
    MOMENTS_BYTES,
    Plan,
    advice,
    make_plan,
    plan_shape,
    require_fits,
    smallest_dp_shard,
)
from dsv3.planning.shape import StateBytes, StepShape
from dsv3.precision.config import ComputeType, MomentType, PrecisionConfig
from dsv3.runtime.errors import UserError
from tests.planning.presets import preset

if TYPE_CHECKING:
    from dsv3.config import Config

H800 = HardwareConfig(name="h800", memory_bytes=80 * 10**9)
SHAPE = StepShape(1, 4096, recompute=Recomputed.full, state=StateBytes(compute=2))
KEYS = """
degrees world_size parameters parameters_active memory_bytes device_memory_bytes fits traffic_bytes bubble
tokens_per_second_per_gpu mfu
"""


def plan_16b(dp_shard: int = 8, hardware: HardwareConfig = H800, shape: StepShape = SHAPE) -> Plan:
    return plan_shape(preset("16b"), Degrees(dp_shard=dp_shard), hardware, shape)


def test_json_is_the_contract() -> None:
    told = json.loads(json.dumps(plan_shape(preset("671b"), Degrees(dp_shard=2), H800, SHAPE).to_json()))
    assert list(told) == KEYS.split()
    assert told["degrees"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1, "ep": 1}
    assert (told["world_size"], told["parameters"]) == (2, 682_636_472_320)
    assert told["parameters_active"] == 37_552_282_624
    assert (told["device_memory_bytes"], told["fits"]) == (80 * 10**9, False)
    assert list(told["traffic_bytes"]) == ["dp", "dp_replicate", "tp", "cp", "ep", "pp", "total"]
    assert told["traffic_bytes"]["total"] == told["traffic_bytes"]["dp"] > 0
    assert told["bubble"] == 0
    assert [told[key] for key in KEYS.split()[-2:]] == [None] * 2


def test_a_plan_fits_up_to_the_last_byte() -> None:
    need = plan_16b().memory.total
    for spare, fits in ((0, True), (-1, False)):
        assert plan_16b(hardware=HardwareConfig(name="x", memory_bytes=need + spare)).fits is fits


def test_text_tells_both_conventions_every_part_and_the_verdict() -> None:
    text = plan_16b().to_text()
    lines = text.splitlines()
    assert "16.407 G causal, 18.105 G full square" in text
    assert "15,706,484,224" in text
    assert "2,661,150,208" in text
    assert lines[-1].split() == ["verdict", "fits"]
    parts = {line[2:].rsplit(None, 1)[0]: float(line.split()[-1]) for line in lines if line.startswith("  ")}
    memory = plan_16b().memory
    for name in ("parameters", "gradients", "optimizer", "activations", "total"):
        assert parts[name] == pytest.approx(getattr(memory, name) / GIB, abs=0.006)
    assert {line[: len("active parameters  ")][-2:] for line in lines if line} == {"  "}
    assert all(len(line) < 111 for line in lines)


def test_a_plan_that_does_not_fit_says_how_many_shards_would() -> None:
    plan = plan_16b(dp_shard=3)
    need = f"needs {plan.memory.total / GIB:,.2f} GiB, has 74.51 GiB"
    smallest = smallest_dp_shard(plan)
    assert smallest is not None
    assert smallest.dp_shard == 6
    assert plan_16b(dp_shard=6).fits
    verdict, advice = plan.to_text().splitlines()[-2:]
    assert verdict.split(maxsplit=1) == ["verdict", f"does not fit: {need}"]
    assert "parallel.degrees.dp_shard=6 fits" in advice
    with pytest.raises(UserError) as refused:
        require_fits(plan)
    first, second = str(refused.value).splitlines()
    assert first == f"15,706,484,224 parameters on 3 ranks of hardware=h800 do not fit: a rank {need}"
    assert second == "parallel.degrees.dp_shard=6 fits, with launch.nproc x launch.nnodes = 6 ranks"


def test_the_least_recomputation_that_is_enough_is_the_nearest_fix() -> None:
    plan = plan_16b(
        shape=replace(SHAPE, microbatch_size=4, recompute=Recomputed.none, keep=(Kept.attention,))
    )
    with pytest.raises(UserError, match=r"\nrecompute=selective fits on the same ranks$"):
        require_fits(plan)
    plan = plan_16b(shape=replace(SHAPE, microbatch_size=8, recompute=Recomputed.none, keep=tuple(Kept)))
    with pytest.raises(UserError, match=r"\nrecompute=full fits on the same ranks$"):
        require_fits(plan)


def test_activations_alone_may_be_too_large() -> None:
    plan = plan_16b(shape=replace(SHAPE, microbatch_size=64))
    assert smallest_dp_shard(plan) is None
    assert "would fit" not in plan.to_text()
    with pytest.raises(UserError, match=r"\nno dp_shard helps, .* train.microbatch_size=64 or") as refused:
        require_fits(plan)
    assert len(str(refused.value).splitlines()) == 2
    assert plan.to_text().endswith(str(refused.value).splitlines()[1])


def test_recomputation_and_shards_together_may_be_needed() -> None:
    plan = plan_16b(dp_shard=2, shape=replace(SHAPE, microbatch_size=8, recompute=Recomputed.none))
    with pytest.raises(UserError, match=r"\nrecompute=full and parallel.degrees.dp_shard=(4|8) fits"):
        require_fits(plan)


def config_of(
    parallel: ParallelConfig,
    nproc: int | None = None,
    async_save: bool = True,
    moments: MomentType = MomentType.fp32,
) -> "Config":
    nodes = SimpleNamespace(
        model=preset("debug"),
        train=SimpleNamespace(microbatch=2, length=512, batch=24),
        recompute=RecomputeConfig(mode=Recomputed.full),
        parallel=parallel,
        launch=SimpleNamespace(nproc=nproc),
        precision=PrecisionConfig(ComputeType.bf16, moments),
        checkpoint=SimpleNamespace(async_save=async_save),
    )
    return cast("Config", nodes)


def test_a_save_in_the_background_needs_its_copies_where_there_is_one_memory() -> None:
    """On CPU a run that only just fits would die at its first checkpoint."""
    cpu = HardwareConfig(name="cpu")
    waiting = make_plan(config_of(ParallelConfig(), async_save=False), Degrees(), cpu)
    aside = make_plan(config_of(ParallelConfig()), Degrees(), cpu)
    copies = waiting.memory.parameters + waiting.memory.optimizer
    assert aside.memory.save_copies == copies == aside.memory.total - waiting.memory.total
    assert make_plan(config_of(ParallelConfig()), Degrees(), H800).memory.save_copies == 0
    tight = replace(cpu, memory_bytes=waiting.memory.total)
    plan = make_plan(config_of(ParallelConfig()), Degrees(), tight)
    assert not plan.fits
    assert advice(plan) == "checkpoint.async_save=false fits on the same ranks"


def test_a_config_is_read_into_the_shape_of_a_step() -> None:
    config = config_of(ParallelConfig(reshard_after_forward=False))
    plan = make_plan(config, Degrees(dp_replicate=2, dp_shard=2), H800)
    keep = (Kept.attention, Kept.experts, Kept.exchange)
    expected = StepShape(2, 512, 3, Recomputed.full, False, StateBytes(compute=2), True, keep=keep)
    assert plan.shape == expected
    assert plan.world_size == 4
    assert not make_plan(config, Degrees(), HardwareConfig(name="cpu")).shape.fused_kernels


def test_a_pipeline_is_read_with_what_its_schedule_forces() -> None:
    pipeline = PipelineConfig(split=[1, 2, 3])
    config = config_of(ParallelConfig(schedule=Schedule.ZBVZeroBubble, pipeline=pipeline))
    shape = make_plan(config, Degrees(pp=2, dp_shard=2), H800).shape
    assert shape.pipelining == Pipelining(Schedule.ZBVZeroBubble, 2, (1, 2, 3))
    assert not shape.reshard_after_forward
    alone = make_plan(config, Degrees(dp_shard=2), H800).shape
    assert (alone.pipelining, alone.reshard_after_forward) == (Pipelining(), True)


def test_nodes_are_as_typed_as_launched_or_as_the_hardware_has_them() -> None:
    eight = replace(H800, devices_per_node=8)
    typed = ParallelConfig(expert=ExpertParallelConfig(ranks_per_node=2))
    found = [
        make_plan(config, Degrees(), eight).shape.ranks_per_node
        for config in (config_of(typed, 4), config_of(ParallelConfig(), 4), config_of(ParallelConfig()))
    ]
    assert found == [2, 4, 8]
    assert make_plan(config_of(ParallelConfig()), Degrees(), H800).shape.ranks_per_node is None


def test_offloaded_state_is_the_hosts_but_on_cpu_there_is_one_memory() -> None:
    config = config_of(ParallelConfig(fsdp=FullyShardConfig(cpu_offload=True)))
    kept, offloaded = (make_plan(c, Degrees(dp_shard=2), H800) for c in (config_of(ParallelConfig()), config))
    state = kept.memory.parameters + kept.memory.gradients + kept.memory.optimizer
    assert offloaded.memory.offloaded == state == kept.memory.total - offloaded.memory.total
    assert "on the host" in offloaded.to_text()
    assert "on the host" not in kept.to_text()
    assert make_plan(config, Degrees(dp_shard=2), HardwareConfig(name="cpu")).memory.offloaded == 0


def test_a_pipelined_plan_tells_schedule_bubble_and_what_is_sent() -> None:
    pipelining = Pipelining(Schedule.Interleaved1F1B, 3)
    shape = replace(SHAPE, microbatches=8, pipelining=pipelining, recompute=Recomputed.selective)
    plan = plan_shape(preset("16b"), Degrees(pp=4, dp_shard=2, tp=2, ep=4), H800, shape)
    lines = [line.split() for line in plan.to_text().splitlines()]
    assert ["schedule", "Interleaved1F1B,", "4", "ranks", "x", "3", "stages"] in lines
    assert ["bubble", "11.1%"] in lines
    assert plan.to_json()["bubble"] == pytest.approx(3 / 27)
    sent = {line[0]: float(line[1]) for line in lines if line and line[0] in vars(plan.traffic)}
    assert set(sent) == {"dp", "tp", "ep", "pp"}
    assert sent["tp"] == pytest.approx(plan.traffic.tp / GIB, abs=0.006)


def test_every_compute_and_moment_type_has_its_bytes() -> None:
    assert set(COMPUTE_BYTES) == {compute.name for compute in ComputeType}
    assert set(MOMENTS_BYTES) == {moments.name for moments in MomentType}


def test_bf16_moments_are_half_the_optimizer_state_and_nothing_else() -> None:
    cpu, degrees = HardwareConfig(name="cpu"), Degrees(dp_shard=2)
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


@pytest.mark.parametrize(("moments", "bytes_"), [(MomentType.fp32, 8), (MomentType.bf16, 4)])
def test_the_policy_is_one_line_of_the_table(moments: MomentType, bytes_: int) -> None:
    text = make_plan(config_of(ParallelConfig(), moments=moments), Degrees(), H800).to_text()
    line = f"bytes a parameter  master 4, gradient 4, moments {bytes_}, compute copy 2"
    assert [row for row in text.splitlines() if row.startswith("bytes")] == [line]


def test_what_fits_or_is_unknown_is_let_through() -> None:
    require_fits(plan_16b())
    unknown = plan_16b(hardware=HardwareConfig(name="x"))
    require_fits(unknown)
    assert unknown.fits is None
    assert "hardware.memory_bytes is not known" in unknown.to_text()


def test_a_plan_travels_between_processes() -> None:
    assert pickle.loads(pickle.dumps(plan_16b())) == plan_16b()


def test_planning_imports_none_of_the_heavy_ones() -> None:
    program = (
        "import sys, dsv3.planning.report, dsv3.parallel.degrees, dsv3.metrics.flops; "
        "print({'torch', 'numpy', 'hydra', 'omegaconf', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
