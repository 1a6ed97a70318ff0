from __future__ import annotations

import math
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmi_server.aggregation import (
    BELOW_QUORUM,
    MAX_MAGNITUDE,
    CohortMatrix,
    EstimatorName,
    EstimatorSettings,
    IgnoredValue,
    SignalRule,
    estimate,
    group_estimates,
)
from fmi_server.aggregation.transforms import LOGIT_MARGIN

RULES = EstimatorSettings()


def filled(values, rules=(), **options):
    """Make a cohort in which site i sends values[i] as controller.tau at second i."""
    cohort = CohortMatrix(rules, **options)
    for second, value in enumerate(values):
        cohort.put(f"site-{second}", {"controller": {"tau": value}}, now=float(second))
    return cohort


def tau(cohort, reputation=None, rules=RULES):
    return cohort.release(rules, reputation, 100.0).estimates()["tau"]


def test_the_prior_is_the_estimate_of_the_newest_values():
    release = filled([0.8, 0.9, 0.85, 0.95]).release(RULES, None, 100.0)
    assert release.prior() == {"tau": pytest.approx(0.875)}
    assert release.sections == ("controller",)
    assert (release.sites, release.oldest, release.newest, release.at) == (4, 0.0, 3.0, 100.0)
    assert 0.0 < release.confidence < 1.0


def test_below_quorum_the_release_says_why():
    release = filled([0.8, 0.9]).release(RULES, None, 1.0)
    assert release.prior() == {}
    assert release.estimates()["tau"].reason == BELOW_QUORUM
    assert release.confidence == 0.0


def test_an_empty_cohort_releases_nothing():
    release = CohortMatrix().release(RULES, {}, 1.0)
    assert (release.names, release.sites, release.oldest, release.newest) == ((), 0, None, None)


def test_one_site_one_vote():
    cohort = filled([0.1, 0.2, 0.3])
    for second in range(50):
        cohort.put("site-0", {"controller": {"tau": 0.4}}, now=10.0 + second)
    found = tau(cohort)
    assert (found.sites, found.value) == (3, 0.3)


def test_a_signal_missing_in_a_newer_packet_stays_until_it_expires():
    cohort = CohortMatrix()
    for site in range(3):
        cohort.put(f"s{site}", {"metrics": {"a": 1.0, "b": 2.0}}, now=0.0)
        cohort.put(f"s{site}", {"metrics": {"b": 3.0}}, now=60.0)
    assert cohort.release(RULES, None, 60.0).prior() == {"a": 1.0, "b": 3.0}
    assert cohort.expire(now=90.0, ttl_s=50.0) == ()
    assert cohort.release(RULES, None, 90.0).prior() == {"b": 3.0}
    assert cohort.expire(now=200.0, ttl_s=50.0) == ("s0", "s1", "s2")
    assert cohort.sites == ()
    assert cohort.release(RULES, None, 200.0).prior() == {}


def test_a_late_packet_does_not_overwrite_a_newer_value():
    cohort = filled([0.1, 0.2, 0.3])
    late = cohort.put("site-2", {"controller": {"tau": 9.0, "other": 1.0}}, now=1.0)
    assert (late.applied, late.changed) == (1, 1)  # `other` was new
    assert tau(cohort).value == 0.2
    assert cohort.put("site-2", {"controller": {"tau": 9.0}}, now=2.0).applied == 1


def test_dropping_a_site_takes_its_votes_and_its_column_is_used_again():
    cohort = filled([0.1, 0.2, 0.3, 0.4])
    assert cohort.drop("site-3")
    assert not cohort.drop("site-3")
    assert tau(cohort).value == 0.2
    cohort.put("new", {"controller": {"other": 5.0}}, now=9.0)
    assert tau(cohort).sites == 3


def test_sites_that_come_and_go_do_not_grow_the_matrix():
    cohort = filled([0.1, 0.2, 0.3])
    for second in range(500):
        cohort.put(f"guest-{second}", {"controller": {"tau": 9.0}}, now=10.0 + second)
        cohort.drop(f"guest-{second}")
    assert cohort._cells.values.shape == (1, 4)
    assert tau(cohort).value == 0.2


# --- only what changed -------------------------------------------------------------------------


