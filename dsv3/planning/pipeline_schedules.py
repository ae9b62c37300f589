"""In which order a pipeline rank works: what it holds at once and when it waits follow from that.

The orders are those of torch.distributed.pipelining.schedules, which the test compares them with.


How long ranks wait for one another, in shares of a step.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from dsv3.config.parallel import Schedule
from dsv3.planning.pipeline_stages import stages_of_rank


class Action(NamedTuple):
    """One microbatch at one stage. F: forward, B: backward, or its halves I (inputs) and W (weights)."""

    kind: str
    stage: int
    microbatch: int


class _Order(list[Action]):
    """Actions in order; each takes the next microbatch of its kind and stage."""

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
def order(schedule: Schedule, rank: int, pp: int, per_rank: int, microbatches: int) -> tuple[Action, ...]:
    """What rank `rank` of `pp`, with `per_rank` stages, does in a step of `microbatches`."""
    stages = stages_of_rank(schedule, rank, pp, per_rank)
    if schedule is Schedule.ZBVZeroBubble:
        made = _zbv(rank, pp, microbatches, *stages)
    elif schedule is Schedule.DualPipeV:
        made = _dualpipe_v(rank, pp, microbatches, *stages)
    elif schedule in (Schedule.GPipe, Schedule["1F1B"]):
        warmup = microbatches if schedule is Schedule.GPipe else min(microbatches, pp - rank)
        made = _one_stage(stages[0], warmup, microbatches)
    else:
        made = _interleaved(schedule is Schedule.InterleavedZeroBubble, rank, pp, stages, microbatches)
    return tuple(action for action in made if action.microbatch < microbatches)


def _one_stage(stage: int, warmup: int, microbatches: int) -> _Order:
    made = _Order()
    made.add(*[("F", stage)] * warmup)
    made.add(*[("B", stage), ("F", stage)] * (microbatches - warmup))
    made.add(*[("B", stage)] * warmup)
    return made


def _interleaved(zero_bubble: bool, rank: int, pp: int, stages: list[int], microbatches: int) -> _Order:
    """A round of microbatches through one stage, then the next (arXiv 2104.04473, 2.2; 2401.10241)."""
    a_round = microbatches // max(1, microbatches // pp)
    operations = microbatches * len(stages)
    warmup = min((len(stages) - 1) * a_round + (1 if zero_bubble else 2) * (pp - 1 - rank), operations)
    forwards = [stages[n // a_round % len(stages)] for n in range(operations)]
    backwards = [stages[-1 - n // a_round % len(stages)] for n in range(operations)]
    made = _Order()
    made.add(*[("F", stage) for stage in forwards[:warmup]])
    for number, stage in enumerate(backwards):
        if warmup + number < operations:
            made.add(("F", forwards[warmup + number]))
        made.add(("I" if zero_bubble else "B", stage))
        if zero_bubble and number >= rank:
            made.add_weights()
    while made.weights_due:
        made.add_weights()
    return made


def _zbv(rank: int, pp: int, microbatches: int, front: int, back: int) -> _Order:
    """The V of arXiv 2401.10241, section 6, made for 2 pp - 1 microbatches at least."""
    made, enough = _Order(), max(2 * pp - 1, microbatches)
    work = {stage: [("F", stage), ("I", stage), ("W", stage)] for stage in (front, back)}
    made.add(*[("F", front)] * (2 * (pp - rank) - 1))
    made.add(*[("F", back), ("F", front)] * rank)
    made.add(*work[back] * (pp - rank))
    while made.done["F", back] < made.done["F", front] or made.done["F", front] < enough:
        made.add(*work[front][0 if made.done["F", front] < enough else 1 :], *work[back])
    made.add(*[("I", front), ("I", back)] * rank)
    made.add(*[("I", front), ("W", front)] * (pp - rank))
    for stage in (back, front):
        made.add(*[("W", stage)] * (made.done["I", stage] - made.done["W", stage]))
    return made


def _dualpipe_v(rank: int, pp: int, microbatches: int, front: int, back: int) -> _Order:
    """One half of DualPipe, folded into a V (arXiv 2412.19437, section 3.2.1)."""
    made, after = _Order(), pp - rank - 1
    made.add(*[("F", front)] * (2 * after))
    made.add(*[("F", front), ("F", back)] * (rank + 1))
    for _ in range(after):
        made.add(("I", back))
        made.add_weights()
        made.add(("F", back))
    steady = microbatches - 2 * pp + rank + 1
    made.add(*[("F", front), ("B", back), ("F", back), ("B", front)] * steady)
    made.add(*[("B", back), ("F", back), ("B", front)] * after)
    # In the second half of what is left, weights wait so that inputs' gradients leave sooner.
    whole = 2 * ((rank + 1) // 2) + (1 - rank % 2)
    left = [("B" if n < whole else "I", (back, front)[n % 2]) for n in range(2 * (rank + 1))]
    made.add(*left)
    for _ in range(after):
        made.add_weights()
        made.add(("I", front))
    while made.weights_due:
        made.add_weights()
    return made


# A backward pass costs two forward passes, each of its halves one.
_DURATION = {"F": 1, "B": 2, "I": 1, "W": 1}

# Beyond so many rounds of pp microbatches more of them lengthen a step, not the waiting.
_ROUNDS = 4


@lru_cache(maxsize=256)
def bubble(schedule: Schedule, pp: int, per_rank: int, microbatches: int) -> float:
    """The share of a step (0 to 1) in which a pipeline rank waits; stages cost the same, sending nothing.

    GPipe and 1F1B: (pp - 1) / (microbatches + pp - 1), with per_rank virtual stages interleaved
    (pp - 1) / (per_rank x microbatches + pp - 1). The others follow from simulating their order.
    """
    if pp == 1:
        return 0.0
    few = _few(pp, microbatches)
    waiting = _span(schedule, pp, per_rank, few) - 3 * per_rank * few
    return waiting / (waiting + 3 * per_rank * microbatches)


def _few(pp: int, microbatches: int) -> int:
    """Fewer microbatches, in rounds of the same size (interleaved schedules have such): as much waiting."""
    rounds = max(1, microbatches // pp)
    if rounds <= _ROUNDS:
        return microbatches
    return microbatches // rounds * _ROUNDS


def _span(schedule: Schedule, pp: int, per_rank: int, microbatches: int) -> int:
    """Time from the first action to the last, every rank working in its order as soon as it can."""
    waiting = {rank: iter(order(schedule, rank, pp, per_rank, microbatches)) for rank in range(pp)}
    heads: dict[int, Action | None] = {rank: next(actions) for rank, actions in waiting.items()}
    ends: dict[tuple[bool, int, int], int] = {}
    now = dict.fromkeys(heads, 0)
    while any(heads.values()):
        for rank in heads:
            heads[rank] = _work(heads[rank], waiting[rank], ends, now, rank, pp * per_rank)
    return max(now.values())


def _work(
    head: Action | None,
    rest: Iterator[Action],
    ends: dict[tuple[bool, int, int], int],
    now: dict[int, int],
    rank: int,
    stages: int,
) -> Action | None:
    """Let a rank work until it waits for another; the action it waits with."""
    while head is not None:
        forward = head.kind == "F"
        source = head.stage + (-1 if forward else 1)
        start = now[rank]
        if head.kind != "W" and 0 <= source < stages:
            arrived = ends.get((forward, source, head.microbatch))
            if arrived is None:
                return head
            start = max(start, arrived)
        now[rank] = start + _DURATION[head.kind]
        if head.kind != "W":
            ends[forward, head.stage, head.microbatch] = now[rank]
        head = next(rest, None)
    return None
