from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fmi_server.aggregation import (
    START_REPUTATION,
    ReputationBook,
    TrustSettings,
    leave_one_out_z,
    site_scores,
    trust,
)


def z_by_removal(row, settings):
    """Leave each site out for real and ask scipy for the spread of the others."""
    found = []
    for index, value in enumerate(row):
        others = [v for i, v in enumerate(row) if i != index]
        middle = np.median(others)
        mad = stats.median_abs_deviation(others, scale="normal")
        sigma = max(mad, 0.1 * abs(middle) / settings.tolerance_z)
        gap = abs(value - middle)
        found.append(0.0 if gap == 0 else (gap / sigma if sigma else math.inf))
    return found


@given(
    st.lists(st.floats(-100, 100).map(lambda v: round(v, 3)), min_size=5, max_size=14),
    st.integers(0, 4),
)
def test_z_agrees_with_leaving_each_site_out(values, missing):
    settings = TrustSettings()
    row = np.array([[*values, *[np.inf] * missing]])
    found = leave_one_out_z(row, settings)[0]
    expected = z_by_removal(values, settings)
    np.testing.assert_allclose(found[: len(values)], expected, rtol=1e-9)
    assert np.isnan(found[len(values) :]).all()


@given(
    st.lists(st.sampled_from([-2.0, 0.0, 1.0, 1.5, 7.0]), min_size=5, max_size=14),
    st.integers(0, 3),
)
def test_z_agrees_where_many_values_are_equal(values, missing):
    row = np.array([[*values, *[np.inf] * missing]])
    expected = z_by_removal(values, TrustSettings())
    np.testing.assert_allclose(leave_one_out_z(row)[0, : len(values)], expected, rtol=1e-9)


def uneven(rows=37, sites=41):
    """Make rows of which some have too few sites, some liars, and some but one value."""
    rng = np.random.default_rng(5)
    values = rng.normal(1.0, 0.1, (rows, sites))
    values[rng.random(values.shape) > 0.6] = np.inf
    values[3, 4:] = np.inf
    values[5, values[5] < np.inf] = 2.0
    values[:, 1] *= 30.0
    return values


@pytest.mark.parametrize("cells", [1, 100, 1000])
def test_blocks_change_no_score(cells, monkeypatch):
    values = uneven()
    at_once, z_at_once = site_scores(values), leave_one_out_z(values)
    monkeypatch.setattr(trust, "_BLOCK_CELLS", cells)
    np.testing.assert_array_equal(site_scores(values), at_once)
    np.testing.assert_array_equal(leave_one_out_z(values), z_at_once)


def test_who_is_judged_alone_gets_the_score_it_gets_among_all():
    values = uneven()
    scores = site_scores(values)
    for columns in ([7], [1, 0, 40], list(range(41))):
        found = site_scores(values, columns=np.array(columns))
        np.testing.assert_array_equal(found, scores[columns])
    assert site_scores(values, columns=np.array([], dtype=np.int64)).size == 0


def test_signals_that_do_not_count_move_no_score():
    values = uneven()
    rows = np.array([0, 2, 3, 9, 30])
    np.testing.assert_array_equal(site_scores(values, rows=rows), site_scores(values[rows]))


def test_the_memory_of_judging_does_not_grow_with_the_signals():
    values = np.random.default_rng(0).normal(size=(800, 1000))
    peaks = []
    for rows in (200, 800):
        tracemalloc.start()
        site_scores(values[:rows])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_signals_with_few_sites_are_not_judged():
    values = np.array([[1.0, 2.0, 3.0, 99.0, np.inf], [1.0, 2.0, 3.0, 4.0, 5.0]])
    z = leave_one_out_z(values)
    assert np.isnan(z[0]).all()
    assert not np.isnan(z[1]).any()
    assert np.isnan(site_scores(values[:1])).all()


def test_a_last_digit_condemns_nobody():
    values = np.array([[1.0, 1.0, 1.0, 1.0, 1.0, 1.001]])
    assert site_scores(values).tolist() == [1.0] * 6


def test_the_score_is_the_mean_over_the_signals():
    settings = TrustSettings()
    values = np.array([[0.0, 1.0, 2.0, 3.0, 4.0, 50.0], [0.0, 1.0, 2.0, 3.0, 4.0, 2.0]])
    z = z_by_removal(values[0], settings)[-1]
    assert site_scores(values, settings)[-1] == pytest.approx(((2.5 / z) ** 2 + 1.0) / 2)


def test_liars_fall_and_honest_sites_rise():
    rng = np.random.default_rng(0)
    book, names = ReputationBook(), [f"s{i}" for i in range(20)]
    for _ in range(40):
        values = rng.normal(1.0, 0.1, size=(10, 20))
        values[:, :3] += 50.0
        book.update(dict(zip(names, site_scores(values).tolist(), strict=True)))
    assert max(book.of(name) for name in names[:3]) <= 0.02
    assert min(book.of(name) for name in names[3:]) >= 0.9


def test_reputation_goes_up_slowly_and_down_fast():
    book = ReputationBook()
    assert book.of("new") == START_REPUTATION
    book.update({"up": 1.0, "down": 0.0, "unjudged": math.nan})
    assert book.of("up") == pytest.approx(0.55)
    assert book.of("down") == pytest.approx(0.35)
    assert book.snapshot().keys() == {"up", "down"}
    book.forget("down")
    assert book.of("down") == START_REPUTATION


def test_a_site_can_come_back():
    book = ReputationBook(reputation={"s": 0.4})
    for _ in range(50):
        book.update({"s": 0.0})
    assert book.of("s") == 0.01
    for _ in range(50):
        book.update({"s": 1.0})
    assert book.of("s") > 0.95


def test_a_snapshot_starts_a_book_again():
    book = ReputationBook(reputation={"a": 0.3})
    book.update({"a": 1.0})
    assert ReputationBook(reputation=book.snapshot()).of("a") == book.of("a")
    with pytest.raises(ValueError, match="reputation of 'a'"):
        ReputationBook(reputation={"a": 1.5})


def test_a_reputation_counts_for_no_more_than_the_median_of_all_sites():
    names = [f"s{i}" for i in range(5)]
    book = ReputationBook(reputation={"s0": 0.98, "s1": 0.703, "s2": 0.02})
    # The two that nobody has judged have that of a beginning, and so are half of the sites.
    assert book.counted(names) == {"s0": 0.5, "s1": 0.5, "s2": 0.02, "s3": 0.5, "s4": 0.5}
    assert book.counted(names[:3]) == {"s0": 0.7, "s1": 0.7, "s2": 0.02}
    assert book.counted(names[:2]) == {"s0": 0.84, "s1": 0.7}
    assert book.counted([]) == {}
    assert book.snapshot() == {"s0": 0.98, "s1": 0.703, "s2": 0.02}


@pytest.mark.parametrize(
    "wrong",
    [{"up": 0.0}, {"down": 1.5}, {"floor": 0.0}, {"tolerance_z": 0.0}, {"min_sites": 2},
     {"tolerance_z": -1.0}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrustSettings(**wrong)
