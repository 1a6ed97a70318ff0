"""Quantiles of Student's t and of the normal, and Wilson's lower bound, without scipy."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = ["normal_quantile", "t_central_probability", "t_quantile", "wilson_lower_bound"]

_LARGE_DF = 500
_SERIES_DF = 30
_MAX_NEWTON_STEPS = 100
_STANDARD_NORMAL = NormalDist()


def normal_quantile(probability: float) -> float:
    """Return z with P(Z <= z) = probability (Wichura, AS 241, as in the standard library)."""
    return _STANDARD_NORMAL.inv_cdf(probability)


@lru_cache(maxsize=65_536)
def t_quantile(df: int, level: float) -> float:
    """Return t with P(|T| <= t) = level for Student's t with `df` degrees of freedom.

    Up to 500 degrees of freedom the central probability is the finite sum of Abramowitz and
    Stegun 26.7.3 and 26.7.4 in theta = atan(t / sqrt(df)). It is increasing and concave in
    theta, so Newton's method from zero climbs to the root and cannot overshoot. Above 500 the
    Cornish-Fisher expansion 26.7.5 is used; its next term is below 1e-11 at level 0.9999.

    Args:
        df: degrees of freedom, an integer from 1 on.
        level: central probability, strictly between 0 and 1; 0.95 gives the 97.5 % quantile.

    Raises:
        ValueError: `df` below 1 or `level` outside (0, 1).
    """
    if df < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {df}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    return _t_by_expansion(df, level) if df > _LARGE_DF else _t_by_newton(df, level)


def t_central_probability(
    distance: NDArray[np.float64], df: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return P(|T| <= distance) for Student's t, element by element.

    Up to 30 degrees of freedom the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4 are taken,
    above that Hill's normalising expansion (CACM 13, 1970, algorithm 395), which is exact to 1e-7.

    Args:
        distance: not negative, `inf` for certainty.
        df: degrees of freedom, from 1 on, same length.
    """
    result = np.empty(len(distance))
    large = df > _SERIES_DF
    result[large] = _central_by_expansion(distance[large], df[large])
    for n in np.unique(df[~large]).tolist():
        rows = df == n
        theta = np.arctan(distance[rows] / math.sqrt(n))
        result[rows] = _central_by_series(theta, n)
    return result


def _central_by_series(theta: NDArray[np.float64], df: int) -> NDArray[np.float64]:
    coefficients, powers = _series(df)
    sine, cosine = np.sin(theta), np.cos(theta)
    # One factor after the other, and each row summed by itself: a power or a product of matrices may give
    # the last digit by the place of a row among others.
    factors = np.repeat((cosine * cosine)[:, None], powers.size, axis=1)
    factors[:, :1] = cosine[:, None] if df % 2 == 1 else 1.0
    series = sine * (np.cumprod(factors, axis=1) * coefficients).sum(axis=1)
    central = 2.0 / math.pi * (theta + series) if df % 2 == 1 else series
    within: NDArray[np.float64] = np.clip(central, 0.0, 1.0)
    return within


def _central_by_expansion(
    distance: NDArray[np.float64], df: NDArray[np.int64]
) -> NDArray[np.float64]:
    a = df - 0.5
    b = 48.0 * a * a
    # Beyond this the probability is 1 to the last digit, and its powers would overflow.
    t = np.minimum(distance, 1e6)
    z2 = a * np.log1p(t * t / df)
    z = np.sqrt(z2)
    correction = ((((-0.4 * z2 - 3.3) * z2 - 24.0) * z2 - 85.5) / (0.8 * z2 * z2 + 100.0 + b)) + z2
    z = z * (1.0 + (correction + 3.0) / b)
    return np.array([math.erf(x / math.sqrt(2.0)) for x in z.tolist()], dtype=np.float64)


def _t_by_newton(df: int, level: float) -> float:
    odd = df % 2 == 1
    coefficients, powers = _series(df)
    terms = len(powers)
    # d A / d theta = constant * cos(theta)^(df - 1); the constant is the slope at zero.
    slope = float(coefficients.sum())
    slope = 2.0 / math.pi * (1.0 + slope) if odd else slope
    theta = 0.0
    for _ in range(_MAX_NEWTON_STEPS):
        cosine, sine = math.cos(theta), math.sin(theta)
        series = sine * float(coefficients @ cosine**powers) if terms else 0.0
        central = 2.0 / math.pi * (theta + series) if odd else series
        move = (level - central) / (slope * cosine ** (df - 1))
        theta += move
        if abs(move) <= 1e-16 * theta:
            break
    return math.sqrt(df) * math.tan(theta)


def _series(df: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return coefficients and powers of the series in cos(theta).

    Odd df starts at cos, even df at 1; each step multiplies by cos^2.
    """
    odd = df % 2 == 1
    terms = (df - 1) // 2 if odd else df // 2
    count = np.arange(1.0, terms)
    step = 2.0 * count / (2.0 * count + 1.0) if odd else (2.0 * count - 1.0) / (2.0 * count)
    coefficients = np.cumprod(np.concatenate(([1.0], step)))[:terms]
    return coefficients, odd + 2 * np.arange(terms)


def _t_by_expansion(df: int, level: float) -> float:
    z = normal_quantile(0.5 + level / 2.0)
    z2 = z * z
    g1 = z * (z2 + 1.0) / 4.0
    g2 = z * ((5.0 * z2 + 16.0) * z2 + 3.0) / 96.0
    g3 = z * (((3.0 * z2 + 19.0) * z2 + 17.0) * z2 - 15.0) / 384.0
    g4 = z * ((((79.0 * z2 + 776.0) * z2 + 1482.0) * z2 - 1920.0) * z2 - 945.0) / 92160.0
    return z + (g1 + (g2 + (g3 + g4 / df) / df) / df) / df


def wilson_lower_bound(successes: int, trials: int, level: float) -> float:
    """Return the one-sided lower confidence bound of a proportion (Wilson, JASA 22, 1927).

    Args:
        successes: how many trials succeeded, 0 to `trials`.
        trials: number of trials; zero trials say nothing, so the bound is 0.
        level: one-sided confidence, strictly between 0 and 1.

    Raises:
        ValueError: `successes` outside 0..`trials`.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must lie between 0 and {trials}, got {successes}")
    if trials == 0:
        return 0.0
    z = normal_quantile(level)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1.0 - share) / trials + z * z / (4.0 * trials * trials))
    return max(0.0, (centre - margin) / (1.0 + z * z / trials))
