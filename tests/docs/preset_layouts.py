"""Compare conf/layouts.yaml with the fastest layouts of its kinds: `python -m tests.docs.preset_layouts`.

It writes the first table of docs/layouts.md, in a minute.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import yaml

from dsv3.config.registry import CONF
from dsv3.launch.layout_choice import Request
from dsv3.planning.checks import GIB
from dsv3.planning.layout import ParallelDims
from dsv3.planning.layout_search import LayoutSearch
from tests.docs.layouts_table import DOCUMENT, PRESETS, document, sections, told_degrees
from tests.harness.composing import strict_config

NEAR = 0.9
"""Share of the fastest layout's speed from which a row needs no other reason."""


class Preset(NamedTuple):
    """A row of conf/layouts.yaml, and the fastest layout of its kind on the same world."""

    model: str
    preset: str
    world: int
    degrees: ParallelDims
    fastest: ParallelDims
    share: float
    """Speed of the row's degrees, with the best of everything else, as a share of the fastest."""
    memory: float
    """GiB of the row."""
    memory_of_fastest: float
    """GiB of the fastest degrees with the row's settings."""

    @property
    def has_reason(self) -> bool:
        """Return True if the row is about as fast as any, or needs less memory."""
        return self.share >= NEAR or self.memory < self.memory_of_fastest

    def to_markdown(self) -> str:
        names = f"| {self.model} | {self.preset} | {self.world:,}"
        own, fastest = told_degrees(self.degrees), told_degrees(self.fastest)
        figures = f"{own} | {self.share:.0%} | {self.memory:.1f} | {fastest} | {self.memory_of_fastest:.1f} |"
        return f"{names} | {figures}"


def compare(model: str, preset: str) -> Preset:
    """Search the kind of a preset on the world of its row, and within the row's own degrees, in bf16."""
    world = yaml.safe_load((CONF / "layouts.yaml").read_text())[model][preset]["world"]
    choices = [f"model={model}", f"parallel={preset}", "hardware=h800", "precision=bf16"]
    if preset == "cp" and model in ("671b", "kimi_k2"):
        choices.append("train.sequence_length=32768")  # what the row is made for
    config = strict_config(["task=search", *choices])
    typed = {choice.partition("=")[0]: choice for choice in choices}
    kind = Request(config, typed, model, preset)
    degrees = {
        f"parallel.degrees.{axis}": ""
        for axis, n in vars(config.parallel.degrees).items()
        if n is not None and n != "auto"
    }
    own = Request(config, typed | degrees, model, preset)
    search = LayoutSearch(kind.space(world))
    (row,) = LayoutSearch(own.space(world)).run(1, front=False).best
    (best,) = search.run(1, front=False).best
    same = search.memory(replace(row.layout, degrees=best.layout.degrees))
    return Preset(
        model, preset, world, row.layout.degrees, best.layout.degrees, row.speed / best.speed,
        row.memory.total / GIB, same.total / GIB,
    )  # fmt: skip


def rows() -> Iterator[tuple[str, str]]:
    """Yield model and preset of every row."""
    for model, presets in yaml.safe_load((CONF / "layouts.yaml").read_text()).items():
        yield from ((model, preset) for preset in presets)


HEAD = f"""{PRESETS}

conf/layouts.yaml has degrees for each released model and each choice of `parallel`, and the smallest world
that they are made for. The table compares them with the fastest layout of the same kind on that world: h800,
bf16, the report's batch, rows of the pre-training length (of 32,768 tokens for cp of 671b and kimi_k2), and
the best of everything else for both. A row that is more than a tenth slower needs less memory with the same
settings, which a longer sequence or less recomputation may take. The last column is the memory of the fastest
degrees with the row's settings.

| model | parallel | GPUs | degrees | speed | GiB | fastest | GiB |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Write the table."""
    lines = []
    for model, preset in rows():
        row = compare(model, preset)
        lines.append(row.to_markdown())
        print(lines[-1], "" if row.has_reason else "without a reason", flush=True)
    made = sections(DOCUMENT.read_text())
    made[PRESETS] = HEAD + "\n".join(lines) + "\n"
    DOCUMENT.write_text(document(made))


if __name__ == "__main__":
    main()
