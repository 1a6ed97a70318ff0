from __future__ import annotations

import numpy as np
import pytest

from benchmarks.warm_start.searches import (
    Trial,
    best_of,
    best_so_far,
    draws_of,
    local_search,
    random_search,
)

BEST = (7, 2, 1)
FAR = (0, 9, 0)


def _is_neighbour(one, other):
    return np.abs(np.subtract(one, other)).max() <= 4


@pytest.mark.parametrize("budget", [1, 40, 300])
def test_no_configuration_is_evaluated_twice(space, bowl, budget):
    draws = draws_of(space, seed=[1], budget=budget)
    for trials in (random_search(bowl, draws, budget), local_search(bowl, draws, budget, FAR)):
        assert len({trial.point for trial in trials}) == len(trials) == budget


def test_a_search_reports_the_errors_of_the_table(space, bowl):
    draws = draws_of(space, seed=[1], budget=30)
    trials = local_search(bowl, draws, 30, FAR)
    assert all(trial.error == bowl.errors[trial.point] for trial in trials)
    assert trials[0].point == FAR


def test_the_local_search_takes_turns_between_the_best_s_neighbourhood_and_anywhere(space, bowl):
    draws = draws_of(space, seed=[3], budget=31)
    trials = local_search(bowl, draws, 31, FAR)
    assert all(
        _is_neighbour(trials[turn].point, best_of(trials[:turn]).point) for turn in range(1, 31, 2)
    )
    anywhere = [point for point in draws.anywhere if point in {t.point for t in trials[2::2]}]
    assert [trial.point for trial in trials[2::2]] == anywhere


def test_searches_with_the_same_draws_differ_in_their_start_alone(space, bowl):
    draws = draws_of(space, seed=[5], budget=20)
    flat = type(bowl)("flat", space, np.ones(space.shape), 0.0)
    one = local_search(flat, draws, 20, FAR)
    other = local_search(flat, draws, 20, BEST)
    assert [t.point for t in one[2::2]] == [t.point for t in other[2::2]]


def test_a_search_from_the_best_place_needs_one_evaluation_and_from_afar_gets_close(space, bowl):
    draws = draws_of(space, seed=[2], budget=60)
    assert local_search(bowl, draws, 60, BEST)[0].error == pytest.approx(0.0)
    blind = best_so_far(random_search(bowl, draws, 60), 60)[-1]
    assert best_so_far(local_search(bowl, draws, 60, FAR), 60)[-1] < blind


def test_the_best_so_far_never_rises_and_stays_where_a_search_ended():
    trials = [Trial((0,), 0.5), Trial((1,), 0.7), Trial((2,), 0.2)]
    assert best_so_far(trials, 5).tolist() == [0.5, 0.5, 0.2, 0.2, 0.2]


def test_the_earliest_of_equally_good_trials_is_the_best():
    trials = [Trial((0,), 0.2), Trial((1,), 0.1), Trial((2,), 0.1)]
    assert best_of(trials).point == (1,)


def test_draws_depend_on_the_seed_alone(space):
    one, again, other = (draws_of(space, seed=[s], budget=10) for s in (1, 1, 2))
    assert one.anywhere == again.anywhere
    assert (one.steps == again.steps).all()
    assert one.anywhere != other.anywhere
