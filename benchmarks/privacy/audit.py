"""How much an attacker learns of whether a site is there: a lower bound on epsilon, with its confidence.

The attacker knows every other site, knows what the one in question would send, and sees the releases. It
asks which of the two worlds it is in by the projection of what it sees on the difference between the worlds,
which for Gaussian noise no test can better (Neyman and Pearson). From how often it errs follows what epsilon
cannot be:

* without any assumption, `epsilon >= ln((1 - delta - b) / a)` for errors a and b of a test (Kairouz, Oh and
  Viswanath, ICML 2015), with the upper Clopper-Pearson bounds of a and b;
* if the noise is taken to be Gaussian, which it is but for its grid, by the mu that these errors prove (Dong,
  Roth and Su, J. R. Stat. Soc. B 84, 2022; Nasr et al., USENIX Security 2023): sharper, since the errors of
  the middle tell of the tails.

The threshold is chosen on one half of the runs and judged on the other.
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


@dataclass(frozen=True)
class Finding:
    """What an attack proved.

    Attributes:
        assumed_nothing: epsilon is at least this.
        assumed_gaussian: the same, if the noise is Gaussian.
    """

    assumed_nothing: float
    assumed_gaussian: float


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
