"""The timeline of a step: when each pipeline rank computes which microbatch, and how long the step lasts.

Every rank works in its schedule's order as soon as its input has arrived. A step of many microbatches is
simulated for a few: after the first rounds every further microbatch takes as long as the busiest rank computes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from dsv3.config.parallel import Schedule
from dsv3.planning.pipeline_schedules import schedule_actions
from dsv3.planning.pipeline_stages import stages_of_rank

KINDS = ("F", "B", "I", "W")
"""Forward pass, backward pass, and its halves: gradients of inputs and of weights."""

ROUNDS = 4
"""Rounds of pp microbatches (times the stages of a rank) that are simulated; longer steps are extrapolated."""


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
    """Place in the order of the action whose result it needs; -1 for none."""
    travels: bool
    """The result comes from another rank."""


@lru_cache(maxsize=512)
def _order(schedule: Schedule, pp: int, per_rank: int, microbatches: int) -> tuple[_Step, ...]:
    """Return the actions of every rank, each after the one that it waits for."""
    queues = [
        list(reversed(schedule_actions(schedule, rank, pp, per_rank, microbatches))) for rank in range(pp)
    ]
    owner = {
        stage: rank for rank in range(pp) for stage in stages_of_rank(schedule, rank, pp, per_rank)
    }
    places: dict[tuple[bool, int, int], int] = {}
    order: list[_Step] = []
    last = pp * per_rank - 1
    waiting = list(range(pp))
    while waiting:
        for rank in waiting:
            queue = queues[rank]
            while queue:
                kind, stage, microbatch = queue[-1]
                forward, source = kind == "F", -1
                neighbor = stage + (-1 if forward else 1)
                travels = False
                if kind != "W" and 0 <= neighbor <= last:
                    found = places.get((forward, neighbor, microbatch))
                    if found is None:
                        break
                    source, travels = found, owner[neighbor] != rank
                queue.pop()
                if kind != "W":
                    places[forward, stage, microbatch] = len(order)
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
        few = _few(self.pp, self.per_rank, self.microbatches)
        longest = max(self.busy(rank) for rank in range(self.pp)) / self.microbatches
        return self.simulate(few) + (self.microbatches - few) * longest

    def simulate(self, microbatches: int) -> float:
        """Return the seconds of a step of so many microbatches, action by action."""
        seconds = [value for stage in self.stages for value in stage.by_kind()]
        now, ends, send = [0.0] * self.pp, [], self.send
        done = ends.append
        for rank, duration, source, travels in _order(self.schedule, self.pp, self.per_rank, microbatches):
            start = now[rank]
            if source >= 0:
                arrived = ends[source] + send if travels else ends[source]
                if arrived > start:
                    start = arrived
            end = start + seconds[duration]
            now[rank] = end
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
        ends: list[float] = []
        for rank, duration, source, travels in order:
            start = found[rank][-1].end if found[rank] else 0.0
            if source >= 0:
                start = max(start, ends[source] + self.send * travels)
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


def _few(pp: int, per_rank: int, microbatches: int) -> int:
    """Return the microbatches to simulate: rounds of the same size (interleaved schedules have such)."""
    rounds = max(1, microbatches // pp)
    return microbatches if rounds <= ROUNDS else microbatches // rounds * ROUNDS
