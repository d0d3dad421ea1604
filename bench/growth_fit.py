"""
How fast a cost y grows with a size n: exponents with standard errors, from few points with noise.

All fits take relative errors, so that a point of 1 ms counts as much as one of 1 s.

    slope     y = c nᵏ             a line through (log n, log y), of all points and of the upper half of them
    growing   y = a + b nᵏ         a, b ≥ 0: the exponent of what grows where a constant dominates the small sizes. Left out where
                                   it says nothing: fewer than 5 points, less than a tenth of y at the largest n grown (constant),
                                   a standard error above ½, a k less than two of them from 0, or one at the end of the search, 4

A slope over a range in which a constant dominates is too small; the slope of the upper half says what the range ends in, `growing`
what it tends to. Standard errors are those of least squares: they know the scatter of the points, not a model that is wrong.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXPONENTS = np.arange(0.05, 4.0, 0.05)  # where k is searched


@dataclass(frozen=True)
class Power:
    """y = c nᵏ"""

    k: float
    error: float  # standard error of k
    c: float

    def __call__(self, n):
        return self.c * np.asarray(n, float) ** self.k


@dataclass(frozen=True)
class Offset:
    """y = a + b (n / largest)ᵏ"""

    k: float
    error: float
    a: float
    b: float
    smallest: float
    largest: float

    @property
    def share(self) -> float:
        """The part of y at the largest n that was not there at the smallest."""
        return 1 - float(self(self.smallest) / self(self.largest))

    @property
    def says_something(self) -> bool:
        return self.share >= 0.1 and self.error <= min(0.5, self.k / 2) and self.k < EXPONENTS[-1]

    def __call__(self, n):
        return self.a + self.b * (np.asarray(n, float) / self.largest) ** self.k


@dataclass(frozen=True)
class Growth:
    slope: Power
    upper: Power
    growing: Offset | None

    @property
    def curve(self) -> Power | Offset:
        """What is drawn: y = a + b nᵏ where that says something."""
        return self.growing or self.slope


def _checked(n: Sequence[float], y: Sequence[float], least: int) -> tuple[np.ndarray, np.ndarray]:
    n, y = np.asarray(n, float), np.asarray(y, float)
    if n.shape != y.shape or n.ndim != 1:
        raise ValueError(f"fit: n and y must be lists of one length, got shapes {n.shape} and {y.shape}")
    if len(set(n.tolist())) < least:
        raise ValueError(f"fit: n must hold at least {least} different sizes, got {sorted(set(n.tolist()))}")
    for name, values in (("n", n), ("y", y)):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"fit: {name} must be positive and finite, got {values.tolist()}")
    order = np.argsort(n)
    return n[order], y[order]


def power(n: Sequence[float], y: Sequence[float]) -> Power:
    """
    The line through (log n, log y).

    Args: n: sizes, y: costs, positive, at least 3 different sizes.
    Raises: ValueError (lengths, values).
    """
    n, y = _checked(n, y, 3)
    x, z = np.log(n), np.log(y)
    centred = x - x.mean()
    k = centred @ z / (centred @ centred)
    intercept = z.mean() - k * x.mean()
    left = z - intercept - k * x
    return Power(float(k), math.sqrt(left @ left / (len(n) - 2) / (centred @ centred)), math.exp(intercept))


def nonnegative(columns: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    """
    Coefficients ≥ 0 with the least Σ ((columns @ coefficients − values) / values)², and that sum; every subset of columns is tried.

    Args: columns: (points, c) with a small c.   values: (points,), positive.
    """
    relative = columns / values[:, None]
    scale = np.abs(relative).max(0)
    present = np.flatnonzero(scale)  # a column of zeros has any coefficient, and gets 0
    scale[scale == 0] = 1
    relative /= scale
    best, least = np.zeros(columns.shape[1]), float(len(values))
    for count in range(1, len(present) + 1):
        for chosen in map(list, itertools.combinations(present, count)):
            found = np.linalg.lstsq(relative[:, chosen], np.ones(len(values)), rcond=None)[0]
            rest = float(np.square(relative[:, chosen] @ found - 1).sum())
            if (found >= 0).all() and rest < least:
                best, least = np.zeros(columns.shape[1]), rest
                best[chosen] = found
    return best / scale, least


def offset(n: Sequence[float], y: Sequence[float]) -> Offset:
    """
    y = a + b (n / max n)ᵏ with a, b ≥ 0 and k > 0: for each k the best a and b, and of all k the best.

    Args: n: sizes, y: costs, positive, at least 5 different sizes.
    Raises: ValueError (lengths, values).
    """
    n, y = _checked(n, y, 5)
    u = n / n[-1]

    def fit(k):
        return nonnegative(np.stack([np.ones_like(u), u**k], 1), y)

    step, k = EXPONENTS[1] - EXPONENTS[0], min(EXPONENTS, key=lambda k: fit(k)[1])
    while step > 1e-5:
        step /= 2
        k = min((k - step, k, k + step), key=lambda k: fit(k)[1] if k > 0 else math.inf)
    (a, b), rest = fit(k)
    # How the model turns with each of its parameters; one that is held at 0 does not.
    slopes = [u**k, b * u**k * np.log(u)] + ([np.ones_like(u)] if a > 0 else [])
    J = np.stack(slopes, 1) / y[:, None]
    covariance = np.linalg.pinv(J.T @ J) * rest / (len(n) - len(slopes))
    error = math.sqrt(covariance[1, 1]) if b > 0 else math.inf
    return Offset(float(k), error, float(a), float(b), float(n[0]), float(n[-1]))


def growth(n: Sequence[float], y: Sequence[float]) -> Growth:
    """
    All of it for one series.

    Args: n: sizes, y: costs, positive, at least 3 different sizes.
    Raises: ValueError (lengths, values).
    """
    n, y = _checked(n, y, 3)
    half = max(3, math.ceil(len(n) / 2))
    growing = offset(n, y) if len(n) >= 5 else None
    if growing is not None and not growing.says_something:
        growing = None
    return Growth(power(n, y), power(n[-half:], y[-half:]), growing)
