from __future__ import annotations

import numpy as np
import pytest

from fmi_demo.causes import COLUMNS, experiment, find_causes
from fmi_demo.data import split_digits
from fmi_demo.scenario import BOX


@pytest.fixture(scope="module")
def known():
    """A linear system whose causes are known: gamma -> accuracy <- weight_norm <- eta0."""
    rng = np.random.default_rng(0)
    gamma, eta0, alpha = rng.random((3, 400))
    weight_norm = 2.0 * eta0 + 0.2 * rng.random(400)
    accuracy = -1.5 * gamma + 0.8 * weight_norm + 0.2 * rng.random(400)
    return np.column_stack([gamma, eta0, alpha, weight_norm, accuracy])


def test_known_causes_are_found_with_their_signs(known):
    found = {(c.source, c.target): c for c in find_causes(known, seed=1).found}
    assert set(found) == {
        ("eta0", "weight_norm"),
        ("gamma", "accuracy"),
        ("weight_norm", "accuracy"),
    }
    deviation = dict(zip(COLUMNS, known.std(axis=0), strict=True))
    truth = {("eta0", "weight_norm"): 2.0, ("gamma", "accuracy"): -1.5}
    for (source, target), slope in truth.items():
        standardised = slope * deviation[source] / deviation[target]
        assert found[source, target].weight == pytest.approx(standardised, abs=0.05)


def test_errors_are_positive_and_shares_are_shares(known):
    causes = find_causes(known, seed=1)
    assert all(c.stderr > 0.0 for c in causes.found)
    assert all(0.6 <= c.share <= 1.0 for c in causes.found)
    assert causes.trust == pytest.approx(np.mean([c.share for c in causes.found]))


def test_nothing_is_found_where_nothing_is():
    noise = np.random.default_rng(3).random((2000, len(COLUMNS)))
    causes = find_causes(noise, seed=1)
    assert causes.found == ()
    assert causes.trust == 0.0


def test_the_bootstrap_depends_on_its_seed_alone(known):
    assert find_causes(known, seed=1) == find_causes(known, seed=1)
    assert find_causes(known, seed=1) != find_causes(known, seed=2)


def test_a_real_experiment_finds_that_the_learning_rate_drives_the_weights():
    parts, _ = split_digits(6, seed=7)
    table = experiment(parts[0], rows=40, seed=1, split_seed=0)
    assert table.shape == (40, len(COLUMNS))
    assert np.isfinite(table).all()
    causes = find_causes(table, seed=1)
    drives = {(c.source, c.target): c.weight for c in causes.found}
    assert drives["eta0", "weight_norm"] > 0.5
    assert not {target for _, target in drives} & set(BOX)
