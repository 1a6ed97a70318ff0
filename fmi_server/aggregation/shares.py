"""Capped voting shares: no site weighs more than its cap, the rest is divided by weight."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.order_free import order_free_sums

__all__ = ["capped_shares"]

# Below this, of all weights or of the largest one, a weight is rounding dust and counts as zero.
_NO_WEIGHT = 1e-280
_RELATIVE_DUST = 1e-100


def capped_shares(
    weights: NDArray[np.float64], multiplicity: NDArray[np.float64], cap: float
) -> NDArray[np.float64]:
    """Divide one vote per row by weight, with no share above the cap (water filling).

    Per row the share of a cell is `u = min(c, lam * weight)` with `lam` such that
    `sum(multiplicity * u) = 1`. What a capped cell gives up goes to the others in proportion to
    their weights, until none exceeds the cap. The cap in force is `c = max(cap, 1 / voters)`,
    `voters` being the multiplicity of the cells with a positive weight, because a smaller one
    could not be met. Rows without any weight count their cells alike.

    Args:
        weights: rows x sites, finite and not negative.
        multiplicity: rows x sites, 0..1: how much of the cell survived the trimming. Sites tied
            at the trimming edge survive in equal parts.
        cap: largest share of one site, in (0, 1].

    Returns:
        Rows x sites shares; cells of multiplicity zero have share zero. Rows in which no cell
        survives are all zero.
    """
    voting = multiplicity > 0.0
    raw = np.where(voting, weights, 0.0)
    peak = raw.max(axis=1, initial=0.0, keepdims=True)
    # Scaling by the peak first keeps small weights from losing their digits in the division.
    raw = np.where(peak > _NO_WEIGHT, raw / np.where(peak > _NO_WEIGHT, peak, 1.0), 1.0 * voting)
    raw[raw < _RELATIVE_DUST] = 0.0
    voting_cells = np.count_nonzero(voting, axis=1).astype(np.float64)
    voters = order_free_sums(np.where(raw > 0.0, multiplicity, 0.0), voting_cells)
    limit = np.maximum(cap, 1.0 / np.where(voters > 0.0, voters, 1.0))
    shares = np.zeros_like(raw)
    capped = np.zeros(raw.shape, dtype=bool)
    open_rows = np.flatnonzero(voters > 0.0)
    while open_rows.size:
        row_raw, row_mult, row_cap = raw[open_rows], multiplicity[open_rows], capped[open_rows]
        free = np.where(row_cap, 0.0, row_raw)
        most = voting_cells[open_rows]
        left = 1.0 - limit[open_rows] * order_free_sums(np.where(row_cap, row_mult, 0.0), most)
        mass = order_free_sums(row_mult * free, most)
        level = np.maximum(left, 0.0) / np.where(mass > 0.0, mass, 1.0)
        row_shares = np.where(row_cap, limit[open_rows, None], free * level[:, None])
        over = row_shares > limit[open_rows, None] * (1.0 + 1e-12)
        shares[open_rows] = row_shares
        capped[open_rows] |= over
        # Every further round caps at least one more cell, so the loop ends.
        open_rows = open_rows[over.any(axis=1)]
    return shares
