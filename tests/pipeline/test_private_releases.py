"""Private cohorts: released by the clock alone, paid for first, and silent about who is there."""

from __future__ import annotations

import asyncio
import math
import shutil

import numpy as np
import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import NOW, Clock, ccs, msp, pop

from fmi.v1 import cohort_pb2, update_pb2
from fmi_server.aggregator import FMIAggregator
from fmi_server.cohorts import CohortRegistry
from fmi_server.contracts import FMIContractRegistry
from fmi_server.counted_time import as_counted
from fmi_server.emission import Intake
from fmi_server.errors import PrivacyBudgetExhaustedError, ReleaseScheduledError
from fmi_server.feed_requests import kind_name
from fmi_server.operations import PrivacyOverview
from fmi_server.privacy.noisy_means import NoisySums, PrivateSums
from fmi_server.private_releases import PrivateReleases
from fmi_server.releases import RETRY_S, Releaser
from fmi_server.router import FMIRouter
from fmi_server.storage import MemoryStore, SqliteStore, sqlite_backup
from fmi_server.storage.base import LedgerConflictError, StoreUnavailableError
from fmi_server.telemetry import FMITelemetry
from fmi_server.transport.privacy import budget_message
from fmi_server.uplink import summary_packet
from fmi_server.validator import FMIValidator

CONTRACT = FMIContractRegistry()
PRIOR = update_pb2.UPDATE_KIND_PRIOR
DAY_S = 86_400.0
START = NOW // DAY_S * DAY_S + 3600.0  # an hour into a period
SPEC = {
    "name": "care",
    "signals": [
        {"name": "tau", "section": "SIGNAL_SECTION_CONTROLLER", "lower": 0.0, "upper": 1.0},
        {"name": "gain", "section": "SIGNAL_SECTION_METRICS", "lower": -1.0, "upper": 1.0},
    ],
    "privacy": {"dpEpsilon": 40.0, "dpDelta": 1e-6, "dpEpochs": 5},
}


class FaultyStore(MemoryStore):
    """Refuses what it is told to refuse, before or after it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse: set[str] = set()
        self.lose: set[str] = set()
        self.calls: list[str] = []

    async def _call(self, name, work):
        self.calls.append(name)
        if name in self.refuse:
            work.close()
            raise StoreUnavailableError("disk_full", detail="the test filled it")
        result = await work
        if name in self.lose:
            raise StoreUnavailableError("io_error", detail="the test lost the answer")
        return result

    async def publish(self, updates, **named):
        return await self._call("publish", super().publish(updates, **named))

    async def spend(self, spend):
        return await self._call("spend", super().spend(spend))


class Server:
    """A releaser whose clock stands still, over a store that outlives it."""

    def __init__(self, store, clock: Clock, spec=None) -> None:
        self.store, self.clock = store, clock
        self.telemetry = FMITelemetry()
        self.cohorts = CohortRegistry(CONTRACT)
        self.declare(SPEC if spec is None else spec)
        self.releaser = Releaser(
            store,
            self.cohorts,
            FMIAggregator(registry=CONTRACT, clock=clock),
            FMIRouter(telemetry=FMITelemetry()),
            telemetry=self.telemetry,
            clock=clock,
        )
        self.told: list[update_pb2.Update] = []
        self.releaser.publisher.on_update(self.told.append)
        self._intake = Intake(CONTRACT, FMIValidator(CONTRACT, cohorts=self.cohorts, clock=clock))

    def declare(self, spec, *, force: bool = False) -> None:
        message = json_format.ParseDict(spec, cohort_pb2.CohortSpec())
        self.cohorts.declare(message, force=force)

    @property
    def rules(self):
        return self.cohorts.rules("care")

    async def start(self) -> Server:
        await self.releaser.load()
        await self.run_due()
        return self

    async def put(self, spec, *, force: bool = False) -> None:
        """Put other rules in force, as the service does."""
        self.declare(spec, force=force)
        await self.releaser.rebuild("care")

    async def send(self, *packets) -> list[tuple[str, ...]]:
        warnings = []
        for packet in packets:
            candidate = self._intake.inspect(packet, received_at_us=int(self.clock() * 1e6))
            (outcome,) = await self.store.append([candidate.record])
            warnings.append(candidate.warnings)
            if outcome.status == "stored" and not outcome.quarantined:
                await self.releaser.count(as_counted(packet, outcome.received_at_us))
        return warnings

    def due(self) -> float | None:
        return self.releaser._due().get("care")

    async def run_due(self) -> list[str]:
        """Release as long as something is due, as the server's task does; return what was published."""
        before = len(self.told)
        for _ in range(8):
            at = self.due()
            if at is None or at > self.clock():
                break
            await self.releaser._release_safely("care")
        else:
            pytest.fail("it is due for ever")
        # Without a value there is no warm start, and whether there is one is for the noise to say.
        new = [update for update in self.told[before:] if update.kind == PRIOR]
        return [f"{kind_name(update.kind)}@{update.revision}" for update in new]

    async def pass_days(self, days: float) -> list[str]:
        self.clock.advance(days * DAY_S)
        return await self.run_due()

    async def ledger(self) -> list[tuple[int, float]]:
        """Return the days since the first entry, and what each entry costs in releases."""
        spends = await self.store.spends("care")
        cost = self.rules.privacy.rho_per_release
        first = spends[0].period
        return [(round((spend.period - first) / DAY_S / 1e6), spend.rho / cost) for spend in spends]


