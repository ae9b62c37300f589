"""Compare a step that was computed again with what the run has recorded of it, and say what that means.

Three outcomes: it repeats, and then data or numerics are the cause; it does not, and then the hardware is;
or it differs by no more than another rounding explains, where layout, precision or machine are not the run's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3.launch.held_out import precision_choice
from dsv3.metrics.row import MetricsRow

COMPARED = ("loss", "grad_norm", "mtp_loss", "balance_loss")
"""Columns of metrics.jsonl that a step is compared by; a verdict names the first two."""

ROUNDING = {"fp32": (1e-4, 1e-3), "tf32": (1e-3, 1e-2), "bf16": (5e-3, 5e-2), "fp8": (1e-2, 1e-1)}
"""Largest relative differences (of losses, of the gradient norm) that rounding explains, by the coarsest
precision of the two. docs/reliability.md has what was measured: far less, over 12 steps of a small model. But
differences grow with the steps from the checkpoint on, and with a model's depth."""

REPEATS, ROUNDED, DIFFERS = "repeats", "rounding", "differs"
"""The verdicts."""


def matmul_precision(config: Mapping[str, Any]) -> str | None:
    """Return the number format in which a stored config multiplies: a choice of `precision`, or tf32."""
    choice, node = precision_choice(config), config.get("precision")
    in_tf32 = choice == "fp32" and isinstance(node, Mapping) and node.get("matmul") == "high"
    return "tf32" if in_tf32 else choice


def coarsest(*precisions: str | None) -> str:
    """Return that of some choices of `precision` that rounds most."""
    order = list(ROUNDING)
    return max((each for each in precisions if each in ROUNDING), key=order.index, default=order[-1])


def is_finer(here: str | None, run: str | None) -> bool:
    """Return whether the replay rounds less than the run did."""
    return here in ROUNDING and run in ROUNDING and list(ROUNDING).index(here) < list(ROUNDING).index(run)


@dataclass(frozen=True)
class ComparedStep:
    """One step, in the run and computed again."""

    step: int
    recorded: MetricsRow | None
    """None where metrics.jsonl lacks it."""
    replayed: Mapping[str, float] | None
    """By column, also what is not finite; None for a step that the run skipped, which is not computed."""

    def pair(self, name: str) -> tuple[float, float] | None:
        """Return a column in the run and computed again, nan for what is not finite; None: unknown."""
        if self.recorded is None or self.replayed is None or name not in self.replayed:
            return None
        before = getattr(self.recorded, name)
        # metrics.jsonl has null for both, and every step with a target has a loss and a gradient norm.
        if before is None and name not in COMPARED[:2]:
            return None
        here = self.replayed[name]
        return (math.nan if before is None else before), (here if math.isfinite(here) else math.nan)

    def difference(self, name: str) -> float | None:
        """Return how far a column differs, inf where one alone is finite; None: unknown."""
        pair = self.pair(name)
        if pair is None:
            return None
        lost = [math.isnan(value) for value in pair]
        if any(lost):
            return 0.0 if all(lost) else math.inf
        return abs(pair[0] - pair[1])

    def relative(self, name: str) -> float | None:
        """Return the difference as a share of the recorded value."""
        difference, pair = self.difference(name), self.pair(name)
        if not difference or pair is None or math.isinf(difference):
            return difference
        return difference / max(abs(pair[0]), abs(pair[1]))

    @property
    def is_equal(self) -> bool:
        """Return whether nothing differs, bit for bit."""
        return not any(self.difference(name) for name in COMPARED)

    def within(self, limits: tuple[float, float]) -> bool:
        """Return whether rounding explains all differences; see ROUNDING."""
        of_losses, of_norm = limits
        return all(
            (self.relative(name) or 0.0) <= (of_norm if name == "grad_norm" else of_losses)
            for name in COMPARED
        )

    @property
    def is_finite(self) -> bool:
        """Return whether the step that was computed again has finite numbers."""
        return self.replayed is not None and all(map(math.isfinite, self.replayed.values()))


