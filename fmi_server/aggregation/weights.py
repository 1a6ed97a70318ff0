"""The weight of a site: what it declares, capped by what the others declare, times reputation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.trust import START_REPUTATION

__all__ = ["site_reputations", "site_weights"]


def site_weights(
    site_ids: Sequence[str],
    declared: Sequence[float],
    reputation: Mapping[str, float] | None,
) -> NDArray[np.float64]:
    """Return `min(declared, median declared) * reputation` per site.

    Args:
        site_ids: sites, each once.
        declared: declared confidence or trust, 0..1, same length.
        reputation: per site; a site that is missing has the start reputation, None counts all
            alike.

    Raises:
        ValueError: a declared confidence lies outside 0..1.
    """
    stated = np.asarray(declared, dtype=np.float64)
    if not ((stated >= 0.0) & (stated <= 1.0)).all():
        raise ValueError("declared confidence must lie in 0..1")
    capped = np.minimum(stated, np.median(stated)) if stated.size else stated
    return np.multiply(capped, site_reputations(site_ids, reputation))


def site_reputations(
    site_ids: Collection[str], reputation: Mapping[str, float] | None
) -> NDArray[np.float64]:
    """Return the reputation per site; arguments as in `site_weights`."""
    if reputation is None:
        return np.ones(len(site_ids))
    return np.array([reputation.get(site, START_REPUTATION) for site in site_ids], dtype=np.float64)
