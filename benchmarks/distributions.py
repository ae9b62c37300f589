"""Distributions of numbers, with the integrals over a part of their range in closed form."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Array = np.ndarray
Moments = Callable[[Array], tuple[Array, Array, Array]]


@dataclass(frozen=True)
class Distribution:
    """A symmetric distribution, by the partial moments of the magnitude: the integrals of 1, x and x^2
    times its density from 0 to a."""

    name: str
    moments: Moments
    draw: Callable[[np.random.Generator, tuple[int, int]], Array]
    top: float
    """Beyond it there is nothing to speak of."""

    def quantiles(self, shares: Array) -> Array:
        """The magnitudes below which these shares lie."""
        low, high = np.zeros_like(shares), np.full_like(shares, self.top)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.moments(middle)[0] < shares
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return high


def _uniform(a: Array) -> tuple[Array, Array, Array]:
    a = np.minimum(a, 1.0)
    return a, a**2 / 2, a**3 / 3


def _normal(a: Array) -> tuple[Array, Array, Array]:
    m0 = torch.erf(torch.from_numpy(a / math.sqrt(2))).numpy()
    bell = math.sqrt(2 / math.pi) * np.exp(-(a**2) / 2)
    return m0, math.sqrt(2 / math.pi) - bell, m0 - a * bell


def _laplace(a: Array) -> tuple[Array, Array, Array]:
    tail = np.exp(-a)
    return 1 - tail, 1 - (1 + a) * tail, 2 - (a**2 + 2 * a + 2) * tail


_OCTAVES, _SIGMA = 24, 1.0


def _log_uniform(a: Array) -> tuple[Array, Array, Array]:
    low, width = 2.0**-_OCTAVES, _OCTAVES * math.log(2)
    a = np.clip(a, low, 1.0)
    return np.log(a / low) / width, (a - low) / width, (a**2 - low**2) / 2 / width


def _log_normal(a: Array) -> tuple[Array, Array, Array]:
    with np.errstate(divide="ignore"):
        z = torch.from_numpy(np.log(a) / _SIGMA)
    m0, m1, m2 = (
        math.exp((j * _SIGMA) ** 2 / 2) * torch.special.ndtr(z - j * _SIGMA).numpy() for j in range(3)
    )
    return m0, m1, m2


def _signed(draw: np.random.Generator, magnitudes: Array) -> Array:
    signed: Array = magnitudes * draw.choice([-1.0, 1.0], magnitudes.shape)
    return signed


DISTRIBUTIONS = [
    Distribution("uniform", _uniform, lambda draw, shape: draw.uniform(-1, 1, shape), 1.0),
    Distribution("normal", _normal, lambda draw, shape: draw.standard_normal(shape), 9.0),
    Distribution("Laplace", _laplace, lambda draw, shape: draw.laplace(size=shape), 45.0),
    Distribution(
        f"log-uniform, {_OCTAVES} octaves",
        _log_uniform,
        lambda draw, shape: _signed(draw, np.exp2(draw.uniform(-_OCTAVES, 0, shape))),
        1.0,
    ),
    Distribution(
        f"log-normal, sigma {_SIGMA:.0f}",
        _log_normal,
        lambda draw, shape: _signed(draw, np.exp(_SIGMA * draw.standard_normal(shape))),
        math.exp(9 * _SIGMA),
    ),
]