def test_a_release_recomputes_only_what_changed():
    cohort = CohortMatrix()
    for site in range(5):
        cohort.put(f"s{site}", {"metrics": {"a": site, "b": site, "c": site}}, now=0.0)
    first = cohort.release(RULES, None, 0.0)
    assert (first.recomputed, cohort.dirty) == (3, frozenset())
    assert cohort.release(RULES, None, 1.0).recomputed == 0
    report = cohort.put("s0", {"metrics": {"a": 0.0, "b": 7.0}}, now=2.0)
    assert (report.applied, report.changed, cohort.dirty) == (2, 1, frozenset({"b"}))
    second = cohort.release(RULES, None, 2.0)
    assert second.recomputed == 1
    assert second.prior() == {"a": 2.0, "b": 3.0, "c": 2.0}
    assert first.prior() == {"a": 2.0, "b": 2.0, "c": 2.0}  # a release is never changed


def test_new_settings_recompute_everything():
    cohort = filled([1.0, 2.0, 3.0, 10.0])
    assert tau(cohort).value == 2.5
    assert tau(cohort, rules=EstimatorSettings(name="mean")).value == 4.0


def test_a_moved_reputation_recomputes_the_signals_of_its_site():
    cohort = CohortMatrix()
    for site in range(6):
        cohort.put(f"s{site}", {"metrics": {"a": site}}, now=0.0)
        if site:
            cohort.put(f"s{site}", {"metrics": {"b": site}}, now=0.0)
    trust = dict.fromkeys(cohort.sites, 0.9)
    assert cohort.release(RULES, trust, 0.0).recomputed == 2
    assert cohort.release(RULES, {**trust, "s0": 0.905}, 0.0).recomputed == 0
    assert cohort.release(RULES, {**trust, "s0": 0.5}, 0.0).recomputed == 1
    assert cohort.release(RULES, {**trust, "s3": 0.5}, 0.0).recomputed == 2


def test_small_drifts_of_reputation_add_up():
    cohort = filled([float(v) for v in range(8)])
    names = cohort.sites
    before = tau(cohort, dict.fromkeys(names, 0.5)).value
    for step in range(60):
        trust = {**dict.fromkeys(names, 0.5), "site-6": 0.5 - step * 0.008}
        found = tau(cohort, trust).value
    fresh = tau(filled([float(v) for v in range(8)]), trust).value
    assert fresh < before
    assert found == pytest.approx(fresh, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "put", "drop", "expire", "release"]),
            st.integers(0, 6),
            st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-10, 10), max_size=4),
            st.sampled_from([0.2, 0.5, 1.0]),
        ),
        max_size=60,
    )
)
def test_cached_releases_equal_a_fresh_cohort(steps):
    """Whatever the history, the release is that of the values a plain dict would hold."""
    cohort = CohortMatrix()
    held: dict[str, dict[str, tuple[float, float, float]]] = {}
    for now, (action, number, values, confidence) in enumerate(steps):
        site = f"s{number}"
        if action == "put":
            cohort.put(site, {"metrics": values}, now=float(now), confidence=confidence)
            if values:
                entry = {name: (v, confidence, float(now)) for name, v in values.items()}
                held.setdefault(site, {}).update(entry)
        elif action == "drop":
            cohort.drop(site)
            held.pop(site, None)
        elif action == "expire":
            cohort.expire(float(now), 10.0)
            for known in list(held):
                kept = {n: e for n, e in held[known].items() if e[2] >= now - 10.0}
                held[known] = kept
                if not kept:
                    del held[known]
        else:
            cohort.release(RULES, None, float(now))
    release = cohort.release(RULES, None, 1e3)
    assert set(cohort.sites) == set(held)
    for row, name in enumerate(release.names):
        found = [entry[name][0] for entry in held.values() if name in entry]
        assert release.table.sites[row] == len(found)
        expected = estimate(np.array([found or [np.inf]])).row(0)
        plain = all(e[1] == 1.0 for entry in held.values() for e in entry.values())
        if expected.value is None:
            assert release.table.reason[row] == BELOW_QUORUM
        elif plain or expected.used == "median":
            assert release.table.value[row] == pytest.approx(expected.value, abs=1e-12)
        else:
            assert min(found) <= release.table.value[row] <= max(found)


