from typing import Any

import pytest
from torch.distributed.pipelining.schedules import PipelineScheduleMulti

from dsv3.config.parallel import PipelineConfig, Schedule
from dsv3.planning import pipeline_schedules
from dsv3.planning.pipeline_schedules import bubble, schedule_actions
from dsv3.planning.pipeline_stages import stages_per_rank, supports_microbatches
from tests.planning.test_pipeline_stages import LAYOUTS, torch_schedule

KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
ONE = Schedule["1F1B"]


def torch_order(actions: list[Any]) -> list[tuple[str, int, int]]:
    found = []
    for action in actions:
        for one in () if action is None else action.sub_actions or (action,):
            found.append((KINDS[one.computation_type.name], one.stage_index, one.microbatch_index))
    return found


@pytest.mark.parametrize(("schedule", "pp", "per_rank"), LAYOUTS, ids=str)
def test_the_order_is_that_of_torch(schedule: Schedule, pp: int, per_rank: int) -> None:
    for microbatches in (1, 2, 3, 5, 8, 9, 14):
        if not supports_microbatches(schedule, pp, per_rank, microbatches):
            continue
        built = torch_schedule(schedule, 0, pp, per_rank, microbatches)
        for rank in range(pp):
            made = list(schedule_actions(schedule, rank, pp, per_rank, microbatches))
            forwards = [action for action in made if action.kind == "F"]
            assert len(forwards) == len(set(forwards)) == per_rank * microbatches
            if isinstance(built, PipelineScheduleMulti):
                assert made == torch_order(built.pipeline_order[rank])


def test_one_stage_a_rank_warms_up_by_its_distance_from_the_last() -> None:
    def kinds(schedule: Schedule, rank: int) -> str:
        return "".join(action.kind for action in schedule_actions(schedule, rank, 3, 1, 4))

    assert [kinds(ONE, rank) for rank in range(3)] == ["FFFBFBBB", "FFBFBFBB", "FBFBFBFB"]
    assert kinds(Schedule.GPipe, 1) == "FFFFBBBB"


@pytest.mark.parametrize(("pp", "microbatches"), [(2, 2), (4, 8), (16, 120), (4, 4)])
def test_the_bubble_is_the_known_one(pp: int, microbatches: int) -> None:
    for schedule in (ONE, Schedule.GPipe):
        assert bubble(schedule, pp, 1, microbatches) == pytest.approx((pp - 1) / (microbatches + pp - 1))
    for per_rank in (2, 3):
        interleaved = (pp - 1) / (per_rank * microbatches + pp - 1)
        if microbatches % pp == 0:
            assert bubble(Schedule.Interleaved1F1B, pp, per_rank, microbatches) == pytest.approx(interleaved)


def test_splitting_the_backward_pass_fills_the_bubble() -> None:
    filled = [bubble(s, 4, 2, 16) for s in (Schedule.InterleavedZeroBubble, Schedule.ZBVZeroBubble)]
    assert max(filled) < bubble(Schedule.Interleaved1F1B, 4, 2, 16)
    # DualPipeV overlaps work of two microbatches, which is not counted here.
    assert bubble(Schedule.DualPipeV, 4, 2, 16) < bubble(ONE, 4, 1, 16)
    assert bubble(ONE, 1, 1, 7) == 0.0


@pytest.mark.parametrize("schedule", Schedule)
def test_more_microbatches_than_are_simulated_give_the_same(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_rank = stages_per_rank(schedule, PipelineConfig())
    for pp, microbatches in ((4, 32), (3, 30), (2, 22)):
        told = bubble(schedule, pp, per_rank, microbatches)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline_schedules, "_ROUNDS", 1000)
            assert told == pytest.approx(bubble.__wrapped__(schedule, pp, per_rank, microbatches))
