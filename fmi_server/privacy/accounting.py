"""What noise costs: zero-concentrated differential privacy, and what it means as (epsilon, delta).

Neighbouring inputs differ in one whole site: it is there with all that it sent, or it is not.

Noise of the discrete Gaussian with standard deviation sigma on integer sums that one site moves by at most
Delta in L2 is `Delta^2 / (2 sigma^2)`-zCDP (Canonne, Kamath and Steinke, 2022, Theorem 4 and its
multivariate form), like continuous noise, and rho adds up over releases, however each was chosen in the
light of those before (Bun and Steinke, TCC 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

__all__ = [
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_mu",
    "zcdp_delta",
    "zcdp_epsilon",
    "zcdp_of_noise",
    "zcdp_rho",
]

_STEPS: Final = 200
"""Bisections: far more than a double has bits."""


def zcdp_of_noise(sensitivity: float, sigma: float) -> float:
    """Return the rho that one release costs.

    Args:
        sensitivity: most that one site moves the sums, in L2.
        sigma: standard deviation of the noise of each sum, in the same unit.
    """
    ratio = sensitivity / sigma
    return ratio * ratio / 2.0


def zcdp_delta(rho: float, epsilon: float) -> float:
    """Return the smallest delta for which rho-zCDP is known to imply (epsilon, delta).

    The least over a > 1 of `exp((a - 1) (a rho - epsilon)) / (a - 1) * (1 - 1/a)^a` (Canonne, Kamath and
    Steinke, 2022, Proposition 7); its logarithm is convex in a.

    Args:
        rho: not negative.
        epsilon: not negative.
    """
    if rho == 0.0:
        return 0.0

    def slope(order: float) -> float:
        return (2.0 * order - 1.0) * rho - epsilon + math.log1p(-1.0 / order)

    # The slope rises from minus infinity at 1 and is positive at this order.
    high = (epsilon + 1.0) / (2.0 * rho) + 2.0
    order = _root(slope, 1.0, high)
    least_order = 1.0 + 1e-12
    order = max(order, least_order)
    exponent = (order - 1.0) * (order * rho - epsilon) + order * math.log1p(-1.0 / order)
    return math.exp(min(0.0, exponent - math.log(order - 1.0)))


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Return the smallest epsilon for which rho-zCDP is known to imply (epsilon, delta).

    Args:
        rho: not negative.
        delta: strictly between 0 and 1.
    """
    _check_delta(delta)
    if zcdp_delta(rho, 0.0) <= delta:
        return 0.0
    # Bun and Steinke's simpler conversion is never below it.
    high = rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))
    return _root(lambda epsilon: delta - zcdp_delta(rho, epsilon), 0.0, high)


def zcdp_rho(epsilon: float, delta: float) -> float:
    """Return the largest rho that is known to keep within (epsilon, delta).

    Args:
        epsilon: positive.
        delta: strictly between 0 and 1.
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    high = 1.0
    while zcdp_delta(high, epsilon) <= delta:
        high *= 2.0
    # What is returned keeps the promise: bisection ends a rounding above the root at most.
    return _root(lambda rho: zcdp_delta(rho, epsilon) - delta, 0.0, high) * (1.0 - 1e-12)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return delta(epsilon) of continuous Gaussian noise, exactly (Balle and Wang, ICML 2018, Theorem 8).

    Args:
        mu: sensitivity by standard deviation, of one release or `sqrt(sum(mu_i^2))` of several.
        epsilon: not negative.
    """
    if mu == 0.0:
        return 0.0
    first = _cdf(mu / 2.0 - epsilon / mu)
    # exp(epsilon) alone may be past the largest number.
    second = _log_cdf(-mu / 2.0 - epsilon / mu) + epsilon
    return max(0.0, first - math.exp(second))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon of continuous Gaussian noise at a delta.

    Args:
        mu: as in `gaussian_delta`.
        delta: strictly between 0 and 1.
    """
    _check_delta(delta)
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2.0
    return _root(lambda epsilon: delta - gaussian_delta(mu, epsilon), 0.0, high)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the largest mu of continuous Gaussian noise that keeps within (epsilon, delta).

    Args:
        epsilon: not negative.
        delta: strictly between 0 and 1.
    """
    _check_delta(delta)
    high = 1.0
    while gaussian_delta(high, epsilon) <= delta:
        high *= 2.0
    return _root(lambda mu: gaussian_delta(mu, epsilon) - delta, 0.0, high)


def _cdf(z: float) -> float:
    """Return the normal distribution function, with all its digits in the lower tail."""
    return math.erfc(-z / math.sqrt(2.0)) / 2.0


def _log_cdf(z: float) -> float:
    """Return the logarithm of the normal distribution function, far out by its continued fraction."""
    if z > -35.0:
        return math.log(_cdf(z))
    size, fraction = -z, 0.0
    for term in range(60, 0, -1):
        fraction = term / (size + fraction)
    return -size * size / 2.0 - math.log(math.sqrt(2.0 * math.pi) * (size + fraction))


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Return the upper end of what bisection leaves of the place where a rising function crosses zero."""
    for _ in range(_STEPS):
        middle = low + (high - low) / 2.0
        if middle in (low, high):
            break
        if rising(middle) > 0.0:
            high = middle
        else:
            low = middle
    return high


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must lie strictly between 0 and 1, got {delta}")


def _check_epsilon(epsilon: float) -> None:
    if not 0.0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
