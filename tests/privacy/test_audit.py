"""The attack of `make bench-privacy`, with few trials: it catches what is broken and not what is sound."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.privacy import __main__ as bench
from benchmarks.privacy.audit import audit
from fmi_server.privacy.accounting import gaussian_epsilon


@pytest.mark.parametrize("mu", [0.25, 1.0])
def test_the_attack_on_gaussian_noise_comes_near_the_truth_and_not_beyond(mu):
    rng = np.random.default_rng(1)

    def seen(present, trials):
        return rng.normal(mu if present else 0.0, 1.0, trials)

    found = audit(seen, 1e-5, 100_000)
    truth = gaussian_epsilon(mu, 1e-5)
    assert 0.2 * truth < found.assumed_nothing < truth
    assert 0.8 * truth < found.assumed_gaussian < truth


def test_the_mechanism_holds_and_each_planted_fault_is_caught(tmp_path, capsys, monkeypatch):
    report = tmp_path / "new" / "privacy.json"
    monkeypatch.setattr("sys.argv", ["privacy", "--trials", "6000", "--json", str(report)])
    bench.main()
    said = capsys.readouterr().out
    found = json.loads(report.read_text())
    assert [case["sound"] for case in found] == [True, True, False, False, False]
    for case in found:
        assert case["name"] in said
        proved = case["finding"]
        assert proved["assumed_nothing"] <= proved["assumed_gaussian"] * 1.01
        caught = proved["assumed_gaussian"] > case["claim"]
        assert caught != case["sound"], case
