"""Plots of losses as PNG files: the loss curve of one run, and the comparison of several."""

import io
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.metrics.jsonl import read_rows
from dsv3.metrics.row import MetricsRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# 900 x 560 points at 160 dots an inch stay sharp on a dense screen.
INCHES = (9.0, 5.6)

DOTS_PER_INCH = 160

INK, QUIET, GRID = "#1f2933", "#7b8794", "#e4e7eb"

TRAINING, HELD_OUT, LR = "#2b6cb0", "#dd6b20", "#9aa5b1"

Points = tuple[list[int], list[float]]

Curve = tuple[str, Sequence[MetricsRow]]

NAMED_CURVES = 12  # further curves are drawn but not named


def plot_loss_curve(
    source: Path | Sequence[MetricsRow], png_path: Path, title: str = "Training loss"
) -> None:
    """Draw training loss, held-out loss and learning rate over the steps into a PNG.

    `source` is a metrics.jsonl or its rows, in any order and of any number; losses are in nats. No display is
    needed, and matplotlib's global state does not change.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(read_rows(source) if isinstance(source, Path) else source, key=lambda row: row.step)
    figure = Figure(figsize=INCHES)
    FigureCanvasAgg(figure)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1], gridspec_kw={"hspace": 0.1})
    figure.subplots_adjust(left=0.075, right=0.97, top=0.86, bottom=0.095)
    loss_axes.tick_params(labelbottom=False)
    if rows:
        loss_axes.set_xlim(rows[0].step - 1, rows[-1].step + max(0.01 * len(rows), 0.02))
    _draw_losses(loss_axes, rows)
    _draw_learning_rate(lr_axes, rows)
    text: dict[str, Any] = {"x": 0.075, "parse_math": False, "va": "baseline"}
    figure.text(y=0.94, s=drawable(title), color=INK, size=15, weight="bold", **text)
    figure.text(y=0.895, s=_summarize(rows), color=QUIET, size=10.5, **text)
    write_png(figure, png_path)


def drawable(text: str) -> str:
    """Return a text with a mark in place of what is no character: bytes of a name that is no UTF-8."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def write_png(figure: "Figure", png_path: Path) -> None:
    """Write a figure as a PNG; a file that is there is replaced in one rename."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    temporary = png_path.with_name(png_path.name + ".tmp")
    temporary.write_bytes(picture.getvalue())
    temporary.replace(png_path)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over `window` values around each one; centred, it does not lag behind a falling loss.

    Towards both ends the window shrinks evenly, so that the curve starts and ends on the data.
    """
    sums = [0.0, *accumulate(values)]
    last = len(values) - 1
    reaches = [min(window // 2, index, last - index) for index in range(len(values))]
    return [(sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1) for i, reach in enumerate(reaches)]


def _draw_losses(axes: "Axes", rows: Sequence[MetricsRow]) -> None:
    steps, losses = finite_points(rows, lambda row: row.loss)
    held_steps, held_losses = finite_points(rows, lambda row: row.evaluation_loss)
    style_axes(axes, "loss (nats)")
    if not losses and not held_losses:
        axes.text(0.5, 0.5, "no loss recorded", transform=axes.transAxes, ha="center", color=QUIET, size=12)
        axes.set_yticks([])
        return
    alone: dict[str, Any] = {"marker": "o", "alpha": 1.0} if len(losses) == 1 else {"alpha": 0.4}
    if losses:
        axes.plot(steps, losses, color=TRAINING, lw=1.0, label="training, each step", **alone)
    if len(losses) > 2:
        smoothed = running_mean(losses, max(3, min(len(losses) // 15, 400)))
        axes.plot(steps, smoothed, color=TRAINING, lw=2.2, label="training, smoothed")
    if held_losses:
        marks: dict[str, Any] = {"marker": "o", "mec": "white", "mew": 1.2, "zorder": 4}
        size = 7.5 if len(held_losses) < 40 else 5.0
        axes.plot(held_steps, held_losses, color=HELD_OUT, lw=0, ms=size, label="held-out", **marks)
    axes.legend(loc="upper right", fontsize=10, labelcolor=INK, edgecolor="none", framealpha=1)


def _draw_learning_rate(axes: "Axes", rows: Sequence[MetricsRow]) -> None:
    steps, rates = finite_points(rows, lambda row: row.lr)
    style_axes(axes, "")
    axes.text(0.99, 0.8, "learning rate", transform=axes.transAxes, ha="right", color=QUIET, size=10)
    axes.set_xlabel("step", color=QUIET, size=10.5)
    axes.plot(steps, rates, color=LR, lw=1.4, marker="o" if len(rates) == 1 else "")
    axes.fill_between(steps, rates, color=LR, alpha=0.18, lw=0)
    top = max(rates, default=0.0)
    if top > 0:
        axes.set_ylim(0, top * 1.5)
        axes.set_yticks([0, top], ["0", f"{top:.1e}".replace("e-0", "e-")])
    else:
        axes.set_yticks([])


def style_axes(axes: "Axes", label: str) -> None:
    """Reduce the frame to a quiet grid, whole steps on the x axis, and `label` on the y axis."""
    from matplotlib.ticker import MaxNLocator

    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, labelsize=10, length=0, pad=5)
    axes.set_ylabel(label, color=QUIET, size=10.5)
    axes.margins(y=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def finite_points(rows: Sequence[MetricsRow], value: Callable[[MetricsRow], float | None]) -> Points:
    """Return the steps and values of the rows whose value is known and finite."""
    known = [(row.step, found) for row in rows if (found := value(row)) is not None and math.isfinite(found)]
    return [step for step, _ in known], [found for _, found in known]


def _summarize(rows: Sequence[MetricsRow]) -> str:
    """Return the last metrics in words."""
    parts = [f"step {rows[-1].step:,}", f"{rows[-1].tokens:,} tokens"] if rows else ["no steps yet"]
    losses = finite_points(rows, lambda row: row.loss)[1]
    held_out = finite_points(rows, lambda row: row.evaluation_loss)[1]
    if losses:
        parts.append(f"training {losses[-1]:.3f}")
    if held_out:
        perplexity = math.exp(min(held_out[-1], 700.0))
        parts.append(f"held-out {held_out[-1]:.3f} (perplexity {perplexity:,.4g})")
    return "  ·  ".join(parts)


def plot_comparison(
    curves: Sequence[Curve], png_path: Path, title: str, apart: Sequence[Sequence[tuple[int, float]]] = ()
) -> None:
    """Draw each run's smoothed training loss as a line and its held-out losses as dots, in nats over steps.

    `curves` are names with rows, the best first. `apart` holds for each curve the steps and relative
    differences from a reference, drawn below on a logarithmic scale.

    Raises:
        OSError: the file cannot be written.
    """
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
    style_axes(axes, "loss (nats): line training, dots held-out")
    last.set_xlabel("step", color=QUIET, size=10.5)
    for index, (name, rows) in enumerate(curves):
        color = colormaps["viridis"](index / max(1, len(curves)))
        steps, losses = finite_points(rows, lambda row: row.loss)
        # A leading underscore keeps a line out of the legend, a dollar sign would begin mathematics.
        label = f"{index + 1}. {drawable(name)}".replace("$", r"\$") if index < NAMED_CURVES else "_"
        alone: dict[str, Any] = {"marker": "o"} if len(losses) == 1 else {}
        window = max(1, min(len(losses) // 15, 400))
        axes.plot(steps, running_mean(losses, window), color=color, lw=1.8, label=label, **alone)
        held = finite_points(rows, lambda row: row.evaluation_loss)
        if below:
            shown = [(step, difference) for step, difference in apart[index] if difference > 0]
            last.semilogy(*(zip(*shown, strict=True) if shown else ((), ())), color=color, lw=1.2)
        axes.plot(*held, color=color, lw=0, marker="o", ms=7, mec="white", mew=1.2, zorder=4, label="_")
    if below:
        style_axes(last, "difference from the reference")
    axes.legend(loc="upper right", fontsize=9, labelcolor=INK, edgecolor="none", framealpha=0.9)
    text: dict[str, Any] = {"x": 0.075, "parse_math": False, "va": "baseline"}
    figure.text(y=0.94, s=drawable(title), color=INK, size=15, weight="bold", **text)
    write_png(figure, png_path)
