"""Subscribe: ORDERED, RESUMABLE, and BOUNDED for whoever does not read."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random

import grpc
import pytest
from server_harness import (
    DEADLINE_S,
    HINT,
    PRIOR,
    WARM_START,
    Client,
    Events,
    eventually,
    msp,
    pop,
    refusal_of,
    rows,
    spec,
)

from fmi.v1 import cohort_pb2, update_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.testing import running_server

EVERY = wire_pb2.DELIVERY_MODE_EVERY
LATEST = wire_pb2.DELIVERY_MODE_LATEST

SLOW_READER = (
    # A window that does not grow, so that what nobody reads stays at the server.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65_536),
)


async def declare(client: Client, *cohorts: str, **fields) -> None:
    aggregation = cohort_pb2.AggregationSpec(vote_min_sites=1)
    for cohort in cohorts:
        await client.put_spec(spec(cohort, aggregation=aggregation, **fields))


class Publisher:
    """Publishes one prior after the other: each emits a new value and releases."""

    def __init__(self, client: Client, cohort: str, *, signals: int = 1) -> None:
        self._client = client
        self._cohort = cohort
        self._names = [f"signal_{i}".ljust(60, "_") for i in range(signals)]
        self._values = itertools.count(1)

    async def __call__(self, count: int = 1) -> update_pb2.Update:
        for _ in range(count):
            value = float(next(self._values))
            await self._client.emit(
                msp("site", self._cohort, controller=dict.fromkeys(self._names, value))
            )
            await self._client.release(self._cohort)
        latest = await self._client.update(self._cohort)
        assert latest.prior_update.prior[self._names[0]] == value
        return latest


def start(cohort: str, revision: int, *, kind: int = PRIOR, epoch: str = "") -> list:
    return [
        wire_pb2.StartRevision(cohort=cohort, kind=kind, revision=revision, history_epoch=epoch)
    ]


def revisions(updates) -> list[int]:
    return [update.revision for update in updates]


# Snapshot, then live


async def test_an_empty_server_gives_the_end_of_the_snapshot_at_once(client):
    async with client.subscribed("**") as events:
        end = await events.next()
        assert end.snapshot_end.updates == 0
        assert end.snapshot_end.history_epoch
        assert not end.snapshot_end.history_changed
        assert end.resume_token


async def test_a_snapshot_has_the_newest_of_each_and_then_it_is_live(client):
    await declare(client, "care", "trade")
    care, trade = Publisher(client, "care"), Publisher(client, "trade")
    await care(3)
    await trade(2)
    async with client.subscribed("care", "trade", kinds=[PRIOR]) as events:
        snapshot = await events.snapshot()
        assert {(u.cohort, u.revision) for u in snapshot} == {("care", 3), ("trade", 2)}
        published = await care()
        assert await events.updates(1) == [published]
        published = await trade()
        assert await events.updates(1) == [published]


async def test_an_update_is_what_get_update_gives(client):
    await declare(client, "care")
    async with client.subscribed("care", kinds=[PRIOR, WARM_START]) as events:
        await events.snapshot()
        await Publisher(client, "care")()
        prior, warm_start = await events.updates(2)
        assert prior == await client.update("care", PRIOR)
        assert warm_start == await client.update("care", WARM_START)
        assert prior.prior_update.rev == prior.revision == 1
        assert warm_start.sequence == prior.sequence + 1
        assert prior.history_epoch == warm_start.history_epoch


async def test_kinds_and_patterns_choose(client):
    names = ("retail/eu", "retail/us", "retail/eu/north", "care")
    await declare(client, *names)
    for name in names:
        await Publisher(client, name)()
        await client.emit(pop("site", name))
        await client.release(name)

    async def chosen(*patterns: str, kinds: tuple[int, ...] = ()) -> set[tuple[str, int]]:
        async with client.subscribed(*patterns, kinds=kinds) as events:
            return {(u.cohort, u.kind) for u in await events.snapshot()}

    def all_of(*cohorts: str, kinds=(PRIOR, WARM_START, HINT)) -> set[tuple[str, int]]:
        return set(itertools.product(cohorts, kinds))

    assert await chosen("**") == all_of(*names)
    assert await chosen("*") == all_of("care")
    assert await chosen("retail/*", kinds=(PRIOR,)) == all_of(
        "retail/eu", "retail/us", kinds=(PRIOR,)
    )
    assert await chosen("retail/**", kinds=(HINT,)) == all_of(*names[:3], kinds=(HINT,))
    assert await chosen("retail/?u", "care") == all_of("retail/eu", "care")
    assert await chosen("nowhere") == set()


async def test_cohorts_that_come_later_are_seen(client):
    async with client.subscribed("new/*", kinds=[PRIOR]) as events:
        await events.snapshot()
        await declare(client, "new/one", "old/one")
        await Publisher(client, "old/one")()
        published = await Publisher(client, "new/one")()
        assert await events.updates(1) == [published]


# From where one was


@pytest.mark.parametrize("first", [1, 3, 5])
async def test_every_goes_on_from_a_revision(client, first):
    await declare(client, "care")
    await Publisher(client, "care")(5)
    async with client.subscribed(
        "care", kinds=[PRIOR], mode=EVERY, start_revisions=start("care", first)
    ) as events:
        snapshot = await events.snapshot()
        assert revisions(snapshot) == list(range(first, 6))


async def test_latest_goes_on_from_a_revision_and_says_what_it_leaves_out(client):
    await declare(client, "care")
    await Publisher(client, "care")(5)
    async with client.subscribed("care", kinds=[PRIOR], start_revisions=start("care", 2)) as events:
        lagged, update, end = await events.until("snapshot_end")
        assert lagged.WhichOneof("event") == "lagged"
        assert (lagged.lagged.from_revision, lagged.lagged.to_revision) == (2, 4)
        assert (lagged.lagged.cohort, lagged.lagged.kind) == ("care", PRIOR)
        assert update.update.revision == 5
        assert end.snapshot_end.updates == 1, "what was left out is no update"


@pytest.mark.parametrize("mode", [EVERY, LATEST])
async def test_the_next_revision_is_a_start_too(client, mode):
    await declare(client, "care")
    publish = Publisher(client, "care")
    await publish(2)
    async with client.subscribed(
        "care", kinds=[PRIOR], mode=mode, start_revisions=start("care", 3)
    ) as events:
        assert await events.snapshot() == []
        published = await publish()
        assert await events.updates(1) == [published]


async def test_a_start_names_one_cohort_and_the_others_have_a_snapshot(client):
    await declare(client, "care", "trade")
    await Publisher(client, "care")(4)
    await Publisher(client, "trade")(4)
    async with client.subscribed(
        "**", kinds=[PRIOR], mode=EVERY, start_revisions=start("care", 2)
    ) as events:
        snapshot = await events.snapshot()
        by_cohort = {
            name: [u.revision for u in snapshot if u.cohort == name] for name in ("care", "trade")
        }
        assert by_cohort == {"care": [2, 3, 4], "trade": [4]}


@pytest.mark.parametrize("mode", [EVERY, LATEST])
@pytest.mark.parametrize("restart", [False, True], ids=["same server", "restarted"])
async def test_a_resume_token_goes_on_behind_its_event(data_dir, mode, restart):
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_server(data_dir))
        client = await stack.enter_async_context(Client(server.target))
        await declare(client, "care", "trade")
        care, trade = Publisher(client, "care"), Publisher(client, "trade")
        await care(2)
        async with client.subscribed("**", kinds=[PRIOR], mode=EVERY) as events:
            await events.snapshot()
            await trade()
            await care()
            await events.next()
            token = (await events.next()).resume_token
        await care(3)
        await trade(2)
        if restart:
            await stack.aclose()
            server = await stack.enter_async_context(running_server(data_dir))
            client = await stack.enter_async_context(Client(server.target))
        async with client.subscribed("**", kinds=[PRIOR], mode=mode, resume_token=token) as events:
            *missed, end = await events.until("snapshot_end")
            seen = [
                (e.update.cohort, e.update.revision)
                for e in missed
                if e.WhichOneof("event") == "update"
            ]
            left_out = {
                e.lagged.cohort: (e.lagged.from_revision, e.lagged.to_revision)
                for e in missed
                if e.WhichOneof("event") == "lagged"
            }
            if mode == EVERY:
                assert seen == [("care", 4), ("care", 5), ("care", 6), ("trade", 2), ("trade", 3)]
                assert not left_out
            else:
                assert seen == [("care", 6), ("trade", 3)]
                assert left_out == {"care": (4, 5), "trade": (2, 2)}
            assert end.snapshot_end.updates == len(seen)
            assert not end.snapshot_end.history_changed


async def test_a_token_of_another_history_gives_a_whole_snapshot_and_says_so(client, tmp_path):
    async with (
        running_server(tmp_path / "other") as other,
        Client(other.target) as stranger,
        stranger.subscribed("**") as events,
    ):
        foreign = await events.next()
    await declare(client, "care")
    await Publisher(client, "care")(3)
    by_token = {"resume_token": foreign.resume_token}
    epoch = foreign.snapshot_end.history_epoch
    by_revision = {"start_revisions": start("care", 2, epoch=epoch)}
    for where in (by_token, by_revision):
        async with client.subscribed("care", kinds=[PRIOR], mode=EVERY, **where) as events:
            update, end = await events.until("snapshot_end")
            assert update.update.revision == 3
            assert end.snapshot_end.history_changed
            assert end.snapshot_end.history_epoch != epoch


async def test_every_is_the_history_without_gaps_whenever_it_begins(client):
    """Subscribers come, go and come back while 60 priors are published; each has all from its start."""
    await declare(client, "care")
    publish = Publisher(client, "care")
    await publish()
    chance = random.Random(7)
    last = 61

    async def follow() -> list[update_pb2.Update]:
        seen: list[update_pb2.Update] = []
        token = ""
        while not seen or seen[-1].revision < last:
            async with client.subscribed(
                "care", kinds=[PRIOR], mode=EVERY, resume_token=token
            ) as events:
                for _ in range(chance.randint(1, 20)):
                    event = await events.next()
                    token = event.resume_token
                    if event.WhichOneof("event") == "update":
                        seen.append(event.update)
                    if seen and seen[-1].revision == last:
                        break
        return seen

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        followers = [tasks.create_task(follow()) for _ in range(10)]
        await publish(30)
        followers += [tasks.create_task(follow()) for _ in range(10)]
        await publish(30)
    kept = {r: await client.update("care", PRIOR, r) for r in range(1, last + 1)}
    for follower in followers:
        seen = follower.result()
        assert revisions(seen) == list(range(seen[0].revision, last + 1))
        assert all(update == kept[update.revision] for update in seen)


# Slow subscribers


async def test_a_subscriber_that_does_not_read_gets_the_newest_and_slows_nobody(server, client):
    """BOUNDED: 100 releases of 60 kB pass one who reads nothing; another has all of them."""
    await declare(client, "care")
    publish = Publisher(client, "care", signals=500)
    async with (
        Client(server.target, SLOW_READER) as asleep,
        Client(server.target) as awake,
        asleep.subscribed("care", kinds=[PRIOR]) as slow,
        awake.subscribed("care", kinds=[PRIOR], mode=EVERY) as quick,
    ):
        await slow.snapshot()
        await quick.snapshot()
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            all_of_them = tasks.create_task(quick.updates(100))
            tasks.create_task(publish(100))
        assert revisions(all_of_them.result()) == list(range(1, 101))

        covered: list[int] = []
        left_out = 0
        while not covered or covered[-1] < 100:
            event = await slow.next()
            if event.WhichOneof("event") == "lagged":
                told = event.lagged
                left_out += told.to_revision + 1 - told.from_revision
                covered += range(told.from_revision, told.to_revision + 1)
                after = await slow.next()
                assert after.update.revision == told.to_revision + 1
                covered.append(after.update.revision)
            else:
                covered.append(event.update.revision)
        assert covered == list(range(1, 101)), "each is had or told of, once and in order"
        assert left_out >= 50, "most of it was never sent"
        counts = server.service.telemetry.snapshot()
        assert counts["fmi_conflated_updates_total"] == left_out


async def test_what_a_subscriber_missed_of_a_new_cohort_is_told(server, client):
    """A cohort that came into being while nobody read has its first revisions told of too."""
    await declare(client, "big", "late")
    fill = Publisher(client, "big", signals=500)
    late = Publisher(client, "late")
    async with (
        Client(server.target, SLOW_READER) as asleep,
        asleep.subscribed("**", kinds=[PRIOR]) as slow,
    ):
        await slow.snapshot()
        await fill(12)
        await late(4)
        seen = []
        async with asyncio.timeout(DEADLINE_S):
            while True:
                event = await slow.next()
                if event.WhichOneof("event") == "lagged" and event.lagged.cohort == "late":
                    seen.append((event.lagged.from_revision, event.lagged.to_revision))
                if event.WhichOneof("event") == "update" and event.update.cohort == "late":
                    seen.append(event.update.revision)
                if seen and seen[-1] == 4:
                    break
        assert seen == [(1, 3), 4]


async def test_every_reads_what_it_missed_from_the_store(server, client, monkeypatch):
    """EVERY has no queue: behind the memory of the log it goes on from the store."""
    log = server.service.releaser.publisher.log
    monkeypatch.setattr(log, "recent", type(log.recent)(maxlen=3))
    await declare(client, "care")
    publish = Publisher(client, "care", signals=500)
    async with (
        Client(server.target, SLOW_READER) as asleep,
        asleep.subscribed("care", kinds=[PRIOR], mode=EVERY) as slow,
    ):
        await slow.snapshot()
        await publish(40)
        updates = await slow.updates(40)
    assert revisions(updates) == list(range(1, 41))
    assert updates[17] == await client.update("care", PRIOR, 18)


async def test_200_subscribers_on_10_connections_get_the_same_bytes(server, client):
    await declare(client, "care", "trade")
    care, trade = Publisher(client, "care", signals=20), Publisher(client, "trade")
    request = wire_pb2.SubscribeRequest(cohorts=["**"], mode=EVERY).SerializeToString()
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            (await stack.enter_async_context(Client(server.target))).channel for _ in range(10)
        ]
        calls = [
            channel.unary_stream("/fmi.v1.InterchangeService/Subscribe")(request)
            for channel in channels
            for _ in range(20)
        ]
        for call in calls:
            stack.callback(call.cancel)

        async def read(count: int) -> list[tuple[bytes, ...]]:
            async def one(call) -> tuple[bytes, ...]:
                got: list[bytes] = []
                while len(got) < count:
                    data = await call.read()
                    # A sign of life comes on a slow machine, and has a time of its own.
                    if not wire_pb2.SubscribeResponse.FromString(data).HasField("progress"):
                        got.append(data)
                return tuple(got)

            async with asyncio.timeout(DEADLINE_S):
                return await asyncio.gather(*(one(call) for call in calls))

        await read(1)
        assert server.service.router.subscribers == 200
        assert (await client.cohorts())["care"].subscribers == 200
        for _ in range(5):
            await care()
            await trade()
        received = await read(20)
    assert len(set(received)) == 1
    events = [wire_pb2.SubscribeResponse.FromString(data) for data in received[0]]
    assert [e.update.sequence for e in events] == list(range(1, 21))


@pytest.mark.parametrize("reading", [True, False], ids=["idle", "blocked"])
async def test_a_subscriber_that_leaves_is_forgotten(server, client, reading):
    await declare(client, "care")
    async with Client(server.target, SLOW_READER) as leaving:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                events = await stack.enter_async_context(leaving.subscribed("**"))
                await events.snapshot()
            assert server.service.router.subscribers == 5
            if not reading:
                await Publisher(client, "care", signals=500)(5)
        await eventually(lambda: server.service.router.subscribers == 0)
    assert server.service.telemetry.snapshot()["fmi_subscribers"] == 0


async def test_signs_of_life_come_behind_all_data(data_dir):
    async with (
        running_server(data_dir, progress_interval_s=0.2) as server,
        Client(server.target) as client,
    ):
        await declare(client, "care")
        publish = Publisher(client, "care")
        async with client.subscribed("care", kinds=[PRIOR]) as events:
            await events.snapshot()
            first, second = await events.next(), await events.next()
            assert first.WhichOneof("event") == second.WhichOneof("event") == "progress"
            times = [e.progress.server_time.ToNanoseconds() for e in (first, second)]
            assert 0.1e9 < times[1] - times[0] < 10e9, "by default it is longer"
            published = await publish()
            *_, update = await events.until("update")
            assert update.update == published
            *_, progress = await events.until("progress")
        async with client.subscribed(
            "care", kinds=[PRIOR], resume_token=progress.resume_token
        ) as events:
            assert await events.snapshot() == []


# What cannot be had


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        pytest.param({"cohorts": []}, "cohorts", id="no cohort"),
        pytest.param({"cohorts": [""]}, "cohorts[0]", id="an empty pattern"),
        pytest.param({"cohorts": ["Care"]}, "cohorts[0]", id="capitals"),
        pytest.param({"cohorts": ["care", "a b"]}, "cohorts[1]", id="a space"),
        pytest.param({"cohorts": ["/care"]}, "cohorts[0]", id="a slash in front"),
        pytest.param({"cohorts": ["c"] * 65}, "cohorts", id="too many patterns"),
        pytest.param({"cohorts": ["care", "*a" * 9]}, "cohorts[1]", id="too many stars"),
        pytest.param({"kinds": [0]}, "kinds[0]", id="no kind"),
        pytest.param({"kinds": [9]}, "kinds[0]", id="a kind that is none"),
        pytest.param({"mode": 7}, "mode", id="a mode that is none"),
        pytest.param(
            {"start_revisions": start("care", 0)}, "start_revisions[0].revision", id="revision 0"
        ),
        pytest.param(
            {"start_revisions": start("", 1)}, "start_revisions[0].cohort", id="a start of nothing"
        ),
        pytest.param(
            {"start_revisions": start("care", 1, kind=0)},
            "start_revisions[0].kind",
            id="a start of no kind",
        ),
        pytest.param(
            {"start_revisions": start("care", 1) * 2}, "start_revisions[1]", id="a start twice"
        ),
        pytest.param(
            {"start_revisions": start("trade", 1)},
            "start_revisions",
            id="a start of another cohort",
        ),
        pytest.param(
            {"start_revisions": start("care", 1), "kinds": [HINT]},
            "start_revisions",
            id="a start of another kind",
        ),
        pytest.param(
            {"start_revisions": start("care", 5)}, "start_revisions", id="a start past the end"
        ),
        pytest.param(
            {"start_revisions": start("care", 2**64 - 1)}, "start_revisions", id="an endless start"
        ),
        pytest.param({"resume_token": "mine"}, "resume_token", id="a token that is none"),
        pytest.param({"resume_token": "a:-1"}, "resume_token", id="a negative token"),
        pytest.param({"resume_token": "a:" + "9" * 40}, "resume_token", id="an endless token"),
        pytest.param({"resume_token": "x" * 300}, "resume_token", id="a token that is too long"),
        pytest.param({"resume_token": "{epoch}:7000"}, "resume_token", id="a token past the end"),
        pytest.param(
            {"resume_token": "{epoch}:1", "start_revisions": start("care", 1)},
            "resume_token",
            id="a token and a start",
        ),
    ],
)
@pytest.mark.parametrize("mode", [LATEST, EVERY])
async def test_an_invalid_filter_is_told(server, client, fields, field, mode):
    await declare(client, "care")
    await Publisher(client, "care")(3)
    epoch = server.service.store.history_epoch
    values = {"cohorts": ["care"], "mode": mode, **fields}
    if "resume_token" in values:
        values["resume_token"] = values["resume_token"].replace("{epoch}", epoch)
    call = client.interchange.Subscribe(wire_pb2.SubscribeRequest(**values))
    refusal = await Events(call).refusal()
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FILTER")
    assert [violation[0] for violation in refusal.violations] == [field]
    assert refusal.retry_s is None
    await eventually(lambda: server.service.router.subscribers == 0)


async def test_what_is_compacted_is_told_with_the_oldest_that_is_held(data_dir):
    retention = cohort_pb2.RetentionSpec(updates=4)
    async with running_server(data_dir) as server, Client(server.target) as client:
        await declare(client, "care", retention=retention)
        publish = Publisher(client, "care")
        await publish()
        async with client.subscribed("care", kinds=[PRIOR], mode=EVERY) as events:
            old_token = (await events.next()).resume_token
        await publish(39)
        held = [
            row[3] for row in rows(data_dir, "updates")["updates"] if (row[1:3]) == ("care", PRIOR)
        ]
        assert len(held) < 4 + 16, "it is trimmed each 16 revisions"
        assert held == list(range(held[0], 41))

        refusal = await refusal_of(client.update("care", PRIOR, 2))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "COMPACTED")
        assert refusal.metadata == {
            "cohort": "care",
            "kind": "prior",
            "revision": "2",
            "oldest_revision": str(held[0]),
        }
        oldest = await client.update("care", PRIOR, held[0])
        assert oldest.revision == held[0]

        request = wire_pb2.SubscribeRequest(
            cohorts=["care"], kinds=[PRIOR], mode=EVERY, start_revisions=start("care", 2)
        )
        refusal = await Events(client.interchange.Subscribe(request)).refusal()
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "COMPACTED")
        assert refusal.metadata["oldest_revision"] == str(held[0])
        async with client.subscribed(
            "care", kinds=[PRIOR], mode=EVERY, start_revisions=start("care", held[0])
        ) as events:
            assert revisions(await events.snapshot()) == held

    async with running_server(data_dir) as server, Client(server.target) as client:
        request = wire_pb2.SubscribeRequest(
            cohorts=["care"], kinds=[PRIOR], mode=EVERY, resume_token=old_token
        )
        refusal = await Events(client.interchange.Subscribe(request)).refusal()
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "COMPACTED")
        async with client.subscribed("care", kinds=[PRIOR], resume_token=old_token) as events:
            lagged = (await events.next()).lagged
            assert (lagged.from_revision, lagged.to_revision) == (0, 39), (
                "it cannot be told any more"
            )
            assert revisions(await events.snapshot()) == [40]
        async with client.subscribed("care", kinds=[PRIOR]) as events:
            assert revisions(await events.snapshot()) == [40], "without the token it is a snapshot"


async def test_get_update_gives_each_revision_and_the_newest(client):
    await declare(client, "care")
    latest = await Publisher(client, "care")(3)
    assert await client.update("care") == latest
    found = [await client.update("care", PRIOR, revision) for revision in (1, 2, 3)]
    values = [list(u.prior_update.prior.values()) for u in found]
    assert values == [[1.0], [2.0], [3.0]]
    assert [u.released_at.ToNanoseconds() for u in found] == sorted(
        u.released_at.ToNanoseconds() for u in found
    )
    refusal = await refusal_of(client.update("care", PRIOR, 4))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "UPDATE_NOT_FOUND")
    refusal = await refusal_of(client.update("care", HINT))
    assert refusal.metadata == {"cohort": "care", "kind": "policy_hint", "revision": "0"}
