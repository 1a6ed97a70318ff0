"""Leases at real brokers: one holder at a time, by tokens that rise, for a while."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

import pytest
from broker import Broker

from fmi_server.storage import JetStreamStore
from fmi_server.storage.base import StoreUnavailableError
from fmi_server.storage.jetstream_broker import BrokerConnection, BrokerOptions
from fmi_server.storage.jetstream_leases import Lease, LeaseHolder, LeaseLostError, LeaseTable
from fmi_server.storage.jetstream_names import BrokerAddress, LogNames

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NAMES = LogNames("fmi")


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with Broker(tmp_path / "broker") as started:
        yield started


@pytest.fixture
async def connection(broker: Broker) -> AsyncIterator[BrokerConnection]:
    options = BrokerOptions(ack_timeout_s=0.3, patience_s=3.0, duplicate_window_s=10.0)
    opened = BrokerConnection(BrokerAddress.parse(broker.url()), options)
    await opened.connect()
    yield opened
    await opened.close()


@pytest.fixture
async def leases(connection: BrokerConnection) -> LeaseTable:
    table = LeaseTable(connection, NAMES, ttl_s=60.0)
    await table.open()
    return table


@pytest.fixture
async def brief(connection: BrokerConnection) -> LeaseTable:
    """Leases that are soon over, for tests in which that is what is waited for."""
    table = LeaseTable(connection, LogNames("brief"), ttl_s=2.0)
    await table.open()
    return table


async def taken(leases: LeaseTable, name: str, holder: str) -> Lease:
    async with asyncio.timeout(60):
        while True:
            lease = await leases.acquire(name, holder)
            if lease is not None:
                return lease
            await asyncio.sleep(0.02)


async def test_one_of_many_has_it(leases: LeaseTable) -> None:
    found = await asyncio.gather(*(leases.acquire("retail/eu", f"r{n}") for n in range(10)))
    (lease,) = [lease for lease in found if lease is not None]
    assert leases.is_good(lease)
    assert await leases.holder("retail/eu") == LeaseHolder(lease.holder, lease.token)
    assert await leases.holder("retail.eu") is None
    assert await leases.acquire("retail.eu", "other") is not None


async def test_who_gives_it_back_lets_another_have_it_at_once(leases: LeaseTable) -> None:
    first = await leases.acquire("a", "one")
    assert first is not None
    assert await leases.release(first)
    assert await leases.holder("a") is None
    second = await leases.acquire("a", "two")
    assert second is not None
    assert second.token > first.token
    assert not await leases.release(first), "what was given back is not given back again"
    with pytest.raises(LeaseLostError):
        await leases.renew(first)
    assert await leases.holder("a") == LeaseHolder("two", second.token)


async def test_who_did_not_hear_that_it_has_it_takes_it_again(leases: LeaseTable) -> None:
    """The answer to a taking or a renewal may be lost: then the key is there, under its own name."""
    unheard = await leases.acquire("a", "one")
    assert unheard is not None
    assert await leases.acquire("a", "two") is None
    lease = await leases.acquire("a", "one")
    assert lease is not None
    assert lease.token > unheard.token
    assert await leases.holder("a") == LeaseHolder("one", lease.token)
    assert (await leases.renew(lease)).token == lease.token
    with pytest.raises(LeaseLostError):
        await leases.renew(unheard)


async def test_who_renews_keeps_it_and_its_token(brief: LeaseTable) -> None:
    # A machine that stands still for as long as a lease lasts loses it: then it is tried with another one.
    async with asyncio.timeout(250):
        for number in itertools.count():
            if await is_kept_by_renewals(brief, f"a-{number}"):
                break


async def is_kept_by_renewals(leases: LeaseTable, name: str) -> bool:
    """Keep a lease for longer than it lasts by itself; return False where it was renewed too late."""
    begun = renewed = time.monotonic()
    lease = await leases.acquire(name, "one")
    assert lease is not None
    token = lease.token
    while time.monotonic() < begun + 1.5 * leases.ttl_s:
        before, renewed = renewed, time.monotonic()
        try:
            lease = await leases.renew(lease)
            assert leases.is_good(lease)
            assert lease.token == token
            assert await leases.acquire(name, "two") is None
            assert await leases.holder(name) == LeaseHolder("one", token)
        except (AssertionError, LeaseLostError, StoreUnavailableError):
            if time.monotonic() < before + leases.ttl_s / 2:
                raise
            return False
        await asyncio.sleep(leases.ttl_s / 20)  # it is the passing of the time that is tested
    return True


async def test_who_does_not_renew_loses_it_and_knows_before(brief: LeaseTable) -> None:
    lease = await brief.acquire("a", "one")
    assert lease is not None
    second = await taken(brief, "a", "two")
    assert not brief.is_good(lease), "no two believe that they hold it"
    assert second.token > lease.token
    with pytest.raises(LeaseLostError) as caught:
        await brief.renew(lease)
    assert caught.value.lease == lease


async def test_a_broker_that_comes_back_still_knows_the_holder(
    broker: Broker, leases: LeaseTable, connection: BrokerConnection
) -> None:
    slow = LeaseTable(connection, LogNames("slow"), ttl_s=200.0)
    await slow.open()
    lease = await slow.acquire("a", "one")
    assert lease is not None
    broker.kill()
    with pytest.raises(StoreUnavailableError):
        await leases.acquire("b", "one")
    await broker.start()
    async with asyncio.timeout(60):
        while True:
            try:
                renewed = await slow.renew(lease)
                break
            except StoreUnavailableError:  # the connection is not there again yet
                await asyncio.sleep(0.02)
    assert renewed.token == lease.token
    assert await slow.acquire("a", "two") is None


async def test_a_repeat_of_what_was_stored_is_no_loss(leases: LeaseTable) -> None:
    """What is sent again because its acknowledgement was lost is answered like the first time."""
    broker, subject = leases._broker, leases._subject("a")
    places = [
        await broker.send(leases._stream, subject, b"{}", message_id="same", expected_last=0)
        for _ in range(2)
    ]
    assert places[0] == places[1]


async def test_the_time_is_that_of_the_bucket(connection: BrokerConnection) -> None:
    first = LeaseTable(connection, NAMES, ttl_s=5.0)
    await first.open()
    second = LeaseTable(connection, NAMES, ttl_s=60.0)
    await second.open()
    assert second.ttl_s == 5.0
    with pytest.raises(ValueError, match="ttl_s"):
        LeaseTable(connection, NAMES, ttl_s=0.5)


async def test_two_stores_share_the_leases(broker: Broker, tmp_path: Path) -> None:
    one = JetStreamStore(broker.url(), tmp_path / "one.db")
    other = JetStreamStore(broker.url(), tmp_path / "other.db")
    async with one, other:
        mine, theirs = await one.leases(ttl_s=5.0), await other.leases()
        assert theirs.ttl_s == 5.0
        lease = await mine.acquire("partition-7", "one")
        assert lease is not None
        assert await theirs.acquire("partition-7", "other") is None
        assert await theirs.holder("partition-7") == LeaseHolder("one", lease.token)
