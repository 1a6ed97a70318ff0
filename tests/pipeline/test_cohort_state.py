"""The resident state of a cohort: one site one vote, newest wins, in whatever order packets come."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import statistics
from fractions import Fraction

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import NOW, ccs, msp, pop

from fmi.v1 import cohort_pb2, packet_pb2
from fmi_server.aggregation import START_REPUTATION, CausalPair, CausalSummary, WarmStartRequest
from fmi_server.aggregator import FMIAggregator
from fmi_server.cohort_state import CohortState
from fmi_server.cohorts import CohortRegistry, CohortRules
from fmi_server.contracts import FMIContractRegistry
from fmi_server.site_records import (
    MAX_CAUSAL_ITEMS_PER_SITE,
    MAX_OUTCOMES_PER_SITE,
    MAX_SUMMARIES_PER_SITE,
    SiteRecord,
    emitted_at,
)
from fmi_server.validator import FMIValidator

CONTRACT = FMIContractRegistry()
AGGREGATOR = FMIAggregator(registry=CONTRACT)
LOSS = {
    "name": "loss",
    "section": "SIGNAL_SECTION_METRICS",
    "direction": "SIGNAL_DIRECTION_LOWER_IS_BETTER",
}


def rules(**spec) -> CohortRules:
    message = json_format.ParseDict({"name": "care", **spec}, cohort_pb2.CohortSpec())
    return CohortRegistry(CONTRACT).compile(message)


def counted(packets, *, reputations=None, **spec) -> CohortState:
    state = CohortState(rules(**spec), reputations=reputations)
    for packet in packets:
        state.count(packet)
    return state


def priors(state: CohortState, now: float = NOW) -> dict[str, float]:
    return dict(AGGREGATOR.result(state, now=now).prior_update.prior)


def taus(*values: float, at: float = NOW) -> list[packet_pb2.Packet]:
    return [msp(f"s{i}", controller={"tau": value}, at=at) for i, value in enumerate(values)]


# One site, one vote


def test_a_site_has_one_vote_however_often_it_speaks():
    packets = taus(0.1, 0.2, 0.3)
    shouting = [msp("s2", controller={"tau": 0.3}, at=NOW - i) for i in range(1, 500)]
    assert priors(counted([*packets, *shouting])) == priors(counted(packets))
    state = counted([msp("only", controller={"tau": i}, at=NOW + i) for i in range(50)])
    assert state.sites == 1
    assert not state.quorum
    assert priors(state) == {}


def test_the_newest_value_of_a_site_counts_and_a_late_packet_overrides_nothing():
    newest = taus(0.4, 0.5, 0.6)
    older = taus(0.1, 0.1, 0.1, at=NOW - 100)
    expected = priors(counted(newest))
    assert priors(counted([*older, *newest])) == expected
    assert priors(counted([*newest, *older])) == expected
    assert expected == {"tau": pytest.approx(0.5)}


def test_a_late_packet_adds_what_no_newer_one_said():
    packets = taus(0.4, 0.5, 0.6)
    late = [msp(f"s{i}", controller={"tau": 9.0, "g": 0.1}, at=NOW - 100) for i in range(3)]
    found = priors(counted([*packets, *late]))
    assert found == {"tau": pytest.approx(0.5), "g": pytest.approx(0.1)}


# Order

SECTIONS = {"tau": "controller", "g": "evaluator", "loss": "metrics"}


@st.composite
def histories(draw) -> list[packet_pb2.Packet]:
    """Draw packets of some sites; a site has no two packets of one moment."""
    packets = []
    for site in range(draw(st.integers(1, 6))):
        moments = draw(st.lists(st.integers(0, 50), min_size=1, max_size=5, unique=True))
        for moment in moments:
            header = {
                "at": NOW - moment,
                "profile_class": draw(st.sampled_from(["", "big", "small"])),
                "regime": draw(st.sampled_from(["", "winter", "summer"])),
            }
            name = f"s{site}"
            number = st.floats(0.1, 10.0).map(lambda x: round(x, 3))
            match draw(st.sampled_from(["msp", "msp", "pop", "ccs"])):
                case "msp":
                    sections: dict[str, dict[str, float]] = {"controller": {"tau": draw(number)}}
                    for signal in draw(st.lists(st.sampled_from(["g", "loss"]), unique=True)):
                        sections.setdefault(SECTIONS[signal], {})[signal] = draw(number)
                    confidence = draw(st.sampled_from([None, 0.2, 0.9]))
                    packets.append(msp(name, **sections, confidence=confidence, **header))
                case "pop":
                    after = {"loss": draw(number)}
                    packets.append(pop(name, before={"loss": 5.0}, after=after, **header))
                case "ccs":
                    pairs = (("a", "b", draw(number)),) if draw(st.booleans()) else ()
                    concepts = {"drift": draw(number)} if draw(st.booleans()) else {}
                    packets.append(
                        ccs(name, pairs=pairs, concepts=concepts, tested=("a", "b"), **header)
                    )
    return packets


def told(state: CohortState, now: float = NOW) -> list[object]:
    result = AGGREGATOR.result(state, now=now)
    for lineage in (
        result.prior_update.lineage,
        *(profile.lineage for profile in result.warm_starts.profiles),
    ):
        lineage.ClearField("window")  # a bound that depends on which values stood there before
    return [
        json_format.MessageToDict(message)
        for message in (
            result.prior_update,
            result.warm_starts,
            result.policy_hint,
            result.causal_consensus,
        )
    ]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_the_order_of_packets_does_not_matter(data):
    packets = data.draw(histories())
    spec = {"signals": [LOSS], "freeSignals": True}
    asked = CohortState(rules(**spec))
    for packet in data.draw(st.permutations(packets)):
        asked.count(packet)
        # Nor does it matter whether somebody asks meanwhile, which keeps estimates.
        for name in ("big", "small", "default"):
            asked.warm_start(WarmStartRequest(name, "winter", {"drift": 1.0}))
    assert told(asked) == told(counted(packets, **spec))


@settings(deadline=None)
@given(st.permutations(range(12)), st.sampled_from([6, 12]))
def test_summaries_of_one_moment_correct_each_other_in_the_order_of_their_ids(order, count):
    """Four sites say of one moment that they found an edge, that it is another, and that it is gone."""
    said = [(("a", "b", 0.3),), (("a", "b", 0.9), ("b", "c", 0.5)), ()]
    packets = [
        ccs(f"s{site}", pairs=said[turn], tested=("a", "b", "c"), at=NOW)
        for turn in range(3)
        for site in range(4)
    ]
    chosen = sorted(order[:count])
    packets = [packets[number] for number in chosen]
    shuffled = [packets[chosen.index(number)] for number in order if number in chosen]
    assert told(counted(shuffled)) == told(counted(packets))


class Life:
    """A cohort with a history, as a server lives through it."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.spec = {
            "signals": [LOSS] if self.chance.random() < 0.5 else [],
            "freeSignals": True,
            "aggregation": {
                "metricsAggregation": self.chance.choice(
                    ["trimmed_mean", "weighted_mean", "median", "mean_of_median", "mean"]
                )
            },
            "retention": {"siteTtl": "100s"},
            "policy": {"window": self.chance.choice(["50s", "100s", "300s"])},
        }
        self.state = CohortState(rules(**self.spec))
        self.stored: list[packet_pb2.Packet] = []
        self.now = NOW
        self.sites = [f"s{i}" for i in range(self.chance.randint(4, 25))]

    def live(self, steps: int) -> None:
        for _ in range(steps):
            chance = self.chance.random()
            if chance < 0.7:
                packets = [self.packet() for _ in range(self.chance.choice([1, 1, 1, 6]))]
                self.stored += packets
                self.state.count_all(packets)
            elif chance < 0.8:
                asked = self.chance.choice(["big", "small"]), self.chance.choice(["", "winter"])
                self.state.warm_start(WarmStartRequest(*asked, {"drift": 1.0}))
            elif chance < 0.9:
                self.state.release(self.now)
            else:
                self.now += self.chance.choice([0.5, 20.0, 70.0])
                self.sites = self.sites[1:] + self.sites[: self.chance.choice([0, 1])]
                self.sites.append(f"new{len(self.stored)}")
                self.state.expire(self.now)

    def packet(self) -> packet_pb2.Packet:
        self.now += 0.01
        chance = self.chance
        header = {
            "at": self.now - chance.choice([0, 0, 0, 30, 90]),
            "profile_class": chance.choice(["big", "small"]),
            "regime": chance.choice(["", "", "winter", "summer"]),
        }
        name, kind = chance.choice(self.sites), chance.random()
        if kind < 0.1:
            return pop(name, before={"loss": 5.0}, after={"loss": chance.random()}, **header)
        if kind < 0.25:
            concepts = {"drift": chance.random()} if chance.random() < 0.5 else {}
            pairs = (("a", "b", chance.random()),)
            return ccs(name, pairs=pairs, concepts=concepts, trust=chance.random(), **header)
        names = chance.sample(["tau", "g", "loss", "x", "y", "z"], chance.randint(1, 4))
        sections: dict[str, dict[str, float]] = {}
        for signal in names:
            # Some names come in two sections, and zero has a sign.
            section = chance.choice(["controller", "evaluator"]) if signal == "g" else "controller"
            value = chance.choice([chance.gauss(1.0, 0.3), 0.0, -0.0, 0.7])
            sections.setdefault(SECTIONS.get(signal, section), {})[signal] = value
        packet = msp(name, **sections, confidence=chance.choice([None, 0.3, 0.6, 0.9]), **header)
        packet.msp.evidence.sites = chance.choice([1.0, 1.0, 1.0, 3.0])
        return packet

    def started_again(self) -> CohortState:
        """What a server makes of what is stored, when it has let go of what cannot count any more."""
        since = self.now - max(self.state.rules.site_ttl_s, self.state.rules.policy_window_s)
        gone = self.state.overtaken(self.stored, self.now)
        kept = [
            packet
            for packet, overtaken in zip(self.stored, gone, strict=True)
            if not overtaken and emitted_at(packet) >= since
        ]
        state = CohortState(
            rules(**self.spec), reputations=self.state.reputations(), packets=self.state.packets
        )
        state.replay(kept)
        return state


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(20, 80))
def test_a_server_that_starts_again_says_the_same_to_the_last_digit(seed, steps):
    life = Life(seed)
    life.live(steps)
    life.state.release(life.now)  # judged is who sent
    again = life.started_again()
    assert told(again, now=life.now) == told(life.state, now=life.now)
    assert again.reputations() == life.state.reputations()


