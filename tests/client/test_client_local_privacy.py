"""LocalPrivacy: what leaves a site, what stays, and what is refused."""

from __future__ import annotations

import math
import random
import statistics
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from private_packets import BOUNDS, WIDE, build, private, wire

from fmi.v1 import cohort_pb2, packet_pb2
from fmi_client import (
    ConfigurationError,
    ContractError,
    FMIEmitter,
    LocalPrivacy,
    PrivacyCoverageError,
    SignalBounds,
    local_privacy,
)
from fmi_client._contract import packet_violations
from fmi_client.local_privacy import _HALF_WIDTH, _Scale


@pytest.fixture
def without_noise(monkeypatch):
    monkeypatch.setattr(local_privacy, "discrete_gaussian", lambda _: 0)


# What leaves


def test_the_packet_declares_what_was_done_and_is_a_valid_one():
    privacy = private()
    packet = privacy.apply(build())
    applied = packet.header.provenance.applied_privacy
    assert applied.mechanism == "discrete_gaussian"
    assert applied.epsilon == privacy.packet_epsilon
    assert applied.delta == 1e-6
    assert not packet_violations(packet)


def test_signals_have_noise_and_stay_in_their_bounds():
    privacy = private(BOUNDS, epsilon=1000.0, emissions=200)
    taus = [privacy.apply(build()).msp.controller["tau"] for _ in range(200)]
    assert len(set(taus)) > 20
    assert all(0.5 <= tau <= 1.0 for tau in taus)


def test_noise_has_the_standard_deviation_that_is_told():
    """Of 400 draws the standard deviation is within 0.18, and the mean within 5 of its own, but for 1e-6."""
    privacy = private({"tau": WIDE["tau"]}, emissions=400)
    emitter = FMIEmitter("s", privacy=privacy)
    taus = [emitter.emit_msp(controller={"tau": 0.9}).msp.controller["tau"] for _ in range(400)]
    sigma = privacy.noise_sigma * 0.25
    assert statistics.stdev(taus) == pytest.approx(sigma, rel=0.18)
    assert statistics.mean(taus) == pytest.approx(0.9, abs=5 * sigma / 20)


def test_nothing_else_that_speaks_of_the_data_leaves():
    packet = build(
        evidence={"confidence": 0.3, "samples": 7, "tau": {"stderr": 0.1}}, window_span=(3, 9)
    )
    packet.header.profile_class = "icu"
    packet.header.provenance.MergeFrom(
        packet_pb2.Provenance(
            software="tuner/1", data_fingerprint="fp", regime_tag="winter", n_samples=900
        )
    )
    # A field of a newer contract.
    packet.MergeFromString(b"\x7a\x05hello")
    packet.msp.MergeFromString(b"\x7a\x05hello")
    leaves = private().apply(packet)
    assert b"hello" not in wire(leaves)
    assert not leaves.msp.HasField("evidence")
    assert not leaves.msp.HasField("window_span")
    kept = packet_pb2.PacketHeader()
    kept.CopyFrom(packet.header)
    kept.provenance.Clear()
    kept.provenance.software = "tuner/1"
    kept.provenance.applied_privacy.CopyFrom(leaves.header.provenance.applied_privacy)
    assert leaves.header == kept
    public = private(regime_is_public=True).apply(packet)
    assert public.header.provenance.regime_tag == "winter"


def test_the_given_packet_is_left_as_it_is():
    packet = build()
    before = wire(packet)
    private().apply(packet)
    assert wire(packet) == before


def test_entropy_is_the_operating_systems():
    """Two runs of one seeded program have noise of their own."""
    leaves = []
    for _ in range(2):
        random.seed(1)
        leaves.append(dict(private().apply(build()).msp.metrics))
    assert leaves[0] != leaves[1]


# The grid


BOUND = st.floats(-1e9, 1e9)
VALUE = st.floats(-1e150, 1e150)


@st.composite
def scales(draw):
    lower, upper = sorted(draw(st.tuples(BOUND, BOUND).filter(lambda pair: pair[0] != pair[1])))
    log = lower > 1e-300 and draw(st.booleans()) and math.log(lower) < math.log(upper)
    least = lower if log else draw(st.floats(-1e12, lower))
    most = draw(st.floats(upper, 1e12))
    return _Scale(SignalBounds(lower, upper, limits=(least, most), log=log))


@given(scales(), VALUE)
def test_whatever_comes_is_a_grid_point_within_the_sensitivity(scale, value):
    assert abs(scale.grid_point(value)) <= _HALF_WIDTH


