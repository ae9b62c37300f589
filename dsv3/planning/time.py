"""How long ranks wait for one another, in shares of a step."""

from collections.abc import Iterator
from functools import lru_cache

from dsv3.parallel.config import Schedule
from dsv3.planning.schedules import Action, order

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
