"""The verdict on a step: not finite, or above a multiple of the median of the last good norms."""

import math
import random
from statistics import median_low

import pytest
import torch

from dsv3.checkpoint.run_statistics import RunStatistics
from dsv3.config.accidents import AccidentsConfig
from dsv3.training.step_guard import GOOD, NONFINITE, SPIKE, StepGuard
from tests.harness.trained import ALONE

OPTIMIZER = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)


def guard_of(norms: list[float] = [], **config: float) -> StepGuard:  # noqa: B006
    rules = AccidentsConfig(**{"spike_window": 5, **config})  # type: ignore[arg-type]
    return StepGuard(rules, RunStatistics(norms=norms), ALONE.device, OPTIMIZER)


def judge(guard: StepGuard, norm: float, finite: bool = True) -> int:
    return int(guard.judge(torch.tensor(finite), torch.tensor(norm)).kind)


def test_verdicts_by_brute_force_and_over_resumes_at_any_step() -> None:
    choose = random.Random(0)
    steps = [
        (choose.choice([1.0, 2.0, 3.0, 25.0, 90.0, math.nan, math.inf]), choose.random() > 0.1)
        for _ in range(300)
    ]
    guard, good, kinds = guard_of(), list[float](), []
    for norm, finite in steps:
        bad = not finite or not math.isfinite(norm)
        spike = len(good) >= 5 and norm > 10 * median_low(good[-5:])
        expected = NONFINITE if bad else SPIKE if spike else GOOD
        assert judge(guard, norm, finite) == expected
        kinds.append(expected)
        good += [norm] if expected == GOOD else []
        assert guard.good_norms() == good[-5:]
        if choose.random() < 0.2:  # a resume
            guard = guard_of(guard.good_norms())
    assert min(map(kinds.count, (GOOD, NONFINITE, SPIKE))) > 10


def test_until_the_window_is_full_and_without_a_factor_nothing_is_a_spike() -> None:
    assert [judge(guard_of([1.0] * count), 1e6) for count in (0, 4, 5)] == [GOOD, GOOD, SPIKE]
    assert judge(guard_of([1.0] * 5, spike_factor=math.inf), 1e30) == GOOD


def test_without_skip_the_verdict_is_told_and_nothing_is_skipped() -> None:
    verdict = guard_of(skip=False).judge(torch.tensor(False), torch.tensor(1.0))
    assert (int(verdict.kind), bool(verdict.skip)) == (NONFINITE, False)


def test_a_window_that_a_resume_shortens_keeps_the_newest_norms() -> None:
    guard = guard_of([float(number) for number in range(1, 10)])
    assert guard.good_norms() == [5.0, 6.0, 7.0, 8.0, 9.0]
    judge(guard, 10.0)
    assert guard.good_norms() == [6.0, 7.0, 8.0, 9.0, 10.0]


@pytest.mark.parametrize("fused", [True, False])
def test_the_device_skips_where_the_optimizer_can(fused: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], fused=fused)
    optimizer.param_groups[0]["params"] = [parameter]
    guard = StepGuard(AccidentsConfig(), RunStatistics(), torch.device("meta"), optimizer)
    assert guard.asks_host is not fused
