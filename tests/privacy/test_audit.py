"""The attack of `make bench-privacy`, with few trials: it catches what is broken and not what is sound."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.privacy import __main__ as bench
from benchmarks.privacy.audit import audit, statistic
from benchmarks.privacy.mechanisms import (
    DELTA,
    EPSILON,
    NoiselessWeights,
    moved_by,
    noisy_sums_seen,
    planned,
)
from fmi_server.privacy.accounting import gaussian_epsilon
from fmi_server.privacy.noisy_means import NoisySums, PrivateSums
from fmi_server.private_prior import private_prior

NOISY = PrivateSums.noisy


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Noise from a seed, so that a run that passes goes on passing: an attack errs now and then."""
    entropy = np.random.default_rng(7).bytes
    for draws in (NOISY, NoiselessWeights.noisy):
        monkeypatch.setattr(draws, "__defaults__", (entropy,))
    monkeypatch.setitem(private_prior.__kwdefaults__, "entropy", entropy)


def test_noise_is_drawn_from_the_seed(monkeypatch):
    plan = planned()
    first = [noisy_sums_seen(plan)(False, 3).tolist() for _ in range(2)]
    entropy = np.random.default_rng(7).bytes
    monkeypatch.setattr(NOISY, "__defaults__", (entropy,))
    again = [noisy_sums_seen(plan)(False, 3).tolist() for _ in range(2)]
    assert first == again
    assert first[0] != first[1]


@pytest.mark.parametrize("mu", [0.25, 1.0])
def test_the_attack_on_gaussian_noise_comes_near_the_truth_and_not_beyond(mu):
    rng = np.random.default_rng(1)

    def seen(present, trials):
        return rng.normal(mu if present else 0.0, 1.0, trials)

    found = audit(seen, 1e-5, 100_000)
    truth = gaussian_epsilon(mu, 1e-5)
    assert 0.2 * truth < found.assumed_nothing < truth
    assert 0.8 * truth < found.assumed_gaussian < truth


def test_what_has_no_noise_gives_the_site_away():
    rng = np.random.default_rng(2)

    def seen(present, trials):
        noise = np.column_stack([rng.normal(0.0, 1.0, trials), np.zeros(trials)])
        return noise + (np.array([0.1, 0.001]) if present else 0.0)

    found = audit(statistic(seen, np.array([0.1, 0.001])), 1e-5, 4_000)
    assert found.assumed_nothing > 5.0


@pytest.mark.timeout(900)
def test_the_mechanism_holds_and_each_planted_fault_is_caught(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SHARE_PUBLISHED", 4)
    monkeypatch.setattr("benchmarks.privacy.audit.LEARNING", 400)
    report = tmp_path / "new" / "privacy.json"
    monkeypatch.setattr("sys.argv", ["privacy", "--trials", "4000", "--json", str(report)])
    bench.main()
    said = capsys.readouterr().out
    found = json.loads(report.read_text())
    assert [case["sound"] for case in found] == [True] * 3 + [False] * 6 + [True] + [False] * 2
    for case in found:
        assert case["name"] in said
        proved = case["finding"]
        assert proved["assumed_nothing"] <= proved["assumed_gaussian"] * 1.01
        caught = proved["assumed_gaussian"] > case["claim"]
        assert caught != case["sound"], case


def noiseless_weights(self, sums, *entropy):
    return NoisySums(NOISY(self, sums, *entropy).values, sums.weights)


def noiseless_values(self, sums, *entropy):
    return NoisySums(sums.values, NOISY(self, sums, *entropy).weights)


def one_draw_for_both(self, sums, *entropy):
    noise = NOISY(self, sums, *entropy).values - sums.values
    return NoisySums(sums.values + noise, sums.weights + noise)


def a_third_of_the_noise(self, sums, *entropy):
    drawn = NOISY(self, sums, *entropy)
    return NoisySums(
        sums.values + (drawn.values - sums.values) // 3,
        sums.weights + (drawn.weights - sums.weights) // 3,
    )


def none(_, sums, *_entropy):
    return sums


@pytest.mark.parametrize(
    "fault",
    [noiseless_weights, noiseless_values, one_draw_for_both, a_third_of_the_noise, none],
    ids=lambda fault: fault.__name__,
)
def test_the_attack_meets_the_method_that_the_server_calls(fault, monkeypatch):
    """A fault in `PrivateSums.noisy` itself, of which the attack is told nothing."""
    monkeypatch.setattr(PrivateSums, "noisy", fault)
    plan = planned()
    attack = statistic(noisy_sums_seen(plan), moved_by(plan))
    assert audit(attack, DELTA, 6_000).assumed_gaussian > EPSILON
