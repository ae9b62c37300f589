"""Learning-rate schedules, and the other hyperparameters that change from step to step.

A schedule maps an optimizer step, from 1, to a factor of the optimizer's peak learning rate (optimizer.lr).
The warm-up counts steps. All else goes by the share of the run that is done: that of its tokens, which is
that of its steps unless the batch size ramps up (train.batch_ramp).
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.config.training import TrainConfig
from dsv3.planning.batch_schedule import BatchSchedule


@dataclass(frozen=True)
class StepHyperparameters:
    """The learning rate, the loss weights and the speed of the expert bias in one optimizer step."""

    lr: float
    mtp_weight: float
    balance_weight: float
    """Alpha of the sequence-wise balance loss (eq. 17)."""
    bias_speed: float
    """Gamma: how far the expert bias moves per step (aux-loss-free load balancing)."""
    z_loss_weight: float = 0.0

    @classmethod
    def at(cls, share: float, lr: float, config: TrainConfig) -> "StepHyperparameters":
        """Return the hyperparameters of the step after which `share` of the run is done."""
        mtp, balance = config.mtp_loss, config.balance
        mtp_weight = mtp.weight if share <= mtp.switch_at else mtp.final_weight
        bias_speed = balance.speed if share <= balance.bias_until else 0.0
        return cls(lr, mtp_weight, balance.loss_weight, bias_speed, balance.z_loss_weight)


class Schedule:
    """Base class: linear warm-up from 0 over `warmup_steps`, then the factor of the subclass.

    The factor is 1 at the last warm-up step. `after_warmup` depends on the share of the run that is done.
    Past `total_steps` the factor stays as it was there.
    """

    batch = BatchSchedule(1)
    """Sizes of the run's steps, for their share of its tokens; constant unless build_schedule sets them."""

    def __init__(self, warmup_steps: int, total_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step: int) -> float:
        """Return the factor of the peak learning rate for optimizer step `step` (from 1)."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        return self.after_warmup(min(self.share(step), 1.0))

    def share(self, step: int) -> float:
        """Return the share of the run that is done after `step`; more than 1 past its end."""
        return self.batch.share(step, self.total_steps)

    def last_step(self, share: float) -> int:
        """Return the last step after which no more than `share` of the run is done."""
        return bisect_right(range(1, self.total_steps + 1), share, key=self.share)

    def after_warmup(self, share: float) -> float:
        """Return the factor at `share` of the run, 0 to 1."""
        raise NotImplementedError


class WarmupCosine(Schedule):
    """A half cosine from 1 at the end of the warm-up to `final` at the end of the run."""

    def __init__(self, warmup_steps: int, total_steps: int, final: float) -> None:
        super().__init__(warmup_steps, total_steps)
        self.final = final

    def after_warmup(self, share: float) -> float:
        """Return the factor at `share` of the run, 0 to 1."""
        start = min(self.share(self.warmup_steps), 1.0)
        return _cosine((share - start) / (1.0 - start) if start < 1.0 else 1.0, 1.0, self.final)


class WarmupStableDecay(Schedule):
    """Constant 1 (stable), then a straight line to `final` over the last `decay` share of the run (WSD)."""

    def __init__(self, warmup_steps: int, total_steps: int, decay: float, final: float) -> None:
        super().__init__(warmup_steps, total_steps)
        self.decay = decay
        self.final = final

    def after_warmup(self, share: float) -> float:
        """Return the factor at `share` of the run, 0 to 1."""
        left = 1.0 - share
        if left >= self.decay:
            return 1.0
        return self.final + (1.0 - self.final) * left / self.decay


class Steps(Schedule):
    """Step decay: times `factor` after each share of the run in `at` (V2-Lite: 0.316 at 0.8 and 0.9)."""

    def __init__(self, warmup_steps: int, total_steps: int, at: list[float], factor: float) -> None:
        super().__init__(warmup_steps, total_steps)
        self.at = at
        self.factor = factor

    def after_warmup(self, share: float) -> float:
        """Return the factor at `share` of the run, 0 to 1."""
        return self.factor ** sum(share > passed for passed in self.at)


class DeepSeekV3(Schedule):
    """The schedule of the report over 14.8T tokens (section 4.2), stretched to the length of the run.

    It is constant for 10T tokens, falls along a cosine to a tenth over 4.3T, keeps that tenth for 333B, and
    has 7.3e-6 / 2.2e-4 for the last 167B.
    """

    # Billions of tokens as whole numbers: 14.633 / 14.8 would round to just below the boundary.
    constant_until = 10_000 / 14_800
    decayed_at = 14_300 / 14_800
    low_until = 14_633 / 14_800
    low = 0.1
    last = 7.3e-6 / 2.2e-4

    def after_warmup(self, share: float) -> float:
        """Return the factor at `share` of the run, 0 to 1."""
        if share <= self.constant_until:
            return 1.0
        if share <= self.decayed_at:
            progress = (share - self.constant_until) / (self.decayed_at - self.constant_until)
            return _cosine(progress, 1.0, self.low)
        return self.low if share <= self.low_until else self.last


def build_schedule(config: Config) -> Schedule:
    """Return the schedule of a completed config over the batch sizes of its run."""
    schedule: Schedule = build(config.schedule)
    schedule.batch = BatchSchedule.of(config.train)
    return schedule


def _cosine(progress: float, start: float, end: float) -> float:
    """Return the value at `progress` (0 to 1) of a half cosine from `start` to `end`."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
