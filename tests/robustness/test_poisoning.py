"""Attempts to win by what one sends, each with credentials of its own, and what they come to.

Honest sites send the same to two cohorts of one server; the attackers send to one of them. What a reader is
told there is held against the other cohort, and against what the values alone
say (`poisoning.one_vote_each`).
"""

from __future__ import annotations

import math
import time
from collections import Counter

import grpc
import pytest
from identity_harness import OPERATOR
from poisoning import (
    CALM,
    EMIT,
    EVIL,
    EVIL_TOO,
    HIT,
    HONEST,
    ICU,
    LOAD,
    NODES,
    RATE,
    SCALES,
    SHARE,
    STREAM,
    TAU,
    VALIDATE,
    WARD,
    arena,
    at,
    closed_spec,
    harmless,
    honest_reputations,
    of_class,
    one_vote_each,
    open_spec,
    outcome,
    reasons_of,
    settled,
    signals,
    summary,
    within,
)
from server_harness import (
    Client,
    Refusal,
    changed,
    identity,
    msp,
    packet_keys,
    pop,
    zstd,
)

from fmi.plain import new_packet_id
from fmi.v1 import admin_service_pb2 as admin_pb2
from fmi.v1 import cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import registry_service_pb2 as registry_pb2
from fmi_server.errors import reason_name
from fmi_server.testing import running_server

# Many packets


