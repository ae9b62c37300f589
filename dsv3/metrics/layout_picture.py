"""Draw what a search for layouts has found: speed against memory, with the front."""

from collections.abc import Sequence
from pathlib import Path

from dsv3.errors import UserError
from dsv3.metrics.plots import drawable, write_png

Point = tuple[float, float]
"""GiB of a rank, and tokens per second and GPU."""


def draw_layouts(
    points: Sequence[Point], front: Sequence[Point], room: float, title: str, picture: str
) -> None:
    """Write a PNG: a dot per planned layout, the front as steps, a line at the device's memory.

    `room` is the device's memory in GiB. A file that is there is replaced in one rename.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    all_memory, all_speed = zip(*points, strict=True)
    axes.scatter(all_memory, all_speed, s=9, color="0.65", label="planned layouts")
    ascending = sorted(front)
    memory, speed = zip(*ascending, strict=True)
    axes.step([*memory, room], [*speed, speed[-1]], where="post", color="tab:blue")
    axes.scatter(memory, speed, s=26, color="tab:blue", label="front", zorder=3)
    axes.axvline(room, color="tab:red", linestyle="--", label="device memory")
    axes.set_xlabel("memory of the fullest rank, GiB")
    axes.set_ylabel("tokens/s/GPU")
    axes.set_ylim(bottom=0)
    axes.set_title(drawable(title), parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    try:
        write_png(figure, Path(picture))
    except OSError as error:
        raise UserError(f"task.picture={picture} cannot be written: {error.strerror}") from None
