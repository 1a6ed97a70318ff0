"""What noise costs by the client's account: against dp-accounting, and against the server's own."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st

from fmi_client import LocalPrivacy
from fmi_client._zcdp import zcdp_epsilon, zcdp_rho
from fmi_server.privacy import accounting

ORDERS = (1.0 + np.geomspace(1e-3, 5e3, 2000)).tolist()
RHO = st.floats(1e-8, 1e4)
DELTA = st.floats(1e-15, 0.4)


def oracle(noise_multiplier, releases, delta):
    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    return RdpAccountant(ORDERS).compose(event, releases).get_epsilon(delta)


@pytest.mark.parametrize("sigma", [0.7, 2.0, 50.0])
@pytest.mark.parametrize("releases", [1, 365])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
def test_many_packets_cost_what_dp_accounting_says(sigma, releases, delta):
    rho = releases / (2.0 * sigma * sigma)
    assert zcdp_epsilon(rho, delta) == pytest.approx(oracle(sigma, releases, delta), rel=1e-4)


@pytest.mark.parametrize("signals", [1, 4, 25])
@pytest.mark.parametrize("emissions", [1, 10])
@pytest.mark.parametrize("epsilon", [0.5, 4.0])
def test_the_noise_is_what_dp_accounting_asks_for(signals, emissions, epsilon):
    """A vector in -1..1 of d signals, replaced by any other: the sensitivity in half widths is 2 sqrt(d)."""
    privacy = LocalPrivacy(
        {f"s{i}": (0.0, 2.0) for i in range(signals)},
        epsilon=epsilon,
        delta=1e-6,
        emissions=emissions,
    )
    multiplier = privacy.noise_sigma / (2.0 * math.sqrt(signals))
    assert oracle(multiplier, emissions, 1e-6) == pytest.approx(epsilon, rel=1e-3)
    assert oracle(multiplier, 1, 1e-6) == pytest.approx(privacy.packet_epsilon, rel=1e-3)
    assert privacy.packet_epsilon <= epsilon


@given(RHO, DELTA)
def test_it_agrees_with_the_servers(rho, delta):
    expected = accounting.zcdp_epsilon(rho, delta)
    assert zcdp_epsilon(rho, delta) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(st.floats(1e-3, 1e3), DELTA)
def test_the_budget_never_says_too_much(epsilon, delta):
    rho = zcdp_rho(epsilon, delta)
    assert zcdp_epsilon(rho, delta) <= epsilon
    assert accounting.zcdp_delta(rho, epsilon) <= delta * (1.0 + 1e-9)
    assert rho == pytest.approx(accounting.zcdp_rho(epsilon, delta), rel=1e-6)


@given(RHO, RHO, DELTA)
def test_more_noise_costs_less(rho, more, delta):
    low, high = sorted((rho, rho + more))
    assert zcdp_epsilon(low, delta) <= zcdp_epsilon(high, delta) * (1.0 + 1e-12)


@given(RHO, DELTA)
def test_it_is_no_tighter_than_the_truth(rho, delta):
    """Continuous Gaussian noise of the same size, exactly (Balle and Wang)."""
    truth = accounting.gaussian_epsilon(math.sqrt(2.0 * rho), delta)
    assert zcdp_epsilon(rho, delta) >= truth * (1.0 - 1e-9)


def test_nothing_costs_nothing():
    assert zcdp_epsilon(0.0, 1e-6) == 0.0
