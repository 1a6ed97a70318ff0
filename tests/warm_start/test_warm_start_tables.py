from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.warm_start.tables import Parameter


def test_settings_and_points_are_inverses(space):
    for point in [(0, 0, 0), (3, 7, 1), (9, 9, 2)]:
        assert space.nearest(space.settings(point)) == point


def test_the_nearest_level_is_sought_on_the_parameter_s_own_scale():
    levels = (1.0, 100.0)
    assert Parameter("a", levels, log=True).nearest(20.0) == 1
    assert Parameter("a", levels, log=False).nearest(20.0) == 0


def test_what_lies_outside_goes_to_the_nearest_end(space):
    assert space.nearest({"rate": 1e9, "momentum": -3.0, "depth": 7.0}) == (9, 0, 2)


@given(st.floats(0.0, 1.0))
def test_a_place_in_the_unit_interval_is_found_again(unit):
    parameter = Parameter("a", (1e-8, 1e-3, 1.0), log=True)
    value = parameter.from_unit(unit)
    assert parameter.levels[0] <= value <= parameter.levels[-1]
    assert parameter.to_unit(value) == pytest.approx(unit, abs=1e-9)


def test_a_table_has_the_mean_of_its_runs_and_their_standard_error(bowl):
    assert bowl.errors[7, 2, 1] == pytest.approx(0.0)
    assert bowl.noise == pytest.approx(0.01 / np.sqrt(3))
    assert bowl.worst() == (0, 9, 2)
