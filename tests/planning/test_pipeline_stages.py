"""Stages and schedules against torch's own classes, which are built from stages without a model."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.schedules import get_schedule_class

from dsv3.config.parallel import ParallelConfig, PipelineConfig, Schedule
from dsv3.errors import UserError
from dsv3.planning.pipeline_stages import (
    check_microbatches,
    extra_costs,
    is_v_shaped,
    layer_costs,
    min_microbatches,
    reshard_after_forward,
    split_layers,
    splits_backward,
    stage_count,
    stages_of_rank,
    stages_per_rank,
    supports_microbatches,
)
from tests.planning.presets import NAMES, preset

SEVERAL = (Schedule.Interleaved1F1B, Schedule.InterleavedZeroBubble)
LAYOUTS = [
    (schedule, pp, per_rank)
    for schedule in Schedule
    for pp in (2, 3, 4)
    for per_rank in ([2, 3] if schedule in SEVERAL else [stages_per_rank(schedule, PipelineConfig())])
]


def torch_schedule(schedule: Schedule, rank: int, pp: int, per_rank: int, microbatches: int) -> Any:
    """torch's schedule of one rank."""
    stages = [
        SimpleNamespace(
            stage_index=index,
            num_stages=pp * per_rank,
            group_size=pp,
            group_rank=rank,
            group=None,
            submod=None,
            is_first=index == 0,
            is_last=index == pp * per_rank - 1,
            has_backward=True,
        )
        for index in stages_of_rank(schedule, rank, pp, per_rank)
    ]
    kind = cast("Any", get_schedule_class(schedule.value))
    single = issubclass(kind, torch_schedules.PipelineScheduleSingle)
    return kind(stages[0] if single else stages, microbatches)


@pytest.mark.parametrize(("schedule", "pp", "per_rank"), LAYOUTS, ids=str)
def test_a_number_of_microbatches_is_taken_exactly_where_torch_takes_it(
    schedule: Schedule, pp: int, per_rank: int
) -> None:
    for microbatches in range(1, 4 * pp):
        if supports_microbatches(schedule, pp, per_rank, microbatches):
            torch_schedule(schedule, 0, pp, per_rank, microbatches)
            check_microbatches(schedule, pp, per_rank, microbatches)
        else:
            with pytest.raises(ValueError, match="microbatches"):
                torch_schedule(schedule, 0, pp, per_rank, microbatches)
            with pytest.raises(UserError, match="cannot run"):
                check_microbatches(schedule, pp, per_rank, microbatches)
    assert supports_microbatches(schedule, pp, per_rank, min_microbatches(schedule, pp, per_rank))
    assert not supports_microbatches(schedule, pp, per_rank, 0)


@pytest.mark.parametrize(("schedule", "pp", "per_rank"), LAYOUTS, ids=str)
def test_stages_lie_on_the_ranks_that_torch_sends_to(schedule: Schedule, pp: int, per_rank: int) -> None:
    placed = [stages_of_rank(schedule, rank, pp, per_rank) for rank in range(pp)]
    assert sorted(itertools.chain(*placed)) == list(range(pp * per_rank))
    built = torch_schedule(schedule, 0, pp, per_rank, 2 * pp * per_rank)
    if isinstance(built, torch_schedules.PipelineScheduleMulti):
        expected = {stage: rank for rank, stages in enumerate(placed) for stage in stages}
        assert built.stage_index_to_group_rank == expected
    else:
        assert placed == [[rank] for rank in range(pp)]


def test_a_v_holds_the_first_and_the_last_stage_on_one_rank() -> None:
    assert stages_of_rank(Schedule.DualPipeV, 0, 4, 2) == [0, 7]
    assert stages_of_rank(Schedule.Interleaved1F1B, 1, 4, 3) == [1, 5, 9]
    assert [s.name for s in Schedule if is_v_shaped(s)] == ["ZBVZeroBubble", "DualPipeV"]


@pytest.mark.parametrize("schedule", Schedule)
def test_schedules_that_split_the_backward_pass_are_those_with_such_actions(schedule: Schedule) -> None:
    per_rank = stages_per_rank(schedule, PipelineConfig())
    order = getattr(torch_schedule(schedule, 0, 2, per_rank, 8), "pipeline_order", {})
    kinds = {action.computation_type.name for ops in order.values() for action in ops if action is not None}
    assert ("BACKWARD_WEIGHT" in kinds) is splits_backward(schedule)