def test_of_packets_of_one_moment_the_one_that_was_stored_last_counts():
    first, last = taus(0.1, 0.2, 0.3), taus(0.7, 0.8, 0.9)
    assert priors(counted([*first, *last])) == {"tau": pytest.approx(0.8)}
    assert priors(counted([*last, *first])) == {"tau": pytest.approx(0.2)}


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(histories(), st.lists(st.integers(0, 30), max_size=3))
def test_many_at_once_are_as_one_by_one(packets, cuts):
    spec = {"signals": [LOSS], "freeSignals": True}
    at_once = CohortState(rules(**spec))
    edges = [0, *sorted(min(cut, len(packets)) for cut in cuts), len(packets)]
    for start, end in itertools.pairwise(edges):
        at_once.count_all(packets[start:end])
    one_by_one = counted(packets, **spec)
    assert told(at_once) == told(one_by_one)
    assert at_once.packets == one_by_one.packets


def test_a_value_in_another_section_does_not_overtake():
    packets = [
        *taus(0.4, 0.5, 0.6, at=NOW - 10),
        *(msp(f"s{i}", metrics={"tau": 7.0}) for i in range(3)),
    ]
    for order in (packets, packets[::-1]):
        at_once = CohortState(rules())
        at_once.count_all(order)
        assert priors(at_once) == priors(counted(order)) == {"tau": pytest.approx(0.5)}


