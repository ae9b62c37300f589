"""Compare a run with its plan: tokens per second and peak memory, measured against planned.

A row of metrics.jsonl has the plan's values beside the measured ones. After the warm-up, at the end, and
where a run leaves its plan later on, the console has both in a line. Where they differ by more than LIMIT a
second line names the largest causes of the planned time, and what to look at.

Medians of the newest steps with the present batch are compared, none of the first WARM_UP steps of a process:
they compile, choose kernels and fill caches.
"""

import resource
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from dsv3.config.hardware import CPU
from dsv3.config.parallel import RecomputeMode
from dsv3.distributed.process_group import RankContext
from dsv3.metrics.row import MetricsRow
from dsv3.planning.memory import MemoryBytes
from dsv3.planning.plan import Plan, plan_from_shape
from dsv3.planning.step_time import Cause, StepTime
from dsv3.training.stragglers import NOTABLE

LIMIT = 0.25
"""Difference from the plan, as a share of what is planned, from which it is explained."""

WARM_UP = 10
"""Steps of a process that are not compared."""

WINDOW = 10
"""Steps that a comparison needs at least; after a change of the batch they are counted anew."""

RECENT = 500
"""Steps that a comparison looks back at most. So a run that becomes slow after weeks is told soon, and a run
does not keep its rows."""

SLACK_GIB = {"cpu": 1.0, "cuda": 0.25}
"""Differences of memory that are no news, by device: libraries that are imported late, pools of threads and
of the allocator, workspaces of kernels. No plan counts them."""

NOTABLE_LOADING = 0.1
"""Share of a step's time from which the wait for data is told as a reason."""

NAMED_CAUSES, SMALL_CAUSE = 3, 0.05
"""The causes that a line names: so many, each at least of this share of the planned time."""

GIB = 2**30


@dataclass(frozen=True)
class Held:
    """Memory of the busiest rank before its model was made; zeros on a GPU, where nothing is."""

    now: int = 0
    """Bytes."""
    peak: int = 0
    """Bytes at most, so far: preparing data may take more than training."""

    @classmethod
    def measure(cls, ranks: RankContext) -> "Held":
        """Return it; all ranks call this together, before they make a model."""
        if ranks.device.type != "cpu":
            return cls()
        now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        both = ranks.max(torch.tensor([now, peak], dtype=torch.float64, device=ranks.device)).tolist()
        return cls(*map(int, both))


@dataclass(frozen=True)
class Prediction:
    """The planned speed and memory of steps with one batch size."""

    time: StepTime | None
    memory: MemoryBytes
    memory_gib: float
    """Peak of the busiest rank, with what a CPU's process holds besides: comparable to memory_gib."""

    @property
    def tokens_per_second(self) -> float | None:
        """Return the tokens per second of all ranks, None where the hardware's speed is not known."""
        return None if self.time is None else self.time.tokens_per_second


@dataclass(frozen=True)
class Comparison:
    """Medians of measured steps against the prediction for them; None is unknown."""

    prediction: Prediction
    rows: Sequence[MetricsRow]
    memory_gib: float | None
    """Peak of the busiest rank so far."""
    slack_gib: float = 0.0
    """Differences of memory up to this are none."""

    @property
    def tokens_per_second(self) -> float | None:
        """Return the median of the steps."""
        rates = [row.tokens_per_second for row in self.rows if row.tokens_per_second is not None]
        return median(rates) if rates else None

    @property
    def speed_off(self) -> float | None:
        """Return by which share of it the speed differs from the planned one; below 0 it is slower."""
        return _off(self.tokens_per_second, self.prediction.tokens_per_second)

    @property
    def memory_off(self) -> float | None:
        """Return by which share of it the memory differs from the planned one; below 0 it is less."""
        return _off(self.memory_gib, self.prediction.memory_gib)

    def verdicts(self) -> list[str]:
        """Return what is off by more than LIMIT: slower, faster, more memory, less memory."""
        found = []
        if self.speed_off is not None and abs(self.speed_off) > LIMIT:
            found.append("slower" if self.speed_off < 0 else "faster")
        measured, planned = self.memory_gib, self.prediction.memory_gib
        if measured is not None and abs(measured - planned) > max(LIMIT * planned, self.slack_gib):
            found.append("more memory" if measured > planned else "less memory")
        return found

    def told(self) -> str:
        """Return measured and planned values in a line; "" where none can be compared."""
        parts = []
        if self.speed_off is not None:
            planned = f"planned {self.prediction.tokens_per_second:,.0f} ({self.speed_off:+.0%})"
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s, {planned}")
        if self.memory_off is not None:
            planned = f"planned {self.prediction.memory_gib:.2f} ({self.memory_off:+.0%})"
            parts.append(f"{self.memory_gib:.2f} GiB, {planned}")
        return "; ".join(parts)