@given(scales(), VALUE, VALUE)
def test_the_grid_keeps_order(scale, one, other):
    low, high = sorted((one, other))
    assert scale.grid_point(low) <= scale.grid_point(high)


@given(scales(), st.integers(-(1 << 70), 1 << 70))
def test_whatever_noise_does_values_stay_in_the_limits(scale, point):
    least, most = scale.bounds.limits
    assert least <= scale.value(point) <= most


@given(scales(), st.floats(0.0, 1.0))
def test_without_noise_a_value_comes_back(scale, share):
    lower, upper = scale.bounds.lower, scale.bounds.upper
    value = min(max(lower + share * (upper - lower), lower), upper)
    back = scale.value(scale.grid_point(value))
    if scale.bounds.log:
        assert abs(math.log(back) - math.log(value)) <= (
            (math.log(upper) - math.log(lower)) / _HALF_WIDTH + 1e-12
        )
    else:
        width = Fraction(upper) - Fraction(lower)
        assert abs(Fraction(back) - Fraction(value)) <= width / _HALF_WIDTH + Fraction(
            math.ulp(value)
        )


@given(scales())
def test_the_ends_of_the_bounds_are_the_ends_of_the_grid(scale):
    assert scale.grid_point(scale.bounds.lower) == -_HALF_WIDTH
    assert scale.grid_point(scale.bounds.upper) == _HALF_WIDTH


def test_the_sensitivity_is_the_diagonal_of_the_box():
    """Exactly, in integers: the costliest replacement moves each signal from one bound to the other."""
    for signals in (1, 3, 17):
        privacy = LocalPrivacy(
            {f"s{i}": (0.0, 2.0**i) for i in range(signals)}, epsilon=1.0, delta=1e-6
        )
        ends = [
            [scale.grid_point(place) for scale in privacy._scales.values()]
            for place in (-1.0, 2.0**20)
        ]
        moved = sum((one - other) ** 2 for one, other in zip(*ends, strict=True))
        assert privacy._rho == Fraction(moved, 2 * privacy._sigma**2)
        assert privacy._rho <= privacy._budget
        assert Fraction(moved, 2 * (privacy._sigma - 1) ** 2) > privacy._budget


@pytest.mark.usefixtures("without_noise")
def test_values_beyond_the_bounds_are_moved_there():
    leaves = private(BOUNDS).apply(build(tau=7.0, gain=-40.0))
    assert dict(leaves.msp.controller) == {"tau": 1.0}
    assert dict(leaves.msp.metrics) == {"gain": -1.0}


