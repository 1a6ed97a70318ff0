from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_server.aggregation.order_free import order_free_sums

TERM = st.floats(-1e150, 1e150, allow_subnormal=False)


def sums(rows, most):
    return order_free_sums(np.array(rows, dtype=float), np.array(most, dtype=float))


@given(st.lists(TERM, min_size=1, max_size=40), st.data())
def test_neither_order_nor_zeros_decide_a_digit(terms, data):
    most = [math.fsum(map(abs, terms))]
    mixed = data.draw(st.permutations([*terms, *[0.0] * data.draw(st.integers(0, 20))]))
    assert sums([terms], most)[0] == sums([mixed], most)[0]


@given(st.lists(TERM, min_size=1, max_size=200))
def test_the_sum_is_the_sum(terms):
    size = math.fsum(map(abs, terms))
    exact = sum(map(Fraction, terms))
    found = Fraction(sums([terms], [size])[0])
    assert abs(found - exact) <= Fraction(size) * len(terms) / 2**51


@pytest.mark.parametrize("terms", [1_000, 100_000])
def test_it_loses_no_more_than_plain_summation_may(terms):
    values = np.random.default_rng(terms).random((8, terms))
    found = sums(values, np.full(8, float(terms)))
    exact = np.array([math.fsum(row) for row in values])
    assert np.max(np.abs(found - exact) / exact) < 4.0 * math.sqrt(terms) * 2.0**-52


def test_rows_of_nothing_and_of_the_smallest_and_largest_numbers():
    tiny = np.full((1, 3), 5e-324)
    assert sums(np.zeros((2, 0)), [0.0, 0.0]).tolist() == [0.0, 0.0]
    assert sums([[0.0, 0.0]], [0.0]).tolist() == [0.0]
    assert sums(tiny, [15e-324]).tolist() == [15e-324]
    assert sums([[1e300, -1e300, 1e300]], [3e300])[0] == pytest.approx(1e300, rel=1e-15)
