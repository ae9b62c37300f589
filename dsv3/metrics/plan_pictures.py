"""Pictures of a plan: the memory of each pipeline rank in memory.png, and the time of a step in timeline.png.

metrics/timeline_page.py makes timeline.html of the same step. task=plan writes them where task.pictures names
a directory, all of them or none.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.metrics.plots import DOTS_PER_INCH, GRID, INK, QUIET
from dsv3.metrics.step_timeline import (
    COLORS,
    KINDS,
    REST,
    REST_COLOR,
    StepPicture,
    layout_told,
    step_picture,
    step_told,
)
from dsv3.metrics.timeline_page import timeline_page
from dsv3.planning.memory import MemoryBytes, pipeline_memory
from dsv3.planning.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIB = 2**30

PARTS = {
    "parameters": "#2b6cb0",
    "gradients": "#63b3ed",
    "optimizer": "#38a169",
    "activations": "#dd6b20",
    "weight_copies": "#ecc94b",
    "save_copies": "#b794f4",
}
"""The fields of MemoryBytes that lie on the device, from the bottom of a stack, with their colours."""

LIMIT = "#c53030"

SPANS_PER_RANK = 250
"""In a picture of this width a span is then some pixels wide."""

NAMED_RANKS = 32
"""Beyond so many pipeline ranks not every row is named."""

Stacks = dict[str, list[float]]


def draw_plan(plan: Plan) -> tuple[dict[str, bytes], str]:
    """Return the files of a plan's pictures by name, and why a step cannot be drawn, or ""."""
    files = {"memory.png": _png(memory_figure(plan))}
    time = plan.time
    if time is None:
        return files, unknown_time(plan)
    picture = step_picture(time.timeline, SPANS_PER_RANK * plan.degrees.pp)
    files["timeline.png"] = _png(timeline_figure(plan, picture))
    files["timeline.html"] = timeline_page(plan).encode()
    return files, ""


def unknown_time(plan: Plan) -> str:
    """Return why the step of a plan has no time, and what to type for one that has."""
    if plan.shape.cpu_offload:
        return "no timeline: the time of a step with parallel.fsdp.cpu_offload=true is not known"
    return (
        f"no timeline: the speed of hardware {plan.hardware.name} is not known; "
        "name a GPU (hardware=h100), or measure this machine (task=calibrate)"
    )


def write_pictures(directory: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files into a directory, which is made; each replaces one that is there, and all do or none.

    Raises:
        OSError: they cannot be written; nothing is left of them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = {directory / name: content for name, content in files.items()}
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in paths}
    try:
        for path, content in paths.items():
            if path.is_dir():
                raise IsADirectoryError(21, "a directory has this name", str(path))
            temporary[path].write_bytes(content)
        for path, written in temporary.items():
            written.replace(path)
    finally:
        for written in temporary.values():
            with suppress(OSError):
                written.unlink(missing_ok=True)
    return list(paths)


def memory_stacks(memories: Sequence[MemoryBytes]) -> Stacks:
    """Return the GiB of each part on the device by pipeline rank, at the fullest moment of a step.

    Parts that no rank has are left out.
    """
    stacks = {part: [getattr(memory, part) / GIB for memory in memories] for part in PARTS}
    stacks["gradients"] = [(memory.gradients - memory.late_gradients) / GIB for memory in memories]
    return {part: sizes for part, sizes in stacks.items() if any(sizes)}


def memory_figure(plan: Plan) -> "Figure":
    """Draw what each pipeline rank holds at the fullest moment of a step, against its device's memory."""
    memories = pipeline_memory(plan.model, plan.degrees, plan.shape)
    count, limit = len(memories), plan.hardware.memory_bytes
    figure, axes = _figure(count)
    ends = [0.0] * count
    for part, sizes in memory_stacks(memories).items():
        axes.barh(
            range(count), sizes, left=ends, color=PARTS[part], height=0.72, label=part.replace("_", " ")
        )
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    top = max([*ends, limit / GIB if limit else 0.0])
    if count <= NAMED_RANKS:
        for rank, end in enumerate(ends):
            label = f"{end:,.2f}" if end < 10 else f"{end:,.1f}"
            axes.text(end + 0.008 * top, rank, label, va="center", color=INK, size=9)
    if limit:
        label = f"device memory {limit / GIB:,.1f}"
        axes.axvline(limit / GIB, color=LIMIT, lw=1.6, ls="--", label=label)
    axes.set_xlim(0, top * 1.1 or 1)
    axes.set_xlabel("GiB per rank", color=QUIET, size=10.5)
    _below(figure, axes, 4)
    fullest = max(range(count), key=lambda rank: memories[rank].total)
    verdict = {True: "fits", False: "does not fit", None: "device memory unknown"}[plan.fits]
    note = f"{verdict}: {ends[fullest]:,.2f} GiB on the fullest rank"
    note += f" (pipeline rank {fullest})" if count > 1 else ""
    held = [name for name in ("offloaded", "pinned") if getattr(memories[fullest], name)]
    on_host = [f"{getattr(memories[fullest], name) / GIB:,.1f} GiB {name}" for name in held]
    _title(figure, "Memory of a rank", plan, " · ".join([note, *on_host]))
    return figure