def test_both_axes_grow_without_losing_anything():
    cohort, rng = CohortMatrix(), np.random.default_rng(0)
    expected = np.full((90, 70), np.inf)
    for site in range(70):
        rows = rng.choice(min(90, 5 + 2 * site), size=5, replace=False)
        expected[rows, site] = rng.normal(size=5)
        values = {f"x{row}": expected[row, site] for row in rows}
        cohort.put(f"s{site}", {"metrics": values}, now=0.0)
    release = cohort.release(RULES, None, 0.0)
    table = estimate(expected)
    for row, name in enumerate(release.names):
        np.testing.assert_allclose(release.table.value[row], table.value[int(name[1:])])


@pytest.mark.parametrize("confidence", [1.0, 0.7])
def test_blocks_change_no_release(confidence, monkeypatch):
    cohort, rng = CohortMatrix(), np.random.default_rng(3)
    for site in range(40):
        values = {f"x{row}": rng.normal() for row in range(30) if rng.random() < 0.5 or row == 7}
        own = confidence if site % 2 else 1.0
        cohort.put(f"s{site}", {"metrics": values}, now=0.0, confidence=own)
    half = cohort.sites[::2]
    tables = []
    for cells in (1 << 20, 100):
        monkeypatch.setattr(group_estimates, "_BLOCK_CELLS", cells)
        fresh = EstimatorSettings(weight_cap=0.5)  # new rules: everything is computed anew
        cohort.release(fresh, None, 0.0)
        release = cohort.release(RULES, None, 0.0)
        assert release.recomputed == 30
        tables.append((release.table, cohort.estimate_sites(half, RULES)))
    for left, right in zip(*tables, strict=True):
        for field in fields(left):
            held, found = getattr(left, field.name), getattr(right, field.name)
            np.testing.assert_array_equal(held, found)


def test_what_is_computed_in_steps_equals_what_is_computed_at_once():
    values = np.random.default_rng(8).normal(size=(6, 50))
    slow, fast = CohortMatrix(), CohortMatrix()
    for site in range(50):
        for row in range(6):
            if (site + row) % 3:
                signal = {"metrics": {f"x{row}": values[row, site]}}
                slow.put(f"s{site}", signal, now=0.0)
                fast.put(f"s{site}", signal, now=0.0)
                if site == 49 and row % 2:
                    slow.release(RULES, None, 0.0)
    assert slow.release(RULES, None, 0.0).prior() == fast.release(RULES, None, 0.0).prior()


def test_all_sites_together_are_not_estimated_twice():
    cohort = filled([float(value) for value in range(8)])
    release = cohort.release(RULES, {}, 0.0)
    everyone = ["unknown", *reversed(cohort.sites)]
    assert cohort.estimate_sites(everyone, RULES, {}) is release.table
    # Fewer sites, other rules, other weights or newer values are estimated.
    assert cohort.estimate_sites(everyone[:-1], RULES, {}).row(0).sites == 7
    median = EstimatorSettings(name="median")
    assert cohort.estimate_sites(everyone, median, {}).used.tolist() == ["median"]
    trusted = cohort.estimate_sites(everyone, RULES, {"site-2": 1.0})
    assert trusted.value.tolist() == [pytest.approx(0.25 * 2 + 0.75 * (1 + 3 + 4 + 5 + 6) / 5)]
    cohort.put("site-7", {"controller": {"tau": -1.0}}, now=9.0)
    assert cohort.estimate_sites(everyone, RULES, {}).value.tolist() == [2.5]


def test_sites_are_scored_against_all_that_is_told():
    cohort = filled([1.0, 1.1, 1.2, 1.3, 1.4, 9.0])
    for site in range(5):
        cohort.put(f"site-{site}", {"metrics": {"tau": 5.0 * site}}, now=20.0)
    cohort.put("site-5", {"metrics": {"other": 1.0}}, now=20.0)
    scores = cohort.score_sites(["site-5", "site-2", "unknown"])
    assert scores.keys() == {"site-5", "site-2"}
    assert scores["site-2"] == 1.0
    assert scores["site-5"] < 0.01
    cohort.drop("site-5")
    assert cohort.score_sites(["site-5"]) == {}


