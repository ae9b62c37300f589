"""Measured against planned: what is compared, from when on, and what is told where a run is off its plan."""

from dataclasses import replace
from typing import Any

import pytest

from dsv3.config.hardware import HardwareConfig
from dsv3.config.parallel import RecomputeMode
from dsv3.metrics.row import MetricsRow
from dsv3.planning.plan import Plan, plan_from_shape
from dsv3.planning.step_time import Cause
from dsv3.training.plan_check import GIB, RECENT, SLACK_GIB, WARM_UP, WINDOW, Held, PlanCheck
from tests.metrics.planned import GPU, plan_of_stages

LENGTH = 4096


class Steps:
    """A run of one process; its steps are `speed` times as fast as planned, and take `memory` as much."""

    def __init__(self, plan: Plan, checkpoint_every: int = 0, held: Held | None = None) -> None:
        self.check = PlanCheck(plan, held or Held(), LENGTH, checkpoint_every)
        self.check.start(0)
        self.plan = plan
        self.rows: list[MetricsRow] = []
        self.tokens = 0

    def take(
        self, count: int, speed: float = 1.0, memory: float | None = None, batch: int = 32, **more: Any
    ) -> MetricsRow:
        """Take so many steps of `batch` sequences; return the last row."""
        for _ in range(count):
            self.tokens += batch * LENGTH
            row = MetricsRow(step=len(self.rows) + 1, tokens=self.tokens, **more)
            self.check.predict(row)
            if row.planned_tokens_per_second is not None:
                row.tokens_per_second = row.planned_tokens_per_second * speed
            else:
                row.tokens_per_second = 1.0
            self.rows.append(row)
        if memory is not None:
            assert row.planned_memory_gib is not None
            self.check.memory_gib = row.planned_memory_gib * memory
        return row

    def told(self) -> str:
        return "\n".join(self.check.news())


def test_a_row_has_the_plans_values_beside_the_measured_ones() -> None:
    plan = plan_of_stages()
    row = Steps(plan).take(1)
    assert plan.time is not None
    assert row.planned_tokens_per_second == plan.time.tokens_per_second
    assert row.planned_memory_gib == plan.memory.total / GIB
    assert row.scalars().keys() >= {"planned_tokens_per_second", "planned_memory_gib"}


@pytest.mark.parametrize(
    ("speed", "memory", "words"),
    [
        (0.76, 1.0, ""),
        (1.24, 1.0, ""),
        (1.0, 1.24, ""),
        (1.0, 0.76, ""),
        (0.74, 1.0, "26% slower than planned"),
        (1.26, 1.0, "26% faster than planned"),
        (3.0, 1.0, "3 times as fast as planned"),
        (1.0, 1.26, "26% more memory than planned"),
        (1.0, 0.74, "26% less memory than planned"),
    ],
)
def test_a_difference_of_26_percent_is_explained_and_one_of_24_is_not(
    speed: float, memory: float, words: str
) -> None:
    steps = Steps(plan_of_stages())
    steps.take(WARM_UP + WINDOW, speed, memory)
    first, *advice = steps.check.news()
    planned = f"planned {steps.rows[-1].planned_tokens_per_second:,.0f} ({speed - 1:+.0%})"
    assert first.startswith("measured against planned: ")
    assert planned in first
    assert f"({memory - 1:+.0%})" in first
    assert len(advice) == bool(words)
    assert words in "".join(advice)
    summary = steps.check.summary()
    assert summary == [
        ("against plan", first.removeprefix("measured against planned: ")),
        *(("", a) for a in advice),
    ]


def test_steps_of_the_warm_up_never_count_and_nothing_is_told_before_enough_others() -> None:
    steps = Steps(plan_of_stages())
    steps.take(WARM_UP, speed=0.01, memory=1.0)
    for _ in range(WINDOW - 1):
        steps.take(1)
        assert steps.check.news() == []
    assert steps.check.summary()[0][0] == "planned"  # of a short run the plan alone
    steps.take(1)
    assert "(+0%)" in steps.told()
    assert steps.told() == ""  # once


def test_a_run_that_becomes_slow_later_is_told_so_once() -> None:
    steps = Steps(plan_of_stages())
    steps.take(WARM_UP + WINDOW)
    assert "slower" not in steps.told()
    steps.take(2 * WINDOW, speed=0.5)
    assert "50% slower than planned" in steps.told()
    steps.take(WINDOW, speed=0.5)
    assert steps.told() == ""