def taus(count: int, at: float = START, **more):
    return [msp(f"s{i}", controller={"tau": 0.3}, at=at, **more) for i in range(count)]


@pytest.fixture
def clock() -> Clock:
    return Clock(START)


@pytest.fixture
async def store():
    async with FaultyStore() as found:
        yield found


@pytest.fixture
async def server(store, clock) -> Server:
    """It has sites enough for values, so that each release says something new."""
    server = await Server(store, clock).start()
    await server.send(*taus(30))
    return server


# When


async def test_it_releases_once_in_each_period_whatever_is_sent(server):
    assert await server.ledger() == [(0, 0.0)]
    assert server.due() == START - 3600.0 + DAY_S
    assert await server.pass_days(0.5) == []
    assert await server.pass_days(0.5) == ["prior@1"]
    assert await server.run_due() == []
    await server.send(*taus(30, at=server.clock(), packet_id=None))
    assert await server.run_due() == []
    assert await server.pass_days(1) == ["prior@2"]
    assert await server.pass_days(1) == ["prior@3"], "without news too"
    assert await server.ledger() == [(0, 0.0), (1, 1.0), (2, 1.0), (3, 1.0)]


async def test_it_releases_without_a_single_site(store, clock):
    server = await Server(store, clock).start()
    published = await server.pass_days(1)
    assert published[0] == "prior@1"
    assert await server.ledger() == [(0, 0.0), (1, 1.0)]


async def test_periods_in_which_it_was_down_are_neither_made_up_for_nor_charged(server):
    await server.pass_days(1)
    assert await server.pass_days(3) != []
    assert await server.ledger() == [(0, 0.0), (1, 1.0), (4, 1.0)]


async def test_nothing_before_the_first_release_that_the_spec_names(store, clock):
    later = "2025-06-20T12:00:00Z"
    spec = {**SPEC, "privacy": {**SPEC["privacy"], "firstReleaseAt": later}}
    server = await Server(store, clock, spec).start()
    at = server.rules.first_release_at
    assert server.due() == at > START + 2 * DAY_S
    clock.now = at - 1.0
    assert await server.run_due() == []
    clock.now = at
    assert await server.run_due() != []


async def test_nobody_can_ask_for_a_release(server):
    with pytest.raises(ReleaseScheduledError, match="the next is due at 20") as refused:
        await server.releaser.release("care")
    assert refused.value.next_release_at == server.due()


async def test_a_clock_that_is_set_back_waits(server, clock):
    await server.pass_days(2)
    clock.advance(-3 * DAY_S)
    assert await server.run_due() == []
    assert await server.pass_days(2.5) == []
    assert await server.pass_days(1.5) != []
    assert [day for day, _ in await server.ledger()] == [0, 2, 3]


