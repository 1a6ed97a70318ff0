"""Servers that are late while another one makes a cohort private: nothing is told without noise."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

import cluster_harness
from broker import Broker
from cluster_harness import care, heard_of, owner, taus, two
from server_harness import DEADLINE_S, PRIOR, Client, eventually, msp, refusal_of, spec

from fmi.v1 import cohort_pb2, update_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server import partitions
from fmi_server.app import RunningServer
from fmi_server.storage import JetStreamStore

TAU = {"name": "tau", "section": 2, "lower": 0.0, "upper": 1.0}


@pytest.fixture(autouse=True)
def _who_has_a_cohort_keeps_it(monkeypatch) -> None:
    """Whoever is made to wait here keeps its leases, however slow the machine is."""
    monkeypatch.setattr(cluster_harness, "LEASE_S", 60.0)
    monkeypatch.setattr(partitions, "LOOKS", 150)


@pytest.fixture
async def broker(tmp_path) -> AsyncIterator[Broker]:
    async with Broker(tmp_path / "broker", sync="2m") as started:
        yield started


def private(epsilon: float = 2.0) -> cohort_pb2.CohortSpec:
    made = spec(
        "care", signals=[TAU], privacy={"dp_epsilon": epsilon, "dp_delta": 1e-6, "dp_epochs": 50}
    )
    made.ClearField("release")
    return made


class Held:
    """A server whose next write of a kind stands still just before it goes to the brokers."""

    def __init__(self, server: RunningServer, kind: str) -> None:
        self.standing = asyncio.Event()
        self.may_go_on = asyncio.Event()
        assert isinstance(server.service.store, JetStreamStore)
        self._log = server.service.store._open_replica()._log
        self._write, self._kind = self._log.write, f'["{kind}"'.encode()

    def __enter__(self) -> Self:
        self._log.write = self._stand_still
        return self

    def __exit__(self, *_: object) -> None:
        self.may_go_on.set()
        self._log.write = self._write

    async def _stand_still(self, subject, command_id, data, **named):
        if self._kind in data[:100] and not self.standing.is_set():
            self.standing.set()
            await self.may_go_on.wait()
        return await self._write(subject, command_id, data, **named)


async def spec_in_force_at_both(servers: tuple[RunningServer, ...], *, private: bool) -> None:
    def done() -> bool:
        rules = [server.service.cohorts.rules("care") for server in servers]
        return all((one.privacy is not None) is private for one in rules)

    await eventually(done)


async def priors(server: RunningServer) -> list[update_pb2.Update]:
    found = await server.service.store.updates("care", PRIOR)
    return [update_pb2.Update.FromString(record.payload) for record in found]


async def test_a_release_from_before_a_cohort_was_private_is_not_told_after_it(broker, tmp_path):
    async with two(broker, tmp_path) as servers:
        async with Client(servers[0].target) as client:
            await client.put_spec(care(signals=[TAU]))
        await eventually(lambda: all("care" in one.service.cohorts for one in servers))
        slow = owner("care", *servers)
        (other,) = [server for server in servers if server is not slow]
        async with Client(other.target) as client:
            with Held(slow, "publish") as held:
                await client.emit(*taus(0.1, 0.2, 0.3))
                await held.standing.wait()
                await client.put_spec(private())
            await spec_in_force_at_both(servers, private=True)
            # What comes behind it in the log comes behind whatever the slow one wrote.
            await slow.service.store.probe()
            await eventually(lambda: "care" not in slow.service.releaser._releasing)
            await slow.service.store.probe()
            await other.service.settle()
            assert await priors(other) == []
            counts = slow.service.telemetry.snapshot()
            assert counts['fmi_releases_total{outcome="overtaken"}'] >= 1.0
            assert counts['fmi_releases_total{outcome="failed"}'] == 0.0


async def test_a_release_that_is_paid_by_a_larger_budget_is_not_told_after_it(broker, tmp_path):
    frequent = private(5000.0)  # so that there is something to tell, whatever the noise
    frequent.release.max_interval.FromMilliseconds(500)
    async with two(broker, tmp_path) as servers:
        slow = owner("care", *servers)
        (other,) = [server for server in servers if server is not slow]
        async with Client(other.target) as client:
            with Held(slow, "publish") as held:
                await client.put_spec(frequent)
                await client.emit(*taus(*(n / 40 for n in range(40))))
                await held.standing.wait()
                await client.put_spec(private(2.0), force=True)
            await eventually(lambda: "care" not in slow.service.releaser._releasing)
            await other.service.settle()
            assert await priors(other) == []
            assert sum(spend.rho > 0.0 for spend in await other.service.store.spends("care")) == 1


async def test_of_two_changes_at_once_the_second_is_checked_against_the_first(broker, tmp_path):
    async with (
        two(broker, tmp_path) as servers,
        Client(servers[0].target) as a,
        Client(servers[1].target) as b,
    ):
        await a.put_spec(care(signals=[TAU]))
        await eventually(lambda: "care" in servers[1].service.cohorts)
        with Held(servers[0], "cohort") as held:
            wider = care(signals=[TAU | {"upper": 2.0}])
            late = asyncio.ensure_future(refusal_of(a.put_spec(wider)))
            await held.standing.wait()
            await b.put_spec(private())
        assert (await late).reason == "SPEC_CHANGE_UNSAFE"
        await spec_in_force_at_both(servers, private=True)


async def test_packets_behind_a_spec_are_not_counted_by_the_rules_of_before(broker, tmp_path):
    async with two(broker, tmp_path) as (first, late), Client(first.target) as client:
        await client.put_spec(care(signals=[TAU]))
        await eventually(lambda: "care" in late.service.cohorts)
        following, releaser = late.service.cluster.following, late.service.releaser
        counted, count = [], releaser.count

        async def noted(packet, **named):
            if packet.header.cohort == "care":
                counted.append(late.service.cohorts.rules("care").privacy is not None)
            await count(packet, **named)

        releaser.count = noted
        async with following._turn:
            # Of another cohort there is a release, which is heard of first.
            await client.put_spec(spec("town"))
            await client.emit(*taus(0.1, 0.2, 0.3, cohort="town"))
            await client.release("town")
            await eventually(lambda: ("updates", "", None) in following._changes)
            await client.put_spec(private())
            await client.emit(*taus(0.1, 0.2, 0.3))
            last = await first.service.store.last_sequence()

            async def there():
                return await late.service.store.last_sequence() == last

            await eventually(there)
        await eventually(lambda: len(counted) == 3)
        assert all(counted)


async def test_no_warm_start_is_made_of_what_is_held_where_a_spec_is_not_in_force_yet(
    broker, tmp_path
):
    asked = wire_pb2.GetWarmStartRequest(cohort="care")
    async with (
        two(broker, tmp_path) as (first, late),
        Client(first.target) as client,
        Client(late.target) as there,
    ):
        await client.put_spec(spec("care", signals=[TAU]))
        await client.emit(*taus(0.1, 0.2, 0.3))

        async def held(value: float) -> bool:
            answer = await heard_of(there.interchange.GetWarmStart(asked, timeout=DEADLINE_S))
            return answer is not None and answer.profile.init["tau"] == pytest.approx(value)

        await eventually(lambda: held(0.2))
        await eventually(lambda: heard_of(there.update("care")))
        await client.emit(msp("s0", "care", controller={"tau": 0.9}))
        await eventually(lambda: held(0.3))
        async with late.service.cluster.following._turn:
            await client.put_spec(private())
            await eventually(lambda: late.service.cluster.following.spec_waits("care"))
            assert await held(0.2)  # as it was released