def test_spare_room_stays_small():
    cohort = CohortMatrix(max_signals=300, max_new_per_site=300)
    for site in range(1000):
        cohort.put(f"s{site}", {"metrics": {f"x{site % 200}": 1.0}}, now=0.0)
    assert cohort.nbytes < 1.125**2 * 3 * 8 * 200 * 1000


# --- weights -----------------------------------------------------------------------------------


def test_weights_are_capped_confidence_times_reputation():
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    declared = [0.2, 0.4, 0.4, 0.4, 0.6, 1.0, 1.0, 1.0]
    trust = {f"s{i}": r for i, r in enumerate([1.0, 0.5, 1.0, 0.7, 1.0, 0.9, 1.0, 1.0])}
    cohort = CohortMatrix()
    for site, (value, own) in enumerate(zip(values, declared, strict=True)):
        cohort.put(f"s{site}", {"metrics": {"a": value}}, now=0.0, confidence=own)
    release = cohort.release(RULES, trust, 0.0)
    assert release.confidence_cap == 0.5
    weights = np.minimum(declared, 0.5) * list(trust.values())
    expected = np.average(values[1:-1], weights=weights[1:-1])
    assert release.prior()["a"] == pytest.approx(expected)


def test_a_site_that_stands_for_more_weighs_more_up_to_the_median():
    def prior_of(*sizes):
        matrix = CohortMatrix()
        for site, (value, size) in enumerate(zip([0.0, 1.0, 2.0, 3.0, 4.0], sizes, strict=True)):
            matrix.put(f"s{site}", {"controller": {"tau": value}}, now=1.0, size=size)
        return matrix.release(EstimatorSettings(weight_cap=1.0), None, 1.0).prior()["tau"]

    # Of the survivors 1, 2 and 3 the first stands for a quarter of the median.
    assert prior_of(8, 2, 8, 8, 8) == pytest.approx((0.25 * 1 + 2 + 3) / 2.25)
    assert prior_of(8, 2, 8, 1e12, 8) == prior_of(8, 2, 8, 8, 8)
    assert prior_of(5, 5, 5, 5, 5) == prior_of(1, 1, 1, 1, 1) == 2.0
    # The least that can be declared, by as many as are the median.
    assert prior_of(5e-324, 5e-324, 5e-324, 1e12, 1e12) == 2.0


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_size_that_is_none_is_refused(bad):
    matrix = CohortMatrix()
    with pytest.raises(ValueError, match="size"):
        matrix.put("s", {"controller": {"tau": 1.0}}, now=1.0, size=bad)
    assert matrix.sites == ()


def test_a_site_nobody_has_judged_has_the_start_reputation():
    left, right = filled([1.0, 2.0, 3.0, 4.0, 9.0, 9.5]), filled([1.0, 2.0, 3.0, 4.0, 9.0, 9.5])
    known = {"site-1": 1.0, "site-2": 1.0}
    spelled = {**dict.fromkeys(left.sites, 0.5), **known}
    assert tau(left, known) == tau(right, spelled)


def test_confidence_per_signal_beats_that_of_the_packet():
    cohort = CohortMatrix()
    for site in range(8):
        own = {"a": 0.1} if site == 5 else None
        values = {"metrics": {"a": float(site), "b": float(site)}}
        cohort.put(f"s{site}", values, now=0.0, confidence=0.8, signal_confidence=own)
    prior = cohort.release(RULES, None, 0.0).prior()
    assert prior["a"] < prior["b"]


def test_some_sites_alone_can_be_asked():
    cohort = filled([1.0, 2.0, 3.0, 100.0, 200.0, 300.0])
    sites = ["site-3", "site-4", "site-5", "unknown"]
    assert cohort.estimate_sites(sites, RULES).row(0).value == 200.0
    assert cohort.estimate_sites([], RULES).row(0).reason == BELOW_QUORUM


# --- vocabulary --------------------------------------------------------------------------------