# What


async def test_it_tells_its_noisy_means_and_nothing_else(server):
    """Every field that speaks of who sent what is empty."""
    await server.send(
        *(
            msp(
                f"s{i}",
                controller={"tau": 0.3},
                metrics={"gain": 0.5},
                profile_class="rare",
                regime="north",
                confidence=0.5,
                at=START,
            )
            for i in range(60)
        ),
        *(pop(f"s{i}", before={"gain": 0.1}, after={"gain": 0.4}, at=START) for i in range(9)),
        *(ccs(f"s{i}", pairs=(("a", "b", 0.5),), at=START) for i in range(9)),
    )
    await server.pass_days(1)
    prior, warm = server.told
    told = json_format.MessageToDict(prior.prior_update)
    assert told.keys() == {"rev", "prior", "confidence", "cohorts", "estimates", "lineage"}
    assert told["lineage"].keys() == {"estimator", "epsilonSpent", "delta"}
    assert prior.prior_update.lineage.epsilon_spent == pytest.approx(server.rules.privacy.spent(1))
    assert told["estimates"].keys() == {"tau", "gain"}
    assert {key for estimate in told["estimates"].values() for key in estimate} <= {
        "section", "value", "stderr", "lower", "upper", "effectiveSites", "confidence", "estimator",
        "tolerance",
    }  # fmt: skip
    assert told["prior"].keys() == {"tau"}, "a metric is no setting"
    assert told["prior"]["tau"] == pytest.approx(0.3, abs=0.4)
    (profile,) = warm.warm_start.profiles
    assert (profile.profile_class, dict(profile.init)) == (
        "default",
        dict(prior.prior_update.prior),
    )
    assert not profile.lineage.packets
    assert not profile.lineage.sites
    assert server.releaser.publisher.log.latest.keys() == {("care", 1), ("care", 2)}


async def test_it_tells_when_a_release_was_due_and_not_how_long_it_took(store):
    """A server whose every look at the clock costs time, as computing for many sites does."""
    clock = Clock(START)

    def slow() -> float:
        clock.advance(0.013)
        return clock.now

    server = await Server(store, slow).start()
    clock.advance(DAY_S)
    await server.run_due()
    (update,) = [update for update in server.told if update.kind == PRIOR]
    assert update.released_at.ToNanoseconds() == int((START - 3600.0 + DAY_S) * 1e9)


async def test_a_parent_is_told_of_the_privacy_that_was_applied(server):
    await server.pass_days(1)
    (update,) = [update for update in server.told if update.kind == PRIOR]
    packet = summary_packet(update, "region", now=server.clock())
    applied = packet.header.provenance.applied_privacy
    assert (applied.mechanism, applied.delta) == ("discrete_gaussian", 1e-6)
    assert applied.epsilon == pytest.approx(server.rules.privacy.spent(1))
    assert CONTRACT.violations(packet) == []


async def test_a_site_is_told_that_its_outcomes_and_causes_are_not_released(server):
    first, second, third = await server.send(
        pop("s1", before={"gain": 0.1}, after={"gain": 0.4}, at=START),
        ccs("s1", pairs=(("a", "b", 0.5),), at=START),
        *taus(1),
    )
    assert first == ("pop: is kept, but a private cohort releases nothing of it",)
    assert second == ("ccs: is kept, but a private cohort releases nothing of it",)
    assert third == ()


SITES = ("a", "b", "c", "victim")
VALUES = st.floats(0.0, 1.0)
TIMES = st.floats(-40 * DAY_S, 200.0)