@pytest.mark.parametrize(("noise", "expected"), [(10**9, 10.0), (-(10**9), 1e-6)])
def test_on_a_logarithmic_scale_noise_multiplies(monkeypatch, noise, expected):
    bounds = SignalBounds(1e-4, 1.0, limits=(1e-6, 10.0), log=True)
    privacy = LocalPrivacy({"c": bounds}, epsilon=8.0, delta=1e-6, emissions=2)
    emitter = FMIEmitter("s", privacy=privacy)
    monkeypatch.setattr(local_privacy, "discrete_gaussian", lambda _: noise)
    assert emitter.emit_msp(controller={"c": 0.01}).msp.controller["c"] == pytest.approx(expected)
    monkeypatch.setattr(local_privacy, "discrete_gaussian", lambda _: _HALF_WIDTH // 2)
    moved = emitter.emit_msp(controller={"c": 0.01}).msp.controller["c"]
    assert moved == pytest.approx(0.1)


# What is refused


def refusal(packet, privacy=None):
    with pytest.raises(PrivacyCoverageError) as caught:
        (privacy or private()).apply(packet)
    return [(fault.field, fault.rule_id) for fault in caught.value.violations]


def test_all_that_is_not_covered_is_named_at_once_and_costs_nothing():
    privacy = private()
    packet = FMIEmitter("s").emit_msp(metrics={"tau": 0.9, "loss": 1.0}, operators={"queue": 4.0})
    assert refusal(packet, privacy) == [
        ('msp.metrics["loss"]', "fmi.local_privacy.bounds"),
        ('msp.operators["queue"]', "fmi.local_privacy.bounds"),
        ('msp["gain"]', "fmi.local_privacy.complete"),
    ]
    assert privacy.spent == 0.0


def test_a_signal_in_another_section_is_not_covered():
    privacy = private()
    privacy._scales["tau"] = _Scale(SignalBounds(0.5, 1.0, section="controller"))
    assert privacy.apply(build())
    packet = FMIEmitter("s").emit_msp(metrics={"tau": 0.9, "gain": 0.5})
    assert refusal(packet, privacy) == [('msp.metrics["tau"]', "fmi.local_privacy.section")]


def test_other_kinds_are_not_covered():
    emitter = FMIEmitter("s")
    pop = emitter.emit_pop({"tau": 0.8}, {"loss": 0.4}, {"loss": 0.3})
    ccs = emitter.emit_ccs([("a", "b", 0.4)])
    assert refusal(pop) == [("pop", "fmi.local_privacy.kind")]
    assert refusal(ccs) == [("ccs", "fmi.local_privacy.kind")]
    with pytest.raises(PrivacyCoverageError):
        FMIEmitter("s", privacy=private()).emit_ccs([("a", "b", 0.4)])


def test_a_packet_that_breaks_the_contract_costs_nothing():
    privacy = private()
    packet = build()
    packet.msp.controller["tau"] = math.nan
    with pytest.raises(ContractError):
        privacy.apply(packet)
    assert privacy.spent == 0.0


@pytest.mark.parametrize(
    "bounds",
    [
        (1.0, 1.0),
        (2.0, 1.0),
        (math.nan, 1.0),
        (0.0, math.inf),
        (0.0, 1e151),
        SignalBounds(0.0, 1.0, limits=(0.1, 1.0)),
        SignalBounds(0.0, 1.0, limits=(0.0, 0.9)),
        SignalBounds(0.0, 1.0, log=True),
        SignalBounds(0.1, 1.0, limits=(-1.0, 1.0), log=True),
        SignalBounds(1.0, math.nextafter(1.0, 2.0), log=True, limits=(0.0, 2.0)),
        SignalBounds(0.0, 1.0, section="control"),
    ],
)
def test_bounds_that_are_none_are_refused_by_name(bounds):
    with pytest.raises(ConfigurationError) as caught:
        LocalPrivacy({"fine": (0.0, 1.0), "tau": bounds}, epsilon=1.0, delta=1e-6)
    assert [fault.field for fault in caught.value.violations] == ['bounds["tau"]']


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("epsilon", [0.0, -1.0, math.inf, math.nan]),
        ("delta", [0.0, 1.0, -0.1, math.nan]),
        ("emissions", [0, -1, 10**40]),
    ],
)
def test_settings_out_of_range_are_refused(setting, values):
    for value in values:
        with pytest.raises(ConfigurationError, match=setting):
            private(**{setting: value})


def test_no_signals_are_refused():
    with pytest.raises(ConfigurationError, match="at least one signal"):
        LocalPrivacy({}, epsilon=1.0, delta=1e-6)


def test_a_provenance_that_declares_privacy_for_every_packet_is_refused():
    provenance = {"applied_privacy": {"mechanism": "gaussian", "epsilon": 1.0}}
    with pytest.raises(ConfigurationError, match="not both"):
        FMIEmitter("s", provenance=provenance, privacy=private())


# From a spec


SPEC = cohort_pb2.CohortSpec(
    name="care",
    signals=[
        cohort_pb2.SignalSpec(
            name="tau", section=cohort_pb2.SIGNAL_SECTION_CONTROLLER, lower=0.0, upper=1.0
        ),
        cohort_pb2.SignalSpec(
            name="c",
            section=cohort_pb2.SIGNAL_SECTION_CONTROLLER,
            lower=1e-6,
            transform=cohort_pb2.SIGNAL_TRANSFORM_LOG,
        ),
        cohort_pb2.SignalSpec(name="loss", section=cohort_pb2.SIGNAL_SECTION_METRICS),
    ],
)


def test_bounds_come_from_the_spec_and_narrower_ones_have_it_as_limits():
    privacy = LocalPrivacy.from_spec(
        SPEC,
        epsilon=8.0,
        delta=1e-6,
        emissions=3,
        signals=["tau", "c"],
        bounds={"c": (1e-3, 10.0)},
    )
    assert privacy.bounds == {
        "tau": SignalBounds(0.0, 1.0, limits=(0.0, 1.0), section="controller"),
        "c": SignalBounds(1e-3, 10.0, limits=(1e-6, 1e150), section="controller", log=True),
    }
    assert (privacy.epsilon, privacy.delta, privacy.emissions) == (8.0, 1e-6, 3)


def test_signals_without_bounds_and_unknown_ones_are_named():
    with pytest.raises(ConfigurationError) as caught:
        LocalPrivacy.from_spec(SPEC, epsilon=8.0, delta=1e-6, bounds={"other": (0.0, 1.0)})
    assert [fault.field for fault in caught.value.violations] == [
        'bounds["other"]',
        'bounds["c"]',
        'bounds["loss"]',
    ]