def test_a_name_is_told_in_the_section_of_most_sites():
    cohort = CohortMatrix()
    assert cohort.section_of("tau") is None
    cohort.put("liar", {"metrics": {"tau": 9.0}}, now=0.0)
    assert cohort.section_of("tau") == "metrics"
    for i in range(3):
        assert not cohort.put(f"s{i}", {"controller": {"tau": float(i)}}, now=0.0).ignored
    release = cohort.release(RULES, None, 0.0)
    assert (release.names, release.sections) == (("tau",), ("controller",))
    assert (release.prior(), release.outvoted) == ({"tau": 1.0}, 1)
    assert cohort.holds("metrics", "tau")
    assert cohort.estimate_sites([f"s{i}" for i in range(3)], RULES).value.tolist() == [1.0]
    for i in range(3):
        cohort.drop(f"s{i}")
    assert cohort.section_of("tau") == "metrics"


@pytest.mark.parametrize("first", ["metrics", "controller"])
def test_where_as_many_sites_stand_behind_two_sections_a_setting_is_told(first):
    second = {"metrics": "controller", "controller": "metrics"}[first]
    cohort = CohortMatrix()
    cohort.put("a", {first: {"tau": 1.0}}, now=0.0)
    cohort.put("b", {second: {"tau": 2.0}}, now=0.0)
    assert cohort.section_of("tau") == "controller"


def test_a_declared_name_stands_in_its_section():
    cohort = CohortMatrix([SignalRule("tau", "controller")])
    report = cohort.put("b", {"metrics": {"tau": 2.0, "gain": 3.0}}, now=0.0)
    assert report.ignored == (IgnoredValue("metrics", "tau", "section_conflict"),)
    assert (report.applied, cohort.signals) == (1, ("tau", "gain"))


def test_a_closed_vocabulary_takes_only_what_is_declared():
    cohort = CohortMatrix([SignalRule("tau", "controller")], open_vocabulary=False)
    report = cohort.put("a", {"controller": {"tau": 1.0, "x": 2.0}}, now=0.0)
    assert report.ignored == (IgnoredValue("controller", "x", "undeclared"),)
    assert cohort.rule("tau") == SignalRule("tau", "controller")
    assert cohort.rule("x") is None


def test_an_open_vocabulary_is_bounded():
    cohort = CohortMatrix(max_signals=2)
    report = cohort.put("a", {"metrics": {"a": 1.0, "b": 1.0, "c": 1.0}}, now=0.0)
    assert report.ignored == (IgnoredValue("metrics", "c", "vocabulary_full"),)


def test_one_site_brings_in_a_bounded_number_of_names():
    cohort = CohortMatrix(max_signals=10, max_new_per_site=4)
    flood = {"metrics": {f"x{i}": 1.0 for i in range(10)}}
    report = cohort.put("liar", flood, now=0.0)
    assert (report.applied, {value.reason for value in report.ignored}) == (
        4,
        {"too_many_new_names"},
    )
    assert cohort.put("honest", {"controller": {"tau": 1.0}}, now=0.0).ignored == ()
    assert cohort.put("other", {"metrics": {"x0": 2.0, "x4": 2.0}}, now=0.0).applied == 2


@pytest.mark.parametrize("leave", ["drop", "expire"])
def test_names_that_nobody_holds_make_room(leave):
    cohort = CohortMatrix(max_signals=3)
    cohort.put("gone", {"metrics": {"a": 1.0, "b": 1.0, "c": 1.0}}, now=0.0)
    cohort.put("stays", {"metrics": {"a": 5.0}}, now=9.0)
    full = cohort.put("new", {"controller": {"d": 1.0}}, now=9.0)
    assert [value.reason for value in full.ignored] == ["vocabulary_full"]
    cohort.release(RULES, None, 9.0)
    if leave == "drop":
        cohort.drop("gone")
    else:
        cohort.expire(10.0, 5.0)
    # `b` is sent again, so that only the row of `c` is free: `d` takes it, and `e` finds none.
    report = cohort.put("new", {"metrics": {"b": 2.0}, "controller": {"d": 3.0, "e": 4.0}}, now=9.0)
    assert [value.name for value in report.ignored] == ["e"]
    assert set(cohort.signals) == {"a", "b", "d"}
    assert cohort.section_of("d") == "controller"
    one = EstimatorSettings(min_sites=1)
    assert cohort.release(one, None, 9.0).prior() == {"a": 5.0, "b": 2.0, "d": 3.0}