def timeline_figure(plan: Plan, picture: StepPicture) -> "Figure":
    """Draw when each pipeline rank computes what, in one step or in its begin and its end."""
    time = plan.time
    assert time is not None
    count = len(picture.rows)
    cut = picture.cut
    figure, first = _figure(count)
    end = max(time.seconds, picture.seconds)
    windows = [(0.0, end)]
    panels = [first]
    if cut is not None:
        windows = [(0.0, cut[0]), (cut[1], end)]
        first.remove()
        widths = [last - begin for begin, last in windows]
        panels = list(figure.subplots(1, 2, sharey=True, width_ratios=widths, gridspec_kw={"wspace": 0.03}))
        for axes in panels:
            _style(axes, count)
        panels[1].tick_params(labelleft=False)
    for axes, window in zip(panels, windows, strict=True):
        _draw_window(axes, picture, window, end)
    labels = {COLORS[kind]: KINDS[kind] for kind in picture.kinds}
    if end > picture.seconds:
        labels[REST_COLOR] = REST
    for color, label in labels.items():
        panels[0].barh([0], [0], color=color, label=label)
    if count <= NAMED_RANKS:
        for rank, row in enumerate(picture.rows):
            if count > 1:
                right = panels[-1].get_xlim()[1]
                told = f" idle {picture.idle(row):.0%}"
                panels[-1].text(right, rank, told, va="center", color=QUIET, size=8.5)
    figure.supxlabel("ms", color=QUIET, size=10.5, y=0.1 * 5.6 / figure.get_figheight())
    _below(figure, panels[0], 5)
    _title(figure, "Time of a step", plan, step_told(plan), picture.told())
    return figure


def _draw_window(axes: "Axes", picture: StepPicture, window: tuple[float, float], end: float) -> None:
    """Draw the spans of a window of time; numbers of microbatches where there is room for them."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    begin, last = window
    axes.xaxis.set_major_locator(MaxNLocator(6, prune=None if last - begin >= end else "both"))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    roomy = 0.02 * (last - begin) * max(1.0, len(str(picture.microbatches)) / 2)
    axes.set_xlim(begin * 1e3, last * 1e3)
    for rank, row in enumerate(picture.rows):
        shown = [span for span in row.spans if span.end > begin and span.start < last]
        for kind in picture.kinds:
            parts = [(s.start * 1e3, (s.end - s.start) * 1e3) for s in shown if s.kind == kind]
            # A white edge parts equal neighbours; it would cover a span that is no wider than itself.
            edges = [0.4 if wide > 0.004e3 * (last - begin) else 0.0 for _, wide in parts]
            axes.broken_barh(
                parts, (rank - 0.4, 0.8), facecolor=COLORS[kind], edgecolor="white", linewidth=edges
            )
        if len(picture.rows) <= NAMED_RANKS:
            for span in shown:
                middle = (span.start + span.end) / 2
                if span.end - span.start >= roomy and begin < middle < last:
                    text: dict[str, Any] = {"ha": "center", "va": "center", "color": "white", "size": 7}
                    axes.text(middle * 1e3, rank, str(span.microbatch), clip_on=True, **text)
        if end > picture.seconds and last > picture.seconds:
            start = max(begin, picture.seconds)
            axes.broken_barh([(start * 1e3, (end - start) * 1e3)], (rank - 0.4, 0.8), facecolor=REST_COLOR)


def _figure(rows: int) -> "tuple[Figure, Axes]":
    """Return a figure of so many horizontal rows, which is as high as they need."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 2.6 + 0.26 * min(max(rows, 3), 64)
    figure = Figure(figsize=(9.0, height))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.085, right=0.93, top=1 - 0.95 / height, bottom=1.05 / height)
    axes = figure.subplots()
    _style(axes, rows)
    return figure, axes


def _style(axes: "Axes", rows: int) -> None:
    axes.spines[:].set_visible(False)
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, labelsize=9, length=0, pad=4)
    axes.set_ylim(rows - 0.5, -0.5)
    named = range(0, rows, 1 + (rows - 1) // NAMED_RANKS)
    axes.set_yticks(list(named), [f"pp {rank}" if rows > 1 else "rank" for rank in named])


def _below(figure: "Figure", axes: "Axes", columns: int) -> None:
    """Put the legend of `axes` at the bottom of the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=columns, fontsize=9, labelcolor=INK, frameon=False
    )


def _title(figure: "Figure", what: str, plan: Plan, *notes: str) -> None:
    """Write the heading of a picture: what it shows, of which layout, and notes below."""
    height = figure.get_figheight()
    text: dict[str, Any] = {"x": 0.02, "parse_math": False, "va": "baseline"}
    figure.text(
        y=1 - 0.3 / height, s=f"{what}: {layout_told(plan)}", color=INK, size=11, weight="bold", **text
    )
    for number, note in enumerate(note for note in notes if note):
        figure.text(y=1 - (0.53 + 0.2 * number) / height, s=note, color=QUIET, size=9, **text)


def _png(figure: "Figure") -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    return picture.getvalue()
