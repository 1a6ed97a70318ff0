"""Releases: what a site gets out of it, over the network."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics

import grpc
import pytest
from server_harness import (
    CAUSES,
    DEADLINE_S,
    HINT,
    PRIOR,
    WARM_START,
    Client,
    ccs,
    eventually,
    msp,
    pop,
    refusal_of,
    rows,
    spec,
)

from fmi.v1 import admin_service_pb2, cohort_pb2, registry_service_pb2, update_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.storage import SqliteStore
from fmi_server.testing import running_server

GAIN = cohort_pb2.SignalSpec(
    name="gain",
    section=cohort_pb2.SIGNAL_SECTION_METRICS,
    direction=cohort_pb2.SIGNAL_DIRECTION_HIGHER_IS_BETTER,
)
TAU = cohort_pb2.SignalSpec(
    name="tau", section=cohort_pb2.SIGNAL_SECTION_CONTROLLER, lower=0.0, upper=2.0
)


async def warm_start(client: Client, cohort: str, **fields) -> update_pb2.WarmStartProfile:
    request = wire_pb2.GetWarmStartRequest(cohort=cohort, **fields)
    return (await client.interchange.GetWarmStart(request, timeout=DEADLINE_S)).profile


# What an update says


async def test_a_prior_has_the_names_of_the_overview(client):
    await client.put_spec(spec("healthcare"))
    values = [0.88, 0.90, 0.91, 0.92, 5.0]
    for i, tau in enumerate(values):
        await client.emit(
            msp(
                f"site-{i}",
                "healthcare",
                metrics={"gain_p50": 0.15},
                controller={"tau": tau},
                evaluator={"g_min": 0.008},
                operators={"mix": 0.5},
            )
        )
    await client.release("healthcare")
    update = await client.update("healthcare")
    prior = update.prior_update

    assert prior.rev == update.revision >= 1
    assert set(prior.prior) == {"tau", "g_min", "mix"}, "metrics are watched, not applied"
    assert prior.prior["g_min"] == pytest.approx(0.008)
    # One site of five is trimmed from each end; the liar moves nothing.
    assert prior.prior["tau"] == pytest.approx(statistics.mean(values[1:4]))
    assert list(prior.cohorts) == ["healthcare"]
    assert 0 < prior.confidence <= 1
    assert set(prior.estimates) == {"tau", "g_min", "mix", "gain_p50"}
    tau = prior.estimates["tau"]
    assert (tau.section, tau.sites, tau.trimmed, tau.tolerated) == ("controller", 5, 2, 1)
    assert tau.lower < tau.value < tau.upper
    assert prior.estimates["gain_p50"].section == "metrics"
    assert (prior.lineage.sites, prior.lineage.packets) == (5, 5)
    assert prior.lineage.estimator == "trimmed_mean"
    assert prior.lineage.epsilon_spent == 0


async def test_below_the_quorum_a_signal_has_a_reason_and_no_value(client):
    await client.put_spec(spec("care"))
    await client.emit(msp("a", "care"), msp("b", "care"))
    await client.release("care")
    prior = (await client.update("care")).prior_update
    assert not prior.prior
    assert not prior.estimates["tau"].HasField("value")
    assert prior.estimates["tau"].reason
    assert prior.estimates["tau"].sites == 2


async def test_a_quorum_releases_by_itself(client):
    """No operator and no interval is needed for the first prior of a cohort that nobody declared."""
    async with client.subscribed("default", kinds=[PRIOR]) as events:
        await events.snapshot()
        await client.emit(*(msp(f"site-{i}") for i in range(3)))
        (update,) = await events.updates(1)
        assert update.prior_update.prior["tau"] == pytest.approx(0.9)


async def test_a_change_is_released_after_the_interval(client):
    quick = cohort_pb2.CohortSpec(name="quick")
    quick.release.min_interval.FromMilliseconds(50)
    await client.put_spec(quick)
    async with client.subscribed("quick", kinds=[PRIOR]) as events:
        await events.snapshot()
        await client.emit(*(msp(f"site-{i}", "quick") for i in range(3)))
        seen = []
        for value in (0.1, 0.2, 0.3):
            await client.emit(
                *(msp(f"site-{i}", "quick", controller={"tau": value}) for i in range(3))
            )
            while not seen or seen[-1].prior_update.prior["tau"] != pytest.approx(value):
                event = await events.next()
                if event.WhichOneof("event") == "update":
                    seen.append(event.update)
        times = [u.released_at.ToNanoseconds() / 1e9 for u in seen]
        assert all(b - a >= 0.045 for a, b in itertools.pairwise(times))


async def test_nothing_changed_and_nothing_is_published(client, data_dir):
    await client.put_spec(spec("care"))
    packets = [msp(f"site-{i}", "care", controller={"tau": 0.5}) for i in range(6)]
    await client.emit(*packets)

    async def settled() -> bool:
        return not await client.release("care")

    await eventually(settled)
    before = rows(data_dir, "updates")
    await client.emit(*packets)  # repeats
    assert await client.release("care") == []
    assert rows(data_dir, "updates") == before
    assert not (await client.cohorts())["care"].dirty


async def test_release_now_gives_what_it_published(client):
    await client.put_spec(spec("care", aggregation=cohort_pb2.AggregationSpec(vote_min_sites=1)))
    await client.emit(msp("a", "care"))
    await client.release("care")
    await client.emit(msp("a", "care", controller={"tau": 0.5}))
    published = await client.release("care")
    assert {u.kind for u in published} == {PRIOR, WARM_START}
    for update in published:
        assert update == await client.update("care", update.kind)
    status = (await client.cohorts())["care"]
    assert dict(status.revisions) == {"prior": 2, "warm_start": 2}
    assert status.released_at.ToNanoseconds() == pytest.approx(
        published[0].released_at.ToNanoseconds(), abs=1e9
    )


async def test_release_now_of_an_unknown_cohort(client):
    refusal = await refusal_of(client.release("nowhere"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "COHORT_UNKNOWN")


async def test_many_releases_at_once_have_one_revision_each(client, data_dir):
    await client.put_spec(spec("care", aggregation=cohort_pb2.AggregationSpec(vote_min_sites=1)))

    async def change(i: int) -> None:
        await client.emit(msp(f"s{i}", "care", controller={"tau": i / 100}))
        await client.release("care")

    await asyncio.gather(*(change(i) for i in range(40)))
    await client.release("care")
    updates = rows(data_dir, "updates")["updates"]
    assert [row[0] for row in updates] == list(range(1, len(updates) + 1))
    for kind in (PRIOR, WARM_START):
        revisions = [row[3] for row in updates if row[2] == kind]
        assert revisions == list(range(1, len(revisions) + 1))
    assert (await client.update("care")).prior_update.estimates["tau"].sites == 40


class SlowPublish(SqliteStore):
    """Publishes, and holds the answer back while the gate is closed."""

    def __init__(self, path) -> None:
        super().__init__(path)
        self.gate = asyncio.Event()
        self.gate.set()
        self.published = asyncio.Event()

    async def publish(self, updates, **named):
        answer = await super().publish(updates, **named)
        self.published.set()
        await self.gate.wait()
        return answer


async def test_a_caller_that_gives_up_does_not_stop_later_releases(tmp_path, monkeypatch):
    """ORDERED: an update that is stored is in the history, whether or not somebody waited for it."""
    store = SlowPublish(tmp_path / "slow.sqlite3")
    aggregation = cohort_pb2.AggregationSpec(vote_min_sites=1)
    async with running_server(store=store) as server, Client(server.target) as client:
        await client.put_spec(spec("care", aggregation=aggregation))
        await client.emit(msp("a", "care", controller={"tau": 0.1}))
        await client.release("care")
        await client.emit(msp("a", "care", controller={"tau": 0.2}))
        store.published.clear()
        store.gate.clear()
        request = admin_service_pb2.ReleaseNowRequest(cohort="care")
        release, given_up = server.service.release, asyncio.Event()

        async def watched(*args, **named):
            try:
                return await release(*args, **named)
            except asyncio.CancelledError:
                given_up.set()
                raise

        monkeypatch.setattr(server.service, "release", watched)
        call = asyncio.ensure_future(client.admin.ReleaseNow(request, timeout=DEADLINE_S))
        async with asyncio.timeout(DEADLINE_S):
            await store.published.wait()
            call.cancel()
            await given_up.wait()
        monkeypatch.undo()
        store.gate.set()

        async with client.subscribed(
            "care",
            kinds=[PRIOR],
            mode=wire_pb2.DELIVERY_MODE_EVERY,
            start_revisions=[wire_pb2.StartRevision(cohort="care", kind=PRIOR, revision=1)],
        ) as events:
            await client.emit(msp("a", "care", controller={"tau": 0.3}))
            await client.release("care")
            seen: list[update_pb2.Update] = []
            while len(seen) < 3:
                event = await events.next()
                if event.WhichOneof("event") == "update":
                    seen.append(event.update)
        assert [u.revision for u in seen] == [1, 2, 3]
        assert [u.prior_update.prior["tau"] for u in seen] == [0.1, 0.2, 0.3]


async def test_a_restart_alone_publishes_nothing(data_dir):
    async def settle(client: Client) -> None:
        while await client.release("care"):
            pass

    chance = random.Random(7)
    sites_by_turn = [f"site-{i}" for i in range(33)]
    async with running_server(data_dir) as server, Client(server.target) as client:
        await client.put_spec(spec("care"))
        for _ in range(
            3
        ):  # each time in another order, so that columns and ids are not in one order
            chance.shuffle(sites_by_turn)
            for site in sites_by_turn:
                names = chance.sample(["tau", "beta", "gamma", "delta"], 3)
                header = {
                    "profile_class": chance.choice(["small", "large"]),
                    "provenance": {"regime_tag": chance.choice(["winter", "summer", ""])},
                }
                await client.emit(
                    msp(
                        site,
                        "care",
                        controller={name: chance.gauss(0.5, 0.1) for name in names},
                        evidence={"confidence": chance.uniform(0.4, 1.0)},
                        **header,
                    ),
                    ccs(site, "care", trust=chance.uniform(0.4, 1.0), **header),
                )
            await client.release("care")
        await settle(client)
        sites = await client.sites()
    before = rows(data_dir, "updates")
    for _ in range(3):
        async with running_server(data_dir) as server, Client(server.target) as client:
            await settle(client)
            assert await client.sites() == sites
        assert rows(data_dir, "updates") == before


# Warm starts


async def test_a_warm_start_is_for_the_class_and_the_regime(client):
    await client.put_spec(spec("care"))
    groups = {("small", "winter"): 0.2, ("small", "summer"): 0.4, ("large", "winter"): 0.8}
    for (profile, regime), tau in groups.items():
        for i in range(4):
            site = f"{profile}-{regime}-{i}"
            header = {"profile_class": profile, "provenance": {"regime_tag": regime}}
            cold = 1.0 if regime == "winter" else 0.0
            await client.emit(
                msp(site, "care", controller={"tau": tau}, **header),
                ccs(site, "care", concepts=[{"id": "cold", "score": cold}], **header),
            )
    await client.release("care")
    source = update_pb2.WarmStartSource

    exact = await warm_start(client, "care", profile_class="small", regime_tag="winter")
    assert exact.init["tau"] == pytest.approx(0.2)
    assert exact.context_selector.source == source.WARM_START_SOURCE_PROFILE_AND_REGIME
    assert exact.context_selector.regime == "winter"
    assert exact.origins["tau"].sites == 4
    assert (exact.lineage.packets, exact.lineage.sites) == (12, 12)
    assert exact.lineage.estimator == "trimmed_mean"
    assert exact.lineage.HasField("window")

    nearest = await warm_start(client, "care", profile_class="small", concepts={"cold": 0.1})
    assert nearest.init["tau"] == pytest.approx(0.4)
    assert nearest.context_selector.regime == "summer"
    assert nearest.context_selector.distance == pytest.approx(0.1)
    assert list(nearest.context_selector.shared_concepts) == ["cold"]

    regime = await warm_start(client, "care", profile_class="new", regime_tag="summer")
    assert regime.context_selector.source == source.WARM_START_SOURCE_REGIME
    assert regime.init["tau"] == pytest.approx(0.4)

    of_class = await warm_start(client, "care", profile_class="large")
    assert of_class.context_selector.source == source.WARM_START_SOURCE_PROFILE_CLASS
    assert of_class.init["tau"] == pytest.approx(0.8)

    whole = await warm_start(client, "care", profile_class="new")
    assert whole.context_selector.source == source.WARM_START_SOURCE_COHORT

    profiles = (await client.update("care", WARM_START)).warm_start.profiles
    assert [p.profile_class for p in profiles] == ["default", "large", "small"]
    contexts = (await client.update("care")).prior_update.contexts
    assert [(c.regime, c.sites) for c in contexts] == [("summer", 4), ("winter", 8)]


async def test_a_warm_start_of_nothing_says_so(client):
    await client.put_spec(spec("care"))
    profile = await warm_start(client, "care")
    assert profile.context_selector.source == update_pb2.WARM_START_SOURCE_NONE
    assert not profile.init
    request = wire_pb2.GetWarmStartRequest(cohort="nowhere")
    refusal = await refusal_of(client.interchange.GetWarmStart(request))
    assert refusal.reason == "COHORT_UNKNOWN"


# Hints and causes


async def test_a_hint_needs_a_quorum_and_says_why_there_is_none(client):
    await client.put_spec(spec("care", signals=[GAIN], free_signals=True))
    for i in range(2):
        await client.emit(pop(f"site-{i}", "care", bundle={"lr": 0.1, "mode": "fast"}))
    await client.release("care")
    hint = (await client.update("care", HINT)).policy_hint
    assert not hint.hint_id
    assert "enough sites" in hint.reason
    assert not hint.bundle

    for i in range(2, 8):
        await client.emit(
            pop(
                f"site-{i}",
                "care",
                bundle={"lr": 0.1, "mode": "fast"},
                after={"gain": 2.0 + i / 100},
            )
        )
    await client.release("care")
    hint = (await client.update("care", HINT)).policy_hint
    assert hint.hint_id
    assert hint.bundle["lr"].number == pytest.approx(0.1)
    assert hint.bundle["mode"].text == "fast"
    assert hint.bounds["lr"].lower <= 0.1 <= hint.bounds["lr"].upper
    assert hint.sites == 8
    assert 0 < hint.effect_lower <= hint.effect <= 1.1
    assert 0 < hint.confidence <= 1
    assert hint.reason


async def test_without_a_direction_nothing_is_scored(client):
    await client.put_spec(spec("care"))
    await client.emit(*(pop(f"site-{i}", "care") for i in range(4)))
    await client.release("care")
    hint = (await client.update("care", HINT)).policy_hint
    assert not hint.hint_id
    assert "direction" in hint.reason


async def test_causes_that_a_quorum_found(client):
    await client.put_spec(spec("care"))
    pairs = [("load", "latency", 0.5, "direct"), ("latency", "load", 0.1, "direct")]
    for i in range(5):
        await client.emit(
            ccs(f"site-{i}", "care", causal_pairs=pairs, tested_nodes=["load", "latency", "x"])
        )
    await client.emit(
        ccs(
            "odd",
            "care",
            causal_pairs=[("x", "latency", 3.0, "direct")],
            tested_nodes=["load", "latency", "x"],
        )
    )
    await client.release("care")
    consensus = (await client.update("care", CAUSES)).causal_consensus
    edges = {(e.source, e.target): e for e in consensus.edges}
    assert set(edges) == {("load", "latency"), ("latency", "load")}
    strong = edges["load", "latency"]
    assert strong.weight == pytest.approx(0.5)
    assert (strong.sites, strong.testing_sites) == (5, 6)
    assert strong.direction_conflict
    assert strong.in_cycle
    assert sum(consensus.unpooled.values()) == 1
    assert [set(c.nodes) for c in consensus.cycles] == [{"load", "latency"}]


# Specs


async def test_a_cohort_is_declared_and_kept(data_dir):
    async with running_server(data_dir) as server, Client(server.target) as client:
        answer = await client.put_spec(spec("care", signals=[TAU], description="wards"))
        assert answer.changed
        again = await client.put_spec(spec("care", signals=[TAU], description="wards"))
        assert (again.changed, again.schema_hash) == (False, answer.schema_hash)
    async with running_server(data_dir) as server, Client(server.target) as client:
        request = registry_service_pb2.GetCohortSpecRequest(cohort="care")
        found = await client.registry.GetCohortSpec(request, timeout=DEADLINE_S)
        assert found.schema_hash == answer.schema_hash
        assert found.spec.description == "wards"
        assert found.spec.aggregation.vote_min_sites == 3, "defaults are filled in"
        status = (await client.cohorts())["care"]
        assert status.declared
        assert status.schema_hash == answer.schema_hash


@pytest.mark.parametrize(
    ("change", "field", "rule"),
    [
        pytest.param({"upper": 1.0}, 'signals["tau"].upper', "bounds_narrowed", id="narrowed"),
        pytest.param({"lower": 0.5}, 'signals["tau"].lower', "bounds_narrowed", id="raised"),
        pytest.param(
            {"section": cohort_pb2.SIGNAL_SECTION_EVALUATOR},
            'signals["tau"].section',
            "section_changed",
            id="moved",
        ),
        pytest.param(
            {"lower": 0.1, "transform": cohort_pb2.SIGNAL_TRANSFORM_LOG},
            'signals["tau"].transform',
            "transform_changed",
            id="transformed",
        ),
        pytest.param({"name": "rho"}, 'signals["tau"]', "signal_removed", id="renamed"),
    ],
)
async def test_an_unsafe_change_is_refused_unless_forced(client, data_dir, change, field, rule):
    await client.put_spec(spec("care", signals=[TAU]))
    changed = cohort_pb2.SignalSpec()
    changed.CopyFrom(TAU)
    for name, value in change.items():
        setattr(changed, name, value)
    new = spec("care", signals=[changed])
    before = rows(data_dir, "cohorts")

    for options in ({}, {"dry_run": True}):
        refusal = await refusal_of(client.put_spec(new, **options))
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "SPEC_CHANGE_UNSAFE",
        )
        assert (field, f"fmi.cohort_change.{rule}") in refusal.violations
    dry = await client.put_spec(new, force=True, dry_run=True)
    assert dry.changed
    assert rows(data_dir, "cohorts") == before
    forced = await client.put_spec(new, force=True)
    assert forced.changed
    assert forced.schema_hash == dry.schema_hash
    assert rows(data_dir, "cohorts") != before


async def test_a_safe_change_takes_effect_on_what_is_stored(client):
    """The packets are counted anew: five sites were not enough for the old quorum."""
    old = spec("care", aggregation=cohort_pb2.AggregationSpec(vote_min_sites=6))
    await client.put_spec(old)
    await client.emit(*(msp(f"site-{i}", "care") for i in range(5)))
    await client.release("care")
    assert not (await client.update("care")).prior_update.prior
    await client.put_spec(spec("care", aggregation=cohort_pb2.AggregationSpec(vote_min_sites=5)))
    await client.release("care")
    assert (await client.update("care")).prior_update.prior["tau"] == pytest.approx(0.9)


async def test_declaring_an_open_cohort_keeps_what_it_has(client):
    await client.emit(*(msp(f"site-{i}", "care") for i in range(4)))
    assert not (await client.cohorts())["care"].declared
    await client.put_spec(spec("care", signals=[TAU]))
    status = (await client.cohorts())["care"]
    assert status.declared
    assert (status.sites, status.packets) == (4, 4)
    await client.release("care")
    assert (await client.update("care")).prior_update.prior["tau"] == pytest.approx(0.9)
    refusal = await refusal_of(client.emit(msp("site-9", "care", controller={"rho": 1.0})))
    assert refusal.reason == "COHORT_RULE_VIOLATION"


# Quarantine


async def test_quarantine_keeps_a_packet_out_until_the_operator_lets_it_in(data_dir):
    distrust = cohort_pb2.IngestSpec(min_trust=0.5)
    async with running_server(data_dir) as server, Client(server.target) as client:
        await client.put_spec(spec("care", ingest=distrust))
        trusted = [ccs(f"site-{i}", "care", trust=0.9) for i in range(3)]
        doubtful = ccs("site-3", "care", trust=0.2)
        await client.emit(*trusted)
        (result,) = await client.emit(doubtful)
        assert result.status == wire_pb2.EMIT_STATUS_QUARANTINED
        assert "0.2" in result.refusal.message
        (again,) = await client.emit(doubtful)
        assert again.status == wire_pb2.EMIT_STATUS_DUPLICATE
        assert again.refusal.message == result.refusal.message
        await client.release("care")
        (edge,) = (await client.update("care", CAUSES)).causal_consensus.edges
        assert edge.sites == 3

        request = admin_service_pb2.ListQuarantineRequest(cohort="care")
        (held,) = (await client.admin.ListQuarantine(request)).packets
        assert held.packet == doubtful
        assert held.reason == result.refusal.message
        assert (await client.sites("care"))["care:site-3"].quarantined == 1
        assert (await client.cohorts())["care"].quarantined == 1

    # It is still there after a restart, and the operator lets it in.
    async with running_server(data_dir) as server, Client(server.target) as client:
        key = {"domain_id": "site-3", "packet_id": doubtful.header.packet_id}
        let_in = admin_service_pb2.SetQuarantineRequest(**key)
        assert (await client.admin.SetQuarantine(let_in)).changed
        assert not (await client.admin.SetQuarantine(let_in)).changed
        await client.release("care")
        (edge,) = (await client.update("care", CAUSES)).causal_consensus.edges
        assert edge.sites == 4
        assert not (await client.admin.ListQuarantine(request)).packets

        keep_out = admin_service_pb2.SetQuarantineRequest(**key, quarantined=True, reason="seen")
        assert (await client.admin.SetQuarantine(keep_out)).changed
        await client.release("care")
        (edge,) = (await client.update("care", CAUSES)).causal_consensus.edges
        assert edge.sites == 3
        (held,) = (await client.admin.ListQuarantine(request)).packets
        assert held.reason == "seen"


async def test_an_accepted_packet_can_be_put_into_quarantine(client):
    """The operator takes a liar out; its signals leave the prior with the next release."""
    await client.put_spec(spec("care", aggregation=cohort_pb2.AggregationSpec(max_byzantine=0)))
    await client.emit(*(msp(f"site-{i}", "care", controller={"tau": 1.0}) for i in range(3)))
    liar = msp("liar", "care", controller={"tau": 9.0})
    await client.emit(liar)
    await client.release("care")
    assert (await client.update("care")).prior_update.estimates["tau"].sites == 4
    request = admin_service_pb2.SetQuarantineRequest(
        domain_id="liar", packet_id=liar.header.packet_id, quarantined=True, reason="lies"
    )
    await client.admin.SetQuarantine(request)
    await client.release("care")
    estimate = (await client.update("care")).prior_update.estimates["tau"]
    assert estimate.sites == 3
    assert estimate.value == pytest.approx(1.0)


async def test_quarantine_is_listed_page_by_page(client):
    await client.put_spec(spec("care", ingest=cohort_pb2.IngestSpec(min_trust=0.5)))
    packets = [ccs(f"site-{i}", "care", trust=0.1) for i in range(7)]
    await client.emit(*packets)
    seen, token = [], ""
    for _ in range(10):
        request = admin_service_pb2.ListQuarantineRequest(page_size=3, page_token=token)
        page = await client.admin.ListQuarantine(request)
        seen += [item.packet for item in page.packets]
        token = page.next_page_token
        if not token:
            break
    assert seen == packets


async def test_one_cohort_that_fails_does_not_stop_the_others(server, client, monkeypatch):
    """EXPLAINED: a fault in one cohort's statistics is logged, and the others are released."""
    state = type(server.service.aggregator)
    original = state.result

    def result(self, resident, *, now):
        if resident.rules.name == "broken":
            raise ArithmeticError("a bug")
        return original(self, resident, now=now)

    monkeypatch.setattr(state, "result", result)
    async with client.subscribed("*", kinds=[PRIOR]) as events:
        await events.snapshot()
        await client.emit(*(msp(f"s{i}", "broken") for i in range(3)))
        await client.emit(*(msp(f"s{i}", "sound") for i in range(3)))
        (update,) = await events.updates(1)
        assert update.cohort == "sound"
    refusal = await refusal_of(client.release("broken"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    monkeypatch.undo()
    assert {u.kind for u in await client.release("broken")} == {PRIOR, WARM_START}
    with contextlib.suppress(grpc.aio.AioRpcError):
        await client.release("sound")
