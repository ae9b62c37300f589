"""task=search: the fastest layouts of a model on a world of GPUs, by arithmetic alone; imports no torch.

launch/layout_choice.py says what the command leaves open and types the layouts that are found;
planning/layout_search.py finds them. docs/planning.md describes the search.
"""

import itertools
import json
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from dsv3.config.task import OutputFormat
from dsv3.distributed.signals import die_with_parent
from dsv3.errors import RunFailed
from dsv3.launch.job import Job
from dsv3.launch.layout_choice import Request, chosen_world, nothing_fits, told_layout
from dsv3.launch.run_dir import require_room_for
from dsv3.metrics.console import format_table
from dsv3.metrics.progress import phase
from dsv3.planning.checks import GIB
from dsv3.planning.layout_search import FRONT_GAIN, FRONT_SPEED, LayoutSearch, SearchResult, merged
from dsv3.planning.layout_space import LayoutSpace

MOST_PROCESSES = 8
"""Parts of a space know less of what others have found: more of them gain little."""

LARGE = 20_000
"""Cells of a space whose search is worth the start of processes, which takes a second."""

_TITLES = ("", "tokens/s/GPU", "GiB", "command")


class SearchTask:
    """Prints the fastest layouts that fit, and the front of speed against memory.

    Args:
        top: how many of the fastest to print.
        picture: PNG file to draw speed against memory into; None draws nothing.
        format: of what is printed.
    """

    def __init__(self, top: int, picture: str | None, format: OutputFormat) -> None:
        self.top = top
        self.picture = picture
        self.format = format

    def run(self, job: Job) -> None:
        """Search, and print to stdout as text or as one JSON object, on rank 0 only."""
        if os.environ.get("RANK", "0") != "0":
            return
        request, world = Request.of(job), chosen_world(job)
        if self.picture is not None:
            # A search may take half a minute.
            require_room_for(Path(self.picture).parent, f"task.picture={self.picture} cannot be written")
        with phase(f"searching layouts of {world:,} ranks"):
            search = LayoutSearch(request.space(world))
            result = run_on_all_cores(search, self.top)
            if not result.best:
                raise nothing_fits(request, search)
        told = self._told(request, search, result)
        if self.picture is not None:
            from dsv3.metrics.layout_picture import draw_layouts

            Path(self.picture).parent.mkdir(parents=True, exist_ok=True)
            points = [(found.memory.total / GIB, found.speed) for found in result.seen]
            front = [(found.memory.total / GIB, found.speed) for found in result.front]
            room = (search.space.hardware.memory_bytes or 0) / GIB
            draw_layouts(points, front, room, self._heading(request, search), self.picture)
            print(f"picture: {self.picture}", file=sys.stderr)
        if self.format is OutputFormat.json:
            print(json.dumps(told, indent=1))
            return
        lines = [
            self._heading(request, search),
            f"{result.legal:,} legal layouts; {result.planned:,} were planned, bounds ruled out the rest",
            f"batch: {told['global_batch_size']:,} sequences of {told['sequence_length']:,} tokens per step: "
            f"{told['global_batch_reason']}",
            f"time {told['source']}",
            "",
            _table(told["best"]),
            "",
            f"speed against memory, down to {FRONT_SPEED:.0%} of the fastest: each is over "
            f"{FRONT_GAIN:.0%} faster than all with less memory",
            _table(told["front"]),
            "",
            "to train, start the ranks with torchrun or srun and leave task=plan and launch.world_size out",
        ]
        print("\n".join(lines))

    def _heading(self, request: Request, search: LayoutSearch) -> str:
        space = search.space
        return f"model={request.model} on {space.world:,} ranks of hardware={space.hardware.name}"

    def _told(self, request: Request, search: LayoutSearch, result: SearchResult) -> dict[str, object]:
        """Return the contract of task.format=json."""
        space, (batch, reason) = search.space, request.batch(search.space.world)
        return {
            "model": request.model,
            "world_size": space.world,
            "hardware": space.hardware.name,
            "device_memory_bytes": space.hardware.memory_bytes,
            "global_batch_size": batch,
            "global_batch_reason": reason,
            "sequence_length": space.length,
            "source": result.best[0].time.source,
            "legal": result.legal,
            "planned": result.planned,
            "best": [told_layout(request, found, space.world) for found in result.best],
            "front": [told_layout(request, found, space.world) for found in result.front],
        }


def run_on_all_cores(search: LayoutSearch, count: int) -> SearchResult:
    """Search, a large space by one process per core: each takes a part of the degrees."""
    processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    cells = itertools.islice(search.space.cells(), LARGE)
    if processes == 1 or sum(1 for _ in cells) < LARGE:
        return search.run(count)
    context = multiprocessing.get_context("spawn")
    started: list[tuple[Connection, BaseProcess]] = []
    try:
        for number in range(processes):
            here, there = context.Pipe(duplex=False)
            arguments = (there, search.space, count, (number, processes))
            process = context.Process(target=_search_part, args=arguments, daemon=True)
            process.start()
            there.close()
            started.append((here, process))
        return merged([pipe.recv() for pipe, _ in started], count)
    except EOFError:
        raise RunFailed("a process of the search has died: for want of memory, perhaps") from None
    finally:
        for _, each in started:
            each.kill()
            each.join()


def _search_part(pipe: Connection, space: LayoutSpace, count: int, part: tuple[int, int]) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that has started this one ends it
    pipe.send(LayoutSearch(space).run(count, part=part))


def _table(rows: object) -> str:
    assert isinstance(rows, list)
    cells = [
        (
            str(number),
            f"{row['tokens_per_second_per_gpu']:,.1f}",
            f"{row['memory_bytes']['total'] / GIB:,.2f}",
            row["command"],
        )
        for number, row in enumerate(rows, 1)
    ]
    return format_table(cells, _TITLES, left_aligned=("command",))
