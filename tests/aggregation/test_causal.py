from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import mstats
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.proportion import proportion_confint

from fmi_server.aggregation import (
    CausalPair,
    CausalSettings,
    CausalSummary,
    EstimatorSettings,
    pool_causes,
)
from fmi_server.aggregation.graph import strong_components
from fmi_server.aggregation.pooling import pool_random_effects

UNTRIMMED = CausalSettings(estimator=EstimatorSettings(trim_alpha=0.0, max_byzantine=0))


def summary(number, *edges, **options):
    pairs = tuple(CausalPair(*edge) for edge in edges)
    return CausalSummary(f"s{number}", pairs, **options)


def many(weights, stderrs=None, edge=("a", "b")):
    errors = [None] * len(weights) if stderrs is None else stderrs
    return [
        summary(i, (*edge, w, "linear", e))
        for i, (w, e) in enumerate(zip(weights, errors, strict=True))
    ]


# --- pooling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0])
def test_pooling_agrees_with_statsmodels(seed, spread):
    rng = np.random.default_rng(seed)
    stderrs = rng.uniform(0.3, 0.5, size=5 + 4 * seed)
    effects = rng.normal(1.0, np.sqrt(stderrs**2 + spread**2))
    with np.errstate(invalid="ignore"):  # statsmodels lets tau^2 fall below zero
        oracle = combine_effects(effects, stderrs**2, method_re="chi2", use_t=True)
    found = pool_random_effects(effects, stderrs, 0, 0.95)
    tau_squared = max(0.0, oracle.tau2)
    assert found.tau_squared == pytest.approx(tau_squared, abs=1e-12)
    assert found.i_squared == pytest.approx(max(0.0, oracle.i2), abs=1e-12)
    if oracle.tau2 < 0:
        # At tau^2 = 0 the random effect is the fixed one.
        value, stderrs_of = oracle.mean_effect_fe, (oracle.sd_eff_w_fe_hksj, oracle.sd_eff_w_fe)
    else:
        value, stderrs_of = oracle.mean_effect_re, (oracle.sd_eff_w_re_hksj, oracle.sd_eff_w_re)
    stderr = max(stderrs_of)
    assert found.value == pytest.approx(value)
    assert found.stderr == pytest.approx(stderr)
    half = stats.t.ppf(0.975, len(effects) - 1) * stderr
    assert (found.lower, found.upper) == pytest.approx((value - half, value + half))


def test_effects_that_agree_are_no_surer_than_the_declared_errors():
    found = pool_random_effects(np.full(4, 0.7), np.full(4, 0.04), 0, 0.95)
    assert found.stderr == pytest.approx(0.02)
    assert found.upper - found.value == pytest.approx(stats.t.ppf(0.975, 3) * 0.02)


def test_three_sites_that_agree_are_no_surer_than_a_median_of_their_errors():
    edge = pool_causes(many([0.5, 0.5, 0.5], [0.04, 0.04, 0.05])).edges[0]
    least = math.sqrt(math.pi / 2) * 0.04 / math.sqrt(3)
    assert (edge.method, edge.weight, edge.stderr) == ("median", 0.5, pytest.approx(least))
    assert edge.upper - edge.weight == pytest.approx(stats.t.ppf(0.975, 2) * least)
    undeclared = pool_causes(many([0.5, 0.5, 0.5])).edges[0]
    assert (undeclared.stderr, undeclared.lower, undeclared.upper) == (None, None, None)


def test_trimmed_pooling_of_equal_errors_is_tukey_mclaughlin():
    effects = np.random.default_rng(3).normal(size=20)
    found = pool_random_effects(effects, np.full(20, 0.2), 2, 0.95)
    assert found.value == pytest.approx(stats.trim_mean(effects, 0.1))
    assert found.stderr == pytest.approx(float(mstats.trimmed_stde(effects, limits=(0.1, 0.1))))


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.floats(-9, 9), st.floats(1e-3, 10)), min_size=4, max_size=12),
    st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9)), min_size=0, max_size=2),
)
def test_robust_liars_cannot_leave_the_honest_range(honest, lies):
    effects, stderrs = np.array([*honest, *lies]).T
    cut = len(lies)
    if len(effects) - 2 * cut < 2:
        return
    found = pool_random_effects(effects, stderrs, cut, 0.95)
    assert min(e for e, _ in honest) <= found.value <= max(e for e, _ in honest)


def test_a_claim_of_precision_does_not_buy_the_consensus():
    effects = np.array([0.0, 0.1, -0.1, 0.05, -0.05, 0.2])
    stderrs = np.array([0.2, 0.2, 0.2, 0.2, 0.2, 1e-9])
    assert pool_random_effects(effects, stderrs, 0, 0.95).value < 0.11


def test_pooling_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="fewer than two"):
        pool_random_effects(np.ones(3), np.ones(3), 1, 0.95)
    with pytest.raises(ValueError, match="positive"):
        pool_random_effects(np.ones(4), np.array([1, 1, 1, 0.0]), 1, 0.95)


# --- consensus ---------------------------------------------------------------------------------


