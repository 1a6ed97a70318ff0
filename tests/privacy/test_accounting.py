"""What noise costs, against dp-accounting and by identities."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st

from fmi_server.privacy.accounting import (
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    zcdp_delta,
    zcdp_epsilon,
    zcdp_of_noise,
    zcdp_rho,
)

ORDERS = (1.0 + np.geomspace(1e-3, 5e3, 2000)).tolist()
RHO = st.floats(1e-8, 1e4)
DELTA = st.floats(1e-15, 0.4)
EPSILON = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("sigma", [0.7, 2.0, 10.0, 50.0])
@pytest.mark.parametrize("releases", [1, 10, 365])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
def test_many_releases_cost_what_dp_accounting_says(sigma, releases, delta):
    oracle = RdpAccountant(ORDERS).compose(dp_accounting.GaussianDpEvent(sigma), releases)
    rho = math.fsum([zcdp_of_noise(1.0, sigma)] * releases)
    assert zcdp_epsilon(rho, delta) == pytest.approx(oracle.get_epsilon(delta), rel=1e-4)


@pytest.mark.parametrize("sigma", [0.7, 2.0, 10.0])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
def test_gaussian_noise_costs_what_its_privacy_loss_distribution_says(sigma, epsilon):
    oracle = pld.privacy_loss_distribution.from_gaussian_mechanism(
        sigma, value_discretization_interval=1e-4
    )
    expected = oracle.get_delta_for_epsilon(epsilon)
    assert gaussian_delta(1.0 / sigma, epsilon) == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_the_figures_of_balle_and_wang():
    # Sigma for sensitivity 1 at (1, 1e-6); the classic formula gives 5.2988.
    assert 1.0 / gaussian_mu(1.0, 1e-6) == pytest.approx(4.2247, abs=5e-5)


@given(RHO, DELTA)
def test_epsilon_and_delta_are_inverse(rho, delta):
    epsilon = zcdp_epsilon(rho, delta)
    if epsilon == 0.0:  # so little that this delta allows for all of it
        assert zcdp_delta(rho, 0.0) <= delta
        return
    assert zcdp_delta(rho, epsilon) == pytest.approx(delta, rel=1e-6)
    assert zcdp_rho(epsilon, delta) == pytest.approx(rho, rel=1e-6)


@given(EPSILON, DELTA)
def test_the_budget_never_says_too_much(epsilon, delta):
    assert zcdp_delta(zcdp_rho(epsilon, delta), epsilon) <= delta
    assert gaussian_delta(gaussian_mu(epsilon, delta), epsilon) == pytest.approx(delta, rel=1e-6)


@given(RHO, DELTA)
def test_it_is_no_looser_than_the_simple_conversion_and_no_tighter_than_the_truth(rho, delta):
    epsilon = zcdp_epsilon(rho, delta)
    assert epsilon <= rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta)) * (1.0 + 1e-12)
    assert epsilon >= gaussian_epsilon(math.sqrt(2.0 * rho), delta) * (1.0 - 1e-9)


@given(RHO, RHO, DELTA)
def test_more_noise_costs_less(rho, more, delta):
    low, high = sorted((rho, rho + more))
    assert zcdp_epsilon(low, delta) <= zcdp_epsilon(high, delta)


def test_nothing_costs_nothing():
    assert zcdp_epsilon(0.0, 1e-6) == zcdp_delta(0.0, 1.0) == gaussian_delta(0.0, 1.0) == 0.0
    assert gaussian_epsilon(1e-9, 1e-3) == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_a_delta_out_of_range_is_refused(delta):
    for ask in (zcdp_epsilon, zcdp_rho, gaussian_epsilon, gaussian_mu):
        with pytest.raises(ValueError, match="delta"):
            ask(1.0, delta)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_an_epsilon_out_of_range_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        zcdp_rho(epsilon, 1e-6)
