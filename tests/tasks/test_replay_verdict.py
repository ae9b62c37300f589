"""What a difference between a run and its replay means: data or numerics, hardware, or another rounding."""

import math
from dataclasses import replace
from typing import Any

import pytest

from dsv3.metrics.row import MetricsRow
from dsv3.tasks.replay_verdict import (
    ComparedStep,
    Setup,
    coarsest,
    find_accident,
    judge,
    matmul_precision,
)

EXACT = Setup({}, "bf16", "bf16", True)
SHUFFLED = Setup({}, "bf16", "bf16", False)
LAYOUT = Setup({"parallel.degrees.tp": [1, 2]}, "bf16", "bf16", True)
IN_FP32 = Setup({"precision.compute": ["bf16", "fp32"]}, "bf16", "fp32", True)

NONFINITE = {"kind": "nonfinite", "step": 3, "skipped": True, "limit": None}
SPIKE = {"kind": "spike", "step": 3, "skipped": True, "limit": 20.0}


def step(
    number: int = 3,
    loss: float | None = 4.0,
    norm: float | None = 2.0,
    here_loss: float | None = None,
    grad_norm: float | None = None,
) -> ComparedStep:
    """Return a step, recorded with `loss` and `norm` (None: not finite), replayed with these or others."""
    recorded = MetricsRow(step=number, tokens=number, loss=loss, grad_norm=norm)
    replayed = {"loss": here_loss or loss or math.nan, "grad_norm": grad_norm or norm or math.nan}
    return ComparedStep(number, recorded, replayed)


def outcome(steps: list[ComparedStep], setup: Setup, accident: dict[str, Any] | None = None) -> str:
    """Return outcome and cause in one line."""
    found = judge(steps, accident, setup)
    return f"{found.outcome}: {found.cause}"


def test_equal_numbers_repeat_in_any_setup() -> None:
    for setup in (EXACT, SHUFFLED, LAYOUT, IN_FP32):
        assert outcome([step()], setup) == "repeats: the step is as recorded, bit for bit"


def test_the_smallest_difference_is_the_hardware_where_nothing_else_could_be() -> None:
    last_bit = step(loss=4.0, norm=2.0, grad_norm=math.nextafter(2.0, 3.0))
    assert outcome([last_bit], EXACT) == "differs: hardware: the same step gives other numbers here"
    assert outcome([last_bit], SHUFFLED) == (
        "rounding: no more than rounding explains: sums in no fixed order (train.deterministic=true fixes it)"
    )
    assert outcome([last_bit], LAYOUT) == (
        "rounding: no more than rounding explains: other parallel.degrees.tp"
    )


@pytest.mark.parametrize(("precision", "loss", "norm"), [("fp32", 1e-4, 1e-3), ("bf16", 5e-3, 5e-2)])
def test_rounding_explains_as_much_as_the_coarser_precision_rounds(
    precision: str, loss: float, norm: float
) -> None:
    setup = Setup({"ranks": [1, 2]}, precision, "fp32", True)
    for share, expected in ((0.9, "rounding"), (1.1, "differs")):
        of_norm = step(grad_norm=2.0 * (1 - share * norm))
        of_loss = step(here_loss=4.0 * (1 - share * loss))
        assert [judge([each], None, setup).outcome for each in (of_norm, of_loss)] == [expected] * 2
    assert coarsest("fp32", "fp8") == coarsest("fp8", None) == coarsest(None, None) == "fp8"


def test_what_rounding_does_not_explain_is_hardware_or_the_precision_that_differs() -> None:
    far = step(grad_norm=3.0)
    assert outcome([far], LAYOUT).endswith("gives other numbers here; besides other parallel.degrees.tp")
    assert outcome([far], IN_FP32) == ("differs: numerics of bf16, or hardware: a replay in bf16 tells which")
    assert step(loss=None).difference("loss") == 0.0
    lost = step(grad_norm=math.inf)
    assert (lost.difference("grad_norm"), lost.relative("grad_norm")) == (math.inf, math.inf)
    assert judge([lost], None, LAYOUT).outcome == "differs"