def test_edges_with_errors_are_pooled_with_heterogeneity():
    weights, errors = [0.5, 0.6, 0.7, 0.55, 0.9], [0.1, 0.1, 0.2, 0.1, 0.15]
    edge = pool_causes(many(weights, errors), UNTRIMMED).edges[0]
    oracle = combine_effects(np.array(weights), np.array(errors) ** 2, method_re="chi2")
    assert edge.method == "dersimonian_laird_hksj"
    assert edge.weight == pytest.approx(oracle.mean_effect_re)
    assert edge.i_squared == pytest.approx(oracle.i2)
    assert edge.key == ("a", "b", "linear")


def test_edges_without_errors_are_averaged_without_heterogeneity():
    edge = pool_causes(many([0.5, 0.6, 0.7, 9.0])).edges[0]
    assert (edge.method, edge.weight) == ("trimmed_mean", pytest.approx(0.65))
    assert (edge.i_squared, edge.tau_squared) == (None, None)


def test_a_few_errors_do_not_speak_for_all():
    few = pool_causes(many([0.5] * 10, [0.1] * 4 + [None] * 6), UNTRIMMED).edges[0]
    half = pool_causes(many([0.5] * 10, [0.1] * 5 + [None] * 5), UNTRIMMED).edges[0]
    assert (few.method, few.pooled_sites) == ("trimmed_mean", 10)
    assert (half.method, half.pooled_sites) == ("dersimonian_laird_hksj", 5)


def test_a_liar_among_the_few_that_give_errors_is_withstood():
    rules = CausalSettings(estimator=EstimatorSettings(trim_alpha=0.0, min_sites=2))
    honest = [(0.5, 0.1), (0.6, None), (0.7, None)]
    weights, errors = zip(*honest, (1e6, 0.1), strict=True)
    (edge,) = pool_causes(many(weights, errors), rules).edges
    assert (edge.sites, edge.method) == (4, "trimmed_mean")
    assert 0.5 <= edge.weight <= 0.7


def test_support_counts_only_sites_that_could_have_tested():
    found = pool_causes(
        [
            *many([1.0] * 4),
            summary(10, tested_nodes=frozenset({"a", "b", "c"})),
            summary(11, tested_nodes=frozenset({"a", "c"})),
            summary(12, ("a", "c", 1.0)),
        ]
    )
    edge = found.edges[0]
    assert (edge.sites, edge.testable, found.sites) == (4, 5, 7)
    expected = proportion_confint(4, 5, alpha=0.1, method="wilson")[0]
    assert edge.support == pytest.approx(expected)


def test_nothing_is_dropped_silently():
    found = pool_causes([summary(i, ("a", "a", 1.0), ("a", "b", 1.0)) for i in range(2)])
    assert found.edges == ()
    reasons = {edge.key: (edge.reason, edge.sites) for edge in found.unpooled}
    assert reasons == {("a", "a", ""): ("self_loop", 2), ("a", "b", ""): ("below_quorum", 2)}


def test_types_are_pooled_apart():
    found = pool_causes(
        [summary(i, ("a", "b", 1.0, "linear"), ("a", "b", 5.0, "lag")) for i in range(3)]
    )
    assert {edge.type: edge.weight for edge in found.edges} == {"linear": 1.0, "lag": 5.0}


def test_one_site_has_one_vote_and_the_newest_counts():
    spam = [summary(0, ("a", "b", 100.0), at=float(t)) for t in range(20)]
    assert pool_causes(spam).unpooled[0].sites == 1
    corrected = [*many([1.0, 1.0, 1.0]), summary(0, ("a", "b", 2.0, "linear"), at=1.0)]
    assert pool_causes(reversed(corrected)).edges[0].sites == 3


def test_a_later_test_takes_an_edge_back():
    early = [summary(i, ("a", "b", 1.0)) for i in range(3)]
    elsewhere = summary(0, tested_nodes=frozenset({"a", "c"}), at=1.0)
    assert pool_causes([*early, elsewhere]).edges[0].sites == 3
    again = summary(0, tested_nodes=frozenset({"a", "b"}), at=1.0)
    taken_back = pool_causes([*early, again]).unpooled[0]
    assert (taken_back.sites, taken_back.testable) == (2, 3)


_EDGES = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("abc"), st.floats(-1, 1)), max_size=4
)
_HISTORIES = st.lists(
    st.tuples(st.integers(0, 3), _EDGES, st.frozensets(st.sampled_from("abcd")), st.integers(0, 3)),
    max_size=14,
)


