"""The figures of docs/precision.md about FP8."""

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.e4m3 import error_at
from dsv3.fp8.operands import FP8Recipe
from dsv3.metrics.plots import HELD_OUT, INCHES, INK, QUIET, TRAINING, style_axes, write_png

COLORS = {"1 x 128": TRAINING, "128 x 1": "#38a169", "128 x 128": "#805ad5", "tensor": HELD_OUT}
_TITLE: dict[str, Any] = {"x": 0.075, "parse_math": False, "va": "baseline"}
_OCTAVES, _PER_OCTAVE = 22, 8
_SMALLEST_NORMAL, _LARGEST_ZERO = (math.log2(448) - n for n in (-6, -10))


def draw_levels(path: Path) -> None:
    """The relative error of numbers by their distance from their tile's maximum: closed form and measured."""
    figure, axes = new_figure(
        "Relative error of numbers in FP8 (E4M3)",
        "numbers spread over an octave, in a tile with one scale; the line is computed, the dots measured",
        1,
    )
    octaves = [1 + n / _PER_OCTAVE for n in range(_OCTAVES * _PER_OCTAVE)]
    axes[0].plot(octaves, [error_at(2.0**-n) for n in octaves], color=TRAINING, lw=2.0)
    dots = octaves[:: _PER_OCTAVE // 2]
    axes[0].plot(dots, [_measured(2.0**-n) for n in dots], "o", color=HELD_OUT, ms=4)
    axes[0].set_xlabel("powers of two from the smallest of them up to the tile's largest number", color=QUIET)
    notes: list[tuple[float, str, Any]] = [
        (_SMALLEST_NORMAL, "subnormal codes from here on ", "right"),
        (_LARGEST_ZERO, " the code 0 from here on", "left"),
    ]
    for at, what, side in notes:
        axes[0].axvline(at, color=QUIET, lw=0.8, ls=":")
        axes[0].text(at, 0.05, what, color=QUIET, size=10, ha=side)
    _in_per_cent(axes[0])
    write_png(figure, path)


def _measured(level: float) -> float:
    """Of 127 numbers that are uniform over an octave, in a tile with the number 1."""
    x = level * (1 + torch.rand(64, 128, generator=torch.Generator().manual_seed(0)))
    x[:, 0] = 1.0
    operand = FP8Recipe().quantize_activations(x)
    found = (operand.codes.float() * operand.scales)[:, 1:]
    return float((found - x[:, 1:]).norm() / x[:, 1:].norm())


def _in_per_cent(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_yticks([0.03, 0.1, 0.3, 1.0], ["3 %", "10 %", "30 %", "100 %"])
    axes.minorticks_off()


def draw_outliers(lines: list[dict[str, Any]], path: Path) -> None:
    """What becomes of the other numbers as a few channels grow, by scheme."""
    figure, axes = new_figure(
        "Four channels of 1024 are larger: what becomes of all other numbers",
        "normal numbers in FP8 with fp32 scales, by what shares a scale",
        2,
    )
    names = [("error", "relative error of the others"), ("zeros", "share of the others that become 0")]
    for panel, (name, label) in zip(axes, names, strict=True):
        for scheme, color in COLORS.items():
            own = [line for line in lines if line["scheme"] == scheme]
            panel.plot(
                [line["size"] for line in own], [line[name] for line in own], color=color, lw=2, label=scheme
            )
        style_axes(panel, label)
        panel.set_xscale("log")
        panel.minorticks_off()
        panel.set_xlabel("times as large as the others", color=QUIET, size=10.5)
    _in_per_cent(axes[0])
    axes[0].legend(loc="upper left", fontsize=10, labelcolor=INK, edgecolor="none", framealpha=1)
    write_png(figure, path)


def new_figure(title: str, subtitle: str, panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with a title, a line below it and plain panels side by side."""
    figure = Figure(figsize=INCHES)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    figure.subplots_adjust(left=0.09, right=0.97, top=0.84, bottom=0.12, wspace=0.25)
    figure.text(y=0.94, s=title, color=INK, size=15, weight="bold", **_TITLE)
    figure.text(y=0.89, s=subtitle, color=QUIET, size=10.5, **_TITLE)
    for panel in axes:
        style_axes(panel, "relative error" if panels == 1 else "")
    return figure, axes