def test_a_run_of_weeks_that_becomes_slow_is_told_so_soon() -> None:
    steps = Steps(plan_of_stages())
    steps.take(5 * RECENT)
    assert "slower" not in steps.told()
    steps.take(RECENT // 2 - 1, speed=0.5)
    assert "slower" not in steps.told()
    steps.take(2, speed=0.5)
    assert "50% slower than planned" in steps.told()


def test_in_a_ramp_the_plan_of_the_present_batch_counts() -> None:
    plan = plan_of_stages()
    steps = Steps(plan)
    small = steps.take(WARM_UP + WINDOW, batch=8)
    shape = replace(plan.shape, microbatches=4)
    own = plan_from_shape(plan.model, plan.degrees, plan.hardware, shape)
    assert own.time is not None
    assert plan.time is not None
    assert small.planned_tokens_per_second == own.time.tokens_per_second < plan.time.tokens_per_second
    assert small.planned_memory_gib == own.memory.total / GIB
    assert "(+0%)" in steps.told()
    whole = steps.take(WINDOW - 1)
    assert whole.planned_tokens_per_second == plan.time.tokens_per_second
    assert steps.check.compare() is None
    steps.take(1)
    found = steps.check.compare()
    assert found is not None
    assert len(found.rows) == WINDOW
    assert found.speed_off == pytest.approx(0)


def test_where_no_speed_is_known_memory_alone_is_told() -> None:
    plan = plan_of_stages()
    steps = Steps(plan_from_shape(plan.model, plan.degrees, HardwareConfig(name="cpu"), plan.shape))
    row = steps.take(WARM_UP + WINDOW, memory=1.5)
    assert row.planned_tokens_per_second is None
    first, advice = steps.check.news()
    assert "tokens/s" not in first + advice
    assert "50% more memory than planned; planned GiB: activations" in advice
    assert "GiB" in str(steps.check.summary())


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_small_differences_of_memory_are_no_news(name: str) -> None:
    hardware = replace(GPU, name=name)
    slack = SLACK_GIB["cpu" if name == "cpu" else "cuda"]
    plan = plan_of_stages(hardware=hardware)
    small = replace(
        plan, memory=replace(plan.memory, activations=0, weight_copies=0, optimizer=0, gradients=0)
    )
    small = replace(small, memory=replace(small.memory, parameters=2**20))
    steps = Steps(small)
    steps.take(WARM_UP + WINDOW)
    for more, verdicts in ((0.9 * slack, []), (1.1 * slack, ["more memory"])):
        steps.check.memory_gib = 2**20 / GIB + more
        found = steps.check.compare()
        assert found is not None
        assert found.verdicts() == verdicts


def test_on_a_cpu_the_plan_begins_at_what_the_process_held_before_its_model() -> None:
    plan = plan_of_stages(hardware=replace(GPU, name="cpu"))
    for peak in (1 * GIB, 1000 * GIB):
        row = Steps(plan, held=Held(now=GIB // 2, peak=peak)).take(1)
        assert row.planned_memory_gib == max(peak / GIB, plan.memory.total / GIB + 0.5)


def test_copies_of_a_background_save_count_from_the_first_save_on() -> None:
    plan = plan_of_stages(hardware=replace(GPU, name="cpu"))
    plan = plan_from_shape(plan.model, plan.degrees, plan.hardware, replace(plan.shape, host_copies=True))
    assert plan.memory.save_copies > 0
    steps = Steps(plan, checkpoint_every=3)
    planned = [steps.take(1).planned_memory_gib for _ in range(4)]
    before = (plan.memory.total - plan.memory.save_copies) / GIB
    assert planned == [before, before, before, plan.memory.total / GIB]


def test_advice_names_the_largest_causes_and_what_to_look_at() -> None:
    def advice(plan: Plan, memory: float = 1.0, **row: Any) -> str:
        steps = Steps(plan)
        steps.take(WARM_UP + WINDOW, 0.5, memory, **row)
        return steps.told()

    plan = plan_of_stages(hardware=replace(GPU, source="measured: here"))
    assert plan.time is not None
    shares = sorted(((s / plan.time.seconds, c) for c, s in plan.time.causes.items()), key=lambda s: -s[0])
    largest = ", ".join(f"{cause.value} {share:.0%}" for share, cause in shares[:3])
    assert f"; the plan: {largest}; " in advice(plan)
    seconds = 2 * plan.time.seconds
    waits = advice(plan, data_wait=0.3 * seconds)
    assert "a step waits 30% of its time for data (data_wait): raise train.prefetch" in waits
    assert "profile=on" not in waits
    slow = advice(plan, straggler=0.4, straggler_rank=3)
    assert "the other ranks wait 40% of a step for rank 3 (straggler)" in slow
    assumed = advice(plan_of_stages())
    assert assumed.endswith(
        "its speeds are assumed: conf/hardware/gpu.yaml; measure them: task=calibrate launch.nproc=8"
    )
    assert plan.shape.recompute is RecomputeMode.full
    assert plan.time.causes[Cause.recomputation] > 0.1 * plan.time.seconds
    assert "memory is left for less recomputation: recompute=selective or none" in advice(plan, memory=0.8)
    full = replace(GPU, source="measured: here", memory_bytes=plan.memory.total + 10**9)
    nothing_else = advice(plan_of_stages(hardware=full))
    assert "recompute=" not in nothing_else
    assert "; profile=on shows where the time goes" in nothing_else
