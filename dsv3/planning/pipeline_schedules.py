"""Pipeline schedules: the order in which a rank runs its microbatches, and the bubble that follows from it.

The memory that a rank needs at once follows from the order too. The orders are those of
torch.distributed.pipelining.schedules; tests/planning/test_pipeline_schedules.py compares them.
"""

from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from dsv3.config.parallel import Schedule
from dsv3.planning.pipeline_stages import stages_of_rank


class Action(NamedTuple):
    """One microbatch at one stage; kind F (forward), B (backward), or its halves I (inputs), W (weights)."""

    kind: str
    stage: int
    microbatch: int


class _ActionList(list[Action]):
    """Actions in order; each gets the next microbatch of its kind and stage."""

    def __init__(self) -> None:
        self.done: Counter[tuple[str, int]] = Counter()
        self.weights_due: list[int] = []

    def add(self, *steps: tuple[str, int]) -> None:
        for kind, stage in steps:
            counted = "I" if kind == "B" else kind  # a whole backward pass and a half one share numbers
            self.append(Action(kind, stage, self.done[counted, stage]))
            self.done[counted, stage] += 1
            if kind == "B":
                self.done["W", stage] += 1
            elif kind == "I":
                self.weights_due.append(stage)

    def add_weights(self) -> None:
        if self.weights_due:
            self.add(("W", self.weights_due.pop(0)))


@lru_cache(maxsize=1024)
def schedule_actions(
    schedule: Schedule, rank: int, pp: int, per_rank: int, microbatches: int
) -> tuple[Action, ...]:
    """Return the actions of rank `rank` of `pp`, with `per_rank` stages, in a step of `microbatches`."""
    stages = stages_of_rank(schedule, rank, pp, per_rank)
    if schedule is Schedule.ZBVZeroBubble:
        actions = _zbv(rank, pp, microbatches, *stages)
    elif schedule is Schedule.DualPipeV:
        actions = _dualpipe_v(rank, pp, microbatches, *stages)
    elif schedule in (Schedule.GPipe, Schedule["1F1B"]):
        stage, actions = stages[0], _ActionList()
        warmup = microbatches if schedule is Schedule.GPipe else min(microbatches, pp - rank)
        actions.add(*[("F", stage)] * warmup)
        actions.add(*[("B", stage), ("F", stage)] * (microbatches - warmup))
        actions.add(*[("B", stage)] * warmup)
    else:
        actions = _interleaved(schedule is Schedule.InterleavedZeroBubble, rank, pp, stages, microbatches)
    return tuple(action for action in actions if action.microbatch < microbatches)