@given(_HISTORIES)
def test_what_stands_is_what_reading_one_summary_after_the_other_leaves(history):
    summaries = [
        summary(number, *edges, tested_nodes=tested, at=float(at))
        for number, edges, tested, at in history
    ]
    held: dict[str, dict[tuple[str, str, str], float]] = {}
    seen: dict[str, set[str]] = {}
    for one in sorted(summaries, key=lambda one: one.at):
        tested = set(one.tested_nodes).union(*({pair.source, pair.target} for pair in one.pairs))
        before = held.get(one.site_id, {})
        kept = {key: weight for key, weight in before.items() if not {*key[:2]} <= tested}
        held[one.site_id] = kept | {(p.source, p.target, p.type): p.weight for p in one.pairs}
        seen.setdefault(one.site_id, set()).update(tested)
    rules = CausalSettings(estimator=EstimatorSettings(min_sites=1, name="mean"))
    found = pool_causes(summaries, rules)
    keys = {key for edges in held.values() for key in edges}
    told = {edge.key: edge for edge in [*found.edges, *found.unpooled]}
    assert told.keys() == keys
    assert found.sites == len(held)
    for key, edge in told.items():
        assert edge.sites == sum(1 for edges in held.values() if key in edges)
        assert edge.testable == sum(1 for nodes in seen.values() if {*key[:2]} <= nodes)
    for edge in found.edges:
        weights = [edges[edge.key] for edges in held.values() if edge.key in edges]
        assert edge.weight == pytest.approx(math.fsum(weights) / len(weights), abs=1e-12)


def test_no_more_edges_are_pooled_than_the_limit_and_those_of_most_sites_go_first():
    edges = [("a", f"n{i}", 1.0) for i in range(6)]
    sites = [summary(i, *edges[: 6 - i // 4]) for i in range(16)]
    found = pool_causes(sites, CausalSettings(max_edges=4))
    assert [edge.target for edge in found.edges] == ["n0", "n1", "n2", "n3"]
    assert found.left_out == {"over_limit": 2}
    assert [edge.reason for edge in found.unpooled] == ["over_limit"] * 2
    lonely = pool_causes([summary(0, *edges)], CausalSettings(max_edges=4))
    assert (len(lonely.unpooled), lonely.left_out) == (4, {"below_quorum": 6})


@pytest.mark.parametrize("huge", [1e150, 1.0, 1e-300])
@pytest.mark.parametrize(
    "errors", [(5e-324, 5e-324), (1e-300, 1e150), (1e150, 1e150), (0.1, 1e-300)]
)
def test_pooling_takes_the_largest_and_smallest_numbers(huge, errors):
    effects = np.array([huge, -huge, huge / 2, -huge, 0.0, huge / 3])
    for stderrs in (np.array(errors * 3), np.array([*errors, 0.1, 0.2, 0.1, 0.3])):
        for cut in (0, 1, 2):
            found = pool_random_effects(effects, stderrs, cut, 0.95)
            numbers = (found.value, found.stderr, found.lower, found.upper, found.tau_squared)
            assert all(math.isfinite(number) for number in numbers)
            assert -huge <= found.value <= huge
            assert 0.0 <= found.i_squared <= 1.0


def test_sign_conflict():
    split = pool_causes(many([1.0, 1.1, 0.9, -1.0, -0.8])).edges[0]
    assert (split.positive, split.negative, split.sign_conflict) == (3, 2, True)
    agreed = pool_causes(many([1.0, 1.1, 0.9, 0.7, -0.8])).edges[0]
    assert (agreed.negative, agreed.sign_conflict) == (1, False)


def test_direction_conflict_and_cycles_are_flagged():
    chain = [("a", "b", 1.0), ("b", "c", 1.0), ("c", "d", 1.0)]
    found = pool_causes(
        [summary(i, *chain, ("b", "a", 0.5)) for i in range(4)]
        + [summary(9, *chain, tested_nodes=frozenset("abcd"))]
    )
    flags = {e.key[:2]: (e.direction_conflict, e.in_cycle) for e in found.edges}
    assert flags == {
        ("a", "b"): (True, True),
        ("b", "a"): (True, True),
        ("b", "c"): (False, False),
        ("c", "d"): (False, False),
    }
    assert [cycle.nodes for cycle in found.cycles] == [("a", "b")]
    assert found.cycles[0].weakest == ("b", "a", "")  # four sites of five


def test_reputation_weighs_edges_without_errors():
    weights = [float(v) for v in range(8)]
    plain = pool_causes(many(weights)).edges[0].weight
    trust = {f"s{i}": 1.0 if i < 4 else 0.1 for i in range(8)}
    assert pool_causes(many(weights), reputation=trust).edges[0].weight < plain


@pytest.mark.parametrize(
    "bad", [("a", "b", math.nan), ("a", "b", 1.0, "", 0.0), ("a", "b", 1.0, "", math.inf)]
)
def test_edges_that_are_no_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="site 's0'"):
        pool_causes([summary(0, bad)])


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=40),
)
def test_components_agree_with_networkx(edges):
    successors: dict[str, list[str]] = {}
    graph = nx.DiGraph()
    for source, target in edges:
        successors.setdefault(str(source), []).append(str(target))
        graph.add_edge(str(source), str(target))
    expected = {tuple(sorted(c)) for c in nx.strongly_connected_components(graph)}
    found = strong_components(successors)
    assert len(found) == len(expected)
    assert set(found) == expected


def test_a_long_chain_does_not_exhaust_the_stack():
    chain = {str(i): [str(i + 1)] for i in range(20_000)}
    assert len(strong_components(chain)) == 20_001
    chain["20000"] = ["0"]
    assert len(strong_components(chain)) == 1