@dataclass(frozen=True)
class Setup:
    """The ways in which the replay computes, beside those of the run."""

    differs: Mapping[str, Sequence[Any]]
    """What may let it round otherwise: {what: [in the run, here]}."""
    run_precision: str | None
    precision: str | None
    is_deterministic: bool
    """The same operations give the same bits here."""

    @property
    def repeats_exactly(self) -> bool:
        """Return whether nothing but the hardware could let a number differ."""
        return self.is_deterministic and not self.differs

    @property
    def limits(self) -> tuple[float, float]:
        """Return the differences that rounding explains here."""
        return ROUNDING[coarsest(self.run_precision, self.precision)]


@dataclass(frozen=True)
class Verdict:
    """The outcome of a replay, and its cause."""

    outcome: str
    """REPEATS, ROUNDED or DIFFERS."""
    cause: str
    """In words, with what to type next where that tells more."""
    first_difference: int | None
    """The first step of the replay with any difference."""


def find_accident(step: ComparedStep, entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the accident that the run has recorded for a step; None where it was a good one.

    A run that ends at the first bad number has no `entry` of accidents.jsonl, but nulls in its row. The loss
    of a step without a target is null too, and no accident: the replay has none either.
    """
    if entry is not None:
        return dict(entry)
    row = step.recorded
    has_loss = step.replayed is None or "loss" in step.replayed
    if row is not None and (row.grad_norm is None or (row.loss is None and has_loss)):
        return {"kind": "nonfinite", "step": step.step, "skipped": False}
    return None


def judge(steps: Sequence[ComparedStep], accident: Mapping[str, Any] | None, setup: Setup) -> Verdict:
    """Return the verdict on the last of `steps`, of which the others lead there."""
    last = steps[-1]
    first = next((each.step for each in steps if not each.is_equal), None)
    beyond = next((each.step for each in steps if not each.within(setup.limits)), None)
    if setup.repeats_exactly:
        beyond = first
    if accident is not None:
        return _judge_accident(last, accident, setup, first, beyond)
    if first is None:
        return Verdict(REPEATS, "the step is as recorded, bit for bit", None)
    if beyond is None:
        how = _what_differs(setup) or "sums in no fixed order (train.deterministic=true fixes it)"
        return Verdict(ROUNDED, f"no more than rounding explains: {how}", first)
    return Verdict(DIFFERS, _hardware(setup, beyond, last.step), first)


def _judge_accident(
    last: ComparedStep, accident: Mapping[str, Any], setup: Setup, first: int | None, beyond: int | None
) -> Verdict:
    """Return the verdict on a step with an accident: it repeats where the numbers are bad again."""
    if not _is_bad_again(last, accident, setup):
        return Verdict(DIFFERS, _hardware(setup, min(beyond or last.step, last.step), last.step), first)
    if is_finer(setup.precision, setup.run_precision):
        cause = f"data, or the weights before it: {setup.precision} has it too"
    elif setup.precision == "fp32":
        cause = "data, or the weights before it"
    else:
        cause = "data or numerics: precision=fp32 tells which"
    return Verdict(REPEATS, cause, first)


def _is_bad_again(last: ComparedStep, accident: Mapping[str, Any], setup: Setup) -> bool:
    if not last.is_finite:
        return True
    limit, norm = accident.get("limit"), (last.replayed or {}).get("grad_norm", 0.0)
    if accident.get("kind") != "spike":
        return False
    if isinstance(limit, int | float):
        return norm > limit
    return (last.relative("grad_norm") or 0.0) <= setup.limits[1]


def _hardware(setup: Setup, since: int, step: int) -> str:
    """Return the cause of a difference that rounding does not explain."""
    where = "" if since == step else f" (from step {since} on: task.step={since} looks at that one)"
    if setup.precision != setup.run_precision:
        own = setup.run_precision
        return f"numerics of {own}, or hardware: a replay in {own} tells which{where}"
    others = _what_differs(setup)
    besides = f"; besides {others}" if others else ""
    return f"hardware: the same step gives other numbers here{where}{besides}"


def _what_differs(setup: Setup) -> str:
    """Return what is not as in the run, in a few words."""
    names = list(setup.differs)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"other {shown}" if names else ""
