from dataclasses import replace

import pytest

from dsv3.config.parallel import ParallelConfig, RecomputeMode, Schedule
from dsv3.config.precision import MomentType
from dsv3.planning.layout import ParallelDims
from dsv3.planning.pipeline_stages import PipelineShape
from dsv3.planning.plan import make_plan, plan_from_shape
from dsv3.planning.report import GIB, format_plan
from tests.planning.plans import H800, SHAPE, config_of, plan_16b
from tests.planning.presets import preset


def test_text_tells_both_conventions_every_part_and_the_verdict() -> None:
    text = format_plan(plan_16b())
    lines = text.splitlines()
    assert "16.407 G causal, 18.105 G full square" in text
    assert "15,706,484,224" in text
    assert "2,661,150,208" in text
    assert lines[-1].split() == ["verdict", "fits"]
    indented = [line for line in text.partition("between steps")[0].splitlines() if line.startswith("  ")]
    parts = {line[2:].rsplit(None, 1)[0]: float(line.split()[-1]) for line in indented}
    memory = plan_16b().memory
    for name in ("parameters", "gradients", "optimizer", "activations", "total"):
        assert parts[name] == pytest.approx(getattr(memory, name) / GIB, abs=0.006)
    upkeep = text.partition("between steps")[2].splitlines()
    evaluation = plan_16b().between_steps.evaluation()
    assert evaluation is not None
    assert upkeep[1].split()[-1] == f"{evaluation.tokens:,}"
    assert upkeep[2].split()[0] == "sample"
    assert float(upkeep[3].split()[-1]) == pytest.approx(27 * 576 * 120 * 2 / 2**20, abs=0.006)
    assert {line[: len("bytes per parameter  ")][-2:] for line in lines if line} == {"  "}
    assert all(len(line) < 111 for line in lines)


@pytest.mark.parametrize("microbatches", [1, 8])
def test_the_rows_of_memory_sum_to_the_total(microbatches: int) -> None:
    """Of a step of one microbatch gradients are still to come at its fullest moment."""
    shape = replace(SHAPE, microbatches=microbatches, sequence_length=32768)
    plan = plan_from_shape(preset("16b"), ParallelDims(dp_shard=8, ep=8), H800, shape)
    assert (plan.memory.late_gradients > 0) == (microbatches == 1)
    table = format_plan(plan).partition("memory per rank")[2].partition("\n\n")[0].splitlines()
    sizes = {line[2:].rsplit(None, 1)[0]: float(line.split()[-1]) for line in table[1:]}
    parts = list(sizes)[: list(sizes).index("total")]
    assert ("gradients to come" in parts) == (microbatches == 1)
    assert sum(sizes[part] for part in parts) == pytest.approx(sizes["total"], abs=0.04)


def test_a_pipelined_plan_tells_schedule_bubble_and_what_is_sent() -> None:
    pipelining = PipelineShape(Schedule.Interleaved1F1B, 3)
    shape = replace(SHAPE, microbatches=8, pipelining=pipelining, recompute=RecomputeMode.selective)
    plan = plan_from_shape(preset("16b"), ParallelDims(pp=4, dp_shard=2, tp=2, ep=4), H800, shape)
    lines = [line.split() for line in format_plan(plan).splitlines()]
    assert ["schedule", "Interleaved1F1B,", "4", "ranks", "x", "3", "stages"] in lines
    assert ["bubble", "11.1%", "of", "the", "schedule,", "if", "all", "stages", "were", "alike"] in lines
    assert plan.to_json()["bubble"] == pytest.approx(3 / 27)
    sent = {line[0]: float(line[1]) for line in lines if line and line[0] in vars(plan.traffic)}
    assert set(sent) == {"dp", "tp", "ep", "pp"}
    assert sent["tp"] == pytest.approx(plan.traffic.tp / GIB, abs=0.006)


@pytest.mark.parametrize(("moments", "bytes_"), [(MomentType.fp32, 8), (MomentType.bf16, 4)])
def test_the_policy_is_one_line_of_the_table(moments: MomentType, bytes_: int) -> None:
    text = format_plan(make_plan(config_of(ParallelConfig(), moments=moments), ParallelDims(), H800))
    line = f"bytes per parameter  master 4, gradient 4, optimizer {bytes_}, compute copy 2"
    assert [row for row in text.splitlines() if row.startswith("bytes")] == [line]
