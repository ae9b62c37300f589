"""What a picture of a step shows: all spans of its timeline, or those of its begin and end where it has many.

A step of thousands of microbatches is a long repetition between two ends, and the ends hold the bubble. What
lies between them becomes one block per pipeline rank, which knows how many spans it stands for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.planning.pipeline_timeline import Span
from dsv3.planning.plan import Plan
from dsv3.planning.step_time import Cause

KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, weights",
}
"""The kinds of a timeline's spans, as a reader calls them."""

COLORS = {"F": "#2b6cb0", "B": "#dd6b20", "I": "#ed8936", "W": "#d69e2e"}

REST, REST_COLOR = "optimizer and what else follows", "#9aa5b1"
"""Name and colour of the time from the last microbatch to the end of the step: the optimizer, and traffic of
FSDP that nothing hides."""


@dataclass(frozen=True)
class Middle:
    """Spans of one pipeline rank that are not drawn one by one."""

    start: float
    """Seconds from the begin of the step, as is `end`."""
    end: float
    spans: int
    busy: float
    """Seconds of them in which the rank works."""


@dataclass(frozen=True)
class RankRow:
    """One pipeline rank of a picture."""

    spans: list[Span]
    """Those that are drawn, in the order of their starts."""
    middle: Middle | None
    busy: float
    """Seconds in which the rank computes, over the whole step."""


@dataclass(frozen=True)
class StepPicture:
    """The rows of a picture, and which part of the step they show."""

    rows: list[RankRow]
    seconds: float
    """Of the last span's end: what follows the last microbatch is not part of it."""
    cut: tuple[float, float] | None
    """Seconds between which spans are left out; None where all are drawn."""
    microbatches: int

    @property
    def kinds(self) -> list[str]:
        """Return the kinds that occur, in the order of KINDS."""
        found = {span.kind for row in self.rows for span in row.spans}
        return [kind for kind in KINDS if kind in found]

    def idle(self, row: RankRow) -> float:
        """Return the share of the step, from 0 to 1, in which a rank waits."""
        return 1 - row.busy / self.seconds if self.seconds else 0.0

    def told(self) -> str:
        """Return how much of the step is drawn, in words; "" where it is all of it."""
        if self.cut is None:
            return ""
        left_out = sum(row.middle.spans for row in self.rows if row.middle is not None)
        every = left_out + sum(len(row.spans) for row in self.rows)
        return (
            f"{every - left_out:,} of {every:,} spans are drawn, those of the begin and the end; "
            f"{self.microbatches:,} microbatches are too many to draw each"
        )


def step_picture(timeline: Sequence[Sequence[Span]], most: int) -> StepPicture:
    """Return what to draw of a timeline, at most about `most` spans of all ranks together."""
    ordered = [sorted(spans) for spans in timeline]
    every = [span for spans in ordered for span in spans]
    end = max((span.end for span in every), default=0.0)
    microbatches = 1 + max((span.microbatch for span in every), default=-1)
    cut = None
    if len(every) > most:
        half = most // 2
        cut = (sorted(span.start for span in every)[half], sorted(span.end for span in every)[-half - 1])
    rows = []
    for spans in ordered:
        shown: list[Span] = []
        left_out: list[Span] = []
        for span in spans:
            is_inside = cut is not None and cut[0] <= span.start and span.end <= cut[1]
            (left_out if is_inside else shown).append(span)
        middle = None
        if left_out:
            middle = Middle(left_out[0].start, left_out[-1].end, len(left_out), _working(left_out))
        rows.append(RankRow(shown, middle, _working(spans)))
    return StepPicture(rows, end, cut, microbatches)


def _working(spans: Sequence[Span]) -> float:
    return sum(span.end - span.start for span in spans)


def step_told(plan: Plan) -> str:
    """Return the time of a plan's step in a line, and where it comes from."""
    time = plan.time
    assert time is not None
    length = f"{time.seconds:,.2f} s" if time.seconds >= 10 else f"{time.seconds * 1e3:,.4g} ms"
    parts = [f"{length} per step, {time.tokens_per_second_per_gpu:,.0f} tokens/s per rank"]
    if plan.degrees.pp > 1:
        parts.append(f"{Cause.bubble.value} {time.causes[Cause.bubble] / time.seconds:.1%}")
    return " · ".join([*parts, time.source])


def layout_told(plan: Plan) -> str:
    """Return the layout of a plan in a line."""
    degrees = plan.degrees.to_json()
    axes = " ".join(f"{axis}{n}" for axis, n in degrees.items() if n > 1)
    schedule = f", {plan.shape.pipelining.schedule.name}" if plan.degrees.pp > 1 else ""
    precision = f" {plan.precision}" if plan.precision else ""
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size:,} ranks"
    return f"{ranks} of {plan.hardware.name}{precision}{', ' if axes else ''}{axes}{schedule}"
