"""Fits of costs that cannot be negative."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["costs_of"]


def costs_of(amounts: ArrayLike, totals: ArrayLike, *, relative: bool = True) -> list[float]:
    """Return what one of each kind costs, at least 0, so that the totals come out as nearly as possible.

    A cost that would be negative is 0, and the others are fitted without it.

    Args:
        amounts: totals x kinds, how many of each kind are in a total.
        totals: what was measured, positive.
        relative: whether a small total counts as much as a large one.
    """
    measured = np.maximum(np.asarray(totals, dtype=float), 1e-12)
    unit = measured if relative else np.full(len(measured), measured.mean())
    parts = np.asarray(amounts, dtype=float) / unit[:, None]
    kinds = list(range(parts.shape[1]))
    while True:
        found = np.linalg.lstsq(parts[:, kinds], measured / unit, rcond=None)[0]
        if not kinds or found.min() >= 0.0:
            break
        del kinds[int(found.argmin())]
    costs = np.zeros(parts.shape[1])
    costs[kinds] = found
    return [float(cost) for cost in costs]
