from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_demo.data import split_digits
from fmi_demo.learner import best_of, from_unit, measure, to_unit, tune
from fmi_demo.packets import POLICIES
from fmi_demo.scenario import BOX, LIBRARY_DEFAULTS

UNITS = st.tuples(*(st.floats(0, 1) for _ in BOX))
GOOD = {"gamma": 0.1, "eta0": 1.0, "alpha": 1e-5}


@pytest.fixture(scope="module")
def part():
    parts, _ = split_digits(6, seed=7)
    return parts[0]


@given(UNITS)
def test_settings_stay_in_the_box_and_find_their_way_back(unit):
    settings = from_unit(unit)
    assert all(low <= settings[name] <= high for name, (low, high) in BOX.items())
    assert to_unit(settings) == pytest.approx(unit, abs=1e-9)


def test_the_middle_of_the_cube_is_the_geometric_middle_of_the_box():
    for name, value in from_unit((0.5, 0.5, 0.5)).items():
        low, high = BOX[name]
        assert value == pytest.approx(math.sqrt(low * high))


def test_measuring_twice_gives_the_same(part):
    assert measure(part, GOOD, split_seed=3) == measure(part, GOOD, split_seed=3)


def test_every_image_is_tested_twice_per_repeat(part):
    measured = measure(part, GOOD, split_seed=3, repeats=2)
    assert len(measured.accuracies) == 6
    assert measured.tested == 2 * 2 * len(part.labels)


def test_tuning_matters_on_these_images(part):
    tuned = measure(part, GOOD, split_seed=0).accuracy
    default = measure(part, LIBRARY_DEFAULTS, split_seed=0).accuracy
    assert tuned > 0.9
    assert default < 0.6


def test_every_corner_of_the_box_can_be_measured(part):
    for corner in range(2 ** len(BOX)):
        settings = {name: bounds[corner >> i & 1] for i, (name, bounds) in enumerate(BOX.items())}
        measured = measure(part, settings, split_seed=0)
        assert 0.0 <= measured.accuracy <= 1.0
        assert math.isfinite(measured.weight_norm)


@pytest.mark.parametrize("policy", [policy for _, policy in POLICIES])
def test_a_policy_changes_what_is_learned(part, policy):
    plain = measure(part, GOOD, split_seed=0)
    changed = measure(part, GOOD, split_seed=0, policy=policy)
    assert changed.weight_norm != plain.weight_norm
    assert changed.tested == plain.tested / policy.labelled_thirds


def bowl(settings):
    return -math.dist(to_unit(settings), (0.6, 0.7, 0.3))


def test_the_same_seed_tunes_the_same_way():
    first, second = (list(tune(bowl, seed=5, budget=30)) for _ in range(2))
    assert first == second
    assert list(tune(bowl, seed=6, budget=30)) != first


def test_searches_from_different_starts_are_paired():
    cold = list(tune(bowl, seed=5, budget=20))
    warm = list(tune(bowl, seed=5, budget=20, start=GOOD))
    assert warm[0].unit == pytest.approx(to_unit(GOOD))
    assert cold[0].unit != warm[0].unit
    assert [trial.unit for trial in cold[2::2]] == [trial.unit for trial in warm[2::2]]


def test_tuning_finds_the_top_of_a_smooth_hill():
    assert best_of(list(tune(bowl, seed=1, budget=200))).accuracy > -0.1


def test_the_earliest_of_equals_is_the_best():
    trials = list(tune(lambda _: 1.0, seed=1, budget=5))
    assert best_of(trials) is trials[0]