def test_one_site_cannot_take_a_name_from_the_others():
    packets = [msp("liar", metrics={"tau": 7.0}, at=NOW - 10), *taus(0.4, 0.5, 0.6)]
    at_once = CohortState(rules())
    at_once.count_all(packets)
    assert at_once.section_of("tau") == counted(packets).section_of("tau") == "controller"
    assert priors(at_once) == {"tau": pytest.approx(0.5)}


def test_one_site_cannot_fill_the_vocabulary():
    flood = {f"x{i}": 1.0 for i in range(1024)}
    state = counted([msp("liar", metrics=flood, controller=flood, evaluator=flood)])
    for packet in taus(0.4, 0.5, 0.6):
        state.count(packet)
    assert priors(state) == {"tau": pytest.approx(0.5)}
    assert state.ignored == {"too_many_new_names": 3 * 1024 - 512}


# What a site is


def test_a_regime_is_that_of_the_newest_packet_that_names_one():
    tagged = msp("s0", controller={"tau": 1.0}, at=NOW - 10, regime="winter")
    silent = msp("s0", controller={"tau": 1.0}, at=NOW)
    older = msp("s0", controller={"tau": 1.0}, at=NOW - 20, regime="summer")
    for packets in ([tagged, silent, older], [silent, older, tagged], [older, silent, tagged]):
        site = counted(packets).site("s0")
        assert site is not None
        assert (site.regime_tag, site.heard_at) == ("winter", NOW)


