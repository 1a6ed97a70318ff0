"""Zero-concentrated differential privacy (zCDP), and what it means as (epsilon, delta).

rho adds up over releases, however each was chosen in the light of those before (Bun and Steinke, TCC 2016);
epsilons do not. So budgets are kept in rho, and told in epsilon.
"""

from __future__ import annotations

import math
from typing import Final

__all__ = ["zcdp_epsilon", "zcdp_rho"]

_STEPS: Final = 120
"""Steps of each search: the golden section then leaves 1e-25 of what it began with."""

_GOLDEN: Final = (math.sqrt(5.0) - 1.0) / 2.0
_ORDERS: Final = (-30.0, 60.0)
"""Natural logarithms of the smallest and the largest Rényi order less 1 that are looked at."""


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Return the smallest epsilon for which rho-zCDP is known to imply (epsilon, delta).

    The least over a > 1 of `a rho + log(1 - 1/a) - (log(delta) + log(a)) / (a - 1)` (Canonne, Kamath and
    Steinke, arXiv:2004.00010v4, Proposition 12, solved for epsilon). Every a gives a guarantee, so what the
    search misses makes the answer larger, never wrong; it misses nothing that matters, since the values of a
    that give no more than some epsilon are an interval.

    Args:
        rho: Not negative.
        delta: Strictly between 0 and 1.
    """
    if rho == 0.0:
        return 0.0

    def epsilon(log_excess: float) -> float:
        excess = math.exp(log_excess)
        order = 1.0 + excess
        # log(1 - 1/a) = -log(1 + 1/(a - 1)), with all its digits for large a and for a near 1.
        return order * rho - math.log1p(1.0 / excess) - (math.log(delta * order)) / excess

    low, high = _ORDERS
    for _ in range(_STEPS):
        reach = _GOLDEN * (high - low)
        left, right = high - reach, low + reach
        if epsilon(left) <= epsilon(right):
            high = right
        else:
            low = left
    return max(0.0, min(epsilon(low), epsilon(high)))


def zcdp_rho(epsilon: float, delta: float) -> float:
    """Return the largest rho that is known to keep within (epsilon, delta); what is returned keeps it.

    Args:
        epsilon: Positive and finite.
        delta: Strictly between 0 and 1.
    """
    low, high = 0.0, 1.0
    while zcdp_epsilon(high, delta) <= epsilon:
        low, high = high, high * 2.0
    for _ in range(_STEPS):
        middle = low + (high - low) / 2.0
        if zcdp_epsilon(middle, delta) <= epsilon:
            low = middle
        else:
            high = middle
    # A rounding less, so that the promise is kept to the last digit.
    return low * (1.0 - 1e-12)