_PUTS = st.tuples(
    st.sampled_from(["s0", "s1", "s2"]),
    st.dictionaries(
        st.sampled_from(["controller", "metrics"]),
        st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-9, 9), max_size=5),
    ),
    st.sampled_from(["put", "put", "put", "drop", "release"]),
)


@given(st.lists(_PUTS, max_size=25))
def test_an_open_vocabulary_never_mixes_up_what_sites_said(steps):
    cohort = CohortMatrix(max_signals=5, max_new_per_site=3)
    held: dict[tuple[str, str], dict[str, float]] = {}
    one = EstimatorSettings(name="mean", min_sites=1)
    for site, sections, step in steps:
        if step == "release":
            cohort.release(one, None, 0.0)
        elif step == "drop":
            cohort.drop(site)
            for column in held.values():
                column.pop(site, None)
        else:
            report = cohort.put(site, sections, now=0.0)
            refused = {(value.section, value.name) for value in report.ignored}
            for section, values in sections.items():
                for name, value in values.items():
                    if (section, name) not in refused:
                        held.setdefault((section, name), {})[site] = value
    expected = {}
    for name in "abcdefgh":
        order = [held.get((section, name), {}) for section in ("controller", "metrics")]
        best = max(order, key=len)
        if best:
            expected[name] = pytest.approx(math.fsum(best.values()) / len(best))
    release = cohort.release(one, None, 0.0)
    assert release.prior() == expected
    assert len(release.names) + release.outvoted <= 5


def test_a_signal_is_declared_once():
    with pytest.raises(ValueError, match="twice"):
        CohortMatrix([SignalRule("a"), SignalRule("a")])


# --- bounds and transforms ---------------------------------------------------------------------


def test_values_are_clipped_to_their_bounds():
    cohort = filled([0.5, 7.0, 9.0], [SignalRule("tau", "controller", lower=0.0, upper=1.0)])
    assert tau(cohort).value == 1.0


def test_a_log_signal_is_averaged_on_its_logarithm():
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    found = tau(filled(rates, [SignalRule("tau", "controller", transform="log")]))
    plain = estimate(np.log([rates])).row(0)
    assert found.value == pytest.approx(math.sqrt(1e-5))
    assert (found.lower, found.upper) == pytest.approx(
        (math.exp(plain.lower), math.exp(plain.upper))
    )
    assert found.stderr == pytest.approx(found.value * plain.stderr)


def test_a_logit_signal_stays_inside_its_bounds():
    rule = SignalRule("tau", "controller", lower=2.0, upper=6.0, transform="logit")
    found = tau(filled([2.0, 3.0, 5.9, 6.0, 6.0], [rule]))
    assert 2.0 <= found.lower <= found.value <= found.upper <= 6.0
    share = 1 / (1 + math.exp(-np.log(_odds([3.0, 5.9, 6.0])).mean()))
    stretch = 4 / (1 - 2 * LOGIT_MARGIN)
    assert found.value == pytest.approx(2 + stretch * (share - LOGIT_MARGIN))
    plain = estimate(np.log([_odds([2.0, 3.0, 5.9, 6.0, 6.0])])).row(0)
    assert found.stderr == pytest.approx(stretch * share * (1 - share) * plain.stderr)


def _odds(values):
    share = LOGIT_MARGIN + (1 - 2 * LOGIT_MARGIN) * (np.array(values) - 2) / 4
    return share / (1 - share)


@pytest.mark.parametrize("bounds", [(None, None), (0.0, 1.0), (-3.0, 0.7), (0.1, 0.3)])
def test_logit_sites_that_all_stand_at_a_bound_give_the_bound(bounds):
    lower, upper = bounds
    rule = SignalRule("tau", "controller", lower=lower, upper=upper, transform="logit")
    for bound in (0.0, 1.0) if lower is None else bounds:
        found = tau(filled([bound] * 8, [rule]))
        assert (found.value, found.lower, found.upper) == (bound, bound, bound)


