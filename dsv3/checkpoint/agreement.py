"""Do work on all ranks, or on rank 0 for all: where one rank fails, all of them raise its error.

A rank that raised alone would leave the others waiting for it until a timeout, with an error about the
connection in place of the reason.
"""

import contextlib
from collections.abc import Callable
from typing import TypeVar

from dsv3.distributed.process_group import RankContext
from dsv3.errors import RunFailed, UserError
from dsv3.metrics.progress import phase

T = TypeVar("T")


def together(ranks: RankContext, work: Callable[[], T], waiting: str | None = None) -> list[T]:
    """Do `work` on each rank and return all results in rank order; all ranks call it together.

    `waiting` is the phase of a rank whose own part is done (metrics/progress.py). Results pass through every
    rank, so they must be small. Raises on all ranks what the first of those that failed raised: an OSError, a
    UserError, or a RunFailed that names any other error and its rank.
    """
    result: list[T] = []
    problem = cause = None
    try:
        result = [work()]
    except Exception as error:
        problem, cause = _portable(error, ranks.rank), error
    with contextlib.nullcontext() if waiting is None else phase(waiting):
        answers = ranks.all_gather_object((result, problem))
    for _, found in answers:
        if found is not None:
            raise found from cause
    return [value for values, _ in answers for value in values]


def on_main(ranks: RankContext, work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and return its small result on all ranks; raises as `together` does."""

    def own_part() -> list[T]:
        return [work()] if ranks.is_main else []

    return together(ranks, own_part)[0][0]


def _portable(error: Exception, rank: int) -> Exception:
    """Return an error as it can be sent to other ranks: any others may hold what cannot be pickled."""
    if isinstance(error, UserError | RunFailed):  # before OSError: a file that is missing is both
        return (UserError if isinstance(error, UserError) else RunFailed)(str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    return RunFailed(f"rank {rank} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
