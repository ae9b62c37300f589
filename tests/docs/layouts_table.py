"""Write docs/layouts.md, the fastest layouts by model, GPU and world: `python -m tests.docs.layouts_table`.

A search takes seconds to half a minute, and there are some two hundred: `--only MODEL HARDWARE` makes one
table, and keeps the others as they are.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from dsv3.launch.layout_choice import Request, told_layout
from dsv3.planning.checks import GIB
from dsv3.planning.layout import ParallelDims
from dsv3.planning.layout_search import LayoutSearch
from tests.harness.composing import strict_config

DOCUMENT = Path(__file__).parents[2] / "docs" / "layouts.md"

MODELS = ("16b", "moonlight_16b", "236b", "671b", "kimi_k2")

HARDWARE = ("h100", "h800", "h200", "b200")

PRESETS = "## The rows of conf/layouts.yaml"
"""Heading of the first table, which preset_layouts.py makes."""

WORLDS = tuple(2**n for n in range(3, 13))
"""8 to 4,096 GPUs."""

HEAD = """# The fastest layouts of the released models

These tables are what `task=search` finds fastest on a number of GPUs: with the batch of the model's report,
rows of its pre-training length, and every choice open ([planning.md](planning.md#search)). Memory is that of
the fullest rank. The command plans the layout; to train, start the ranks with torchrun or srun, and leave
`task=plan` and `launch.world_size` out. Worlds on which no layout fits are left out. Speeds are predictions:
planning.md says how far they are from published ones.

Made by `python -m tests.docs.layouts_table`, the first table by `python -m tests.docs.preset_layouts`.
"""


class Row(NamedTuple):
    """One world."""

    world: int
    speed: float
    memory: float
    layout: str
    command: str

    def to_markdown(self) -> str:
        return (
            f"| {self.world:,} | {self.speed:,.0f} | {self.memory:.1f} | {self.layout} | `{self.command}` |"
        )


def table_row(model: str, hardware: str, world: int) -> Row | None:
    """Return the fastest layout of a world; None where none fits."""
    typed = [f"model={model}", f"hardware={hardware}"]
    config = strict_config(["task=search", *typed])
    request = Request(config, {key.partition("=")[0]: key for key in typed}, model)
    search = LayoutSearch(request.space(world))
    if search.first_that_fits() is None:
        return None
    (best,) = search.run(1, front=False).best
    told = told_layout(request, best, world)
    degrees = told_degrees(best.layout.degrees)
    pipeline = best.layout.pipeline
    schedule = f", {pipeline.schedule.name}" if pipeline else ""
    virtual = f" x {pipeline.stages_per_rank}" if pipeline and pipeline.stages_per_rank else ""
    parts = f"{degrees}{schedule}{virtual}, microbatch {best.layout.microbatch_size}"
    layout = f"{parts}, recompute {best.layout.recompute.value}, {best.layout.precision}"
    return Row(world, best.speed, best.memory.total / GIB, layout, str(told["command"]))


def told_degrees(degrees: ParallelDims) -> str:
    """Return the degrees above 1."""
    return " ".join(f"{axis} {n}" for axis, n in degrees.to_json().items() if n > 1)


def section(model: str, hardware: str) -> str:
    """Return the table of one model on one kind of GPU."""
    rows = [row.to_markdown() for world in WORLDS if (row := table_row(model, hardware, world))]
    head = ["| GPUs | tokens/s/GPU | GiB | layout | command |", "|---|---|---|---|---|"]
    return "\n".join([title(model, hardware), "", *head, *rows, ""])


def title(model: str, hardware: str) -> str:
    """Return the heading of a table."""
    return f"## {model} on {hardware}"


def sections(text: str) -> dict[str, str]:
    """Return the tables of a document by their headings."""
    parts = text.split("\n## ")[1:]
    return {f"## {part.splitlines()[0]}": f"## {part}".rstrip() + "\n" for part in parts}


def document(made: dict[str, str]) -> str:
    """Return the document with the tables in their order, as far as they are made."""
    order = [PRESETS, *(title(model, hardware) for model in MODELS for hardware in HARDWARE)]
    return "\n".join([HEAD, *(made[name] for name in order if name in made)])


def main() -> None:
    """Make one table anew, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs=2, metavar=("MODEL", "HARDWARE"))
    only = parser.parse_args().only
    made = sections(DOCUMENT.read_text()) if DOCUMENT.is_file() else {}
    for model in MODELS:
        for hardware in HARDWARE:
            if only in (None, [model, hardware]):
                made[title(model, hardware)] = section(model, hardware)
                DOCUMENT.write_text(document(made))  # a table at a time: all of them take long


if __name__ == "__main__":
    main()
