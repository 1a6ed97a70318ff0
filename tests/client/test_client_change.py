"""A live change of the filter: nothing lost, nothing twice, and a snapshot of what is new."""

# ruff: noqa: S106  resume tokens are no secrets

from __future__ import annotations

import asyncio
import itertools
import random
from collections import defaultdict

import grpc
import pytest
from scripted_server import snapshot_end, status, streams, update, update_event

from fmi.v1 import cohort_pb2, interchange_service_pb2, update_pb2
from fmi_client import (
    AsyncFMIClient,
    CompactedError,
    ConfigurationError,
    FMIEmitter,
    InvalidFilterError,
)
from fmi_server.errors import OverloadedError
from fmi_server.testing import running_server

PRIOR = update_pb2.UPDATE_KIND_PRIOR


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.001)


def filters(request):
    return list(request.cohorts), list(request.kinds)


async def test_a_change_says_what_was_received_under_the_filter_before(server, connect):
    """The handover is sent until the end of the snapshot, with the newest token under the new filter."""
    server.script(
        "Subscribe",
        streams(update_event(1), snapshot_end(), hold=True),
        streams(update_event(7, cohort="new")),  # and then it breaks
        streams(snapshot_end(), update_event(8, cohort="new"), hold=True),
        streams(hold=True),
    )
    client = await connect()
    async with client.subscribe("care", "prior") as subscription:
        events = subscription.events()
        await anext(events)
        assert (await anext(events)).HasField("snapshot_end")
        await subscription.change(["care", "new"])
        assert subscription.changing
        assert subscription.resume_token == "snap", "it goes with the filter from before"
        assert (await anext(events)).update == update(7, cohort="new")
        assert (await anext(events)).HasField("snapshot_end")
        assert not subscription.changing
        assert (await anext(events)).update == update(8, cohort="new")
        await subscription.change("other")
        waiting = asyncio.ensure_future(anext(events))
        await until(lambda: len(server.seen("Subscribe")) == 4)
        waiting.cancel()
    first, changed, resumed, last = server.seen("Subscribe")
    assert filters(first) == (["care"], [PRIOR])
    assert not first.HasField("handover")
    for request, token in ((changed, ""), (resumed, "t7")):
        assert filters(request) == (["care", "new"], [])
        assert request.handover == interchange_service_pb2.Handover(
            cohorts=["care"], kinds=[PRIOR], resume_token="snap"
        )
        assert request.resume_token == token
    assert filters(last) == (["other"], [])
    assert (list(last.handover.cohorts), last.handover.resume_token) == (["care", "new"], "t8")
    assert len({request.instance_id for request in (first, changed, resumed, last)}) == 1


async def test_a_second_change_waits_for_the_first(server, connect):
    server.script(
        "Subscribe",
        streams(snapshot_end(), hold=True),
        streams(update_event(3), snapshot_end(), hold=True),
        streams(hold=True),
    )
    client = await connect()
    async with client.subscribe("a") as subscription:
        events = subscription.events()
        await anext(events)
        await subscription.change("b")
        await subscription.change("c")
        await subscription.change("d")
        await anext(events)
        await anext(events)
        waiting = asyncio.ensure_future(anext(events))
        await until(lambda: len(server.seen("Subscribe")) == 3)
        waiting.cancel()
    _, second, third = server.seen("Subscribe")
    assert (list(second.cohorts), list(second.handover.cohorts)) == (["b"], ["a"])
    assert (list(third.cohorts), list(third.handover.cohorts)) == (["d"], ["b"])


async def test_a_change_before_anything_came_just_asks_for_something_else(server, connect):
    server.script("Subscribe", streams(snapshot_end(), hold=True))
    client = await connect()
    async with client.subscribe("a") as subscription:
        await subscription.change("b", "prior")
        await anext(subscription.events())
    (request,) = server.seen("Subscribe")
    assert filters(request) == (["b"], [PRIOR])
    assert not request.HasField("handover")


async def test_start_revisions_go_with_their_filter(server, connect):
    server.script(
        "Subscribe",
        streams(update_event(4), hold=True),
        streams(snapshot_end(), hold=True),
    )
    client = await connect()
    async with client.subscribe("a", start={("a", "prior"): 4}) as subscription:
        await subscription.change("b")
        assert subscription.changing
        assert (await anext(subscription)).revision == 4
        await anext(subscription.events())
    first, second = server.seen("Subscribe")
    assert (list(first.cohorts), len(first.start_revisions)) == (["a"], 1)
    assert (list(second.cohorts), len(second.start_revisions)) == (["b"], 0)
    assert second.handover.resume_token == "t4"