def _off(measured: float | None, planned: float | None) -> float | None:
    return None if measured is None or not planned else measured / planned - 1


class PlanCheck:
    """Knows what the plan says of each step, and judges the steps so far; belongs to one process of a run.

    Args:
        plan: that of the whole batch.
        held: what the process held before its model was made.
        length: tokens of a sequence.
        checkpoint_every: steps between two saves: a CPU's copies for a background save are there from the
            first one on.
    """

    def __init__(self, plan: Plan, held: Held, length: int, checkpoint_every: int) -> None:
        self.plan = plan
        self.held = held
        self.length = length
        self.checkpoint_every = checkpoint_every
        on_cpu = plan.hardware.name == CPU
        self.slack_gib = SLACK_GIB["cpu" if on_cpu else "cuda"]
        self.has_saved = False
        self.prediction: Prediction | None = None
        """That of the present batch."""
        self.memory_gib: float | None = None
        """Peak of the busiest rank, as last measured."""
        self._known: dict[tuple[int, bool], Prediction] = {}
        self._tokens, self._steps = 0, 0
        self._rows: deque[MetricsRow] = deque(maxlen=RECENT)
        self._told: set[str] | None = None

    def start(self, tokens: int) -> None:
        """Begin, or go back, to where the run has taken so many tokens."""
        self._tokens = tokens
        self._rows.clear()

    def predict(self, row: MetricsRow) -> None:
        """Fill in what is planned for the step that has just been taken."""
        sequences = (row.tokens - self._tokens) // self.length
        self._tokens = row.tokens
        prediction = self.prediction_of(sequences)
        if self.prediction is None or prediction.time != self.prediction.time:
            self._rows.clear()
        self.prediction = prediction
        row.planned_tokens_per_second = prediction.tokens_per_second
        row.planned_memory_gib = prediction.memory_gib
        self._steps += 1
        if self._steps > WARM_UP:
            self._rows.append(row)
        if self.checkpoint_every and row.step % self.checkpoint_every == 0:
            self.has_saved = True

    def prediction_of(self, sequences: int) -> Prediction:
        """Return what is planned for steps of so many sequences."""
        shape = self.plan.shape
        count = max(1, sequences // (shape.microbatch_size * self.plan.degrees.data_parallel))
        key = count, self.has_saved
        if key not in self._known:
            plan = self.plan
            if count != shape.microbatches:
                shape = replace(shape, microbatches=count)
                plan = plan_from_shape(plan.model, plan.degrees, plan.hardware, shape)
            memory = plan.memory.total - (0 if self.has_saved else plan.memory.save_copies)
            peak = max(self.held.peak, self.held.now + memory)
            self._known[key] = Prediction(plan.time, plan.memory, peak / GIB)
        return self._known[key]

    def compare(self) -> Comparison | None:
        """Return the comparison of the present batch; None where too few of its steps are measured."""
        measured = [row for row in self._rows if row.tokens_per_second is not None]
        if self.prediction is None or len(measured) < WINDOW:
            return None
        return Comparison(self.prediction, measured, self.memory_gib, self.slack_gib)

    def news(self) -> list[str]:
        """Return lines for the user: the first comparison, and each kind of difference once more."""
        found = self.compare()
        if found is None:
            return []
        verdicts = set(found.verdicts())
        if self._told is None:
            lines = [f"measured against planned: {told}"] if (told := found.told()) else []
            self._told = set()
        else:
            lines = []
        if verdicts - self._told:
            lines += [f"measured against planned: {found.told()}"] * (not lines)
            lines += self.advice(found)
        self._told |= verdicts
        return lines

    def summary(self) -> list[tuple[str, str]]:
        """Return the rows of the table at the end of a run."""
        found = self.compare()
        if found is not None:
            told = found.told()
            return [("against plan", told)] * bool(told) + [("", line) for line in self.advice(found)]
        if self.prediction is None:
            return []
        speed, memory = self.prediction.tokens_per_second, self.prediction.memory_gib
        return [("planned", f"{memory:.2f} GiB" + ("" if speed is None else f", {speed:,.0f} tokens/s"))]

    def advice(self, found: Comparison) -> list[str]:
        """Return a line per kind of difference: the largest causes, and what to look at."""
        lines = []
        for verdict in found.verdicts():
            if verdict in ("slower", "faster"):
                off, time = found.speed_off, found.prediction.time
                assert off is not None
                assert time is not None
                parts = [_difference(off, verdict), largest_causes(time)]
                reasons = self._why_slower(found) if verdict == "slower" else self._assumed(time)
                lines.append("; ".join([*parts, *reasons]))
            else:
                lines.append(self._on_memory(found, verdict))
        return lines

    def _why_slower(self, found: Comparison) -> list[str]:
        """Return what to look at, what was measured first."""
        time, rows = found.prediction.time, found.rows
        assert time is not None
        reasons = []
        waits = [row.data_wait for row in rows if row.data_wait is not None]
        rate = found.tokens_per_second
        seconds = time.tokens / rate if rate else 0.0
        if waits and (share := median(waits) / max(seconds, 1e-9)) >= NOTABLE_LOADING:
            reasons.append(f"a step waits {share:.0%} of its time for data (data_wait): raise train.prefetch")
        slow = [row for row in rows if row.straggler is not None and row.straggler >= NOTABLE]
        if slow:
            last = slow[-1]
            told = f"the other ranks wait {last.straggler:.0%} of a step for rank {last.straggler_rank}"
            reasons.append(f"{told} (straggler)")
        recomputed = time.causes.get(Cause.recomputation, 0.0) / time.seconds
        if recomputed >= NOTABLE and self._has_room(found):
            reasons.append("memory is left for less recomputation: recompute=selective or none")
        assumed = self._assumed(time)
        return reasons + (assumed or ["profile=on shows where the time goes"] * (not reasons))

    def _assumed(self, time: StepTime) -> list[str]:
        """Return how to replace assumed speeds by measured ones; nothing where they are measured."""
        if time.source.startswith("measured"):
            return []
        ranks = self.plan.ranks_on_node
        nproc = f" launch.nproc={ranks}" if ranks > 1 else ""
        return [f"its speeds are {time.source}; measure them: task=calibrate{nproc}"]

    def _has_room(self, found: Comparison) -> bool:
        limit = self.plan.hardware.memory_bytes
        fewer = self.plan.shape.recompute is not RecomputeMode.none
        return bool(limit) and fewer and (found.memory_gib or 0.0) * GIB < 0.7 * (limit or 0)

    def _on_memory(self, found: Comparison, verdict: str) -> str:
        off = found.memory_off
        assert off is not None
        parts = found.prediction.memory.to_json()
        parts.pop("total")
        largest = sorted(parts.items(), key=lambda part: -part[1])[:NAMED_CAUSES]
        told = ", ".join(f"{name} {value / GIB:.2f}" for name, value in largest)
        line = f"{_difference(off, verdict)}; planned GiB: {told}"
        if verdict == "less memory":
            return f"{line}; a larger train.microbatch_size may fit"
        return f"{line}; profile=on shows what is allocated"


def largest_causes(time: StepTime) -> str:
    """Return the largest shares of the planned time: `the plan: matmuls 48%, pipeline bubble 20%`."""
    shares = [(seconds / time.seconds, cause) for cause, seconds in time.causes.items()]
    shares.sort(key=lambda share: -share[0])
    told = [f"{cause.value} {share:.0%}" for share, cause in shares[:NAMED_CAUSES] if share >= SMALL_CAUSE]
    return f"the plan: {', '.join(told)}"


def _difference(off: float, verdict: str) -> str:
    """Return a difference in words: `31% slower than planned`, from twofold on `3 times as fast`."""
    if off < 1:
        return f"{abs(off):.0%} {verdict} than planned"
    return f"{1 + off:.3g} times as {'fast' if verdict == 'faster' else 'much memory'} as planned"
