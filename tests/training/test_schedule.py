"""The learning rate at the points that the papers name."""

import math

import pytest

from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.training.schedule import DeepSeekV3, Schedule, Steps, WarmupCosine, WarmupStableDecay

PEAK = 2.2e-4
# A step is 0.1 billion tokens, so 14.8T tokens are 148,000 steps.
V3 = DeepSeekV3(warmup_steps=2000, total_steps=148_000)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (1, 1.1e-7),
        (1000, 1.1e-4),
        (2000, 2.2e-4),
        (2001, 2.2e-4),
        (50_000, 2.2e-4),
        (100_000, 2.2e-4),  # 10T
        (121_500, (2.2e-4 + 2.2e-5) / 2),  # half-way through the 4.3T of the cosine
        (110_750, 2.2e-5 + 1.98e-4 * (1 + math.sqrt(0.5)) / 2),  # a quarter
        (143_000, 2.2e-5),  # 14.3T
        (143_001, 2.2e-5),
        (145_000, 2.2e-5),
        (146_329, 2.2e-5),
        (146_330, 2.2e-5),  # 333B later
        (146_331, 7.3e-6),
        (148_000, 7.3e-6),
        (200_000, 7.3e-6),
    ],
)
def test_deepseek_v3_course_at_the_points_of_the_report(step: int, lr: float) -> None:
    assert PEAK * V3(step) == pytest.approx(lr, rel=1e-9)


def test_deepseek_v3_course_falls_from_the_first_step_after_10_trillion_tokens_to_14_3() -> None:
    assert V3(100_001) < 1
    course = [V3(step) for step in range(100_000, 143_001, 500)]
    assert course == sorted(course, reverse=True)
    assert len(set(course)) == len(course)


def test_deepseek_v3_course_is_stretched_to_the_run() -> None:
    short = DeepSeekV3(warmup_steps=20, total_steps=1480)
    for share in (0.1, 0.5, 0.7, 0.8, 0.95, 0.98, 1.0):
        assert short(round(share * 1480)) == pytest.approx(V3(round(share * 1480) * 100))


def test_v2_lite_course_drops_by_0_316_after_80_and_after_90_percent() -> None:
    steps = Steps(warmup_steps=2000, total_steps=100_000, at=[0.8, 0.9], factor=0.316)
    peak = 4.2e-4
    expected = {
        1000: 2.1e-4,
        2000: 4.2e-4,
        80_000: 4.2e-4,
        80_001: 4.2e-4 * 0.316,
        90_000: 4.2e-4 * 0.316,
        90_001: 4.2e-4 * 0.099856,
        100_000: 4.2e-4 * 0.099856,
    }
    for step, lr in expected.items():
        assert peak * steps(step) == pytest.approx(lr)


def test_wsd_is_constant_and_then_a_straight_line() -> None:
    wsd = WarmupStableDecay(warmup_steps=10, total_steps=1000, decay=0.2, final=0.1)
    expected = {5: 0.5, 10: 1, 400: 1, 800: 1, 850: 0.775, 900: 0.55, 950: 0.325, 1000: 0.1, 1200: 0.1}
    assert {step: wsd(step) for step in expected} == pytest.approx(expected)
    to_zero = WarmupStableDecay(warmup_steps=0, total_steps=10, decay=0.5, final=0.0)
    assert [to_zero(step) for step in range(1, 11)] == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


def test_wsd_may_decay_never_or_all_the_time() -> None:
    never = WarmupStableDecay(warmup_steps=0, total_steps=10, decay=0.0, final=0.0)
    assert [never(step) for step in (1, 5, 9, 10, 11)] == [1] * 5
    always = WarmupStableDecay(warmup_steps=0, total_steps=10, decay=1.0, final=0.0)
    assert [always(step) for step in (1, 5, 10)] == pytest.approx([0.9, 0.5, 0])


def test_cosine_begins_where_the_warm_up_ends_and_ends_at_the_end() -> None:
    cosine = WarmupCosine(warmup_steps=100, total_steps=1100, final=0.1)
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    expected = {1: 0.01, 50: 0.5, 100: 1, 350: quarter, 600: 0.55, 1100: 0.1, 5000: 0.1}
    assert {step: cosine(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    "schedule",
    [
        WarmupCosine(100, 10, final=0.1),
        WarmupStableDecay(100, 10, decay=0.2, final=0.0),
        Steps(100, 10, at=[0.8, 0.9], factor=0.316),
        DeepSeekV3(100, 10),
    ],
)
def test_a_run_shorter_than_its_warm_up_only_warms_up(schedule: Schedule) -> None:
    assert [schedule(step) for step in range(1, 11)] == pytest.approx([n / 100 for n in range(1, 11)])
    assert all(0 <= schedule(step) <= 1 for step in range(1, 300))


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    for schedule in (DeepSeekV3(0, 1000), Steps(0, 1000, [0.8], 0.1), WarmupStableDecay(0, 1000, 0.2, 0.0)):
        assert schedule(1) == 1
    # A cosine has moved one step of 1,000.
    assert WarmupCosine(0, 1000, 0.0)(1) == pytest.approx((1 + math.cos(math.pi / 1000)) / 2)


@pytest.mark.parametrize(
    "schedule",
    [WarmupCosine(90, 100, final=0.1), WarmupStableDecay(90, 100, decay=0.2, final=0.0), DeepSeekV3(90, 100)],
)
def test_a_warm_up_that_reaches_into_the_decay_still_ends_at_the_peak(schedule: Schedule) -> None:
    assert schedule(89) == pytest.approx(89 / 90)
    assert schedule(90) == 1
    assert schedule(91) <= 1


@pytest.mark.parametrize("kind", ["v3", "steps", "wsd", "cosine"])
def test_under_a_ramp_a_step_has_the_rate_of_its_tokens(kind: str) -> None:
    """Steps have 10, 20, 30 and then 40 rows; each has the rate of the constant run's step at its tokens."""

    def build(total: int) -> Schedule:
        return {
            "v3": DeepSeekV3(0, total),
            "steps": Steps(0, total, [0.5, 0.75], 0.1),
            "wsd": WarmupStableDecay(0, total, 0.5, 0.0),
            "cosine": WarmupCosine(0, total, 0.1),
        }[kind]

    ramp = BatchSchedule(40, 10, 10, 2400, 4)  # 200 rows at each of three sizes, for 20, 10 and 7 steps
    assert ramp.samples_after(0, 87) == 610 + 50 * 40
    ramped, constant = build(87), build(ramp.samples_after(0, 87))
    ramped.batch = ramp
    for step in range(1, 88):
        assert ramped(step) == pytest.approx(constant(ramp.samples_after(0, step)), rel=1e-12)
    for share in (0.0, 0.1, 0.5, 0.999):
        last = ramped.last_step(share)
        assert ramped.share(last) <= share < ramped.share(last + 1)


def test_a_warm_up_counts_steps_also_under_a_ramp() -> None:
    cosine = WarmupCosine(10, 87, 0.1)
    cosine.batch = BatchSchedule(40, 10, 10, 2400, 4)
    assert [cosine(step) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert 1.0 > cosine(11) > cosine(12) > cosine(86) > cosine(87) == pytest.approx(0.1)