async def test_compacted_in_a_change_raises_or_begins_anew(server, connect):
    compacted = status(grpc.StatusCode.OUT_OF_RANGE, "COMPACTED", "compacted")
    client = await connect()
    for on_compacted in ("raise", "snapshot"):
        server.script(
            "Subscribe",
            streams(snapshot_end(), hold=True),
            streams(then=compacted),
            *([streams(update_event(9), hold=True)] if on_compacted == "snapshot" else []),
        )
        async with client.subscribe("a", on_compacted=on_compacted) as subscription:
            await anext(subscription.events())
            await subscription.change("b")
            if on_compacted == "raise":
                with pytest.raises(CompactedError):
                    await anext(subscription)
            else:
                assert (await anext(subscription)).revision == 9
                last = server.seen("Subscribe")[-1]
                assert (last.resume_token, last.HasField("handover")) == ("", False)


async def test_what_cannot_be_meant_changes_nothing(connect):
    client = await connect()
    async with client.subscribe("a") as subscription:
        with pytest.raises(InvalidFilterError):
            await subscription.change("b", "nonsense")
        assert not subscription.changing
    with pytest.raises(ConfigurationError, match="closed"):
        await subscription.change("b")


# Against the real server


COHORTS = ("stay", "x/1", "x/2", "y/1")
FILTERS = (("**",), ("stay",), ("stay", "x/*"), ("stay", "y/*", "x/1"))
MATCHES = {
    FILTERS[0]: set(COHORTS),
    FILTERS[1]: {"stay"},
    FILTERS[2]: {"stay", "x/1", "x/2"},
    FILTERS[3]: {"stay", "y/1", "x/1"},
}


class Follower:
    """Follows cohorts in EVERY mode; remembers what was published and given, and when it joined."""

    def __init__(self, server, client: AsyncFMIClient, chance: random.Random) -> None:
        self._server, self._client, self._chance = server, client, chance
        self._values = itertools.count(1)
        self._present = FILTERS[0]
        self._newest: dict[str, int] = {}
        self._given: dict[str, list[int]] = defaultdict(list)
        self._joins: dict[str, list[int]] = {name: [] for name in COHORTS}
        self.subscription = client.subscribe("**", "prior", mode="every")

    async def declare(self) -> None:
        for name in COHORTS:
            spec = cohort_pb2.CohortSpec(name=name)
            spec.aggregation.vote_min_sites = 1
            spec.release.min_interval.FromSeconds(3600)
            spec.release.max_interval.FromSeconds(7200)
            await self._client.admin.put_cohort_spec(spec)

    async def consume(self) -> None:
        async for found in self.subscription:
            self._given[found.cohort].append(found.revision)
            if self._chance.random() < 0.3:
                await asyncio.sleep(0.003)

    async def publish(self, name: str) -> None:
        emitter = FMIEmitter("s", cohort=name)
        await self._client.emit(emitter.emit_msp(controller={"tau": float(next(self._values))}))
        await self._client.admin.release_now(name)
        self._newest[name] = (await self._client.get_update(name, "prior")).revision

    async def change(self, wanted: tuple[str, ...]) -> None:
        for name in MATCHES[wanted] - MATCHES[self._present]:
            self._joins[name].append(self._newest.get(name, 0))
        self._present = wanted
        await self.subscription.change(wanted, "prior")

    async def break_streams(self) -> None:
        for stream in await self._server.service.router.open_subscriptions():
            stream.feed.stop(OverloadedError("the test", retry_after_s=0.0))

    def has_everything(self) -> bool:
        return {name: found[-1] for name, found in self._given.items()} == self._newest

    def check(self) -> None:
        stay = self._given["stay"]
        assert stay == list(range(stay[0], self._newest["stay"] + 1))
        for name, joins in self._joins.items():
            steps = list(itertools.pairwise(self._given[name]))
            assert all(before < after for before, after in steps)
            gaps = [after for before, after in steps if after != before + 1]
            assert len(gaps) <= len(joins), "a gap is where it joins"
            assert all(any(revision >= joined for joined in joins) for revision in gaps)


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_changes_and_breaks_no_revision_is_lost_or_comes_twice(seed):
    """What all filters cover is gapless; all else is too, but where it joins, and joins with the newest."""
    chance = random.Random(seed)
    async with running_server() as server, AsyncFMIClient(server.target, domain_id="s") as client:
        follower = Follower(server, client, chance)
        await follower.declare()
        consuming = asyncio.ensure_future(follower.consume())
        for _ in range(120):
            move = chance.random()
            if move < 0.75:
                await follower.publish(chance.choice(COHORTS))
            elif move < 0.9:
                await follower.change(chance.choice(FILTERS))
            else:
                await follower.break_streams()
        await follower.change(FILTERS[0])
        await until(follower.has_everything)
        await follower.subscription.aclose()
        await consuming
    follower.check()
