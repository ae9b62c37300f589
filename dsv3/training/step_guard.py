"""Decide for every step whether its numbers are good, and keep a bad step out of everything that it changes.

A step is bad where its loss or gradient is not finite, or where the norm of its gradient is a spike: above
train.accidents.spike_factor times the median of the last good norms. The verdict is a tensor on the device,
computed by every rank from the same two sums over all ranks, so that all of them skip the same steps.

On a GPU the host must not wait for it. Optimizers that take PyTorch's `found_inf` (the fused kernels, as
gradient scaling uses them, and those of dsv3) then skip the step on the device. For the others the host
waits; on CPU it has nothing to wait for.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.checkpoint.run_statistics import RunStatistics
from dsv3.config.accidents import AccidentsConfig
from dsv3.distributed.torch_private import takes_found_inf

GOOD, NONFINITE, SPIKE = 0, 1, 2
"""The verdicts on a step."""


class Verdict(NamedTuple):
    """The verdict on a step; scalars on the device."""

    kind: Tensor
    """GOOD, NONFINITE or SPIKE; int32."""
    skip: Tensor
    """Whether the step must change nothing; bool."""
    limit: Tensor
    """The norm from which on it would have been a spike, inf where there was none; fp32."""


class StepGuard:
    """The rule, with the norms of the last good steps on the device."""

    def __init__(
        self,
        config: AccidentsConfig,
        statistics: RunStatistics,
        device: torch.device,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.config = config
        self.window = config.spike_window
        self.optimizer = optimizer
        elsewhere = any(p.device != device for group in optimizer.param_groups for p in group["params"])
        self.asks_host = device.type == "cpu" or elsewhere or not takes_found_inf(optimizer)
        """The host reads the verdict and does not call the optimizer, which cannot skip by itself."""
        self.places = torch.arange(self.window, device=device)
        self.middle = torch.tensor([(self.window - 1) // 2], device=device)
        self.norms = torch.full((self.window,), math.inf, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.load(statistics)

    def load(self, statistics: RunStatistics) -> None:
        """Take over the norms of a checkpoint; they are those of its last good steps."""
        kept = statistics.norms[-self.window :]
        self.norms.fill_(math.inf)
        self.norms[: len(kept)] = torch.tensor(kept, dtype=torch.float32, device=self.norms.device)
        self.count.fill_(len(kept))

    def good_norms(self) -> list[float]:
        """Return the norms of the last good steps, the oldest first; the host waits for the device."""
        count, norms = int(self.count), self.norms.tolist()
        first = count % self.window
        return norms[:count] if count <= self.window else [*norms[first:], *norms[:first]]

    @torch.no_grad()
    def judge(self, finite: Tensor, norm: Tensor, has_targets: Tensor | None = None) -> Verdict:
        """Return the verdict on a step, and remember the norm of a good one.

        finite: whether all of its losses are, bool. norm: of its whole gradient, before clipping, fp32.
        has_targets: bool, None for True. The norm of a step without a target is about 0: it is not
        remembered, or the next step with targets would be a spike.
        """
        finite = finite & norm.isfinite()
        limit = torch.full_like(norm, math.inf)
        if math.isfinite(self.config.spike_factor):
            # Of an even number the lower of the two in the middle. The window is full or there is no limit.
            median = self.norms.sort().values.index_select(0, self.middle)[0]
            limit = torch.where(self.count >= self.window, median * self.config.spike_factor, limit)
        spike = finite & (norm > limit)
        kind = torch.where(finite, spike * SPIKE, NONFINITE).int()
        good = kind == GOOD
        remembered = good if has_targets is None else good & has_targets
        place = (self.places == self.count % self.window) & remembered
        self.norms = torch.where(place, norm, self.norms)
        self.count += remembered
        return Verdict(kind, ~good & self.config.skip, limit)

    def step(self, skip: Tensor) -> None:
        """Let the optimizer take its step on the device, which `skip` makes it leave all as it is."""
        self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]
