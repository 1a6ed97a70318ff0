"""The simulation of `make privacy-error`, with few draws: a broken mechanism does not come through."""

from __future__ import annotations

import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant

from benchmarks.privacy import clipping
from benchmarks.privacy import error as bench
from fmi_server.privacy.budget import PrivacySettings, plan_budget
from fmi_server.privacy.noisy_means import NoisySums, PrivateSums

EPSILON, DELTA, EPOCHS = 2.0, 1e-6, 50


def simulated(sites, signals, centre=bench.MIDDLE, *, seed=1, draws=6_000):
    plan = plan_budget(PrivacySettings(EPSILON, DELTA, dp_epochs=EPOCHS), signals)
    return bench.simulate(plan, sites, centre, np.random.default_rng(seed), draws=draws)


@pytest.mark.parametrize("centre", [bench.MIDDLE, bench.HALF_WAY])
def test_the_error_is_the_one_that_is_planned_where_there_are_sites_enough(centre):
    found = simulated(1_500, 6, centre)
    assert found.without_value == 0.0
    assert found.ratio == pytest.approx(1.0, abs=0.05)


def test_another_accountant_reads_the_budget_off_the_error():
    """The noise that is seen costs what is claimed, by Renyi accounting, which knows nothing of ours."""
    signals, sites = 6, 1_500
    found = simulated(sites, signals)
    # With means near 0 the error is that of the sum of the values, whose noise is sqrt(1.5 signals) times as
    # large as that of a vector of length 1.
    multiplier = found.rms * sites / math.sqrt(1.5 * signals)
    accountant = RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(multiplier), EPOCHS)
    assert accountant.get_epsilon(DELTA) == pytest.approx(EPSILON, rel=0.07)


def test_the_rarer_values_are_the_fewer_sites_there_are():
    shares = [simulated(sites, 6).without_value for sites in (40, 160, 1_500)]
    assert shares[0] > 0.9
    assert 0.05 < shares[1] < 0.95
    assert shares[2] == 0.0


@pytest.mark.parametrize("factor", [0, 2])
def test_noise_of_another_size_shows(monkeypatch, factor):
    noisy = PrivateSums.noisy

    def broken(self, sums, entropy):
        told = noisy(self, sums, entropy)
        return NoisySums(
            sums.values + factor * (told.values - sums.values),
            sums.weights + factor * (told.weights - sums.weights),
        )

    monkeypatch.setattr(PrivateSums, "noisy", broken)
    assert simulated(3_000, 6, draws=600).ratio == pytest.approx(factor, abs=0.2)


def test_a_site_that_is_counted_wrongly_shows(monkeypatch):
    sums = PrivateSums.sums

    def broken(self, values, weights):
        right = sums(self, values, weights)
        return NoisySums(right.values + 200 * self.value_bound, right.weights)

    monkeypatch.setattr(PrivateSums, "sums", broken)
    assert simulated(1_500, 6, draws=600).ratio > 1.5


def test_it_prints_writes_and_draws(tmp_path, capsys, monkeypatch):
    report, chart = tmp_path / "new" / "error.json", tmp_path / "other" / "error.png"
    flags = ["--sites", "20", "600", "--signals", "1", "5", "--draws", "100"]
    written = ["--json", str(report), "--plot", str(chart)]
    monkeypatch.setattr("sys.argv", ["error", *flags, *written])
    bench.main()
    said = capsys.readouterr().out
    assert "epsilon 1, delta 1e-06, over 1 release;" in said
    assert "epsilon 2, delta 1e-06, over 50 releases;" in said
    found = json.loads(report.read_text())
    assert len(found) == 16
    for error in found:
        if error["sites"] == 600:
            assert f"{error['rms']:8.4f}" in said
    assert chart.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["error", *flags])
    bench.main()
    again = capsys.readouterr().out
    assert again.partition("of 100 draws")[0] == said.partition("of 100 draws")[0]


# A norm for vectors


def test_a_norm_takes_off_the_noise_that_is_said_and_moves_the_means_of_the_unlike():
    sparse, unlike = clipping.CASES[3], clipping.CASES[2]
    norm = clipping.norms(sparse)[1]
    found = clipping.simulate(sparse, norm, 1_000)
    assert found.without_value == 0.0
    assert found.moved < 0.002
    assert found.rms == pytest.approx(found.planned, rel=0.12)
    moved = clipping.simulate(unlike, norm, 1_000)
    shares = norm / math.sqrt(unlike.sent * 1.5), 1.0
    # A fifth at 1 with what is left of them, the others around 0 and not scaled.
    expected = 0.2 * shares[0] / (0.2 * shares[0] + 0.8) - 0.2
    assert moved.moved == pytest.approx(abs(expected), rel=0.05)
    assert math.hypot(moved.planned, moved.moved) == pytest.approx(moved.rms, rel=0.12)
    assert clipping.simulate(unlike, None, 1_000).moved < 1e-6


def test_the_simulation_of_norms_prints_every_case(capsys, monkeypatch):
    monkeypatch.setattr(clipping, "CASES", (clipping.CASES[0],))
    monkeypatch.setattr("sys.argv", ["clipping", "--draws", "40"])
    clipping.main()
    told = capsys.readouterr().out
    assert told.count(clipping.CASES[0].name) == 3
    assert "4.08" in told
