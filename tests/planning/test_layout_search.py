"""The search for layouts against planning every layout, and its bounds against the plans that they bound."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config.parallel import RecomputeMode, SavedOp, Schedule
from dsv3.planning.layout import ParallelDims
from dsv3.planning.layout_search import (
    FRONT_GAIN,
    FRONT_SPEED,
    Found,
    LayoutSearch,
    _Kept,
    recomputed_besides,
)
from dsv3.planning.layout_space import Choices, Layout
from dsv3.planning.memory import MemoryBytes, pipeline_memory, rank_memory
from dsv3.planning.pipeline_schedules import most_held, schedule_actions
from dsv3.planning.pipeline_stages import PipelineShape, is_v_shaped, stages_of_rank, supports_microbatches
from dsv3.planning.step_time import StepTime
from tests.planning.layout_spaces import BF16, FORMATS, Planned, every_plan, gpu, small_config, space_of
from tests.planning.plans import SHAPE
from tests.planning.presets import preset

ONE = {"bf16": BF16}

SPACES = {
    "all axes of 4 ranks": (4, Choices(ONE, schedule=Schedule["1F1B"], recompute=RecomputeMode.full)),
    "all schedules": (4, Choices(ONE, axes={"pp": 2, "cp": 1, "tp": 1}, recompute=RecomputeMode.none)),
    "formats and recomputation of 6 ranks": (6, Choices(FORMATS, axes={"pp": 1}, microbatch_size=1)),
}


@pytest.mark.parametrize("name", SPACES)
def test_the_search_finds_what_planning_every_layout_finds(name: str) -> None:
    world, choices = SPACES[name]
    layers = 12 if choices.axes.get("pp", 1) > 1 else 4
    # 6 ranks may split a sequence in 3, which its length forbids.
    config = small_config(layers, batch=24 if world == 6 else 8, length=4096 if world == 6 else 2048)
    space = space_of(world, gpu(), choices, config)
    every = sorted(every_plan(space), key=lambda plan: -plan.speed)
    assert len(every) > 50
    # Memory that half of the layouts do not have, so that pruning by memory counts too.
    room = sorted(plan.memory for plan in every)[len(every) // 2]
    fitting = [plan for plan in every if plan.memory <= room]
    result = LayoutSearch(space_of(world, gpu(room), choices, config)).run(5)
    assert result.legal == len(every)
    assert [found.speed for found in result.best] == pytest.approx([plan.speed for plan in fitting[:5]])
    found = [Planned(each.speed, each.memory.total) for each in result.front]
    assert_is_front(found, fitting)


def assert_is_front(front: list[Planned], fitting: list[Planned]) -> None:
    """Assert that the front has plans of `fitting`, and that none is much better with as little memory."""
    assert {round(plan.speed, 6) for plan in front} <= {round(plan.speed, 6) for plan in fitting}
    assert (
        front == sorted(front, key=lambda plan: -plan.memory) == sorted(front, key=lambda plan: -plan.speed)
    )
    fastest = max(plan.speed for plan in fitting)
    for plan in fitting:
        if plan.speed >= FRONT_SPEED * fastest * (1 + FRONT_GAIN) ** 2:
            assert any(
                own.memory <= plan.memory and own.speed * (1 + FRONT_GAIN) ** 2 >= plan.speed for own in front
            )


@given(
    pp=st.sampled_from([1, 2, 4]),
    paired=st.sampled_from([0.0, 0.9]),
    schedule=st.sampled_from(list(Schedule)),
    length=st.sampled_from([2048, 8192]),
    data=st.data(),
)
@settings(max_examples=12, deadline=None)
def test_no_bound_rules_out_a_layout_that_is_better(
    pp: int, paired: float, schedule: Schedule, length: int, data: st.DataObject
) -> None:
    own = small_config(layers=8, batch=16, length=length)
    space = space_of(8, gpu(ep_paired=paired), Choices(FORMATS, axes={"pp": pp}, schedule=schedule), own)
    search = LayoutSearch(space)
    tokens = space.batch.final * space.length
    cell = data.draw(st.sampled_from(sorted(space.cells(), key=repr)))
    search.run(1)  # fills in what floors are made of
    most, floor = search.most_speed(cell, tokens), search.floor(cell)
    planned = [search.plan(layout) for layout in space.layouts(cell)]
    first = planned[0]
    for found in planned:
        assert found.speed <= most * (1 + 1e-9)
        assert found.memory.total >= floor
        # The first of a cell shards over most ranks, and tells what all of the cell take.
        assert found.memory.total >= first.memory.total
        assert found.speed <= search.common_speed(first, tokens) * (1 + 1e-9)
    fewer = search.most_speed(cell._replace(recompute=RecomputeMode.none), tokens)
    assert most <= fewer * (1 + 1e-9)


def test_what_may_be_a_result_is_among_the_best_or_on_the_front() -> None:
    def found(speed: float, memory: int) -> Found:
        time = SimpleNamespace(tokens_per_second_per_gpu=speed)
        return Found(cast("Layout", None), MemoryBytes(memory, 0, 0, 0), cast("StepTime", time))

    kept = _Kept(1, wants_front=True)
    assert kept.wants(1.0, 10**9)
    for speed, memory in ((60.0, 20), (100.0, 50), (40.0, 5), (60.3, 30)):
        kept.add(found(speed, memory))
    assert kept.wants(100.0, 10**9)  # as fast as the best
    assert kept.wants(80.0, 30)  # faster than all with less memory
    assert not kept.wants(80.0, 50)
    assert not kept.wants(60.5, 30)  # by less than a gain
    assert kept.wants(55.0, 10)
    assert not kept.wants(49.0, 1)  # beyond the end of the front
    assert (kept.is_complete(55.0), kept.is_complete(49.0)) == (False, True)
    assert [(each.speed, each.memory.total) for each in kept.front()] == [(100.0, 50), (60.0, 20)]
    assert [each.speed for each in kept.best()] == [100.0]


BOUNDED = {
    "pipelines": (gpu(), Choices(ONE, axes={"pp": 2}, schedule=Schedule["1F1B"]), 2048),
    "pairs of microbatches": (
        gpu(ep_paired=0.9),
        Choices(ONE, axes={"pp": 2, "cp": 1, "tp": 1}, schedule=Schedule.DualPipeV),
        2048,
    ),
    "long sequences": (gpu(), Choices(ONE, axes={"pp": 1}), 8192),
    "gradients beyond activations": (gpu(), Choices(ONE, axes={"pp": 1, "cp": 1}), 64),
    "one layer": (gpu(), Choices(ONE, axes={"pp": 1, "cp": 1, "tp": 1}), 2048),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_of_cells_hold_for_their_layouts(name: str) -> None:
    hardware, choices, length = BOUNDED[name]
    config = small_config(layers=8, batch=16, length=length)
    if name == "one layer":  # of a width at which recomputation adds more than it saves
        wide = replace(preset("16b"), num_layers=1, num_dense_layers=0, vocab_size=512)
        config = replace(config, model=wide)
    space = space_of(8, hardware, choices, config)
    search, tokens = LayoutSearch(space), 16 * length
    search.run(1)  # fills in what floors are made of
    for cell in list(space.cells())[::4]:  # of every recomputation
        most, floor = search.most_speed(cell, tokens), search.floor(cell)
        planned = [search.plan(layout) for layout in space.layouts(cell)]
        common = search.common_speed(planned[0], tokens)
        for found in planned:
            assert found.speed <= min(most, common) * (1 + 1e-9), cell
            assert found.memory.total >= floor, cell


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("degrees", [ParallelDims(), ParallelDims(dp_shard=8, ep=8), ParallelDims(pp=2)])
def test_recomputation_that_saves_nothing_adds_no_more_than_is_known(
    layers: int, degrees: ParallelDims
) -> None:
    """The bound of a search for less recomputation: what one or two layers keep is less than what it adds."""
    model = replace(preset("16b"), num_layers=layers, num_dense_layers=0, vocab_size=512)
    if degrees.pp > layers:
        return
    grown = 0
    for length, keep in itertools.product((64, 2048), ((), tuple(SavedOp))):
        shape = replace(SHAPE, sequence_length=length, microbatches=4, recompute=RecomputeMode.none)
        shape = replace(shape, ranks_per_node=8)
        plain = rank_memory(model, degrees, shape).total
        for mode in (RecomputeMode.selective, RecomputeMode.full):
            own = replace(shape, recompute=mode, keep=keep)
            besides = recomputed_besides(model, degrees, own)
            grown = max(grown, rank_memory(model, degrees, own).total - plain)
            assert rank_memory(model, degrees, own).total - plain <= besides
    assert grown > 0 or degrees.dp_shard == 1


def test_what_does_not_fit_is_told_by_the_layout_that_takes_least() -> None:
    choices = Choices(ONE, schedule=Schedule["1F1B"])
    space = space_of(4, gpu(), choices)
    least = min(plan.memory for plan in every_plan(space))
    search = LayoutSearch(space_of(4, gpu(least - 1), choices))
    assert search.run(3).best == []
    assert search.first_that_fits() is None
    found = search.least_memory()
    assert found is not None
    assert found[1].total == least
    fitting = LayoutSearch(space_of(4, gpu(least), choices)).first_that_fits()
    assert fitting is not None
    assert fitting.memory.total == least


@pytest.mark.parametrize("schedule", Schedule)
def test_the_fullest_rank_is_found_among_ranks_with_alike_stages(schedule: Schedule) -> None:
    interleaved = schedule in (Schedule.Interleaved1F1B, Schedule.InterleavedZeroBubble)
    pipelining = PipelineShape(schedule, 2 if interleaved or is_v_shaped(schedule) else 1)
    for pp, mode, microbatches in itertools.product((4, 16), RecomputeMode, (32, 64)):
        shape = replace(SHAPE, microbatches=microbatches, recompute=mode, pipelining=pipelining)
        degrees = ParallelDims(pp=pp, dp_shard=64, ep=32)
        every = pipeline_memory(preset("671b"), degrees, shape)
        assert rank_memory(preset("671b"), degrees, shape).total == max(each.total for each in every)


@pytest.mark.parametrize("schedule", Schedule)
def test_a_few_rounds_hold_as_many_microbatches_as_a_whole_step(schedule: Schedule) -> None:
    per_rank = {Schedule.GPipe: 1, Schedule["1F1B"]: 1}.get(schedule, 2)
    for pp, rank, microbatches in itertools.product((2, 4), (0, 1), (4, 6, 8, 24, 96)):
        if not supports_microbatches(schedule, pp, per_rank, microbatches):
            continue
        stages = stages_of_rank(schedule, rank, pp, per_rank)
        for weights in ((1, 1), (1, 3), (5, 1)):
            each = dict(zip(stages, weights, strict=False))
            now = most = 0
            for action in schedule_actions(schedule, rank, pp, per_rank, microbatches):
                now += {"F": 1, "I": 0}.get(action.kind, -1) * each[action.stage]
                most = max(most, now)
            held = most_held(schedule, rank, pp, per_rank, microbatches)
            assert most == max(sum(each[stage] * count for stage, count in moment) for moment in held)