def test_a_profile_class_is_that_of_the_newest_packet():
    packets = [
        msp("s0", controller={"tau": 1.0}, at=NOW, profile_class="big"),
        msp("s0", controller={"tau": 1.0}, at=NOW - 1, profile_class="small"),
    ]
    for order in (packets, packets[::-1]):
        site = counted(order).site("s0")
        assert site is not None
        assert site.profile_class == "big"
    silent = counted([*packets, msp("s0", controller={"tau": 1.0}, at=NOW + 1)]).site("s0")
    assert silent is not None
    assert silent.profile_class == "default"


# Bounds


def test_what_is_kept_of_one_site_is_bounded_and_the_newest_stays():
    outcomes = [pop("s0", at=NOW + i) for i in range(MAX_OUTCOMES_PER_SITE + 50)]
    summaries = [
        ccs("s0", pairs=(("a", "b", 1.0),), at=NOW + i) for i in range(MAX_SUMMARIES_PER_SITE + 50)
    ]
    for packets in ([*outcomes, *summaries], [*outcomes[::-1], *summaries[::-1]]):
        site = counted(packets).site("s0")
        assert site is not None
        assert len(site.outcomes) == MAX_OUTCOMES_PER_SITE
        assert len(site.summaries) == MAX_SUMMARIES_PER_SITE
        assert min(site.outcomes)[0] == NOW + 50
        assert min(site.summaries)[0] == NOW + 50


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4096), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_causal_pairs_kept_of_a_site_are_bounded_in_whatever_order_they_come(sizes, random):
    entries = []
    for at, size in enumerate(sizes):
        pairs = (CausalPair("a", "b", 1.0),) * size
        entries.append((float(at), f"p{at}", CausalSummary("s0", pairs, at=float(at))))
    expected, room = [], MAX_CAUSAL_ITEMS_PER_SITE
    for entry in reversed(entries):
        room -= len(entry[2].pairs)
        if room < 0:
            break
        expected.append(entry[1])
    random.shuffle(entries)
    site = SiteRecord()
    for entry in entries * 2:
        site.keep_summary(entry)
    assert sorted(entry[1] for entry in site.summaries) == sorted(expected)
    assert site.causal_items == sum(len(entry[2].pairs) for entry in site.summaries)
    assert site.drop_before(0.0, float(len(sizes)))
    assert (site.summaries, site.causal_items) == ([], 0)


def test_an_outcome_counts_once_however_often_it_is_replayed():
    outcome = pop("s0")
    site = counted([outcome] * 5).site("s0")
    assert site is not None
    assert len(site.outcomes) == 1


def test_which_names_of_a_large_packet_get_in_is_the_same_in_every_process():
    state = counted([msp("s0", controller={f"signal_{i:04}": 1.0 for i in range(1000)}, at=NOW)])
    assert sorted(state.signals_in_use()) == [f"signal_{i:04}" for i in range(512)]


def test_an_open_vocabulary_is_bounded():
    state = CohortState(rules())
    for block in range(12):
        state.count(msp(f"s{block}", controller={f"b{block}s{i}": 1.0 for i in range(500)}))
    assert state.ignored == {"vocabulary_full": 12 * 500 - 4096}


# Expiry


