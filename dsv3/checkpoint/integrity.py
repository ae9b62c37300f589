"""Checks a checkpoint's files by all ranks, and tells how to go on where a run's newest is damaged."""

import heapq
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3.checkpoint.directory import complete_steps
from dsv3.checkpoint.manifest import (
    FileEntry,
    check_digest,
    check_sizes,
    read_manifest,
    verify_description,
)
from dsv3.runtime.errors import UserError

if TYPE_CHECKING:  # who only looks at a description needs no torch
    from dsv3.runtime.distributed import Worker


def verify_together(directory: Path, worker: "Worker") -> None:
    """Compare a checkpoint with its manifest, if it has one: all sizes, and a rank's share of the content.

    The ranks call it together. UserError on all of them, with what the first rank to find damage found.
    """
    problem = None
    try:
        entries = read_manifest(directory) or {}
        check_sizes(directory, entries)  # by every rank: a node may see another disk
        for name in shares(entries, worker.world)[worker.rank]:
            check_digest(directory, name, entries[name])
    except UserError as error:
        problem = str(error)
    for found in worker.gather(problem):
        if found is not None:
            raise UserError(found)


def shares(entries: dict[str, FileEntry], world: int) -> list[list[str]]:
    """The files that each rank reads, about as many bytes each: the largest go first, to who has least."""
    result: list[list[str]] = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]
    for name in sorted(entries, key=lambda name: (-entries[name].size, name)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + entries[name].size, rank))
        result[rank].append(name)
    return result


def check_newest(newest: Path) -> None:
    """Compare the description of a run's newest checkpoint, before workers start; see `with_way_out`."""
    try:
        verify_description(newest)
    except UserError as error:
        raise with_way_out(error, newest) from None


def with_way_out(error: UserError, newest: Path) -> UserError:
    """`error`, found in a run's newest checkpoint, with the command that goes on from an older one.

    Nothing is put aside without being asked: it may be the disk or the copy that can be mended.
    """
    run_dir = newest.parent.parent
    aside, older = [newest], None
    for step in reversed(complete_steps(run_dir)[:-1]):
        if _has_its_sizes(step):
            older = step
            break
        aside.append(step)
    where = f"from {older.name}" if older is not None else "from step 0, as no older checkpoint is whole,"
    damaged = run_dir / "damaged"
    move = f"mkdir -p {shlex.quote(str(damaged))} && {shlex.join(['mv', *map(str, aside), f'{damaged}/'])}"
    resume = shlex.join(["python", "train.py", f"resume={run_dir}"])
    return UserError(f"{error}\nto go on {where} instead: {move} && {resume}")


def _has_its_sizes(step: Path) -> bool:
    try:
        check_sizes(step, read_manifest(step) or {})
    except UserError:
        return False
    return True
