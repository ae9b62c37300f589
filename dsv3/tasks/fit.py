"""task=fit: what can be trained on given hardware, by arithmetic alone; imports no torch.

With a world it goes through the models of the family, or takes the one that is typed; a typed model without
a world goes through the kinds of GPUs. Whether something fits is decided by the search of task=search.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from dsv3.config.overrides import compose
from dsv3.config.registry import config_groups
from dsv3.config.strict import strict
from dsv3.config.task import OutputFormat
from dsv3.launch.job import Job
from dsv3.launch.layout_choice import MOST_RANKS, Request, chosen_world, smallest_world, told_layout
from dsv3.metrics.console import format_table
from dsv3.metrics.progress import phase
from dsv3.planning import parameters
from dsv3.planning.checks import GIB
from dsv3.planning.hardware import named_hardware
from dsv3.planning.layout_search import LayoutSearch

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
"""Tokens of the sequences that are tried, unless a length is typed."""

NOT_OF_THE_FAMILY = ("debug", "hf")
"""Choices of `model` that are no model to train at scale."""

_BILLION = 10**9

Row = dict[str, Any]


class FitTask:
    """Prints what fits: per model on a world, or per kind of GPU for one model.

    Args:
        format: of what is printed.
    """

    def __init__(self, format: OutputFormat) -> None:
        self.format = format

    def run(self, job: Job) -> None:
        """Print to stdout as text or as one JSON object, on rank 0 only."""
        if os.environ.get("RANK", "0") != "0":
            return
        request = Request.of(job)
        one = any(key.partition(".")[0] == "model" or key == "checkpoint.load" for key in request.typed)
        on_world = bool(job.config.launch.world_size or job.config.launch.nproc)
        if one and not on_world:
            told: Row = {"model": request.model, "hardware": list(_on_every_gpu(request))}
            text = _hardware_text(told)
        else:
            world = chosen_world(job)
            requests = [request] if one else list(_family(request, job))
            space = request.space(world)  # an unknown device is refused before anything else
            told = {"world_size": world, "hardware": space.hardware.name}
            told["models"] = [_on_world(each, world) for each in requests]
            text = _family_text(told)
        print(json.dumps(told, indent=1) if self.format is OutputFormat.json else text)


def _family(request: Request, job: Job) -> Iterator[Request]:
    """Yield the request for every model of the family, the smallest first."""
    names = [name for name in config_groups()["model"] if name not in NOT_OF_THE_FAMILY]
    others = [override for key, override in request.typed.items() if key.partition(".")[0] != "model"]
    searched = [f"file://{path}" for path in job.config_dirs]
    requests = [
        request.for_model(name, strict(compose([*dict.fromkeys(others), f"model={name}"], searched)))
        for name in names
    ]
    yield from sorted(requests, key=lambda each: parameters.total(each.config.model))


def _on_world(request: Request, world: int) -> Row:
    """Return what of a model fits on a world: the longest sequences, and runs at the ends of the lengths."""
    typed = request.config.train.sequence_length
    lengths = (typed,) if typed is not None else LENGTHS
    model = {"model": request.model, "parameters": parameters.total(request.config.model)}
    with phase(f"fitting {request.model} on {world:,} ranks"):
        fitting = []
        for length in lengths:
            if LayoutSearch(request.with_length(length).space(world)).first_that_fits() is None:
                break
            fitting.append(length)
        if not fitting:
            needed = smallest_world(request.with_length(lengths[0]), 2 * world)
            return {
                **model,
                "fits": False,
                "longest_sequence_length": None,
                "runs": [],
                "smallest_world": needed,
            }
        runs = [
            _fastest(request.with_length(length), world)
            for length in dict.fromkeys((fitting[0], fitting[-1]))
        ]
    return {
        **model,
        "fits": True,
        "longest_sequence_length": fitting[-1],
        "runs": runs,
        "smallest_world": None,
    }


def _on_every_gpu(request: Request) -> Iterator[Row]:
    """Yield, per kind of GPU, the smallest world that trains a model, and its fastest layout there."""
    if request.config.train.sequence_length is None:
        request = request.with_length(LENGTHS[0])
    for gpu in named_hardware():
        own = request.with_hardware(gpu)
        with phase(f"fitting {request.model} on {gpu.name}"):
            world = smallest_world(own)
            run = None if world is None else _fastest(own, world)
        yield {"name": gpu.name, "memory_bytes": gpu.memory_bytes, "smallest_world": world, "run": run}


def _fastest(request: Request, world: int) -> Row:
    """Return the fastest layout at the request's length, as JSON."""
    (best,) = LayoutSearch(request.space(world)).run(1, front=False).best
    days = _BILLION / best.time.tokens_per_second / 86400
    return {
        "sequence_length": request.length(),
        "days_per_billion_tokens": days,
        **told_layout(request, best, world),
    }


_RUN = ("tokens", "tokens/s/GPU", "days per 1e9 tokens", "GiB", "command")


def _cells(run: Row) -> list[str]:
    speed, days = run["tokens_per_second_per_gpu"], run["days_per_billion_tokens"]
    memory = run["memory_bytes"]["total"] / GIB
    return [f"{run['sequence_length']:,}", f"{speed:,.1f}", f"{days:,.2f}", f"{memory:,.2f}", run["command"]]


def _family_text(told: Row) -> str:
    rows = []
    for row in told["models"]:
        name = [row["model"], f"{row['parameters'] / 1e9:,.1f} B"]
        if row["fits"]:
            rows += [[*name, *_cells(run)] for run in row["runs"]]
        else:
            world = row["smallest_world"]
            needs = f"needs {world:,} ranks" if world else f"not on {MOST_RANKS:,} ranks either"
            rows.append([*name, "-", "-", "-", "-", needs])
    heading = f"full training on {told['world_size']:,} ranks of hardware={told['hardware']}: the shortest "
    heading += "and the longest sequences that fit"
    return (
        f"{heading}\n{format_table(rows, ('model', 'parameters', *_RUN), left_aligned=('model', 'command'))}"
    )


def _hardware_text(told: Row) -> str:
    rows = []
    for row in told["hardware"]:
        name = [row["name"], f"{row['memory_bytes'] / GIB:,.1f}", f"{row['smallest_world'] or 0:,}"]
        none = ["-", "-", "-", "-", f"no world up to {MOST_RANKS:,} ranks fits"]
        rows.append([*name, *(none if row["run"] is None else _cells(row["run"]))])
    titles = ("hardware", "GiB of a GPU", "smallest world", *_RUN)
    return format_table(rows, titles, left_aligned=("hardware", "command"))
