"""Courses of the learning rate: each gives, for a step from 1, a factor of the optimizer's peak lr."""

import math


class Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then what a subclass says about the share of the run.

    The factor at the last warm-up step is 1. `share` counts whole steps: 0 before the first, 1 at the
    last of `total_steps`; beyond it the course stays where it ended.
    """

    def __init__(self, warmup_steps: int, total_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step: int) -> float:
        """Factor of the peak learning rate for optimizer step `step` (from 1)."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        return self.after_warmup(min(step / self.total_steps, 1.0))

    def after_warmup(self, share: float) -> float:
        """Factor at `share` of the run."""
        raise NotImplementedError


class WarmupCosine(Schedule):
    """A half cosine from 1 at the end of the warm-up to `final` at the end of the run."""

    def __init__(self, warmup_steps: int, total_steps: int, final: float) -> None:
        super().__init__(warmup_steps, total_steps)
        self.final = final

    def after_warmup(self, share: float) -> float:
        """Factor at `share` of the run."""
        start = min(self.warmup_steps / self.total_steps, 1.0)
        return _cosine((share - start) / (1.0 - start) if start < 1.0 else 1.0, 1.0, self.final)


class WarmupStableDecay(Schedule):
    """1 until the last `decay` share of the run, then a straight line to `final`."""

    def __init__(self, warmup_steps: int, total_steps: int, decay: float, final: float) -> None:
        super().__init__(warmup_steps, total_steps)
        self.decay = decay
        self.final = final

    def after_warmup(self, share: float) -> float:
        """Factor at `share` of the run."""
        left = 1.0 - share
        if left >= self.decay:
            return 1.0
        return self.final + (1.0 - self.final) * left / self.decay


class Steps(Schedule):
    """Multiplied by `factor` once each share of `at` has passed (V2-Lite: 0.316 at 80 % and 90 %)."""

    def __init__(self, warmup_steps: int, total_steps: int, at: list[float], factor: float) -> None:
        super().__init__(warmup_steps, total_steps)
        self.at = at
        self.factor = factor

    def after_warmup(self, share: float) -> float:
        """Factor at `share` of the run."""
        return self.factor ** sum(share > passed for passed in self.at)


class DeepSeekV3(Schedule):
    """The report's course over 14.8T tokens (section 4.2), stretched to the run.

    Constant to 10T, cosine to a tenth over 4.3T, that tenth for 333B, and 7.3e-6 / 2.2e-4 for the last
    167B.
    """

    # Billions of tokens as whole numbers: 14.633 / 14.8 would round to just below the boundary.
    constant_until = 10_000 / 14_800
    decayed_at = 14_300 / 14_800
    low_until = 14_633 / 14_800
    low = 0.1
    last = 7.3e-6 / 2.2e-4

    def after_warmup(self, share: float) -> float:
        """Factor at `share` of the run."""
        if share <= self.constant_until:
            return 1.0
        if share <= self.decayed_at:
            progress = (share - self.constant_until) / (self.decayed_at - self.constant_until)
            return _cosine(progress, 1.0, self.low)
        return self.low if share <= self.low_until else self.last


def _cosine(progress: float, start: float, end: float) -> float:
    """A half cosine from `start` at 0 to `end` at 1."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
