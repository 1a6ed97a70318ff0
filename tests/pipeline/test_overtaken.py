"""Which packets cannot count any more: a state made of the others is the same, whatever comes."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from google.protobuf import json_format
from parts import NOW, ccs, msp, pop
from test_cohort_state import AGGREGATOR, LOSS, rules

from fmi.v1 import packet_pb2
from fmi_server.cohort_state import CohortState
from fmi_server.site_records import emitted_at

RATE = {
    "name": "lr",
    "section": "SIGNAL_SECTION_CONTROLLER",
    "transform": "SIGNAL_TRANSFORM_LOG",
    "lower": 0.01,
}
SPEC = {
    "signals": [LOSS, RATE],
    "freeSignals": True,
    "aggregation": {"voteMinSites": 3},
}
SITES = [f"s{number}" for number in range(4)]


@pytest.fixture
def little_room(monkeypatch):
    """A site keeps so little that everything that is kept is pushed out soon."""
    for name, room in (("OUTCOMES", 3), ("SUMMARIES", 2), ("CAUSAL_ITEMS", 7)):
        monkeypatch.setattr(f"fmi_server.site_records.MAX_{name}_PER_SITE", room)


def some_packet(rng: random.Random, now: float) -> packet_pb2.Packet:
    """A packet of about this time; many have the same time, and some arrive late."""
    site = rng.choice(SITES)
    header = {
        "at": now - rng.choice([0, 0, 1, 5, 20, 45]),
        "profile_class": rng.choice(["", "big"]),
        "regime": rng.choice(["", "winter", "summer"]),
    }

    def number() -> float:
        return round(rng.uniform(0.1, 10.0), 3)

    match rng.choice(["msp", "msp", "msp", "pop", "ccs"]):
        case "msp":
            names = rng.sample(["tau", "g", "lr"], rng.randrange(4))
            metrics = rng.sample(["loss", "tau"], rng.randrange(3))
            return msp(
                site,
                controller={name: number() for name in names},
                metrics={name: number() for name in metrics},
                confidence=rng.choice([None, 0.2, 0.9]),
                **header,
            )
        case "pop":
            return pop(site, before={"loss": 5.0}, after={"loss": number()}, **header)
        case _:
            pairs = tuple(("a", name, number()) for name in "bcd"[: rng.randrange(4)])
            concepts = {"drift": number()} if rng.random() < 0.5 else {}
            tested = ("a", "b") if rng.random() < 0.5 else ()
            return ccs(site, pairs=pairs, concepts=concepts, tested=tested, **header)


def replayed(stored: Sequence[packet_pb2.Packet], now: float = -math.inf, **spec) -> CohortState:
    """Do what a start does: count what is not past its time."""
    state = CohortState(rules(**spec))
    since = now - max(state.rules.site_ttl_s, state.rules.policy_window_s)
    state.replay([packet for packet in stored if emitted_at(packet) >= since])
    return state


def known(state: CohortState, now: float) -> list[object]:
    """Everything that can be asked of a state, but for the window, which is a bound."""
    state.expire(now)
    result = AGGREGATOR.result(state, now=now)
    messages = (
        result.prior_update,
        result.warm_starts,
        result.policy_hint,
        result.causal_consensus,
    )
    for message in (result.prior_update, *result.warm_starts.profiles):
        message.lineage.ClearField("window")
    statistics = state.release(now)
    sites = {
        name: (site.profile_class, site.regime_tag, site.concepts, site.heard_at)
        for name in SITES
        if (site := state.site(name)) is not None
    }
    return [
        [json_format.MessageToDict(message) for message in messages],
        sites,
        statistics.contexts.untagged_sites,
        [(regime.name, regime.sites, regime.concepts) for regime in statistics.contexts.regimes],
        {name: round(value, 9) for name, value in statistics.reputations.items()},
        statistics.class_sites,
        statistics.outcome_sites,
    ]


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("window_s", [30, 90], ids=["window below ttl", "window above ttl"])
@pytest.mark.parametrize("seeds", [range(start, start + 40) for start in (0, 40, 80)], ids=str)
def test_a_restart_from_live_packets_is_one_from_all(seeds, window_s):
    for seed in seeds:
        alive, whole, now, rng = some_history(seed, window_s)
        assert known(alive, now) == known(whole, now), seed
        for packet in [some_packet(rng, now) for _ in range(4)]:
            alive.count(packet)
            whole.count(packet)
        assert known(alive, now) == known(whole, now), (
            f"{seed}: what comes later counts as it would"
        )


def some_history(
    seed: int, window_s: float
) -> tuple[CohortState, CohortState, float, random.Random]:
    """Let packets come, be counted and compacted; return a state of the live ones and one of all."""
    rng = random.Random(seed)
    spec = {**SPEC, "retention": {"siteTtl": "50s"}, "policy": {"window": f"{window_s}s"}}
    state, now = CohortState(rules(**spec)), NOW
    stored: list[packet_pb2.Packet] = []
    live: list[packet_pb2.Packet] = []
    steps = ["packet"] * 12 + ["compact", "wait", "release", "restart"]
    for step in rng.choices(steps, k=rng.randrange(10, 120)):
        match step:
            case "packet":
                packet = some_packet(rng, now)
                stored.append(packet)
                live.append(packet)
                if rng.random() < 0.9:  # else it is stored, and not counted yet
                    state.count(packet)
            case "compact":
                gone = state.overtaken(live, now)
                live = [packet for packet, past in zip(live, gone, strict=True) if not past]
            case "wait":
                now += rng.choice([1, 10, 30])
            case "release":
                state.release(now)
            case "restart":
                state = replayed(live, now, **spec)
    return replayed(live, now, **spec), replayed(stored, now, **spec), now, rng


@pytest.mark.usefixtures("little_room")
def test_what_is_said_anew_is_overtaken_and_little_stays_live():
    stored = [
        packet
        for turn in range(200)
        for packet in (
            msp("s0", controller={"tau": 0.1}, at=NOW + turn),
            pop("s1", at=NOW + turn),
            ccs("s2", pairs=(("a", "b", 1.0),), concepts={"drift": 1.0}, at=NOW + turn),
        )
    ]
    state = replayed(stored, **SPEC)
    live = [
        p for p, gone in zip(stored, state.overtaken(stored, NOW + 200), strict=True) if not gone
    ]
    # The newest MSP; outcomes that fit; summaries that fit, and the newest that had to go.
    assert [p.WhichOneof("body") for p in live].count("msp") == 1
    assert len(live) == 1 + 3 + (2 + 1)


@pytest.mark.usefixtures("little_room")
def test_a_flood_of_one_moment_is_overtaken_by_its_last():
    flood = [msp("s0", controller={"tau": turn / 100}, regime="winter") for turn in range(50)]
    flood += [pop("s1") for _ in range(50)]
    flood += [ccs("s2", concepts={"drift": 1.0}) for _ in range(50)]
    state = replayed(flood, **SPEC)
    gone = state.overtaken(flood, NOW)
    assert gone.index(False) == 49
    # Of outcomes of one time the highest ids are kept, and the last packet is the one last heard of.
    assert [50 + gone[50:100].count(True), gone[100:].count(False)] == [50 + 47, 1]


def test_signals_that_cannot_be_counted_keep_no_packet(monkeypatch):
    monkeypatch.setattr("fmi_server.cohort_state.MAX_SIGNALS", 3)
    names = {f"weird-{number}": 1.0 for number in range(5)}
    stored = [msp("s0", controller={"tau": 0.5, **names}, at=NOW + turn) for turn in range(20)]
    state = replayed(stored, **{**SPEC, "signals": []})
    assert state.ignored["vocabulary_full"] > 0
    assert state.overtaken(stored, NOW + 20) == [True] * 19 + [False]


def test_what_was_not_said_anew_stays():
    old = msp("s0", controller={"tau": 0.5}, metrics={"loss": 1.0}, at=NOW - 10)
    new = msp("s0", controller={"tau": 0.6}, at=NOW)
    state = replayed([old, new], **SPEC)
    assert state.overtaken([old, new], NOW) == [False, False]
    newest = msp("s0", metrics={"loss": 2.0}, at=NOW + 1)
    state.count(newest)
    assert state.overtaken([old, new, newest], NOW) == [True, False, False]


def test_a_packet_of_a_site_nobody_knows_stays_until_its_time_is_over():
    packet = msp("s0", controller={"tau": 0.5})
    state = CohortState(rules(**SPEC))
    assert state.overtaken([packet], NOW) == [False]
    assert state.overtaken([packet], NOW + 31 * 86_400) == [True]


def test_the_packet_of_the_class_and_the_regime_stays():
    tagged = msp("s0", controller={"tau": 0.5}, at=NOW - 10, regime="winter")
    silent = msp("s0", controller={"tau": 0.6}, at=NOW - 5)
    classy = pop("s0", at=NOW, profile_class="big")
    state = replayed([tagged, silent, classy], **SPEC)
    assert state.overtaken([tagged, silent, classy], NOW) == [False, False, False]
    later = msp("s0", controller={"tau": 0.6}, at=NOW + 1, regime="summer")
    state.count(later)
    assert state.overtaken([tagged, silent, later], NOW) == [True, True, False]
