"""The loss curves of several runs in one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.metrics.plot import INCHES, INK, QUIET, plain_axes, points, smooth, write_png
from dsv3.metrics.row import MetricsRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[str, Sequence[MetricsRow]]
# Further curves are drawn but not named.
_NAMED = 12


def comparison(
    curves: Sequence[Curve], png_path: Path, title: str, apart: Sequence[Sequence[tuple[int, float]]] = ()
) -> None:
    """Draw each run's smoothed training loss as a line and its held-out losses as dots, in nats over steps.

    `curves` are names with rows, the best first. `apart` holds for each of them the steps and relative
    differences from a reference, drawn below on a logarithmic scale. Raises OSError where the file cannot
    be written.
    """
    write_png(_figure(curves, title, apart), png_path)


def _figure(curves: Sequence[Curve], title: str, apart: Sequence[Sequence[tuple[int, float]]]) -> "Figure":
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES)
    FigureCanvasAgg(figure)
    below = any(difference for pairs in apart for _, difference in pairs)
    panels = figure.subplots(
        2 if below else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + below]
    )
    axes, last = panels[0, 0], panels[-1, 0]
    figure.subplots_adjust(left=0.075, right=0.97, top=0.9, bottom=0.095)
    plain_axes(axes, "loss (nats): line training, dots held-out")
    last.set_xlabel("step", color=QUIET, size=10.5)
    for index, (name, rows) in enumerate(curves):
        color = colormaps["viridis"](index / max(1, len(curves)))
        steps, losses = points(rows, lambda row: row.loss)
        # A leading underscore keeps a line out of the legend, a dollar sign would begin mathematics.
        label = f"{index + 1}. {name}".replace("$", r"\$") if index < _NAMED else "_"
        alone: dict[str, Any] = {"marker": "o"} if len(losses) == 1 else {}
        window = max(1, min(len(losses) // 15, 400))
        axes.plot(steps, smooth(losses, window), color=color, lw=1.8, label=label, **alone)
        held = points(rows, lambda row: row.evaluation_loss)
        if below:
            shown = [(step, difference) for step, difference in apart[index] if difference > 0]
            last.semilogy(*(zip(*shown, strict=True) if shown else ((), ())), color=color, lw=1.2)
        axes.plot(*held, color=color, lw=0, marker="o", ms=7, mec="white", mew=1.2, zorder=4, label="_")
    if below:
        plain_axes(last, "difference from the reference")
    axes.legend(loc="upper right", fontsize=9, labelcolor=INK, edgecolor="none", framealpha=0.9)
    figure.text(x=0.075, y=0.94, s=title, color=INK, size=15, weight="bold", parse_math=False, va="baseline")
    return figure
