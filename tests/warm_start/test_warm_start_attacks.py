from __future__ import annotations

import numpy as np
import pytest

from benchmarks.warm_start.attacks import ATTACKS, lies, scene_of
from benchmarks.warm_start.federation import cohort_spec
from benchmarks.warm_start.searches import draws_of, random_search
from benchmarks.warm_start.sites import honest_report, report_of
from fmi_client import FMIEmitter

HONEST = [(7, 2, 1), (8, 3, 1), (6, 1, 0)]


@pytest.fixture
def scene(space, bowl):
    return scene_of(space, [space.settings(p) for p in HONEST], space.settings(bowl.worst()))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_lie_is_certain_and_inside_the_bounds_of_the_cohort(name, scene, rng):
    bounds = {
        signal["name"]: (signal["lower"], signal["upper"])
        for signal in cohort_spec(scene.space, "any", "mean")["signals"]
    }
    packets = lies(ATTACKS[name], scene, rng)
    assert packets
    for packet in packets:
        assert packet.confidence == {"rate": 1.0, "momentum": 1.0, "depth": 1.0}
        for setting, value in packet.settings.items():
            low, high = bounds[setting]
            assert low <= value <= high


def _claimed(name, scene, rng):
    return scene.space.nearest(lies(ATTACKS[name], scene, rng)[-1].settings)


def test_each_attack_claims_what_it_says(scene, rng):
    assert _claimed("far corner", scene, rng) == (0, 9, 2)
    assert _claimed("mirror", scene, rng)[:2] == (2, 7)
    assert _claimed("worst settings", scene, rng) == (0, 9, 2)
    assert _claimed("just inside", scene, rng) == (6, 3, 1)


def test_liars_of_random_settings_differ(scene, rng):
    first, second = (lies(ATTACKS["noise"], scene, rng)[0].settings for _ in range(2))
    assert first != second


def test_a_drift_begins_among_the_honest_and_ends_in_the_far_corner(scene, rng):
    path = [scene.space.to_unit(packet.settings) for packet in lies(ATTACKS["drift"], scene, rng)]
    assert path[0] == pytest.approx(scene.centre)
    assert path[-1] == pytest.approx([0.0, 1.0, 1.0])
    assert np.abs(np.diff(path, axis=0)).max() < 0.1


def _tuned(table):
    start = {"rate": 1e-6, "momentum": 1.0, "depth": 3.0}
    return honest_report(table, seed=[0], budget=100, start=start)


def test_an_honest_site_says_the_best_that_it_found(space, bowl):
    report = _tuned(bowl)
    assert space.nearest(report.settings) == pytest.approx((7, 2, 1), abs=1)
    assert report.error == bowl.errors[space.nearest(report.settings)]
    assert report.samples == 100


def test_a_site_is_surer_of_a_setting_that_matters(space, bowl):
    errors = np.broadcast_to(bowl.errors[:, :1, :1], space.shape)
    only_rate = type(bowl)("only rate", space, errors, 0.0)
    draws = draws_of(space, seed=[0], budget=200)
    confidence = report_of(space, random_search(only_rate, draws, 200)).confidence
    assert confidence["rate"] > 0.5 > confidence["momentum"]


def test_a_report_becomes_a_packet_that_the_contract_takes(bowl):
    msp = _tuned(bowl).body()["msp"]
    packet = FMIEmitter("site-bowl", cohort="bowls").emit_msp(**msp)
    assert dict(packet.msp.controller) == msp["controller"]
    assert packet.msp.evidence.signals["rate"].confidence == pytest.approx(
        msp["evidence"]["signals"]["rate"]["confidence"]
    )
