from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_server.aggregation.shares import capped_shares


def reference(weights, parts, cap):
    """Water filling in exact arithmetic: cap the largest until the rest fits."""
    cells = [(Fraction(w), Fraction(p)) for w, p in zip(weights, parts, strict=True)]
    if not any(w * p for w, p in cells):
        cells = [(Fraction(1), p) for _, p in cells]
    voters = sum(p for w, p in cells if w)
    limit = max(Fraction(cap), 1 / voters)
    capped: set[int] = set()
    while True:
        left = 1 - limit * sum(cells[i][1] for i in capped)
        mass = sum(w * p for i, (w, p) in enumerate(cells) if i not in capped)
        level = left / mass if mass else Fraction(0)
        over = {i for i, (w, p) in enumerate(cells) if i not in capped and p and w * level > limit}
        if not over:
            return [
                float(limit if i in capped else (w * level if p else 0))
                for i, (w, p) in enumerate(cells)
            ]
        capped |= over


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        min_size=1,
        max_size=12,
    ).filter(lambda cells: any(part for _, part in cells)),
    st.sampled_from([0.05, 0.25, 0.5, 1.0]),
)
def test_shares_agree_with_exact_water_filling(cells, cap):
    weights, parts = np.array(cells, dtype=float).T
    found = capped_shares(weights[None, :], parts[None, :], cap)[0]
    assert found == pytest.approx(reference(weights, parts, cap), abs=1e-9)
    assert (found @ parts) == pytest.approx(1.0)


def test_rows_are_filled_together():
    weights = np.array(
        [[8.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0], [9.0, 9.0, 1.0, 1, 0]]
    )
    found = capped_shares(weights, np.ones((3, 5)), 0.25)
    expected = [[0.25, 0.1875, 0.1875, 0.1875, 0.1875], [0.2] * 5, [0.25, 0.25, 0.25, 0.25, 0.0]]
    assert found == pytest.approx(np.array(expected))


def test_a_row_without_survivors_has_no_shares():
    assert not capped_shares(np.ones((1, 3)), np.zeros((1, 3)), 0.25).any()