def test_what_is_past_its_time_is_forgotten():
    spec = {"retention": {"siteTtl": "100s"}, "policy": {"window": "200s"}}
    state = counted(
        [
            *taus(0.4, 0.5, 0.6, at=NOW - 50),
            msp("gone", controller={"tau": 0.5}, at=NOW - 101),
            pop("outcome", at=NOW - 150),
            pop("old", at=NOW - 201),
            ccs("causes", pairs=(("a", "b", 1.0),), at=NOW - 101),
        ],
        **spec,
    )
    assert state.sites == 7
    assert state.expire(NOW)
    assert {name for name in ("s0", "gone", "outcome", "old", "causes") if state.site(name)} == {
        "s0",
        "outcome",
    }
    assert not state.expire(NOW)
    assert priors(state) == {"tau": pytest.approx(0.5)}
    assert priors(state, now=NOW + 60) == {}
    assert state.site("s0") is None


# Reputation


def test_liars_lose_their_reputation_and_a_site_that_leaves_is_forgotten():
    state = CohortState(rules(retention={"siteTtl": "100s"}))
    for turn in range(10):
        for packet in taus(0.50, 0.51, 0.52, 0.53, 0.54, 99.0, at=NOW + turn):
            state.count(packet)
        state.release(NOW + turn)
    assert state.reputation("s5") < 0.05
    assert min(state.reputation(f"s{i}") for i in range(5)) > 0.7
    state.release(NOW + 500)
    assert state.reputations() == {}


def test_a_site_that_sends_in_every_release_weighs_no_more_than_most():
    quiet, loud = (counted(taus(*(0.50 + 0.01 * i for i in range(8)))) for _ in range(2))
    quiet.release(NOW)
    for turn in range(30):
        loud.count(msp("s6", controller={"tau": 0.56}, at=NOW + turn))
        found = loud.release(NOW + turn)
    assert loud.reputation("s6") > 0.9 > loud.reputation("s5")
    assert set(found.reputations.values()) == {0.55}
    assert priors(loud, now=NOW + 30) == priors(quiet, now=NOW + 30)


def test_a_site_that_comes_back_after_its_time_is_a_new_site():
    state = CohortState(rules(retention={"siteTtl": "100s"}))
    for turn in range(10):
        state.count_all(taus(0.50, 0.51, 0.52, 0.53, 0.54, 99.0, at=NOW + turn))
        state.release(NOW + turn)
    assert state.reputation("s5") < 0.05
    for packet in taus(0.50, 0.51, 0.52, 0.53, 0.54, at=NOW + 150):
        state.count(packet)
    state.release(NOW + 200)
    assert state.site("s5") is None
    state.count(msp("s5", controller={"tau": 0.53}, at=NOW + 201))
    assert state.reputation("s5") == START_REPUTATION
    state.release(NOW + 201)
    assert (
        START_REPUTATION < state.reputation("s5") < min(state.reputation(f"s{i}") for i in range(5))
    )


def test_a_site_that_moves_counts_in_the_warm_start_of_its_new_class_with_all_its_values():
    state = CohortState(rules())
    for name, start in (("small", 0.1), ("large", 0.8)):
        for i in range(4):
            header = {"at": NOW, "profile_class": name}
            state.count(msp(f"{name}-{i}", controller={"tau": start + i / 100, "g": 1.0}, **header))

    def tau(profile_class: str) -> tuple[str, int, float]:
        found = state.release(NOW + 1).warm_starts[profile_class].init["tau"]
        return found.source, found.sites, pytest.approx(found.value)

    assert tau("small") == ("profile_class", 4, 0.115)
    assert tau("large") == ("profile_class", 4, 0.815)
    # Two of them say so in packets that do not even have the signal.
    for i in (0, 1):
        moved = msp(f"small-{i}", controller={"g": 2.0}, at=NOW + 1, profile_class="large")
        state.count(moved)
    assert tau("large") == ("profile_class", 6, statistics.mean([0.11, 0.80, 0.81, 0.82]))
    assert "small" not in state.release(NOW + 1).warm_starts  # two are no quorum


def test_a_warm_start_that_is_published_is_of_a_class_and_of_no_regime():
    packets = [
        msp(f"s{i}", controller={"tau": float(i % 2)}, regime=("winter", "summer")[i % 2])
        for i in range(8)
    ]
    state = counted(packets)
    published = state.release(NOW).warm_starts.values()
    assert [start.source for start in published] == ["profile_class"]
    assert [start.regime for start in published] == [None]
    asked = state.warm_start(WarmStartRequest(profile_class="default", regime_tag="winter"))
    assert (asked.source, asked.init["tau"].value) == ("profile_and_regime", 0.0)


