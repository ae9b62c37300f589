"""What rounding to E4M3 costs, in closed form: from the format's codes and a distribution, without our code.

A tile of n independent numbers has the scale A / 448, A its largest magnitude, or the next power of two.
Between the midpoints of neighbouring codes c a number x has the error x - c, so that the expected square
is a sum over codes of m2 - 2 c m1 + c^2 m0, m the partial moments of |x| there, which are known in closed
form. Given A the other n - 1 numbers are independent draws up to A; F(A)^n is uniform from 0 to 1, and
the mean over A a mean over that. Assumed: draws are independent, and arithmetic but for the codes exact.
"""

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.distributions import Array, Distribution

_SUBNORMAL = [m * 2.0**-9 for m in range(8)]
CODES = np.array(_SUBNORMAL + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)])[:-1]
"""The numbers of E4M3 from 0 to 448 (arXiv 2209.05433, table 1): without the last, which is NaN."""
EDGES = np.concatenate([[0.0], (CODES[1:] + CODES[:-1]) / 2, [CODES[-1]]])
_MAXIMA = 400


@dataclass(frozen=True)
class Expected:
    """What E4M3 makes of a distribution."""

    error: float
    """Root of the squared errors' sum over that of the squares' sum."""
    zeros: float
    """The share of numbers that become 0."""


def expected(distribution: Distribution, n: int, power_of_two: bool, maxima: Array | None = None) -> Expected:
    """Of tiles of `n` numbers: over all that their maxima may be, or for the given ones."""
    if maxima is None:
        maxima = distribution.quantiles(((np.arange(_MAXIMA) + 0.5) / _MAXIMA) ** (1 / n))
    scales = maxima / CODES[-1]
    scales = np.exp2(np.ceil(np.log2(scales))) if power_of_two else scales
    codes, edges = (x * scales[:, None] for x in (CODES, EDGES))
    m0, m1, m2 = distribution.moments(np.minimum(edges, maxima[:, None]))
    others = (n - 1) / m0[:, -1]  # of a tile, by the chance to be no larger
    squares = (np.diff(m2) - 2 * codes * np.diff(m1) + codes**2 * np.diff(m0)).sum(1) * others
    of_largest = np.abs(codes - maxima[:, None]).min(1) ** 2
    signal = (m2[:, -1] * others + maxima**2).mean()
    zeros = ((m0[:, 1] - m0[:, 0]) * others).mean() / n
    return Expected(math.sqrt((squares + of_largest).mean() / signal), float(zeros))


def error_at(level: float) -> float:
    """The relative error of numbers that are uniform from `level` to `2 x level` of a tile's maximum."""
    low, high = level * CODES[-1], 2 * level * CODES[-1]
    edges = np.clip(EDGES, low, high)
    a, b = edges[:-1], edges[1:]
    squares = ((b - CODES) ** 3 - (a - CODES) ** 3).sum() / 3
    return math.sqrt(float(squares) / ((high**3 - low**3) / 3))


def binade(logarithmic: bool) -> tuple[float, float]:
    """Of numbers spread evenly, or evenly in their logarithm, from 1 to 2: error of the norm; and root
    mean square of each number's relative error."""
    step = np.linspace(1, 2, 9)
    edges = np.concatenate([[1.0], (step[1:] + step[:-1]) / 2, [2.0]])
    a, b = edges[:-1], edges[1:]
    if logarithmic:
        m0, m1, m2 = np.log(b / a), b - a, (b**2 - a**2) / 2
        of_inverse, of_square = 1 / a - 1 / b, (1 / a**2 - 1 / b**2) / 2
    else:
        m0, m1, m2 = b - a, (b**2 - a**2) / 2, (b**3 - a**3) / 3
        of_inverse, of_square = np.log(b / a), 1 / a - 1 / b
    squares = (m2 - 2 * step * m1 + step**2 * m0).sum()
    relative = (m0 - 2 * step * of_inverse + step**2 * of_square).sum()
    return math.sqrt(squares / m2.sum()), math.sqrt(relative / m0.sum())


def decibels(error: float) -> float:
    """The signal-to-noise ratio that a relative error is."""
    return -20 * math.log10(error) if error > 0 else math.inf
