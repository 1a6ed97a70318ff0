"""How much an attacker learns of whether a site is there: a lower bound on epsilon, with its confidence.

The attacker knows every other site, knows what the one in question would send, and sees the releases. It
asks which of the two worlds it is in by the best linear function of what it sees (Fisher), which for Gaussian
noise no test can better (Neyman and Pearson). What noise there is on what, it finds out from runs of its own,
so that a sum without noise gives the site away at once. From how often it errs follows what epsilon cannot
be:

* without any assumption, `epsilon >= ln((1 - delta - b) / a)` for errors a and b of a test (Kairouz, Oh and
  Viswanath, ICML 2015), with the upper Clopper-Pearson bounds of a and b;
* if the noise is taken to be Gaussian, which it is but for its grid, by the mu that these errors prove (Dong,
  Roth and Su, J. R. Stat. Soc. B 84, 2022; Nasr et al., USENIX Security 2023): sharper, since the errors of
  the middle tell of the tails.

The threshold is chosen on one half of the runs and judged on the other. None of them is among those that the
noise was learned from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fmi_server.privacy.accounting import gaussian_epsilon

CONFIDENCE = 0.999
"""That no bound of one audit is too high."""

QUANTILES = np.linspace(0.0005, 0.9995, 400)

LEARNING = 2_000
"""Runs that the noise is learned from."""

PART = 4_000
"""Runs at a time, so that what is drawn stays small."""

NO_NOISE = 1e-6
"""The share of the mean variance that counts as none."""


@dataclass(frozen=True)
class Finding:
    """What an attack proved.

    Attributes:
        assumed_nothing: epsilon is at least this.
        assumed_gaussian: the same, if the noise is Gaussian.
    """

    assumed_nothing: float
    assumed_gaussian: float


def statistic(
    seen: Callable[[bool, int], NDArray[np.float64]], moved: NDArray[np.float64]
) -> Callable[[bool, int], NDArray[np.float64]]:
    """Return the attacker's statistic: the linear function of what it sees that tells the worlds apart best.

    Args:
        seen: of whether the site is there, and a number of trials: what is seen, trials x numbers.
        moved: what the site adds to these numbers.
    """
    learned = seen(False, LEARNING)
    middle = learned.mean(axis=0)
    noise = np.atleast_2d(np.cov(learned, rowvar=False))
    least = NO_NOISE * float(np.trace(noise)) / len(noise) or 1.0
    direction = np.linalg.solve(noise + least * np.eye(len(noise)), moved)

    def projected(present: bool, trials: int) -> NDArray[np.float64]:
        return np.concatenate(
            [
                (seen(present, min(PART, trials - start)) - middle) @ direction
                for start in range(0, trials, PART)
            ]
        )

    return projected


def audit(seen: Callable[[bool, int], NDArray[np.float64]], delta: float, trials: int) -> Finding:
    """Attack a mechanism.

    Args:
        seen: of whether the site is there, and a number of trials: what the attacker's statistic was in each.
        delta: of the claim.
        trials: in each world; half of them choose the threshold.
    """
    without, with_it = seen(False, trials), seen(True, trials)
    half = trials // 2
    places = np.quantile(np.concatenate([without[:half], with_it[:half]]), QUANTILES)
    nothing = max(places, key=lambda t: _bounds(without[:half], with_it[:half], t, delta)[0])
    gaussian = max(places, key=lambda t: _bounds(without[:half], with_it[:half], t, delta)[1])
    return Finding(
        _bounds(without[half:], with_it[half:], nothing, delta)[0],
        _bounds(without[half:], with_it[half:], gaussian, delta)[1],
    )


def _bounds(
    without: NDArray[np.float64], with_it: NDArray[np.float64], threshold: float, delta: float
) -> tuple[float, float]:
    false_alarms = _upper(int(np.count_nonzero(without > threshold)), len(without))
    misses = _upper(int(np.count_nonzero(with_it <= threshold)), len(with_it))
    nothing = [
        math.log((1.0 - delta - other) / one) if 1.0 - delta > other + one else 0.0
        for one, other in ((false_alarms, misses), (misses, false_alarms))
    ]
    normal = NormalDist()
    mu = max(0.0, normal.inv_cdf(1.0 - false_alarms) - normal.inv_cdf(misses))
    return max(nothing), gaussian_epsilon(mu, delta) if mu else 0.0


def _upper(errors: int, runs: int) -> float:
    """Return the upper end of Clopper and Pearson's one-sided interval; two of them hold together."""
    level = 1.0 - (1.0 - CONFIDENCE) / 2.0
    return float(stats.beta.ppf(level, errors + 1, runs - errors)) if errors < runs else 1.0 - 1e-12