@given(
    st.lists(st.floats(0.0, 1.0), min_size=3, max_size=12),
    st.sampled_from([(0.0, 1.0), (2.0, 6.0), (-1e6, 1e-6)]),
)
def test_a_logit_estimate_stays_in_the_range_of_the_values(shares, bounds):
    lower, upper = bounds
    values = [min(upper, lower + (upper - lower) * share) for share in shares]
    rule = SignalRule("tau", "controller", lower=lower, upper=upper, transform="logit")
    found = tau(filled(values, [rule]))
    rounding = 1e-15 * max(upper - lower, abs(lower), abs(upper))
    assert min(values) - rounding <= found.value <= max(values) + rounding


def test_a_log_signal_that_is_not_positive_is_left_out():
    cohort = CohortMatrix([SignalRule("lr", transform="log")])
    report = cohort.put("a", {"metrics": {"lr": 0.0, "x": 1.0}}, now=0.0)
    assert report.ignored == (IgnoredValue("metrics", "lr", "outside_domain"),)
    assert report.applied == 1


@given(st.lists(st.floats(1e-12, 1e12), min_size=3, max_size=12))
def test_a_transformed_estimate_stays_in_the_range_of_the_values(values):
    found = tau(filled(values, [SignalRule("tau", "controller", transform="log")]))
    assert min(values) * (1 - 1e-12) <= found.value <= max(values) * (1 + 1e-12)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2 * MAX_MAGNITUDE])