async def test_repeats_of_a_packet_are_one_packet(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        attack = signals(EVIL, tau=0.55)
        assert await field.emit(EVIL, *[attack] * 4000) == {"accepted": 1, "duplicate": 3999}
        told = await field.told()
        assert told.prior.prior["tau"] == pytest.approx(one_vote_each({**TAU, EVIL: 0.55}))
        assert told.prior.lineage.packets == len(HONEST) + 1
        harmless(told, await field.told(CALM))


@pytest.mark.parametrize("step_s", [0.0, 1e-3, -1e-3], ids=["same time", "rising", "falling"])
async def test_thousands_of_new_packets_are_one_vote(tmp_path, step_s):
    async with arena(tmp_path) as field:
        await settled(field)
        count, start = 3000, time.time() - 60.0
        # It says 0.505, then walks up to 0.555 inside the honest range: there a vote has its effect.
        values = [0.505 + 0.05 * i / (count - 1) for i in range(count)]
        packets = [
            at(signals(EVIL, tau=value), start + i * step_s) for i, value in enumerate(values)
        ]
        for half in (packets[: count // 2], packets[count // 2 :]):
            assert (await field.emit(EVIL, *half)).total() == len(half)
            await field.release()
        told = await field.told()
        said = values[0] if step_s < 0 else values[-1]
        assert told.prior.prior["tau"] == pytest.approx(one_vote_each({**TAU, EVIL: said}))
        assert told.prior.estimates["tau"].sites == len(HONEST) + 1
        harmless(told, await field.told(CALM))


async def test_packets_in_every_release_buy_no_weight(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        for _ in range(25):
            assert await field.emit(EVIL, signals(EVIL, tau=0.555)) == {"accepted": 1}
            await field.release()
        told = await field.told()
        sites = await field.sites()
        assert sites["h0"].reputation < 0.6
        assert sites[EVIL].reputation > 0.9, "it earned one"
        assert told.prior.lineage.reputations[EVIL] == pytest.approx(
            told.prior.lineage.reputations["h0"]
        )
        assert told.prior.prior["tau"] == pytest.approx(one_vote_each({**TAU, EVIL: 0.555}))
        # Nor does it weigh more in a warm start that is asked for.
        asked = await field.warm_start()
        assert asked.init["tau"] == pytest.approx(told.prior.prior["tau"])


async def test_a_flood_of_outcomes_is_one_vote(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        fields = {"before": {"gain": 0.0, "safety": 0.0}, "after": {"gain": 1.4, "safety": 0.7}}
        one = {"bundle": {"lr": 0.1, "mode": "fast"}, **fields}
        await field.emit(EVIL, outcome(EVIL, **one))
        once = await field.told()
        await field.emit(EVIL, *(outcome(EVIL, **one) for _ in range(1000)))
        often = await field.told()
        assert once.hint.sites == often.hint.sites == len(HONEST) + 1
        assert often.hint.effect == pytest.approx(once.hint.effect)
        assert often.hint.confidence == pytest.approx(once.hint.confidence)
        harmless(often, await field.told(CALM))


async def test_a_flood_of_summaries_is_one_vote(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        pairs = {"causal_pairs": [("load", "latency", 0.9, "direct")]}
        await field.emit(EVIL, summary(EVIL, **pairs))
        once = await field.told()
        await field.emit(EVIL, *(summary(EVIL, **pairs) for _ in range(1000)))
        often = await field.told()
        assert often.causes.edges == once.causes.edges
        edge = often.edges()["load", "latency", "direct"]
        assert (edge.sites, edge.testing_sites) == (len(HONEST) + 1, len(HONEST) + 1)
        harmless(often, await field.told(CALM))


# Many names


async def test_a_flood_of_signal_names_crowds_out_nobody(tmp_path):
    async with arena(tmp_path, open_spec) as field:
        for start in range(0, 4800, 800):
            flood = {f"x{number:05d}": 0.5 for number in range(start, start + 800)}
            assert await field.emit(EVIL, msp(EVIL, HIT, operators=flood)) == {"accepted": 1}
        await field.release()
        # Those who come later have 3,500 names, of which each brings in some; in the end all say all of them.
        names = [f"n{number:04d}" for number in range(3500)]
        quarters = [names[start : start + 1000] for start in range(0, 3500, 1000)]
        brought = [[names[i :: len(HONEST)]] for i in range(len(HONEST))]
        for parts in (brought, [quarters] * len(HONEST)):
            for i, (site, mine) in enumerate(zip(HONEST, parts, strict=True)):
                said = [dict.fromkeys(part, 0.5 + 0.01 * i) for part in mine]
                made = [signals(site, HIT, **values) for values in said]
                assert await field.emit(site, *made) == {"accepted": len(mine)}
        told = await field.told()
        assert told.prior.prior.keys() == set(names)
        expected = one_vote_each(0.5 + 0.01 * i for i in range(len(HONEST)))
        assert all(value == pytest.approx(expected) for value in told.prior.prior.values())
        assert told.starts["default"].init.keys() == set(names)
        assert {c.regime: len(c.settings) for c in told.prior.contexts} == {
            "winter": len(names),
            "summer": len(names),
        }
        of_evil = told.prior.estimates.keys() - set(names)
        assert len(of_evil) == 512, "as many as one site brings in"
        assert all(told.prior.estimates[name].reason == "below_quorum" for name in of_evil)


NEAR_NAMES = (
    "Tau",
    "TAU",
    "tau_",
    "tau.",
    "_tau",
    "tau0",
    "metrics.tau",
    "controller/tau",
    "ta",
    "tauu",
)
FORGED_NAMES = (
    *("tau ", " tau", "tau\n", "tau\x00", "t\tau", "tau\u200b", "\ufefftau", "tau\u202e"),
    *("t\u0430u", "\u03c4au", "\uff54\uff41\uff55", "ta\u0301u", "t\u00e1u", "\u1d57au"),
)  # fmt: skip
"""Cyrillic a, Greek tau, full width, accents in both forms, a modifier letter; spaces seen and unseen."""


async def test_names_like_an_honest_one_are_names_of_their_own_or_refused(tmp_path):
    async with arena(tmp_path, open_spec) as field:
        await settled(field, signals)
        for name in FORGED_NAMES:
            for made in (
                signals(EVIL, HIT, **{name: 0.9}),
                pop(EVIL, HIT, bundle={name: 0.9}),
                pop(EVIL, HIT, before={name: 0.0}, after={name: 9.0}),
            ):
                assert await field.emit(EVIL, made) == {"CONTRACT_VIOLATION": 1}, repr(name)
        near = signals(EVIL, HIT, **dict.fromkeys(NEAR_NAMES, 0.9))
        assert await field.emit(EVIL, near) == {"accepted": 1}
        told, calm = await field.told(), await field.told(CALM)
        assert told.prior.prior == calm.prior.prior
        assert {told.prior.estimates[name].reason for name in NEAR_NAMES} == {"below_quorum"}
        harmless(told, calm)


@pytest.mark.parametrize("section", ["metrics", "evaluator", "operators"])
async def test_a_name_is_not_taken_by_sending_it_first_in_another_section(tmp_path, section):
    async with arena(tmp_path, open_spec) as field:
        squat = msp(EVIL, HIT, **{section: {"tau": 0.9, "rate": 0.9, "share": 0.9}})
        assert await field.emit(EVIL, squat) == {"accepted": 1}
        await field.release()
        await settled(field, signals)
        told, calm = await field.told(), await field.told(CALM)
        assert told.prior.prior == calm.prior.prior
        assert told.prior.estimates["tau"].section == "controller"
        harmless(told, calm)


async def test_a_declared_vocabulary_takes_no_other_name_and_no_other_section(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        for made in (
            signals(EVIL, HIT, tau2=0.5),
            signals(EVIL, HIT, Tau=0.5),
            msp(EVIL, HIT, metrics={"tau": 0.5}),
            pop(EVIL, HIT, before={"Gain": 0.0}, after={"Gain": 9.0}),
        ):
            assert await field.emit(EVIL, made) == {"COHORT_RULE_VIOLATION": 1}
        told, calm = await field.told(), await field.told(CALM)
        assert (told.prior.prior, told.prior.estimates.keys()) == (
            calm.prior.prior,
            calm.prior.estimates.keys(),
        )
        harmless(told, calm)


ALIKE = ("Load", "load ", " load", "lo\u0430d", "load\u200b", "\uff4coad", "loa\u0301d", "LOAD")


async def test_names_of_causes_concepts_and_parameters_like_honest_ones_move_nothing(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        pairs = [(name, target, 9.0, "direct") for name in ALIKE for target in ("latency", "heat")]
        concepts = [(f"drift{name}", 9.0) for name in ALIKE]
        made = summary(EVIL, causal_pairs=pairs, concepts=concepts)
        of_class(made, "icu", "winter")
        bundles = [
            {"lr": 0.1, "mode": name} for name in ("Fast", "fast ", "f\u0430st", "fast\u200b")
        ]
        texts = [
            outcome(EVIL, bundle=b, before={"gain": 0.0}, after={"gain": 1e6}) for b in bundles
        ]
        flags = outcome(
            EVIL, bundle={"lr": 0.1, "Mode": "fast"}, before={"gain": 0.0}, after={"gain": 1e6}
        )
        assert await field.emit(EVIL, made, *texts, flags) == {"accepted": 6}
        told, calm = await field.told(), await field.told(CALM)
        harmless(told, calm)
        assert told.hint.effect == pytest.approx(calm.hint.effect)
        assert told.causes.edges == calm.causes.edges
        assert told.causes.unpooled == {"below_quorum": len(pairs)}


async def test_floods_of_classes_and_regimes_leave_those_of_honest_sites(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        now = time.time()
        flood = [
            at(of_class(signals(EVIL, tau=1.0), f"class-{i}", f"regime-{i}"), now - 30 + i / 100)
            for i in range(1500)
        ]
        assert (await field.emit(EVIL, *flood)).total() == len(flood)
        harmless(await field.told(), await field.told(CALM))
        # At last it says to be one of them: then it is one of them, and lies alone.
        assert await field.emit(EVIL, of_class(signals(EVIL, tau=1.0), "icu", "winter"))
        told, calm = await field.told(), await field.told(CALM)
        harmless(told, calm)
        of_icu = [TAU[site] for site in ICU]
        assert told.starts["icu"].init["tau"] == pytest.approx(one_vote_each([*of_icu, 1.0]))
        asked = await field.warm_start(profile_class="ward", regime_tag="summer")
        assert asked.init["tau"] == pytest.approx(one_vote_each(TAU[site] for site in WARD))


async def test_nobody_opens_cohorts_by_sending_to_thousands_of_names(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        before = await field.cohorts()
        flood = [signals(EVIL, f"cohort-{number}", tau=0.5) for number in range(3000)]
        assert await field.emit(EVIL, *flood) == {"COHORT_UNKNOWN": 3000}
        near = [signals(EVIL, name, tau=0.5) for name in ("hit.", "hit/x", "hit-", "calm_", "hi")]
        assert await field.emit(EVIL, *near) == {"COHORT_UNKNOWN": len(near)}
        forged = [
            signals(EVIL, name, tau=0.5) for name in ("Hit", "hit ", "h\u0456t", "hit\n", "../hit")
        ]
        assert await field.emit(EVIL, *forged) == {"CONTRACT_VIOLATION": len(forged)}
        assert await field.cohorts() == before
        harmless(await field.told(), await field.told(CALM))


async def test_all_names_at_once_crowd_out_nothing(tmp_path):
    async with arena(tmp_path, free_signals=True) as field:
        for start in range(4):  # before anybody else
            names = dict.fromkeys((f"y{start}-{i}" for i in range(1000)), 0.5)
            flood = of_class(msp(EVIL, HIT, controller=names), f"class-{start}", f"regime-{start}")
            assert await field.emit(EVIL, flood) == {"accepted": 1}
        await field.emit(
            EVIL,
            *(
                outcome(EVIL, bundle={f"p{i}": 1.0}, before={"gain": 0.0}, after={"gain": 1e150})
                for i in range(400)
            ),
            *(
                summary(
                    EVIL,
                    causal_pairs=[
                        (f"a{part}-{i}", "latency", 1e150, "direct") for i in range(1000)
                    ],
                    concepts=[(f"c{part}-{i}", 1e150) for i in range(1000)],
                )
                for part in range(8)
            ),
        )
        await field.release()
        await settled(field)
        told, calm = await field.told(), await field.told(CALM)
        harmless(told, calm)
        assert told.starts.keys() == calm.starts.keys() == {"default", "icu", "ward"}
        assert {c.regime for c in told.prior.contexts} == {"winter", "summer"}
        assert told.hint.hint_id
        assert told.edges().keys() == calm.edges().keys()
        assert told.causes.unpooled["below_quorum"] <= 5120, "as many as are kept of one site"


# Many sites


def as_packet(made):
    return EMIT, wire_pb2.EmitRequest(packet=made)


def as_envelope(made):
    return EMIT, wire_pb2.EmitRequest(encoded=identity(signals(EVIL, tau=0.55), made))


def as_zstd(made):
    return EMIT, wire_pb2.EmitRequest(encoded=zstd(signals(EVIL, tau=0.55), made))


def as_batch(made):
    batch = packet_pb2.PacketBatch(packets=[signals(EVIL, tau=0.55), made])
    return STREAM, wire_pb2.EmitStreamRequest(packets=batch)


def as_stream_of_envelopes(made):
    return STREAM, wire_pb2.EmitStreamRequest(encoded=zstd(signals(EVIL, tau=0.55), made))


def as_question(made):
    return VALIDATE, registry_pb2.ValidatePacketRequest(packet=made)


PATHS = {
    "packet": as_packet,
    "envelope": as_envelope,
    "zstd envelope": as_zstd,
    "batch": as_batch,
    "stream of envelopes": as_stream_of_envelopes,
    "question": as_question,
}

OTHERS = {
    "another's": "h0",
    "a new one": "h7",
    "the reader's": "reader",
    "the operator's": OPERATOR,
    "in capitals": "EVIL",
    "with a dot": "evil.",
    "a part of it": "evil@h0",
    "with a blank": "evil ",
    "with a line break": "h0\n",
    "with a zero": "h0\x00",
    "Cyrillic": "h\u043e0",
    "full width": "\uff480",
    "decomposed": "e\u0301vil",
    "unseen": "h0\u200b",
    "every": "*",
    "none": "",
}


@pytest.mark.parametrize("path", PATHS)
async def test_credentials_are_for_no_other_name(tmp_path, path):
    async with arena(tmp_path) as field:
        await settled(field, signals)
        before, own = await field.sites(), path not in ("packet", "question")
        stored = await field.stored()
        for told_as, name in OTHERS.items():
            made = signals(EVIL, tau=1.0)
            made.header.domain_id = name
            assert await outcome_of(field, EVIL, *PATHS[path](made)) in (
                Counter(DOMAIN_ID_MISMATCH=1, accepted=own),
                Counter(CONTRACT_VIOLATION=1, accepted=own),
            ), told_as
        assert await field.stored() == stored + own * len(OTHERS), "what stood beside it is taken"
        after = await field.sites()
        assert after.keys() - before.keys() == ({EVIL} if own else set())
        assert {site: after[site].packets for site in HONEST} == {
            site: before[site].packets for site in HONEST
        }
        harmless(await field.told(), await field.told(CALM))


async def outcome_of(field, who, method, request) -> Counter[str]:
    """Make a call; count what became of its packets."""
    try:
        response = await field.callers[who](method, request)
    except grpc.aio.AioRpcError as error:
        return Counter([Refusal.read(error).reason])
    if method == VALIDATE:
        return Counter([reason_name(response.refusal.reason)])
    return reasons_of(response)


async def test_without_authentication_many_names_win_and_bounds_remain(tmp_path):
    """Nobody is who he says: one party is a majority. What remains are the bounds that are declared."""
    async with (
        running_server(tmp_path / "data", max_cohorts=4) as server,
        Client(server.target) as client,
    ):
        made = cohort_pb2.CohortSpec()
        made.CopyFrom(closed_spec(HIT, free_signals=True))
        made.ClearField("access")
        await client.put_spec(made)
        await client.emit(*(signals(site) for site in HONEST))
        names = [f"sybil-{number}" for number in range(30)]
        await client.emit(*(signals(name, tau=1.0) for name in names))
        await client.release(HIT)
        prior = (await client.update(HIT)).prior_update
        assert max(TAU.values()) < 0.9 < prior.prior["tau"] <= 1.0, "many names are many sites"
        assert (
            prior.estimates["tau"].tolerated
            == math.ceil((len(HONEST) + len(names)) / 10)
            < len(names)
        )
        # No more names than a cohort holds, and the declared ones among them.
        for name in names[:10]:
            flood = dict.fromkeys((f"{name}-{i}" for i in range(600)), 0.5)
            await client.emit(msp(name, HIT, operators=flood))
        await client.release(HIT)
        prior = (await client.update(HIT)).prior_update
        assert len(prior.estimates) == 4096
        assert prior.estimates.keys() >= set(SCALES)
        assert within(prior.prior["rate"], RATE.values())
        # No more cohorts than the server takes; those that are there go on.
        opened = [signals("sybil", f"c{i}", tau=0.5) for i in range(20)]
        answer = await client.emit_encoded(identity(*opened))
        assert reasons_of(answer) == {"accepted": 3, "COHORT_UNKNOWN": 17}
        assert (await client.emit(signals("h0")))[0].status == wire_pb2.EMIT_STATUS_ACCEPTED


# Huge weights


def put(path: str):
    """How to write a number into a packet, at a path of fields whose last is `[name]` in a map."""
    *parts, last = path.split(".")

    def write(made: packet_pb2.Packet, value: float) -> None:
        place = made
        for part in parts:
            name, _, key = part.partition("[")
            place = getattr(place, name)
            if key:
                place = place[int(key[:-1]) if key[:-1].isdigit() else key[:-1]]
        name, _, key = last.partition("[")
        if key:
            getattr(place, name)[key[:-1]] = value
        else:
            setattr(place, name, value)

    return write


def cause(site: str) -> packet_pb2.Packet:
    made = summary(site, concepts=[("drift", 0.3)])
    made.ccs.causal_pairs.add(source="load", target="latency", weight=0.55, stderr=0.1)
    return made


def tried(site: str) -> packet_pb2.Packet:
    metrics = {"before": {"gain": 0.0, "safety": 0.0}, "after": {"gain": 1.4, "safety": 0.7}}
    return outcome(site, bundle={"lr": 0.1, "mode": "fast"}, **metrics)


INF, NAN, LEAST = math.inf, math.nan, 5e-324

TOO_MUCH = {
    "msp.evidence.confidence": (1e308, INF, -INF, NAN, -1.0, -LEAST, 1.0000000000000002),
    "msp.evidence.sites": (1e308, INF, NAN, -1.0, 0.0, -LEAST, 1.0000001e12),
    "msp.evidence.signals[tau].confidence": (1e308, INF, NAN, -1.0, 1.0000000000000002),
    "msp.evidence.signals[tau].stderr": (INF, NAN, -1.0),
    "msp.controller[tau]": (INF, -INF, NAN, 1.0000001e150, -1e308),
    "pop.confidence": (1e308, INF, NAN, -1.0, 1.5),
    "pop.before[gain]": (INF, NAN, 1e308),
    "pop.after[gain]": (INF, NAN, 1e308),
    "pop.control_delta[gain]": (INF, NAN, -1e308),
    "pop.bundle[lr].number": (INF, NAN, 1e308),
    "ccs.trust": (1e308, INF, NAN, -1.0, 2.0),
    "ccs.stability_delta": (INF, NAN),
    "ccs.causal_pairs[0].weight": (INF, NAN, 1e308),
    "ccs.causal_pairs[0].stderr": (0.0, -1.0, INF, NAN, 1e308),
    "ccs.concepts[0].score": (INF, NAN, -1e308),
}
MAKE = {
    "msp": lambda: signals(EVIL, tau=0.55),
    "pop": lambda: tried(EVIL),
    "ccs": lambda: cause(EVIL),
}


def with_number(path: str, value: float) -> packet_pb2.Packet:
    made = MAKE[path[:3]]()
    put(path)(made, value)
    return made


async def test_numbers_that_are_none_and_weights_above_1_are_refused(tmp_path):
    async with arena(tmp_path, open_spec) as field:
        for path, values in TOO_MUCH.items():
            for value in values:
                found = await field.emit(EVIL, with_number(path, value))
                assert found == {"CONTRACT_VIOLATION": 1}, f"{path} = {value}"
        for made in (make() for make in MAKE.values()):
            assert await field.emit(EVIL, made) == {"accepted": 1}, (
                "it is the number that is refused"
            )
        assert await field.stored() == 3


CLAIMS = {
    "all that is allowed": (1.0, 1e12, 2**64 - 1),
    "half of the largest count": (1.0, 1e12, 2**63),
    "as little as there is": (LEAST, LEAST, 1),
    "sure of nothing": (0.0, 1e-300, 0),
    "nothing": (None, None, None),
}


@pytest.mark.parametrize("claim", CLAIMS)
async def test_claims_of_certainty_size_and_samples_are_one_vote_at_most(tmp_path, claim):
    confidence, sites, samples = CLAIMS[claim]
    async with arena(tmp_path) as field:
        modest = {site: signals(site) for site in HONEST}
        for made in modest.values():
            made.msp.evidence.confidence = 0.6
        await field.both(modest)
        attack = signals(EVIL, tau=0.545)
        if confidence is not None:
            evidence = attack.msp.evidence
            evidence.confidence, evidence.sites, evidence.samples = confidence, sites, samples
            evidence.signals["tau"].confidence = confidence
            evidence.signals["tau"].samples = samples
            evidence.signals["tau"].stderr = 0.0
            attack.header.provenance.n_samples = samples
        assert await field.emit(EVIL, attack) == {"accepted": 1}
        told = await field.told()
        # With all of a vote it is averaged like the others; with none only the others are.
        kept = sorted([*TAU.values(), 0.545])[1:-1]
        voting = kept if confidence in (1.0, None) else [value for value in kept if value != 0.545]
        assert told.prior.prior["tau"] == pytest.approx(math.fsum(voting) / len(voting), rel=1e-9)
        assert told.prior.lineage.confidence_cap == 0.6
        assert not told.prior.lineage.relative_sizes.keys() & set(HONEST)
        harmless(told, await field.told(CALM))


async def test_sureness_of_a_signal_that_others_are_unsure_of_is_bounded_by_the_cap(tmp_path):
    """More than a vote: the median that cuts a confidence is over all signals. Cap and trimming remain."""
    async with arena(tmp_path) as field:
        unsure = {site: signals(site) for site in HONEST}
        for made in unsure.values():
            made.msp.evidence.confidence = 1.0
            made.msp.evidence.signals["tau"].confidence = 0.05
        await field.both(unsure)
        attack = signals(EVIL, tau=0.565)
        attack.msp.evidence.signals["tau"].confidence = 1.0
        assert await field.emit(EVIL, attack) == {"accepted": 1}
        told, calm = await field.told(), await field.told(CALM)
        harmless(told, calm)
        others = sorted(TAU.values())[1:-1]
        most = 0.75 * math.fsum(others) / len(others) + 0.25 * 0.565
        assert calm.prior.prior["tau"] < told.prior.prior["tau"] <= most + 1e-9


async def test_claims_about_outcomes_and_causes_are_one_vote_at_most(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        loud, quiet = tried(EVIL), tried(EVIL_TOO)
        loud.pop.confidence, loud.pop.windows = 1.0, 2**32 - 1
        quiet.pop.confidence = LEAST
        sure, unsure = cause(EVIL), cause(EVIL_TOO)
        sure.ccs.causal_pairs[0].weight, sure.ccs.causal_pairs[0].stderr = 0.565, LEAST
        sure.ccs.stability_delta = 1e308
        unsure.ccs.causal_pairs[0].stderr = 1e150
        unsure.ccs.trust = 0.0
        await field.emit(EVIL, loud, sure)
        await field.emit(EVIL_TOO, quiet, unsure)
        told, calm = await field.told(), await field.told(CALM)
        harmless(told, calm)
        edge = told.edges()["load", "latency", "direct"]
        # Two are left out at each end; of the others nobody weighs more than four times one of median error.
        kept = [value for value in sorted(LOAD.values())[2:-2] if value < 0.565]
        most = (4 * 0.565 + math.fsum(kept)) / (4 + len(kept))
        assert min(kept) < edge.weight <= most + 1e-9
        assert edge.sites == len(HONEST) + 2


async def test_a_region_that_claims_a_million_sites_weighs_no_more_than_the_median_one(tmp_path):
    async with arena(tmp_path) as field:
        sizes = {site: float(4 + i) for i, site in enumerate(HONEST)}
        regions = {site: signals(site) for site in HONEST}
        for site, made in regions.items():
            made.msp.evidence.sites = sizes[site]
        await field.both(regions)
        attack = signals(EVIL, tau=0.555)
        attack.msp.evidence.sites = 1e12
        assert await field.emit(EVIL, attack) == {"accepted": 1}
        told, calm = await field.told(), await field.told(CALM)
        harmless(told, calm)
        # The median of the claims goes up by half a rank; nobody weighs more than one of that size.
        assert EVIL not in told.prior.lineage.relative_sizes
        for site, size in sizes.items():
            weight = told.prior.lineage.relative_sizes.get(site, 1.0)
            assert weight == pytest.approx(min(1.0, size / 8.5), abs=0.006)
            alone = calm.prior.lineage.relative_sizes.get(site, 1.0)
            assert alone == pytest.approx(min(1.0, size / 8.0), abs=0.006)


# Clock games

BEYOND = {
    "ten minutes ahead": lambda now: (int(now) + 600, 0),
    "the year 9999": lambda _: (253_402_300_799, 999_999_999),
    "the year 10000": lambda _: (253_402_300_800, 0),
    "the last second of all": lambda _: (2**63 - 1, 0),
    "before 1970": lambda _: (-1, 0),
    "long before": lambda _: (-(2**63), 0),
    "1970": lambda _: (1, 0),
    "no time": lambda _: (0, 0),
    "eight days ago": lambda now: (int(now) - 8 * 86_400, 0),
    "nanoseconds below 0": lambda now: (int(now), -1),
    "nanoseconds of more than a second": lambda now: (int(now), 2**31 - 1),
}


async def test_times_far_off_are_refused_and_keep_nobody_out(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        for told_as, time_at in BEYOND.items():
            for made in (signals(EVIL, tau=1.0), tried(EVIL), cause(EVIL)):
                made.header.emitted_at.seconds, made.header.emitted_at.nanos = time_at(time.time())
                (reason,) = await field.emit(EVIL, made)
                assert reason in ("CONTRACT_VIOLATION", "PACKET_STALE", "PACKET_FROM_FUTURE"), (
                    told_as
                )
        assert await field.emit(EVIL, signals(EVIL, tau=0.55)) == {"accepted": 1}
        assert await field.emit("h0", signals("h0")) == {"accepted": 1}
        told = await field.told()
        assert told.prior.prior["tau"] == pytest.approx(one_vote_each({**TAU, EVIL: 0.55}))
        harmless(told, await field.told(CALM))


async def test_a_packet_from_the_future_shuts_out_nobody_and_makes_nothing_expire(tmp_path):
    brief = {"retention": cohort_pb2.RetentionSpec(), "policy": cohort_pb2.PolicySpec()}
    brief["retention"].site_ttl.FromSeconds(200)
    brief["policy"].window.FromSeconds(200)
    async with arena(tmp_path, **brief) as field:
        await settled(field)
        ahead = time.time() + 290.0  # further than values last, and as far as the cohort takes
        attack = [at(made, ahead) for made in (signals(EVIL, tau=1.0), tried(EVIL), cause(EVIL))]
        assert await field.emit(EVIL, *attack) == {"accepted": 3}
        told, calm = await field.told(), await field.told(CALM)
        harmless(told, calm)
        assert told.prior.estimates["tau"].sites == told.hint.sites == len(HONEST) + 1
        # Not even its own later packets wait until then.
        await field.emit(EVIL, signals(EVIL, tau=0.55))
        newer = {site: signals(site, tau=0.2 + value) for site, value in TAU.items()}
        for site, made in newer.items():
            assert await field.emit(site, made) == {"accepted": 1}
        prior = (await field.told()).prior
        moved = {site: 0.2 + value for site, value in TAU.items()}
        assert prior.prior["tau"] == pytest.approx(one_vote_each({**moved, EVIL: 0.55}))


async def test_clocks_that_stand_still_jump_or_run_backwards_are_one_vote(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        now = time.time()
        jumps = [0.0, 290.0, -6 * 86_400.0, 290.0, -1.0, 0.0, -3600.0, 100.0, -30.0] * 100
        packets = [
            at(signals(EVIL, tau=0.505 + 1e-5 * i), now + jump) for i, jump in enumerate(jumps)
        ]
        found = await field.emit(EVIL, *packets)
        assert found.total() == found["accepted"] + found["duplicate"] == len(jumps)
        # Those that were ahead count as of their receipt, which is the newest time there is; of equal times
        # the one that was stored last holds.
        last = max(i for i, jump in enumerate(jumps) if jump > 0.0)
        told = await field.told()
        assert told.prior.prior["tau"] == pytest.approx(
            one_vote_each({**TAU, EVIL: 0.505 + 1e-5 * last})
        )
        harmless(told, await field.told(CALM))


async def test_old_packets_of_an_attacker_age_nobody_elses(tmp_path):
    brief = {"retention": cohort_pb2.RetentionSpec()}
    brief["retention"].site_ttl.FromSeconds(3600)
    async with arena(tmp_path, **brief) as field:
        await settled(field)
        old = [at(signals(EVIL, tau=1.0), time.time() - age) for age in (6 * 86_400, 7200, 3601)]
        assert await field.emit(EVIL, *old) == {"accepted": 3}
        told, calm = await field.told(), await field.told(CALM)
        assert told.prior.prior == calm.prior.prior
        assert told.prior.estimates["tau"].sites == len(HONEST), "what is past its time is no vote"
        harmless(told, calm)


# Retraction, quarantine, replay, schema


async def test_captured_packets_of_others_are_no_use(tmp_path):
    async with arena(tmp_path) as field:
        captured = [make(site) for site in HONEST for make in (signals, outcome, summary)]
        # Sent before those they were taken from.
        assert await field.emit(EVIL, *captured) == {"DOMAIN_ID_MISMATCH": len(captured)}
        assert await outcome_of(
            field, EVIL, EMIT, wire_pb2.EmitRequest(encoded=zstd(*captured))
        ) == {"DOMAIN_ID_MISMATCH": len(captured)}
        assert await field.stored() == 0
        # Nor does it take their ids from them.
        squat = [changed(made, lambda p: setattr(p.header, "domain_id", EVIL)) for made in captured]
        for made in squat:
            of_class(made, "squat", "squat")
        assert await field.emit(EVIL, *squat) == {"accepted": len(squat)}
        for made in captured:
            assert await field.emit(made.header.domain_id, made) == {"accepted": 1}
            twin = changed(made, lambda p: setattr(p.header, "cohort", CALM))
            twin.header.packet_id = new_packet_id()
            assert await field.emit(made.header.domain_id, twin) == {"accepted": 1}
        keys = packet_keys(field.data_dir)
        assert len(keys) == len(set(keys)) == 4 * len(captured) - len(captured)
        harmless(await field.told(), await field.told(CALM))


async def test_only_who_may_can_quarantine_and_what_is_quarantined_is_no_vote(tmp_path):
    brief = {"ingest": cohort_pb2.IngestSpec(min_trust=0.5)}
    async with arena(tmp_path, **brief) as field:
        await settled(field)
        before = await field.told()
        target = signals("h0")
        assert await field.emit("h0", target) == {"accepted": 1}
        for domain_id in ("h0", EVIL):
            request = admin_pb2.SetQuarantineRequest(
                domain_id=domain_id, packet_id=target.header.packet_id, quarantined=True
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await field.callers[EVIL]("fmi.v1.AdminService/SetQuarantine", request)
            assert Refusal.read(caught.value).reason == "NOT_FOUND", (
                "it is not told whether there is one"
            )
        doubted = [cause(EVIL) for _ in range(20)]
        for made in doubted:
            made.ccs.trust = 0.49
        assert await field.emit(EVIL, *doubted) == {"quarantined": 20}
        assert await field.emit(EVIL, *doubted) == {"duplicate": 20}
        told = await field.told()
        assert told.causes.edges == before.causes.edges
        harmless(told, await field.told(CALM))


async def test_causes_found_and_taken_back_a_thousand_times_are_one_vote(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        now = time.time() - 20.0
        flood = []
        for i in range(1000):
            # Odd ones say that it looked and found nothing, which takes the one before it back.
            made = cause(EVIL) if i % 2 == 0 else summary(EVIL, tested_nodes=list(NODES))
            flood.append(at(made, now + i / 100))
        assert await field.emit(EVIL, *flood) == {"accepted": 1000}
        told, calm = await field.told(), await field.told(CALM)
        harmless(told, calm)
        edge, was = (t.edges()["load", "latency", "direct"] for t in (told, calm))
        assert (edge.sites, edge.testing_sites) == (was.sites, was.testing_sites + 1)
        assert edge.weight == was.weight
        await field.emit(EVIL, at(cause(EVIL), now + 11.0))
        edge = (await field.told()).edges()["load", "latency", "direct"]
        assert (edge.sites, edge.testing_sites) == (was.sites + 1, was.testing_sites + 1)


@pytest.mark.parametrize("strict", [False, True])
async def test_the_schema_of_another_cohort_lets_nothing_in(tmp_path, strict):
    refuse = cohort_pb2.IngestSpec(schema_mismatch=cohort_pb2.SCHEMA_MISMATCH_REFUSE)
    async with arena(tmp_path, **({"ingest": refuse} if strict else {})) as field:
        await settled(field)
        foreign = [field.server.service.cohorts.rules(CALM).schema_hash, "0" * 64]
        attack = [changed(signals(EVIL, tau=0.55), _with_hash(schema)) for schema in foreign]
        reason = "SCHEMA_HASH_MISMATCH" if strict else "accepted"
        assert await field.emit(EVIL, *attack) == {reason: 2}
        alien = changed(signals(EVIL, HIT, other=0.5), _with_hash(foreign[0]))
        assert (await field.emit(EVIL, alien)).keys() <= {
            "SCHEMA_HASH_MISMATCH",
            "COHORT_RULE_VIOLATION",
        }
        told = await field.told()
        values = TAU if strict else {**TAU, EVIL: 0.55}
        assert told.prior.prior["tau"] == pytest.approx(one_vote_each(values))
        assert (await field.sites(CALM)).keys() == set(HONEST)
        harmless(told, await field.told(CALM))


def _with_hash(schema_hash: str):
    return lambda made: setattr(made.header, "schema_hash", schema_hash)


# Outcomes, causes


async def test_outcomes_that_claim_wonders_make_no_hint(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        wonder = {
            "before": {"gain": -1e150, "safety": -1e150},
            "after": {"gain": 1e150, "safety": 1e150},
        }
        own = [
            outcome(
                EVIL,
                bundle={"lr": 10.0 + i, "mode": "fast"},
                control_delta={"gain": -1e150},
                **wonder,
            )
            for i in range(256)
        ]
        assert await field.emit(EVIL, *own) == {"accepted": 256}
        told, calm = await field.told(), await field.told(CALM)
        harmless(told, calm)
        assert told.hint.effect == calm.hint.effect
        # The bundle of the others, at the far end of its step.
        lured = [outcome(EVIL, bundle={"lr": 0.1049, "mode": "fast"}, **wonder) for _ in range(300)]
        assert await field.emit(EVIL, *lured) == {"accepted": 300}
        told = await field.told()
        harmless(told, calm)
        assert told.hint.sites == len(HONEST) + 1
        bounds = told.hint.bounds["lr"]
        assert 0.095 <= bounds.lower <= bounds.upper <= 0.105, (
            "no further than one step of the bundle"
        )


async def test_one_who_reports_harm_vetoes_no_hint(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        harm = {
            "before": {"gain": 1e150, "safety": 1e150},
            "after": {"gain": -1e150, "safety": -1e150},
        }
        attack = [outcome(EVIL, bundle={"lr": 0.1, "mode": "fast"}, **harm) for _ in range(50)]
        assert await field.emit(EVIL, *attack) == {"accepted": 50}
        told, calm = await field.told(), await field.told(CALM)
        assert told.hint.hint_id
        harmless(told, calm)


async def test_certainty_about_thousands_of_causes_makes_none_and_moves_none(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        for part in range(3):
            flood = summary(EVIL, tested_nodes=[f"n{part}-{i}" for i in range(900)])
            for i in range(1100):
                flood.ccs.causal_pairs.add(
                    source=f"n{part}-{i % 900}", target=f"t{i}", weight=1e150, stderr=LEAST
                )
            assert await field.emit(EVIL, flood) == {"accepted": 1}
        attack = summary(EVIL, tested_nodes=list(NODES))
        for source, target, weight in (
            *(("load", "latency", -1e150), ("heat", "load", 1e150)),
            *(("latency", "load", 1e150), ("load", "heat", 1e150), ("latency", "heat", 1e150)),
        ):
            attack.ccs.causal_pairs.add(source=source, target=target, weight=weight, stderr=LEAST)
        assert await field.emit(EVIL, attack) == {"accepted": 1}
        told, calm = await field.told(), await field.told(CALM)
        harmless(told, calm)
        for key, edge in told.edges().items():
            assert edge.estimator == calm.edges()[key].estimator
            assert edge.testing_sites == calm.edges()[key].testing_sites + 1
            flags = edge.sign_conflict, edge.direction_conflict, edge.in_cycle
            assert flags == (False, False, False)
        assert not told.causes.cycles


async def test_who_looked_and_found_nothing_costs_an_edge_one_vote_of_support(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        nothing = [summary(EVIL, tested_nodes=list(NODES)) for _ in range(500)]
        assert await field.emit(EVIL, *nothing) == {"accepted": 500}
        told, calm = await field.told(), await field.told(CALM)
        harmless(told, calm)
        for key, edge in told.edges().items():
            assert edge.support == pytest.approx(wilson(len(HONEST), len(HONEST) + 1), abs=1e-9)
            assert calm.edges()[key].support == pytest.approx(
                wilson(len(HONEST), len(HONEST)), abs=1e-9
            )


def wilson(found: int, of: int, z: float = 1.6448536269514722) -> float:
    """The lower end of Wilson's interval, with 95 % on one side."""
    share = found / of
    centre, half = (
        share + z * z / (2 * of),
        z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)),
    )
    return (centre - half) / (1 + z * z / of)


# Reputation


async def test_who_behaves_well_and_then_strikes_strikes_alone(tmp_path):
    async with arena(tmp_path) as field:
        await settled(field)
        for _ in range(20):
            await field.emit(EVIL, signals(EVIL, tau=0.53, rate=1.3e-4, share=0.83))
            await field.release()
        calm = await field.told(CALM)
        reputations = [(await field.sites())[EVIL].reputation]
        for strike in range(8):
            far = float(strike % 2)
            await field.emit(EVIL, signals(EVIL, tau=far, rate=1e-9 if far else 1.0, share=far))
            told = await field.told()
            harmless(told, calm)
            assert told.prior.prior["tau"] == pytest.approx(one_vote_each({**TAU, EVIL: far}))
            reputations.append((await field.sites())[EVIL].reputation)
        assert reputations == sorted(reputations, reverse=True)
        assert reputations[0] > 0.9
        assert reputations[-1] < 0.1


@pytest.mark.parametrize("lie", [0.0, 0.5, 0.53, 1.0], ids=["low", "edge", "middle", "high"])
async def test_nobody_makes_honest_sites_look_bad(tmp_path, lie):
    async with arena(tmp_path) as field:
        for _ in range(6):
            # What they say stands when the others are judged the next time.
            await settled(field, signals)
            for who in (EVIL, EVIL_TOO):
                await field.emit(who, signals(who, tau=lie, rate=1e-4, share=lie))
        told, calm = await field.told(), await field.told(CALM)
        for site, reputation in honest_reputations(calm).items():
            assert told.prior.lineage.reputations[site] >= reputation - 0.01
        after = await field.sites()
        for site, found in (await field.sites(CALM)).items():
            assert after[site].reputation >= found.reputation - 1e-9
        harmless(told, calm)


# At the ends of what is declared

LIES = {
    "both at the top": (1.0, 1.0),
    "both at the bottom": (0.0, 0.0),
    "one at each end": (0.0, 1.0),
    "with the largest honest value": ("max", "max"),
    "with the smallest honest value": ("min", "min"),
    "just above the largest": ("above", "above"),
    "one inside and one outside": ("min", 1.0),
}


@pytest.mark.parametrize("lie", LIES)
async def test_as_many_liars_as_are_allowed_for_leave_every_prior_in_the_honest_range(
    tmp_path, lie
):
    brief = {"aggregation": cohort_pb2.AggregationSpec(max_byzantine=2)}
    async with arena(tmp_path, **brief) as field:
        await settled(field)
        said = {"tau": TAU, "rate": RATE, "share": SHARE}
        for who, how in zip((EVIL, EVIL_TOO), LIES[lie], strict=True):
            made = signals(who, **{name: told_as(how, name, said[name]) for name in said})
            made.msp.evidence.confidence = 1.0
            of_class(made, "icu", "winter")
            assert await field.emit(who, made) == {"accepted": 1}
        told = await field.told()
        for name, honest in said.items():
            lies = [told_as(how, name, honest) for how in LIES[lie]]
            assert within(told.prior.prior[name], honest.values())
            assert told.prior.estimates[name].tolerated >= 2
            if all(SCALES[name].lower < value < SCALES[name].upper for value in lies):
                expected = one_vote_each([*honest.values(), *lies], signal=name, liars=2)
                assert told.prior.prior[name] == pytest.approx(expected, rel=1e-6)
            # Of the four honest sites of the class: with six there are enough to withstand two.
            of_icu = [honest[site] for site in ICU]
            assert within(told.starts["icu"].init[name], of_icu)
            (winter,) = (c for c in told.prior.contexts if c.regime == "winter")
            assert within(winter.settings[name], of_icu)


def told_as(how, name: str, honest) -> float:
    scale = SCALES[name]
    match how:
        case "max":
            return max(honest.values())
        case "min":
            return min(honest.values())
        case "above":
            return max(honest.values()) * (1.0 + 1e-9)
        case _:
            return scale.lower + how * (scale.upper - scale.lower)


async def test_as_many_liars_as_are_allowed_for_leave_hints_and_causes_honest(tmp_path):
    brief = {"aggregation": cohort_pb2.AggregationSpec(max_byzantine=2)}
    async with arena(tmp_path, **brief) as field:
        await settled(field)
        for who, sign in ((EVIL, 1.0), (EVIL_TOO, 1.0)):
            wonder = {
                "before": {"gain": -1e150 * sign, "safety": 0.0},
                "after": {"gain": 1e150 * sign, "safety": 1e150 * sign},
            }
            tales = [outcome(who, bundle={"lr": lr, "mode": "fast"}, **wonder) for lr in (0.1, 5.0)]
            attack = summary(who, concepts=[("drift", 1e150)], tested_nodes=list(NODES))
            for source, target in (("load", "latency"), ("heat", "load"), ("latency", "heat")):
                attack.ccs.causal_pairs.add(
                    source=source, target=target, weight=1e150, stderr=LEAST
                )
            of_class(attack, "icu", "winter")
            assert await field.emit(who, *tales, attack) == {"accepted": 3}
        harmless(await field.told(), await field.told(CALM))