@st.composite
def packets(draw):
    site = draw(st.sampled_from(SITES))
    at = START + draw(TIMES)
    header = {
        "at": at,
        "profile_class": draw(st.sampled_from(["", "x", "rare"])),
        "regime": draw(st.sampled_from(["", "north", "rare"])),
    }
    kind = draw(st.sampled_from(["msp", "msp", "msp", "pop", "ccs"]))
    if kind == "pop":
        return pop(site, before={"gain": 0.1}, after={"gain": draw(VALUES)}, **header)
    if kind == "ccs":
        return ccs(site, pairs=(("a", "b", draw(VALUES)),), **header)
    confidence = draw(st.none() | st.floats(0.0, 1.0))
    signals = draw(st.sampled_from([("tau",), ("gain",), ("tau", "gain")]))
    found = msp(site, confidence=confidence, **header)
    if "tau" in signals:
        found.msp.controller["tau"] = draw(VALUES)
    if "gain" in signals:
        found.msp.metrics["gain"] = draw(VALUES) * 2.0 - 1.0
    found.msp.evidence.sites = draw(st.floats(1.0, 1e6))
    return found


@given(
    days=st.lists(st.lists(packets(), max_size=8), min_size=1, max_size=3),
    estimator=st.sampled_from(["mean", "weighted_mean"]),
    clip_norm=st.sampled_from([None, 0.8]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
async def test_with_or_without_a_site_only_the_sums_differ_and_by_no_more_than_is_paid_for(
    days, estimator, clip_norm
):
    """The neighbouring relation over whole lives: all else that anybody sees is the same, byte for byte."""
    spec = {**SPEC, "aggregation": {"metricsAggregation": estimator}}
    if clip_norm is not None:
        spec["privacy"] = {**SPEC["privacy"], "dpClipNorm": clip_norm}
    ingest = {"maxAge": f"{90 * DAY_S:.0f}s"}
    seen = {}
    for left_out in (None, "victim"):
        sums: list[NoisySums] = []

        def remembered(self, exact, _entropy=None, sums=sums):
            sums.append(exact)
            fixed = np.full_like(exact.values, 7 * self.value_bound)
            return NoisySums(fixed, np.full_like(exact.weights, 40 * self.weight_bound))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PrivateSums, "noisy", remembered)
            async with MemoryStore() as store:
                clock = Clock(START)
                server = await Server(store, clock, {**spec, "ingest": ingest}).start()
                due = []
                for day in days:
                    await server.send(*(p for p in day if p.header.domain_id != left_out))
                    due.append(server.due())
                    await server.pass_days(1)
                for update in server.told:
                    update.ClearField("history_epoch")  # random, and made with the store
                payloads = [update.SerializeToString(deterministic=True) for update in server.told]
                ledger = [(s.period, s.rho) for s in await store.spends("care")]
                seen[left_out] = due, payloads, ledger, sums
                bound = server.rules.privacy.sums.sensitivity_squared
    assert seen[None][:3] == seen["victim"][:3]
    for with_it, without in zip(seen[None][3], seen["victim"][3], strict=True):
        moved = [*(with_it.values - without.values), *(with_it.weights - without.weights)]
        assert sum(int(step) ** 2 for step in moved) <= bound


# What it costs


async def test_releases_stop_when_the_budget_is_spent_and_the_last_stays_served(server, caplog):
    for _ in range(5):
        assert await server.pass_days(1) != []
    for _ in range(3):
        assert await server.pass_days(1) == []
    assert len(await server.ledger()) == 6
    assert server.due() is None
    told = [record for record in caplog.records if "has spent its privacy budget" in record.message]
    assert len(told) == 1
    with pytest.raises(PrivacyBudgetExhaustedError, match=r"epsilon 40, delta 1e-06"):
        await server.releaser.release("care")
    account = server.releaser.private.account(server.rules)
    assert (account.releases, account.releases_left, account.next_release_at) == (5, 0, None)
    assert 39.9 < account.epsilon_spent <= 40.0
    assert server.releaser.publisher.log.latest["care", 1].revision == 5


async def test_a_restart_goes_on_with_the_ledger(server, store, clock):
    await server.pass_days(2)
    again = await Server(store, clock).start()
    assert await again.run_due() == [], "the period has its release"
    assert await again.pass_days(1) == ["prior@2"]
    assert again.releaser.private.account(again.rules).releases == 2


async def test_a_larger_budget_goes_on_from_what_was_spent(server):
    for _ in range(6):
        await server.pass_days(1)
    larger = {**SPEC, "privacy": {**SPEC["privacy"], "dpEpsilon": 80.0, "dpEpochs": 10}}
    await server.put(larger, force=True)
    account = server.releaser.private.account(server.rules)
    plan = server.rules.privacy
    assert account.releases_left == math.floor(
        (plan.rho - account.rho_spent) / plan.rho_per_release
    )
    assert 0 < account.releases_left < 10
    for _ in range(12):
        await server.pass_days(1)
    assert 70.0 < server.releaser.private.account(server.rules).epsilon_spent <= 80.0


@pytest.mark.parametrize("norms", [(1.3, 0.7), (0.7, 1.3), (None, 0.9), (0.9, None)])
async def test_a_norm_that_comes_changes_or_goes_takes_no_release_away(store, clock, norms):
    """It is no weaker promise, so nobody has to force it, and the budget goes on."""
    # So much noise that the grid is coarse, and a release of one norm costs another rounding.
    privacy = {**SPEC["privacy"], "dpEpsilon": 0.05}

    def spec(norm):
        return {**SPEC, "privacy": privacy if norm is None else {**privacy, "dpClipNorm": norm}}

    server = await Server(store, clock, spec(norms[0])).start()
    await server.pass_days(1)
    await server.pass_days(1)
    await server.put(spec(norms[1]))
    assert server.rules.privacy.sums.clip_norm == norms[1]
    for _ in range(8):
        await server.pass_days(1)
    account = server.releaser.private.account(server.rules)
    assert (account.releases, account.releases_left) == (5, 0)
    assert account.epsilon_spent <= 0.05


async def test_another_length_of_periods_never_gives_two_releases_at_once(server, clock):
    await server.pass_days(1)
    await server.put({**SPEC, "release": {"maxInterval": f"{7 * DAY_S:.0f}s"}})
    assert await server.run_due() == []
    assert server.due() % (7 * DAY_S) == 0.0
    assert server.due() > clock()
    clock.now = server.due()
    assert await server.run_due() != []
    await server.put({**SPEC, "release": {"maxInterval": "3600s"}})
    assert await server.run_due() == []
    assert server.due() == clock() + 3600.0


# Faults


async def test_nothing_is_drawn_where_the_spend_is_not_on_disk(server, store):
    store.refuse.add("spend")
    assert await server.pass_days(1) == []
    assert "publish" not in store.calls
    store.refuse.clear()
    server.clock.advance(RETRY_S)
    assert await server.run_due() != []
    assert await server.ledger() == [(0, 0.0), (1, 1.0)]


async def test_a_spend_whose_answer_was_lost_is_spent(server, store):
    store.lose.add("spend")
    assert await server.pass_days(1) == []
    store.lose.clear()
    server.clock.advance(RETRY_S)
    assert await server.run_due() == [], "nobody knows what was drawn for it"
    assert await server.ledger() == [(0, 0.0), (1, 1.0)]
    assert await server.pass_days(1) != []
    assert server.releaser.private.account(server.rules).releases == 2


async def test_what_could_not_be_stored_is_stored_later_as_it_was_drawn(server, store, monkeypatch):
    draws = []
    noisy = PrivateSums.noisy
    monkeypatch.setattr(
        PrivateSums,
        "noisy",
        lambda self, sums, entropy: draws.append(1) or noisy(self, sums, entropy),
    )
    store.refuse.add("publish")
    assert await server.pass_days(1) == []
    server.clock.advance(RETRY_S)
    assert await server.run_due() == []
    await server.send(*taus(30, at=server.clock()))
    store.refuse.clear()
    server.clock.advance(RETRY_S)
    assert await server.run_due() == ["prior@1"], "as it was drawn, without the sites of later"
    assert (len(draws), await server.ledger()) == (1, [(0, 0.0), (1, 1.0)])


async def test_an_update_whose_answer_was_lost_is_told_and_not_drawn_again(server, store):
    store.lose.add("publish")
    assert await server.pass_days(1) == []
    store.lose.clear()
    server.clock.advance(RETRY_S)
    await server.run_due()
    assert [update.revision for update in server.told if update.kind == 1] == [1]
    assert await server.ledger() == [(0, 0.0), (1, 1.0)]


async def test_what_was_drawn_and_not_stored_in_its_period_is_thrown_away(server, store):
    store.refuse.add("publish")
    assert await server.pass_days(1) == []
    store.refuse.clear()
    assert await server.pass_days(1) != []
    assert await server.ledger() == [(0, 0.0), (1, 1.0), (2, 1.0)]


async def test_another_writer_of_the_ledger_costs_this_one_its_release(server, store):
    twin = await Server(store, server.clock).start()
    assert await twin.pass_days(1) != []
    with pytest.raises(LedgerConflictError):
        await server.releaser._release("care")
    server.clock.advance(RETRY_S)
    assert await server.run_due() == []
    assert await server.ledger() == [(0, 0.0), (1, 1.0)]


async def test_a_spec_that_changes_while_a_release_waits_is_what_it_is_paid_by(server, monkeypatch):
    """Whoever holds the lock of the cohort lets the release begin under one plan and draw under another."""
    drawn = []
    noisy = PrivateSums.noisy
    monkeypatch.setattr(
        PrivateSums, "noisy", lambda self, *a: drawn.append(float(self.rho)) or noisy(self, *a)
    )
    server.clock.advance(DAY_S)
    async with server.releaser.settled("care"):
        releasing = asyncio.create_task(server.releaser._release_safely("care"))
        await asyncio.sleep(0)
        dear = {**SPEC, "privacy": {**SPEC["privacy"], "dpEpsilon": 80.0, "dpEpochs": 1}}
        putting = asyncio.create_task(server.put(dear, force=True))
        await asyncio.sleep(0)
    await asyncio.gather(releasing, putting)
    (rho,) = drawn
    charged = (await server.store.spends("care"))[-1].rho
    assert charged == server.rules.privacy.rho_per_release
    assert rho <= charged == pytest.approx(rho, rel=1e-6)


async def test_privacy_that_comes_while_a_release_waits_holds_for_it(store, clock):
    public = {"name": "care", "signals": SPEC["signals"]}
    server = await Server(store, clock, public).start()
    await server.send(*taus(30))
    async with server.releaser.settled("care"):
        releasing = asyncio.create_task(server.releaser._release_safely("care"))
        await asyncio.sleep(0)
        putting = asyncio.create_task(server.put(SPEC))
        await asyncio.sleep(0)
    await asyncio.gather(releasing, putting)
    assert server.told == []


async def test_no_warning_tells_who_is_there(server):
    later, earlier = (
        msp("s1", controller={"tau": 0.4}, at=START),
        msp("s1", controller={"tau": 0.5}, at=START - 5000.0),
    )
    await server.send(later)
    assert server.releaser.newest._newest_us == {}
    (warnings,) = await server.send(earlier)
    assert warnings == ()


async def test_a_ledger_ahead_of_the_clock_is_told_once(server, clock, caplog):
    await server.pass_days(400)
    clock.advance(-399 * DAY_S)
    for _ in range(3):
        await server.run_due()
        server.due()
    told = [r.message for r in caplog.records if "has a release at a time" in r.message]
    assert len(told) == 1
    assert "releases nothing before 2026" in told[0]


async def test_a_ledger_in_memory_is_told(store, clock, caplog):
    await Server(store, clock).start()
    assert [r for r in caplog.records if "begins with a whole budget" in r.message]


def told_of_budgets(server: Server) -> tuple[float, float, float]:
    """Return what the metrics say: who releases, who is exhausted, and in how many days the first ends."""
    server.due()
    counts = server.telemetry.snapshot()
    ends = counts["fmi_privacy_budget_ends_timestamp_seconds"]
    return (
        counts['fmi_private_cohorts{state="releasing"}'],
        counts['fmi_private_cohorts{state="exhausted"}'],
        (ends - (START - 3600.0)) / DAY_S,
    )


async def test_metrics_say_when_a_budget_ends_and_that_it_did(server, store, clock):
    assert told_of_budgets(server) == (1, 0, 5)  # of five releases the first is due tomorrow
    for _ in range(4):
        await server.pass_days(1)
        assert told_of_budgets(server) == (1, 0, 5)
    await server.pass_days(2)  # a period without a release moves the end
    assert told_of_budgets(server) == (0, 1, math.inf)
    again = await Server(store, clock).start()
    assert told_of_budgets(again) == (0, 1, math.inf)
    await again.put({**SPEC, "privacy": {**SPEC["privacy"], "dpEpsilon": 80.0}}, force=True)
    assert told_of_budgets(again)[:2] == (1, 0)
    again.releaser.owns = lambda _: False  # another server releases it, and tells
    assert told_of_budgets(again) == (0, 0, math.inf)
    other = {name: value for name, value in SPEC.items() if name != "privacy"}
    again.releaser.owns = lambda _: True
    await again.put(other, force=True)
    assert told_of_budgets(again) == (0, 0, math.inf)


async def test_metrics_say_that_a_budget_ends_later_where_a_period_was_missed(server):
    assert told_of_budgets(server) == (1, 0, 5)
    await server.pass_days(3)
    assert told_of_budgets(server) == (1, 0, 7)


async def test_a_budget_that_is_overspent_is_no_promise(server):
    for _ in range(5):
        await server.pass_days(1)
    small = {**SPEC, "privacy": {**SPEC["privacy"], "dpEpsilon": 0.5}}
    rules = server.cohorts.compile(json_format.ParseDict(small, cohort_pb2.CohortSpec()))
    found = server.releaser.private.overspent(rules)
    assert found.field == "privacy"
    assert "promises epsilon 0.5" in found.description
    assert "has spent 40" in found.description
    least = float(found.description.split("has spent ")[1].split()[0])  # what is told is enough
    enough = {**SPEC, "privacy": {**SPEC["privacy"], "dpEpsilon": least}}
    rules = server.cohorts.compile(json_format.ParseDict(enough, cohort_pb2.CohortSpec()))
    assert server.releaser.private.overspent(rules) is None
    assert server.releaser.private.overspent(server.rules) is None


def test_as_many_releases_as_there_can_be_are_not_said_to_be_more(clock):
    """Their number was divided out of the budget, came out larger, and fitted no message."""
    privacy = {"dpEpsilon": 2.0, "dpDelta": 1e-6, "dpEpochs": 2**32 - 1}
    spec = json_format.ParseDict({**SPEC, "privacy": privacy}, cohort_pb2.CohortSpec())
    rules, _ = CohortRegistry(CONTRACT).declare(spec)
    private = PrivateReleases(MemoryStore(), FMIAggregator(), None, clock=clock)
    overview = PrivacyOverview(rules, private.account(rules))
    assert budget_message(overview).releases_left == 2**32 - 1


@pytest.mark.parametrize("max_interval_s", [315_576_000_000, 200_000_000_000])
def test_a_next_release_past_all_dates_is_told_as_the_last_of_them(clock, max_interval_s):
    spec = json_format.ParseDict(SPEC, cohort_pb2.CohortSpec())
    spec.release.max_interval.seconds = max_interval_s
    rules, _ = CohortRegistry(CONTRACT).declare(spec)
    private = PrivateReleases(MemoryStore(), FMIAggregator(), None, clock=clock)
    message = budget_message(PrivacyOverview(rules, private.account(rules)))
    assert message.next_release_at.seconds == pytest.approx(min(max_interval_s, 253_402_300_799))


# Backups


@pytest.fixture
def restoring(monkeypatch, clock, tmp_path):
    """Take and restore backups at the time of the test's clock."""
    monkeypatch.setattr(sqlite_backup, "_now_us", lambda: int(clock() * 1e6))
    backup = tmp_path / "backup.sqlite3"

    async def restored() -> SqliteStore:
        path = tmp_path / "restored.sqlite3"
        sqlite_backup.restore_backup(backup, path)
        return SqliteStore(path)

    return SqliteStore(tmp_path / "fmi.sqlite3"), backup, restored


@pytest.mark.parametrize(
    ("days_lost", "days_down", "charged"),
    # The day of the backup, and the day of the restore, are in the ledger, or are charged.
    [(0, 0, 0), (1, 0, 1), (3, 0, 3), (20, 0, 3), (1, 7, 1), (0, 2, 0)],
)
async def test_a_restored_backup_is_charged_what_it_may_lack(
    restoring, clock, days_lost, days_down, charged
):
    store, backup, restored = restoring
    async with store:
        server = await Server(store, clock).start()
        await server.send(*taus(30))
        await server.pass_days(1)
        await server.pass_days(1)
        await store.backup(backup)
        for _ in range(days_lost):
            await server.pass_days(1)
    async with await restored() as store:
        clock.advance(days_down * DAY_S)
        server = await Server(store, clock).start()
        assert server.told == [], "the present period may have had its release"
        ledger = await server.ledger()
        assert ledger[:3] == [(0, 0.0), (1, 1.0), (2, 1.0)]
        assert sum(cost for _, cost in ledger[3:]) == pytest.approx(charged)
        left = server.releaser.private.account(server.rules).releases_left
        assert left == 3 - charged
        again = await Server(store, clock).start()
        assert await again.ledger() == ledger, "it is charged once"
        assert (await server.pass_days(1) != []) == (left > 0)


async def test_a_backup_that_just_missed_a_release_is_charged_for_it(restoring, clock):
    store, backup, restored = restoring
    async with store:
        server = await Server(store, clock).start()
        clock.advance(DAY_S)
        await store.backup(backup)
        await server.run_due()
    async with await restored() as store:
        server = await Server(store, clock).start()
        assert sum(cost for _, cost in await server.ledger()) == 1.0


@pytest.mark.parametrize("days_lost", [2, 20])
async def test_a_backup_from_before_a_cohort_was_private_is_charged_too(
    restoring, clock, days_lost
):
    store, backup, restored = restoring
    async with store:
        await store.backup(backup)
        server = await Server(store, clock).start()
        for _ in range(days_lost):
            await server.pass_days(1)
    async with await restored() as store:
        clock.advance(30 * DAY_S)
        server = await Server(store, clock).start()
        account = server.releaser.private.account(server.rules)
        assert account.releases_left == max(0, 5 - (days_lost + 1))
        # Of a cohort that begins long after it, what was lost is charged all the same: nobody knows.
        assert account.rho_spent > 0.0


@pytest.mark.parametrize(("behind_s", "charged"), [(30.0, 1), (61.0, 3), (7 * DAY_S, 3)])
async def test_a_restore_by_a_clock_that_is_behind_the_backup_never_charges_too_little(
    restoring, clock, behind_s, charged
):
    store, backup, restored = restoring
    async with store:
        server = await Server(store, clock).start()
        await server.pass_days(1)
        await server.pass_days(1)
        clock.advance(DAY_S - START % DAY_S - 30.0)  # clocks differ, and a period ends meanwhile
        await store.backup(backup)
        for _ in range(5):
            await server.pass_days(1)
    clock.advance(-5 * DAY_S - behind_s)
    async with await restored() as store:
        clock.advance(5 * DAY_S + behind_s + 60.0)  # somebody sets it right
        server = await Server(store, clock).start()
        spent = sum(cost for _, cost in await server.ledger())
        assert spent == pytest.approx(2 + charged)


async def test_a_file_that_is_no_backup_is_as_new_as_the_newest_thing_in_it(
    restoring, clock, tmp_path
):
    store, backup, restored = restoring
    async with store:
        server = await Server(store, clock).start()
        await server.pass_days(1)
    shutil.copy(tmp_path / "fmi.sqlite3", backup)
    clock.advance(3 * DAY_S)
    async with await restored() as store:
        server = await Server(store, clock).start()
        assert [cost for _, cost in await server.ledger()] == [0.0, 1.0, pytest.approx(3.0)]
