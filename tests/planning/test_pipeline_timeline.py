"""The timeline of a pipeline: closed forms, spans that hold together, and the extrapolation of long steps."""

import random
from itertools import pairwise

import pytest

from dsv3.config.parallel import Schedule
from dsv3.planning.pipeline_schedules import bubble
from dsv3.planning.pipeline_stages import stages_of_rank
from dsv3.planning.pipeline_timeline import PipelineTimeline, StageSeconds

PER_RANK = {
    Schedule.GPipe: 1,
    Schedule["1F1B"]: 1,
    Schedule.Interleaved1F1B: 3,
    Schedule.InterleavedZeroBubble: 2,
    Schedule.ZBVZeroBubble: 2,
    Schedule.DualPipeV: 2,
}


def timeline(
    schedule: Schedule, pp: int, microbatches: int, uneven: float = 0.0, send: float = 0.0
) -> PipelineTimeline:
    """Return a timeline of stages of 1 second per forward pass, more or less by `uneven`."""
    draw, per_rank = random.Random(pp), PER_RANK[schedule]
    sizes = [1 + draw.uniform(-uneven, uneven) for _ in range(pp * per_rank)]
    stages = tuple(StageSeconds(size, size, size) for size in sizes)
    return PipelineTimeline(schedule, pp, per_rank, microbatches, stages, send)


@pytest.mark.parametrize("microbatches", [8, 40, 512])
def test_the_bubble_is_the_closed_form(microbatches: int) -> None:
    p = 8
    for schedule in (Schedule.GPipe, Schedule["1F1B"]):
        assert timeline(schedule, p, microbatches).seconds == pytest.approx(3 * (microbatches + p - 1))
    interleaved = timeline(Schedule.Interleaved1F1B, p, microbatches)
    assert interleaved.seconds == pytest.approx(3 * (3 * microbatches + p - 1))


@pytest.mark.parametrize("schedule", PER_RANK)
def test_equal_stages_wait_as_the_plans_bubble_says(schedule: Schedule) -> None:
    found = timeline(schedule, 4, 32)
    assert 1 - found.busy(0) / found.seconds == pytest.approx(bubble(schedule, 4, PER_RANK[schedule], 32))


@pytest.mark.parametrize("schedule", PER_RANK)
@pytest.mark.parametrize("send", [0.0, 0.2])
def test_spans_follow_one_another_and_wait_for_their_input(schedule: Schedule, send: float) -> None:
    found = timeline(schedule, 4, 24, uneven=0.3, send=send)
    spans = found.spans()
    assert max(rank[-1].end for rank in spans) == pytest.approx(found.simulate(24))
    ends = {(s.kind == "F", s.stage, s.microbatch): s.end for rank in spans for s in rank if s.kind != "W"}
    for rank, own in enumerate(spans):
        held = stages_of_rank(schedule, rank, 4, PER_RANK[schedule])
        assert {span.stage for span in own} == set(held)
        assert all(before.end <= after.start + 1e-9 for before, after in pairwise(own))
        assert sum(span.end - span.start for span in own) == pytest.approx(found.busy(rank))
        free = 0.0
        for span in own:
            source, arrived = span.stage + (-1 if span.kind == "F" else 1), 0.0
            if span.kind != "W" and 0 <= source < len(found.stages):
                arrived = ends[span.kind == "F", source, span.microbatch] + send * (source not in held)
            assert span.start == pytest.approx(max(free, arrived))  # at once
            free = span.end


@pytest.mark.parametrize("schedule", PER_RANK)
@pytest.mark.parametrize("rest", [0, 1])
def test_a_long_step_is_extrapolated_from_a_few_rounds(schedule: Schedule, rest: int) -> None:
    """Exactly where stages are alike; within 1 % where they differ by 30 %, with slow sends."""
    rest = 0 if "Interleaved" in schedule.name else rest
    alike, unlike = timeline(schedule, 4, 48 + rest), timeline(schedule, 4, 48 + rest, uneven=0.3, send=0.3)
    assert alike.seconds == pytest.approx(alike.simulate(48 + rest), rel=1e-9)
    assert unlike.seconds == pytest.approx(unlike.simulate(48 + rest), rel=0.01)


def test_a_round_of_an_interleaved_schedule_may_be_longer_than_the_pipeline() -> None:
    """torch runs 36 microbatches on 8 ranks in 4 rounds of 9, all of them full."""
    for schedule in (Schedule.Interleaved1F1B, Schedule.InterleavedZeroBubble):
        found = timeline(schedule, 8, 36)
        assert found.seconds == pytest.approx(found.simulate(36), rel=1e-9)


def test_one_rank_waits_for_nobody() -> None:
    alone = PipelineTimeline(Schedule["1F1B"], 1, 1, 3, (StageSeconds(1, 2, 3),))
    assert alone.seconds == 18
    assert [(span.kind, span.microbatch) for span in alone.spans()[0]] == [
        (k, n) for n in range(3) for k in "FB"
    ]
