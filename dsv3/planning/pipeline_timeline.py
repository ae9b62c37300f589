"""The timeline of a step: when each pipeline rank computes which microbatch, and how long the step lasts.

Every rank works in its schedule's order as soon as its input has arrived. A step of many microbatches is
simulated for a few rounds of pp microbatches: once the pipeline runs steadily, each further round takes as
long as the one before it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from dsv3.config.parallel import Schedule
from dsv3.planning.pipeline_schedules import schedule_actions
from dsv3.planning.pipeline_stages import stages_of_rank

KINDS = ("F", "B", "I", "W")
"""Forward pass, backward pass, and its halves: gradients of inputs and of weights."""

ROUNDS = 3
"""Rounds of pp microbatches that are simulated; the rest of a longer step is extrapolated."""


class Span(NamedTuple):
    """One microbatch at one stage, in seconds from the start of the step."""

    start: float
    end: float
    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True)
class StageSeconds:
    """Seconds that one microbatch takes in one stage."""

    forward: float
    inputs: float
    weights: float

    @property
    def backward(self) -> float:
        """Seconds of both halves of the backward pass."""
        return self.inputs + self.weights

    @property
    def total(self) -> float:
        """Seconds of all passes."""
        return self.forward + self.backward

    def by_kind(self) -> tuple[float, float, float, float]:
        """Return the seconds in the order of KINDS."""
        return self.forward, self.backward, self.inputs, self.weights


class _Step(NamedTuple):
    """An action, with the place of the action that it waits for."""

    rank: int
    duration: int
    """Index into the flat list of every stage's seconds by kind."""
    source: int
    """Place in the order, from 1, of the action whose result it needs; 0 for none."""
    travels: int
    """1 if the result comes from another rank."""


@lru_cache(maxsize=512)
def _order(schedule: Schedule, pp: int, per_rank: int, microbatches: int) -> tuple[_Step, ...]:
    """Return the actions of every rank, each after the one that it waits for."""
    queues = [
        list(reversed(schedule_actions(schedule, rank, pp, per_rank, microbatches))) for rank in range(pp)
    ]
    owner = {stage: rank for rank in range(pp) for stage in stages_of_rank(schedule, rank, pp, per_rank)}
    places: dict[tuple[bool, int, int], int] = {}
    order: list[_Step] = []
    last = pp * per_rank - 1
    waiting = list(range(pp))
    while waiting:
        for rank in waiting:
            queue = queues[rank]
            while queue:
                kind, stage, microbatch = queue[-1]
                forward, source = kind == "F", 0
                neighbor = stage + (-1 if forward else 1)
                travels = 0
                if kind != "W" and 0 <= neighbor <= last:
                    found = places.get((forward, neighbor, microbatch))
                    if found is None:
                        break
                    source, travels = found, int(owner[neighbor] != rank)
                queue.pop()
                if kind != "W":
                    places[forward, stage, microbatch] = len(order) + 1
                order.append(_Step(rank, 4 * stage + KINDS.index(kind), source, travels))
        waiting = [rank for rank in waiting if queues[rank]]
    return tuple(order)


@dataclass(frozen=True)
class PipelineTimeline:
    """A step's schedule with the seconds of each stage."""

    schedule: Schedule
    pp: int
    per_rank: int
    microbatches: int
    stages: tuple[StageSeconds, ...]
    """By number of the stage."""
    send: float = 0.0
    """Seconds that hidden states or their gradients travel to another rank."""

    def busy(self, rank: int) -> float:
        """Return the seconds that a rank computes."""
        held = stages_of_rank(self.schedule, rank, self.pp, self.per_rank) if self.pp > 1 else [0]
        return self.microbatches * sum(self.stages[stage].total for stage in held)

    @property
    def seconds(self) -> float:
        """Return the seconds until the last rank is done."""
        if self.pp == 1:
            return self.busy(0)
        rounds, size, rest = _rounds(self.schedule, self.pp, self.microbatches)
        if rounds <= ROUNDS:
            return self.simulate(self.microbatches)
        last, before = (self.simulate(size * count + rest) for count in (ROUNDS, ROUNDS - 1))
        busiest = max(map(self.busy, range(self.pp))) / self.microbatches * size
        return last + (rounds - ROUNDS) * max(last - before, busiest)

    def simulate(self, microbatches: int) -> float:
        """Return the seconds of a step of so many microbatches, action by action."""
        seconds = [value for stage in self.stages for value in stage.by_kind()]
        now, ends, hops = [0.0] * self.pp, [0.0], (0.0, self.send)
        done = ends.append
        for rank, duration, source, travels in _order(self.schedule, self.pp, self.per_rank, microbatches):
            arrived, start = ends[source] + hops[travels], now[rank]
            now[rank] = end = (arrived if arrived > start else start) + seconds[duration]
            done(end)
        return max(now)

    def spans(self) -> list[list[Span]]:
        """Return, per pipeline rank, what it computes when, for every microbatch of the step."""
        if self.pp == 1:
            return [self._one_rank()]
        order = _order(self.schedule, self.pp, self.per_rank, self.microbatches)
        seconds = [value for stage in self.stages for value in stage.by_kind()]
        found: list[list[Span]] = [[] for _ in range(self.pp)]
        actions = [
            iter(schedule_actions(self.schedule, rank, self.pp, self.per_rank, self.microbatches))
            for rank in range(self.pp)
        ]
        ends = [0.0]
        for rank, duration, source, travels in order:
            start = max(found[rank][-1].end if found[rank] else 0.0, ends[source] + self.send * travels)
            action = next(actions[rank])
            ends.append(start + seconds[duration])
            found[rank].append(Span(start, ends[-1], *action))
        return found

    def _one_rank(self) -> list[Span]:
        spans, now = [], 0.0
        for microbatch in range(self.microbatches):
            for kind, length in (("F", self.stages[0].forward), ("B", self.stages[0].backward)):
                spans.append(Span(now, now + length, kind, 0, microbatch))
                now += length
        return spans


def _rounds(schedule: Schedule, pp: int, microbatches: int) -> tuple[int, int, int]:
    """Return the rounds of a step, their size, and the microbatches that are left over.

    An interleaved schedule makes rounds of equal size, of pp microbatches or more; the others have none left
    over in their order, so that any size will do.
    """
    rounds = max(1, microbatches // pp)
    if schedule in (Schedule.Interleaved1F1B, Schedule.InterleavedZeroBubble):
        return rounds, microbatches // rounds, 0
    return rounds, pp, microbatches - rounds * pp