@pytest.mark.parametrize(
    ("signals", "settles"), [(1, 0.01), (2, 0.5), (5, 0.8), (10, 0.9), (100, 0.97)]
)
def test_a_site_that_lies_in_one_of_many_signals_keeps_most_of_its_reputation(signals, settles):
    state, chance = CohortState(rules()), random.Random(3)
    for turn in range(40):
        for number in range(20):
            values = {f"x{i}": chance.gauss(1.0, 0.1) for i in range(signals)}
            if number == 0:
                values["x0"] = 50.0
            state.count(msp(f"s{number}", controller=values, at=NOW + turn))
        state.release(NOW + turn)
    assert state.reputation("s0") == pytest.approx(settles, abs=0.12)


def test_a_replay_is_no_news_and_moves_no_reputation():
    state = CohortState(rules())
    packets = taus(0.50, 0.51, 0.52, 0.53, 9.0)
    state.count_all(packets)
    state.release(NOW)
    judged = state.reputations()
    assert len(judged) == 5
    again = CohortState(rules(), reputations=judged)
    again.replay(packets)
    again.release(NOW)
    assert again.reputations() == judged
    again.replay(packets)
    again.count(msp("new", controller={"tau": 0.5}))
    again.release(NOW)
    assert again.reputations().keys() - judged.keys() == {"new"}


def test_a_prior_can_be_computed_again_from_its_packets_and_its_lineage_alone():
    chance = random.Random(5)
    names = [f"s{i}" for i in range(12)]
    state, newest = CohortState(rules(aggregation={"weightCap": 1.0})), {}
    for turn in range(6):
        for number, name in enumerate(names):
            # One lies, two declare little confidence, three stand for few sites.
            tau = 90.0 if number == 0 else chance.gauss(0.5, 0.05)
            confidence = 0.31 if number in (3, 4) else chance.uniform(0.6, 1.0)
            packet = msp(name, controller={"tau": tau}, confidence=confidence, at=NOW + turn)
            packet.msp.evidence.sites = 2.0 if number in (5, 6, 7) else 7.0
            newest[name] = packet
            state.count(packet)
        state.release(NOW + turn)
    update = AGGREGATOR.result(state, now=NOW + 6).prior_update
    lineage, found = update.lineage, update.estimates["tau"]
    assert lineage.reputations.keys() == set(names)
    assert lineage.relative_sizes == pytest.approx(dict.fromkeys(["s5", "s6", "s7"], 0.29))
    assert lineage.reputations["s0"] < 0.2 < min(lineage.reputations[name] for name in names[1:])

    def weight(packet: packet_pb2.Packet) -> Fraction:
        name = packet.header.domain_id
        confidence = min(packet.msp.evidence.confidence, lineage.confidence_cap)
        factors = confidence, lineage.reputations[name], lineage.relative_sizes.get(name, 1.0)
        return math.prod(map(Fraction, factors))

    packets = sorted(newest.values(), key=lambda packet: packet.msp.controller["tau"])
    cut = found.trimmed // 2
    kept = packets[cut : len(packets) - cut]
    total = sum(map(weight, kept))
    mean = sum(weight(p) * Fraction(p.msp.controller["tau"]) for p in kept) / total
    assert found.value == pytest.approx(float(mean), rel=1e-12)
    kish = total**2 / sum(weight(packet) ** 2 for packet in kept)
    assert found.effective_sites == pytest.approx(float(kish), rel=1e-12)


def test_reading_without_news_moves_no_reputation():
    state = counted(taus(0.50, 0.51, 0.52, 0.53, 9.0))
    state.release(NOW)
    judged = state.reputations()
    for _ in range(5):
        state.release(NOW)
        state.warm_start(WarmStartRequest(profile_class="default"))
    assert state.reputations() == judged


# ROBUST


