"""Two replicas of one log beside one SQLite store: the same writes, the same answers, the same reads."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from broker import Broker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmi_server.storage import JetStreamStore, SqliteStore, Store
from fmi_server.storage.base import (
    DictionaryConflictError,
    LedgerConflictError,
    PacketKey,
    PacketRecord,
    RevisionConflictError,
    SpendRecord,
    UnknownPacketError,
    UpdateRecord,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_COUNTER = itertools.count()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    started = Broker(tmp_path_factory.mktemp("broker"), sync="2m")
    asyncio.run(started.start())
    yield started
    started.kill()


REFUSALS = (
    DictionaryConflictError,
    LedgerConflictError,
    RevisionConflictError,
    UnknownPacketError,
    ValueError,
)
SITES = st.sampled_from(["s.1", "s/2 *"])
PACKETS = st.sampled_from(["p1", "p2", "p3"])
COHORTS = st.sampled_from(["health", "retail/eu"])
KEYS = st.builds(PacketKey, SITES, PACKETS)
RECORDS = st.builds(
    PacketRecord,
    SITES,
    PACKETS,
    COHORTS,
    st.sampled_from(["msp", "pop", "ccs"]),
    st.sampled_from([b"a" * 16, b"a" * 16, b"b" * 16, b"a" * 16, b"short"]),
    st.integers(0, 4),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from(["", "trust"]),
    st.binary(max_size=3),
)


@dataclass(frozen=True)
class Write:
    """One call of a store: its name and what it is given."""

    name: str
    given: tuple[object, ...] = ()
    named: tuple[tuple[str, object], ...] = ()


def write(name: str, *values: st.SearchStrategy, **named: st.SearchStrategy) -> st.SearchStrategy:
    return st.builds(
        Write,
        st.just(name),
        st.tuples(*values),
        st.tuples(*(st.tuples(st.just(key), value) for key, value in named.items())),
    )


SMALL = st.integers(1, 4)
UPDATES = st.builds(
    UpdateRecord, SMALL, COHORTS, st.integers(1, 2), SMALL, SMALL, st.just(b"h"), st.binary()
)
SPENDS = st.builds(
    SpendRecord, COHORTS, SMALL, SMALL, SMALL, st.sampled_from([0.5, 0.25, 0.0]), st.just("epoch")
)
WRITES = st.one_of(
    write("append", st.lists(RECORDS, max_size=6)),
    write("append", st.lists(RECORDS, max_size=6)),
    write("append", st.lists(RECORDS, max_size=6)),
    write("retire", st.lists(KEYS, max_size=6)),
    write("retire", st.lists(KEYS, max_size=6)),
    write("revive", COHORTS, domain_id=st.none() | SITES),
    write("revive", COHORTS, domain_id=st.none()),
    write(
        "forget",
        COHORTS,
        received_before_us=st.sampled_from([3, 10, 10]),
        emitted_before_us=st.sampled_from([3, 10, 10]),
        limit=st.just(500),
    ),
    write("set_quarantine", KEYS, quarantined=st.booleans(), reason=st.just("why")),
    write("publish", st.lists(UPDATES, max_size=3)),
    write("publish", st.lists(UPDATES, max_size=3)),
    write("trim_updates", COHORTS, st.integers(1, 2), keep=st.integers(0, 2)),
    write("spend", SPENDS),
    write("put_cohort", COHORTS, st.binary(max_size=3), SMALL),
    write("put_reputations", COHORTS, st.dictionaries(SITES, st.sampled_from([0.5, float("nan")]))),
    write("put_dictionary", SMALL, st.binary(max_size=1), SMALL),
)


async def carry_out(store: Store, call: Write) -> object:
    """Return what a call answers, or how it is refused, in words that two stores can share."""
    values = list(call.given)
    if call.name == "retire":
        found = [await store.packet(key) for key in values[0]]
        values[0] = [packet.sequence for packet in found if packet is not None]
    if call.name == "publish":
        # What would follow, if the revisions did: so that some are taken and some are not.
        first = await store.next_update_sequence()
        values[0] = [replace(u, sequence=first + n) for n, u in enumerate(values[0])]
    try:
        answer = await getattr(store, call.name)(*values, **dict(call.named))
    except REFUSALS as error:
        return type(error), str(error)
    if call.name == "append":
        # The numbers may have gaps, in each store other ones.
        return [
            (replace(outcome, sequence=0), await known(store, outcome.sequence))
            for outcome in answer
        ]
    return answer


async def known(store: Store, sequence: int) -> PacketKey | None:
    found = await store.packet(sequence)
    return found and PacketKey(found.record.domain_id, found.record.packet_id)


async def everything(store: Store) -> dict[str, object]:
    """Return all that a store shows."""
    cohorts = ("health", "retail/eu")
    return {
        "packets": [p.record for p in await store.load()],
        "live": [[p.record for p in await store.live_packets(c)] for c in cohorts],
        "quarantined": [p.record for p in await store.quarantined()],
        "counts": await store.packet_counts(),
        "forgotten": await store.forgotten(),
        "sites": await store.sites(),
        "updates": await store.updates_since(0),
        "latest": await store.latest_updates(),
        "next": await store.next_update_sequence(),
        "oldest": [await store.oldest_revision(c, k) for c in cohorts for k in (1, 2)],
        "spends": [await store.spends(c) for c in cohorts],
        "ledger": await store.ledger_totals(),
        "cohorts": await store.cohorts(),
        "dictionaries": await store.dictionaries(),
    }


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(calls=st.lists(st.tuples(WRITES, st.booleans()), min_size=12, max_size=40))
def test_replicas_are_as_one_store(
    broker: Broker, tmp_path: Path, calls: list[tuple[Write, bool]]
) -> None:
    number = next(_COUNTER)

    async def scenario() -> None:
        url = broker.url(f"r{number}")
        one = JetStreamStore(url, tmp_path / f"{number}-one.db")
        other = JetStreamStore(url, tmp_path / f"{number}-other.db")
        anew = JetStreamStore(url, tmp_path / f"{number}-anew.db")
        async with SqliteStore(tmp_path / f"{number}.db") as alone, one, other:
            for call, by_other in calls:
                replica = other if by_other else one
                await replica.catch_up()
                assert await carry_out(replica, call) == await carry_out(alone, call)
            expected = await everything(alone)
            async with anew:
                for replica in (one, other, anew):
                    await replica.catch_up()
                    assert await everything(replica) == expected
                assert await one.load() == await other.load() == await anew.load()

    asyncio.run(scenario())
