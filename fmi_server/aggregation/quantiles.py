"""Quantiles of Student's t and of the normal, and Wilson's lower bound, without scipy."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

__all__ = ["normal_quantile", "t_quantile", "wilson_lower_bound"]

_LARGE_DF = 500
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


def _t_by_newton(df: int, level: float) -> float:
    odd = df % 2 == 1
    # The series in cos(theta): odd df starts at cos, even df at 1; each step multiplies by cos^2.
    first = 1 if odd else 0
    terms = (df - 1) // 2 if odd else df // 2
    powers = first + 2 * np.arange(terms)
    step = (
        2.0 * np.arange(1, terms) / (2.0 * np.arange(1, terms) + 1.0)
        if odd
        else (2.0 * np.arange(1, terms) - 1.0) / (2.0 * np.arange(1, terms))
    )
    coefficients = np.cumprod(np.concatenate(([1.0], step)))[:terms]
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