@settings(max_examples=40, deadline=None)
@given(
    honest=st.lists(st.floats(-100, 100), min_size=6, max_size=12),
    lies=st.lists(st.sampled_from([1e150, -1e150, 1e9, 0.0, 101.0]), min_size=2, max_size=2),
    turns=st.integers(1, 3),
)
def test_two_liars_do_not_move_the_prior_out_of_the_honest_range(honest, lies, turns):
    state = CohortState(rules(aggregation={"maxByzantine": 2}))
    for turn in range(turns):
        for i, value in enumerate(honest):
            state.count(msp(f"s{i}", controller={"tau": value}, confidence=0.2, at=NOW + turn))
        for i, value in enumerate(lies):
            state.count(msp(f"liar{i}", controller={"tau": value}, confidence=1.0, at=NOW + turn))
        result = AGGREGATOR.result(state, now=NOW + turn)
        assert min(honest) <= result.prior_update.prior["tau"] <= max(honest)
        for value in result.warm_start.init.values():
            assert min(honest) <= value <= max(honest)
        assert result.prior_update.estimates["tau"].tolerated >= 2


SHARES = st.sampled_from([0.0, 5e-324, 0.5, 1.0])
LIE = st.fixed_dictionaries(
    {
        "value": st.floats(-1e150, 1e150),
        "confidence": st.sampled_from([0.0, 5e-324, 0.5, 1.0]),
        "sites": st.sampled_from([5e-324, 0.5, 1.0, 1e12]),
        "section": st.sampled_from(["controller", "metrics", "evaluator"]),
        "at": st.sampled_from([-1e5, 0.0, 1.0, 200.0]),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    honest=st.lists(st.tuples(st.floats(-100, 100), SHARES), min_size=5, max_size=9),
    lies=st.lists(st.lists(LIE, min_size=1, max_size=4), min_size=1, max_size=2),
    estimator=st.sampled_from(["trimmed_mean", "median"]),
    releases=st.integers(1, 2),
)
def test_whatever_liars_send_the_prior_stays_in_the_honest_range(honest, lies, estimator, releases):
    how = {"maxByzantine": 2, "metricsAggregation": estimator}
    state = CohortState(rules(aggregation=how))
    for turn in range(releases):
        for i, (value, confidence) in enumerate(honest):
            packet = msp(f"s{i}", controller={"tau": value}, confidence=confidence, at=NOW + turn)
            state.count(packet)
        for i, packets in enumerate(lies):
            for lie in packets:
                packet = msp(f"liar{i}", confidence=lie["confidence"], at=NOW + turn + lie["at"])
                getattr(packet.msp, lie["section"])["tau"] = lie["value"]
                packet.msp.evidence.sites = lie["sites"]
                state.count(packet)
        found = AGGREGATOR.result(state, now=NOW + turn).prior_update
        told = [value for value, _ in honest]
        assert min(told) <= found.prior["tau"] <= max(told)
        assert found.estimates["tau"].section == "controller"
        assert 0.0 <= found.estimates["tau"].confidence <= 1.0


def test_without_weights_the_prior_is_the_trimmed_mean():
    values = [0.3, 0.1, 0.9, 0.5, 0.4]
    found = priors(counted(taus(*values)))
    assert found["tau"] == pytest.approx(statistics.fmean(sorted(values)[1:-1]))
    assert math.isfinite(found["tau"])


# EXPLAINED: nothing that the contract takes may keep a release from being made

EXTREMES = st.sampled_from([1e150, -1e150, 5e-324, -5e-324, 0.0, 1.0, -1.0, 1e-300, 0.5])
POSITIVE = st.sampled_from([5e-324, 1e-300, 1e-9, 1.0, 1e150])
LARGEST = 1.7976931348623157e308


@st.composite
def specs(draw) -> dict[str, object]:
    signals = []
    for name in ("loss", "gain"):
        lower, upper = sorted(draw(st.lists(EXTREMES, min_size=2, max_size=2, unique=True)))
        direction = draw(st.sampled_from(["LOWER_IS_BETTER", "HIGHER_IS_BETTER", "UNSPECIFIED"]))
        signal = {
            "name": name,
            "section": "SIGNAL_SECTION_METRICS",
            "direction": f"SIGNAL_DIRECTION_{direction}",
            "guardrail": direction != "UNSPECIFIED" and draw(st.booleans()),
            "scale": draw(st.one_of(POSITIVE, st.just(LARGEST))),
        }
        if draw(st.booleans()):
            signal |= {"lower": lower, "upper": upper}
        signals.append(signal)
    bounds = st.sampled_from([(5e-324, 1e-300), (1e-300, 1e150), (0.5, 1.0)])
    lower, upper = draw(bounds)
    section = "SIGNAL_SECTION_CONTROLLER"
    log = {"transform": "SIGNAL_TRANSFORM_LOG", "lower": lower, "upper": upper}
    signals.append({"name": "rate", "section": section, **log})
    lower, upper = draw(st.sampled_from([(5e-324, 1e-300), (0.1, 0.1 + 2**-55), (0.1, 0.9)]))
    logit = {"transform": "SIGNAL_TRANSFORM_LOGIT", "lower": lower, "upper": upper}
    signals.append({"name": "share", "section": section, **logit})
    aggregation = {
        "metricsAggregation": draw(
            st.sampled_from(["trimmed_mean", "weighted_mean", "mean", "median", "mean_of_median"])
        ),
        "voteMinSites": draw(st.integers(1, 4)),
        "metricsTrimAlpha": draw(st.sampled_from([0.0, 0.1, 0.49])),
        "weightCap": draw(st.sampled_from([5e-324, 0.25, 1.0])),
    }
    if draw(st.booleans()):
        aggregation["maxByzantine"] = draw(st.integers(0, 1))
    return {
        "signals": signals,
        "freeSignals": True,
        "aggregation": aggregation,
        "policy": {"quantum": {"tau": draw(POSITIVE)}},
    }


@st.composite
def extreme_packets(draw) -> list[packet_pb2.Packet]:
    packets = []
    names = ["loss", "gain", "other"]
    numbers = st.dictionaries(st.sampled_from(names), EXTREMES, min_size=1)
    for site in range(draw(st.integers(1, 7))):
        header = {"regime": draw(st.sampled_from(["", "r"])), "cohort": "care"}
        name = f"s{site}"
        controller = draw(st.dictionaries(st.sampled_from(["rate", "share", "tau"]), EXTREMES))
        packets.append(
            msp(
                name,
                metrics=draw(numbers),
                controller=controller,
                confidence=draw(st.one_of(st.none(), SHARES)),
                **header,
            )
        )
        outcome = pop(
            name,
            bundle={"tau": draw(EXTREMES)},
            before=draw(numbers),
            after=draw(numbers),
            **header,
        )
        outcome.pop.control_delta.update(draw(numbers))
        if draw(st.booleans()):
            outcome.pop.confidence = draw(SHARES)
        packets.append(outcome)
        pairs = tuple(
            (*ends, draw(EXTREMES))
            for ends in draw(st.lists(st.sampled_from(["ab", "ba", "bc"]), unique=True))
        )
        summary = ccs(
            name, pairs=pairs, concepts={"drift": draw(EXTREMES)}, trust=draw(SHARES), **header
        )
        for pair in summary.ccs.causal_pairs:
            if draw(st.integers(0, 3)):
                pair.stderr = draw(POSITIVE)
        packets.append(summary)
    return packets


def numbers_of(message) -> list[float]:
    plain = json_format.MessageToDict(message)
    text = json.dumps(plain)
    assert not {'"NaN"', '"Infinity"', '"-Infinity"'} & set(text.replace(",", " ").split())
    return [float(word) for word in re.findall(r"(?<=: )-?[0-9][-+.e0-9]*", text)]


@settings(max_examples=150, suppress_health_check=list(HealthCheck), deadline=None)
@given(specs(), extreme_packets())
def test_whatever_the_contract_takes_can_be_released(spec, packets):
    cohorts = CohortRegistry(CONTRACT)
    cohorts.declare(
        json_format.ParseDict({"name": "care", **spec}, cohort_pb2.CohortSpec()), force=True
    )
    validator = FMIValidator(CONTRACT, cohorts=cohorts, clock=lambda: NOW)
    taken = [packet for packet in packets if not validator.inspect(packet).violations]
    assert taken
    state = CohortState(cohorts.rules("care"))
    state.count_all(taken)
    for _ in range(2):
        result = AGGREGATOR.result(state, now=NOW)
        for message in (
            result.prior_update,
            result.warm_starts,
            result.policy_hint,
            result.causal_consensus,
        ):
            assert all(math.isfinite(number) for number in numbers_of(message))