def test_a_value_that_is_no_number_is_refused_and_nothing_changed(bad):
    cohort = filled([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"controller\.tau"):
        cohort.put("site-0", {"metrics": {"new": 1.0}, "controller": {"tau": bad}}, now=9.0)
    assert cohort.signals == ("tau",)
    assert tau(cohort).value == 0.2


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_a_confidence_outside_its_range_is_refused(bad):
    with pytest.raises(ValueError, match="confidence"):
        CohortMatrix().put("a", {"metrics": {"x": 1.0}}, now=0.0, confidence=bad)
    with pytest.raises(ValueError, match="confidence"):
        CohortMatrix().put("a", {"metrics": {"x": 1.0}}, now=0.0, signal_confidence={"x": bad})


def test_a_time_that_is_no_time_is_refused():
    with pytest.raises(ValueError, match="now"):
        CohortMatrix().put("a", {"metrics": {"x": 1.0}}, now=math.nan)


@pytest.mark.parametrize(
    "wrong",
    [
        {"transform": "sqrt"},
        {"direction": 2},
        {"scale": 0.0},
        {"lower": 2.0, "upper": 1.0},
        {"lower": math.nan},
        {"transform": "log", "lower": 0.0},
        {"transform": "log", "upper": -1.0},
        {"transform": "logit", "lower": 0.0},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="signal 'x'"):
        SignalRule("x", **wrong)


def test_an_interval_ends_at_the_declared_bounds():
    rules = [
        SignalRule("rate", "controller", lower=1e-6, upper=1.0, transform="log"),
        SignalRule("share", "controller", lower=0.0, upper=1.0),
    ]
    matrix = CohortMatrix(rules, open_vocabulary=False)
    for site, (rate, share) in enumerate([(1e-6, 0.01), (1.0, 0.99), (1e-3, 0.5), (0.9, 0.98)]):
        matrix.put(f"site_{site}", {"controller": {"rate": rate, "share": share}}, now=1.0)
    estimates = matrix.release(EstimatorSettings(), None, 2.0).estimates()
    for name, (lower, upper) in {"rate": (1e-6, 1.0), "share": (0.0, 1.0)}.items():
        found = estimates[name]
        assert found.lower == pytest.approx(lower)  # so few sites say next to nothing
        assert found.upper == pytest.approx(upper)
        assert found.lower <= found.value <= found.upper


def test_a_row_without_a_value_has_no_tolerance_and_a_declared_scale_is_the_tolerance():
    matrix = CohortMatrix(
        [SignalRule("rate", "controller", lower=1e-6, upper=1.0, transform="log", scale=0.05)],
        open_vocabulary=False,
    )
    for site, rate in enumerate([0.1, 0.2]):
        matrix.put(f"s{site}", {"controller": {"rate": rate}}, now=1.0)
    assert matrix.release(EstimatorSettings(), None, 1.0).estimates()["rate"].tolerance is None
    matrix.put("s2", {"controller": {"rate": 0.15}}, now=1.0)
    assert matrix.release(EstimatorSettings(), None, 1.0).estimates()["rate"].tolerance == 0.05


@pytest.mark.parametrize(
    ("rule", "agreed", "other", "condemned"),
    [
        (SignalRule("x", transform="log"), 0.5, 0.55, False),
        (SignalRule("x", transform="log"), 1.0, 1.05, False),  # its logarithm is 0
        (SignalRule("x", transform="log"), 0.5, 50.0, True),
        (SignalRule("x"), 0.9, 0.92, False),
        (SignalRule("x"), 0.9, 9.0, True),
        (SignalRule("x", scale=0.001), 0.9, 0.92, True),
        (SignalRule("x", lower=-1.0, upper=1.0), 0.0, 0.05, False),
    ],
)
def test_a_difference_that_does_not_matter_condemns_nobody(rule, agreed, other, condemned):
    matrix = CohortMatrix([rule], open_vocabulary=False)
    for site, value in enumerate([agreed] * 5 + [other]):
        matrix.put(f"s{site}", {"metrics": {"x": value}}, now=1.0)
    scores = matrix.score_sites(matrix.sites)
    assert all(scores[f"s{site}"] == 1.0 for site in range(5))
    assert (scores["s5"] < 0.2) if condemned else (scores["s5"] == 1.0)


def test_few_sites_are_scored_as_they_are_among_all():
    cohort, rng = CohortMatrix(), np.random.default_rng(9)
    for site in range(60):
        values = {f"x{row}": rng.normal() for row in range(30) if rng.random() < 0.3} or {"x0": 1.0}
        cohort.put(f"s{site}", {"metrics": values}, now=0.0)
    together = cohort.score_sites(cohort.sites)
    for few in (["s3"], ["s3", "s59", "s17"], ["s3", "nobody"]):
        assert cohort.score_sites(few) == {site: together[site] for site in few if site in together}


# --- the way there -----------------------------------------------------------------------------


def exactly(table):
    return {field.name: getattr(table, field.name).tolist() for field in fields(table)}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(get_args(EstimatorName)),
    confident=st.booleans(),
)
def test_a_prior_depends_on_what_is_held_alone_to_the_last_digit(seed, name, confident):
    """A long life with releases, sites that left and values that were replaced, and one that begins now."""
    rng = np.random.default_rng(seed)
    rules = EstimatorSettings(name=name)
    sites = [f"site-{number}" for number in rng.permutation(37)]
    reputation = {site: float(rng.choice([0.5, 0.73, 0.99])) for site in sites[::2]}
    said = {
        site: {f"x{row}": rng.normal(3.0) for row in range(6) if rng.random() < 0.8} or {"x0": 1.0}
        for site in sites
    }
    declared = {site: 1.0 if confident else rng.uniform(0.2, 1.0) for site in sites}
    lived, begun = CohortMatrix(), CohortMatrix()
    group = sites[::3]

    def put(cohort, site):
        cohort.put(site, {"controller": said[site]}, now=10.0, confidence=declared[site])

    for number, site in enumerate(sites):
        lived.put(f"guest-{number % 5}", {"controller": {"x1": 7.0}}, now=1.0, confidence=0.1)
        lived.put(site, {"controller": {"x1": rng.normal()}}, now=2.0, confidence=0.3)
        if number % 4 == 0:
            lived.release(rules, {site: 0.2}, 3.0)
            lived.estimate_sites(group, rules, {}, group="thirds")
    for number in range(5):
        lived.drop(f"guest-{number}")
    for site in sites:
        if "x1" not in said[site]:
            said[site]["x1"] = rng.normal()
        put(lived, site)
        if rng.random() < 0.1:
            lived.release(rules, reputation, 11.0)
            lived.estimate_sites(group, rules, reputation, group="thirds")
    for site in rng.permutation(sites).tolist():
        put(begun, site)
    left, right = (cohort.release(rules, reputation, 12.0) for cohort in (lived, begun))
    order = [left.names.index(signal) for signal in right.names]
    assert exactly(left.table.selected(np.array(order))) == exactly(right.table)
    assert left.confidence == right.confidence
    left_group, right_group = (
        cohort.estimate_sites(group, rules, reputation, group="thirds") for cohort in (lived, begun)
    )
    assert exactly(left_group.selected(np.array(order))) == exactly(right_group)