def _interleaved(zero_bubble: bool, rank: int, pp: int, stages: list[int], microbatches: int) -> _ActionList:
    """Run a round of microbatches through one stage, then the next (arXiv 2104.04473, 2.2; 2401.10241)."""
    a_round = microbatches // max(1, microbatches // pp)
    operations = microbatches * len(stages)
    warmup = min((len(stages) - 1) * a_round + (1 if zero_bubble else 2) * (pp - 1 - rank), operations)
    forwards = [stages[n // a_round % len(stages)] for n in range(operations)]
    backwards = [stages[-1 - n // a_round % len(stages)] for n in range(operations)]
    actions = _ActionList()
    actions.add(*[("F", stage) for stage in forwards[:warmup]])
    for number, stage in enumerate(backwards):
        if warmup + number < operations:
            actions.add(("F", forwards[warmup + number]))
        actions.add(("I" if zero_bubble else "B", stage))
        if zero_bubble and number >= rank:
            actions.add_weights()
    while actions.weights_due:
        actions.add_weights()
    return actions


def _zbv(rank: int, pp: int, microbatches: int, front: int, back: int) -> _ActionList:
    """Build the V of arXiv 2401.10241, section 6, for 2 pp - 1 microbatches or more."""
    actions, enough = _ActionList(), max(2 * pp - 1, microbatches)
    work = {stage: [("F", stage), ("I", stage), ("W", stage)] for stage in (front, back)}
    actions.add(*[("F", front)] * (2 * (pp - rank) - 1))
    actions.add(*[("F", back), ("F", front)] * rank)
    actions.add(*work[back] * (pp - rank))
    while actions.done["F", back] < actions.done["F", front] or actions.done["F", front] < enough:
        actions.add(*work[front][0 if actions.done["F", front] < enough else 1 :], *work[back])
    actions.add(*[("I", front), ("I", back)] * rank)
    actions.add(*[("I", front), ("W", front)] * (pp - rank))
    for stage in (back, front):
        actions.add(*[("W", stage)] * (actions.done["I", stage] - actions.done["W", stage]))
    return actions


def _dualpipe_v(rank: int, pp: int, microbatches: int, front: int, back: int) -> _ActionList:
    """Build one half of DualPipe, folded into a V (arXiv 2412.19437, section 3.2.1)."""
    actions, after = _ActionList(), pp - rank - 1
    actions.add(*[("F", front)] * (2 * after))
    actions.add(*[("F", front), ("F", back)] * (rank + 1))
    for _ in range(after):
        actions.add(("I", back))
        actions.add_weights()
        actions.add(("F", back))
    steady = microbatches - 2 * pp + rank + 1
    actions.add(*[("F", front), ("B", back), ("F", back), ("B", front)] * steady)
    actions.add(*[("B", back), ("F", back), ("B", front)] * after)
    # In the second half of the rest, weight gradients wait so that input gradients are sent sooner.
    whole = 2 * ((rank + 1) // 2) + (1 - rank % 2)
    left = [("B" if n < whole else "I", (back, front)[n % 2]) for n in range(2 * (rank + 1))]
    actions.add(*left)
    for _ in range(after):
        actions.add_weights()
        actions.add(("I", front))
    while actions.weights_due:
        actions.add_weights()
    return actions


@lru_cache(maxsize=4096)
def most_held(
    schedule: Schedule, rank: int, pp: int, per_rank: int, microbatches: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return how many microbatches each stage of a rank holds, from forward to backward, at its fullest.

    Each entry is a moment, as (stage, microbatches) of every stage; moments at which no stage holds more than
    at another one are left out.
    """
    stages = stages_of_rank(schedule, rank, pp, per_rank)
    if schedule is not Schedule.GPipe:
        microbatches = _few_rounds(pp, microbatches)
    held = dict.fromkeys(stages, 0)
    moments: dict[tuple[int, ...], None] = {}
    grew = False
    for action in schedule_actions(schedule, rank, pp, per_rank, microbatches):
        if action.kind == "F":
            held[action.stage] += 1
            grew = True
        elif action.kind != "I":
            if grew:
                moments[tuple(held.values())] = None
            held[action.stage] -= 1
            grew = False
    fullest = [
        moment
        for moment in moments
        if not any(other != moment and all(map(int.__ge__, other, moment)) for other in moments)
    ]
    return tuple(tuple(zip(stages, moment, strict=True)) for moment in fullest)


@lru_cache(maxsize=1024)
def most_waiting(
    schedule: Schedule, rank: int, pp: int, per_rank: int, microbatches: int
) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """Return moments as `most_held` does, with the microbatches of each stage that wait for their weights.

    Between the halves of a split backward pass a microbatch holds gradients besides. Each entry has (stage,
    microbatches, those of them that wait) of every stage.
    """
    stages = stages_of_rank(schedule, rank, pp, per_rank)
    held = {stage: [0, 0] for stage in stages}
    moments: dict[tuple[int, ...], None] = {}
    grew = False
    for action in schedule_actions(schedule, rank, pp, per_rank, _few_rounds(pp, microbatches)):
        own = held[action.stage]
        if action.kind in "FI":
            own[action.kind == "I"] += 1
            grew = True
            continue
        if grew:
            moments[tuple(count for counts in held.values() for count in counts)] = None
        own[0] -= 1
        own[1] -= action.kind == "W"
        grew = False
    fullest = [
        moment
        for moment in moments
        if not any(other != moment and all(map(int.__ge__, other, moment)) for other in moments)
    ]
    return tuple(tuple(zip(stages, moment[0::2], moment[1::2], strict=True)) for moment in fullest)


def _few_rounds(pp: int, microbatches: int) -> int:
    """Return fewer microbatches in rounds of the same size, with which every moment of a step occurs."""
    rounds = max(1, microbatches // pp)
    return microbatches if rounds <= _ROUNDS else microbatches // rounds * _ROUNDS


_DURATION = {"F": 1, "B": 2, "I": 1, "W": 1}
"""Time units: a backward pass costs two forward passes, each of its halves one."""

_ROUNDS = 4
"""Beyond so many rounds of pp microbatches, more microbatches lengthen a step but not the waiting."""


@lru_cache(maxsize=256)
def bubble(schedule: Schedule, pp: int, per_rank: int, microbatches: int) -> float:
    """Return the share of a step (0 to 1) in which a pipeline rank waits for others.

    Stages are taken to cost the same, and sending to cost nothing. GPipe and 1F1B: (pp - 1) / (microbatches +
    pp - 1), with per_rank virtual stages interleaved (pp - 1) / (per_rank x microbatches + pp - 1). The other
    schedules follow from simulating their order.
    """
    if pp == 1:
        return 0.0
    # Fewer microbatches, in rounds of the same size (interleaved schedules have such), wait as long.
    few = _few_rounds(pp, microbatches)
    waiting = _simulate_step(schedule, pp, per_rank, few) - 3 * per_rank * few
    return waiting / (waiting + 3 * per_rank * microbatches)


def _simulate_step(schedule: Schedule, pp: int, per_rank: int, microbatches: int) -> int:
    """Return the time units of a step if every rank works in its order as soon as it can."""
    queues = {rank: iter(schedule_actions(schedule, rank, pp, per_rank, microbatches)) for rank in range(pp)}
    heads: dict[int, Action | None] = {rank: next(actions) for rank, actions in queues.items()}
    # When each (forward?, stage, microbatch) was done, and how far each rank has come.
    ends: dict[tuple[bool, int, int], int] = {}
    now = dict.fromkeys(heads, 0)
    while any(heads.values()):
        for rank, head in heads.items():
            # Let the rank work until it waits for another.
            while head is not None:
                forward = head.kind == "F"
                source = head.stage + (-1 if forward else 1)
                start = now[rank]
                if head.kind != "W" and 0 <= source < pp * per_rank:
                    arrived = ends.get((forward, source, head.microbatch))
                    if arrived is None:
                        break
                    start = max(start, arrived)
                now[rank] = start + _DURATION[head.kind]
                if head.kind != "W":
                    ends[forward, head.stage, head.microbatch] = now[rank]
                head = next(queues[rank], None)
            heads[rank] = head
    return max(now.values())