def test_too_few_microbatches_name_the_batch_sizes_that_work() -> None:
    with pytest.raises(UserError) as refused:
        check_microbatches(Schedule["1F1B"], 4, 1, 2, sequences=6)
    assert str(refused.value) == (
        "parallel.schedule=1F1B on 4 stages (pp=4 x 1) cannot run 2 microbatches a step\n"
        "microbatches that work: 4, by train.global_batch_size=24 or another train.microbatch_size"
    )
    with pytest.raises(UserError, match=r"that work: 10 or 12, by train\.global_batch_size=20 or 24 or"):
        check_microbatches(Schedule.Interleaved1F1B, 4, 2, 11, sequences=2)


def test_virtual_stages_are_those_a_schedule_can_have() -> None:
    numbers = [stages_per_rank(schedule, PipelineConfig()) for schedule in Schedule]
    assert numbers == [1, 1, 2, 2, 2, 2]
    assert stages_per_rank(Schedule.Interleaved1F1B, PipelineConfig(stages_per_rank=3)) == 3
    for schedule, typed, allowed in [
        (Schedule["1F1B"], 2, "takes 1 "),
        (Schedule.Interleaved1F1B, 1, "2 or more"),
        (Schedule.DualPipeV, 3, "exactly 2"),
    ]:
        with pytest.raises(UserError, match=rf"pipeline\.stages_per_rank={typed}: .*{allowed}"):
            stages_per_rank(schedule, PipelineConfig(stages_per_rank=typed))
    assert stage_count(ParallelConfig(schedule=Schedule.DualPipeV), 4) == 8
    assert stage_count(ParallelConfig(schedule=Schedule.DualPipeV), 1) == 1


def test_parameters_are_freed_unless_the_schedule_forbids_it() -> None:
    forcing = ParallelConfig(schedule=Schedule.ZBVZeroBubble)
    assert reshard_after_forward(ParallelConfig(), 4)
    assert not reshard_after_forward(ParallelConfig(reshard_after_forward=False), 4)
    assert not reshard_after_forward(forcing, 4)
    assert reshard_after_forward(forcing, 1)
    typed = replace(forcing, reshard_after_forward=True)
    assert reshard_after_forward(typed, 1)
    with pytest.raises(UserError, match=r"reshard_after_forward=true gives wrong gradients with .*ZBVZero"):
        reshard_after_forward(typed, 2)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_in_one_stage_and_every_stage_has_one(name: str) -> None:
    model = preset(name)
    for stages in range(1, model.num_layers + 1):
        split = split_layers(model, stages)
        assert [n for layers in split for n in layers] == list(range(model.num_layers))
        assert len(split) == stages
        assert all(split)


def test_the_split_is_the_best_of_all_and_front_loaded_among_equals() -> None:
    model = replace(preset("16b"), num_layers=9, mtp_depths=1)
    costs, (front, back) = layer_costs(model), extra_costs(model)
    for stages in (2, 3, 4):
        ranked = []
        for cuts in itertools.combinations(range(1, 9), stages - 1):
            bounds = [0, *cuts, 9]
            sums = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
            sums[0] += front
            sums[-1] += back
            ranked.append((max(sums), sum(n * n for n in sums), [-n for n in bounds]))
        best = [-n for n in min(ranked)[2]]
        assert [layers.start for layers in split_layers(model, stages)] == best[:-1]


def test_head_and_mtp_take_the_place_of_layers() -> None:
    sizes = [len(layers) for layers in split_layers(preset("671b"), 16)]
    assert (sum(sizes), sizes[:15], sizes[15]) == (61, [4] * 15, 1)
    without = replace(preset("671b"), mtp_depths=0)
    assert [len(layers) for layers in split_layers(without, 16)][15] > 1


def test_a_split_of_the_user_is_taken_or_refused_with_the_numbers() -> None:
    model = preset("debug")
    assert split_layers(model, 3, [1, 3]) == [range(1), range(1, 3), range(3, 4)]
    for stages, split, told in [
        (3, [2], "2 stages need|3 stages need 2"),
        (2, [4], "ascending numbers from 1 to 3"),
        (3, [2, 2], "leaves a stage without a layer"),
    ]:
        with pytest.raises(UserError, match=rf"^parallel\.pipeline\.split=\[.*({told})"):
            split_layers(model, stages, split)
    with pytest.raises(UserError, match=r"5 pipeline stages need .* model\.num_layers=4"):
        split_layers(model, 5)