def test_a_difference_that_began_earlier_is_told_with_its_step() -> None:
    earlier = step(1, grad_norm=3.0)
    found = judge([earlier, step(2), step(3, grad_norm=3.0)], None, EXACT)
    assert found.first_difference == 1
    assert found.cause.endswith("(from step 1 on: task.step=1 looks at that one)")
    small = step(1, grad_norm=2.0 * (1 + 1e-6))
    found = judge([small, step(2), step(3, grad_norm=3.0)], None, LAYOUT)
    assert (found.first_difference, "from step" in found.cause) == (1, False)


@pytest.mark.parametrize(
    ("setup", "told"),
    [
        (EXACT, "repeats: data or numerics: precision=fp32 tells which"),
        (IN_FP32, "repeats: data, or the weights before it: fp32 has it too"),
        (Setup({}, "fp32", "fp32", True), "repeats: data, or the weights before it"),
    ],
)
def test_an_accident_that_repeats_is_data_or_numerics(setup: Setup, told: str) -> None:
    assert outcome([step(loss=None, norm=None)], setup, NONFINITE) == told


@pytest.mark.parametrize(
    ("setup", "told"),
    [
        (EXACT, "differs: hardware: the same step gives other numbers here"),
        (IN_FP32, "differs: numerics of bf16, or hardware: a replay in bf16 tells which"),
        (
            LAYOUT,
            "differs: hardware: the same step gives other numbers here; besides other parallel.degrees.tp",
        ),
    ],
)
def test_an_accident_that_does_not_repeat_is_hardware_or_the_precision(setup: Setup, told: str) -> None:
    finite = ComparedStep(3, MetricsRow(step=3, tokens=3), {"loss": 4.0, "grad_norm": 2.0})
    assert outcome([finite], setup, NONFINITE) == told


def test_a_spike_repeats_where_the_norm_is_above_what_was_allowed_again() -> None:
    assert judge([step(norm=30.0, grad_norm=21.0)], SPIKE, IN_FP32).outcome == "repeats"
    assert judge([step(norm=30.0, grad_norm=19.0)], SPIKE, IN_FP32).outcome == "differs"
    assert judge([step(norm=30.0, grad_norm=math.nan)], SPIKE, IN_FP32).outcome == "repeats"
    unknown = SPIKE | {"limit": None}
    assert judge([step(norm=30.0, grad_norm=30.1)], unknown, IN_FP32).outcome == "repeats"
    assert judge([step(norm=30.0, grad_norm=3.0)], unknown, IN_FP32).outcome == "differs"


def test_steps_that_the_run_skipped_or_did_not_record_are_not_compared() -> None:
    skipped = ComparedStep(1, MetricsRow(step=1, tokens=1), None)
    unrecorded = ComparedStep(2, None, {"loss": 1.0, "grad_norm": 1.0})
    assert judge([skipped, unrecorded, step()], None, EXACT).outcome == "repeats"
    older = ComparedStep(
        3,
        MetricsRow(step=3, tokens=3, loss=4.0, grad_norm=2.0),
        {"loss": 4.0, "grad_norm": 2.0, "balance_loss": 0.1},
    )
    assert judge([older], None, EXACT).outcome == "repeats"


def test_a_run_that_ended_at_a_bad_number_has_that_accident_in_its_row() -> None:
    found = find_accident(step(loss=None), None)
    assert found == {"kind": "nonfinite", "step": 3, "skipped": False}
    assert find_accident(step(), None) is None
    without_target = replace(step(loss=None), replayed={"grad_norm": 0.0})
    assert find_accident(without_target, None) is None
    assert without_target.difference("loss") is None
    assert find_accident(step(), SPIKE) == SPIKE


def test_tf32_rounds_between_fp32_and_bf16() -> None:
    node = {"compute": "fp32", "matmul": "high", "fp8": None}
    assert matmul_precision({"precision": node}) == "tf32"
    assert matmul_precision({"precision": node | {"compute": "bf16"}}) == "bf16"
    assert matmul_precision({"precision": node | {"matmul": "highest"}}) == "fp32"
    assert matmul_precision({"precision": node | {"fp8": {"dispatch": False}}}) == "fp8"
    assert [coarsest("fp32", "tf32"), coarsest("tf32", "bf16")] == ["tf32", "bf16"]
