"""The contract of `Store`, held against every store."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from broker import Broker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmi_server import storage
from fmi_server.storage import JetStreamStore, MemoryStore, SqliteStore, Store
from fmi_server.storage.base import (
    DictionaryConflictError,
    DictionaryRecord,
    LedgerConflictError,
    LedgerTotal,
    PacketKey,
    PacketRecord,
    RevisionConflictError,
    SpecChangedError,
    SpendRecord,
    StoredPacket,
    StoreError,
    StoreUnavailableError,
    UnknownPacketError,
    UpdateRecord,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

_COUNTER = itertools.count()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker for all tests here; each store has a federation of its own."""
    started = Broker(tmp_path_factory.mktemp("broker"), sync="2m")
    asyncio.run(started.start())
    yield started
    started.kill()


@pytest.fixture(params=["sqlite", "memory", "jetstream"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    if request.param == "memory":
        return MemoryStore
    if request.param == "sqlite":
        return lambda: SqliteStore(tmp_path / f"{next(_COUNTER)}.db")
    broker: Broker = request.getfixturevalue("broker")

    def make() -> Store:
        number = next(_COUNTER)
        return JetStreamStore(broker.url(f"f{number}"), tmp_path / f"{number}.db")

    return make


@pytest.fixture
async def store(make_store: Callable[[], Store]) -> AsyncIterator[Store]:
    async with make_store() as opened:
        yield opened


def packet(packet_id: str = "p1", domain_id: str = "site-a", **changes: object) -> PacketRecord:
    record = PacketRecord(
        domain_id=domain_id,
        packet_id=packet_id,
        cohort="health",
        kind="msp",
        content_hash=b"h" * 16,
        received_at_us=1_000,
        emitted_at_us=900,
        quarantined=False,
        quarantine_reason="",
        payload=packet_id.encode("utf-8", "replace"),
    )
    return replace(record, **changes)


def update(sequence: int, revision: int, cohort: str = "health", kind: int = 1) -> UpdateRecord:
    return UpdateRecord(
        sequence, cohort, kind, revision, 10 * sequence, b"hash", f"{cohort}{revision}".encode()
    )


async def live(store: Store, cohort: str = "health", page: int = 1000) -> list[StoredPacket]:
    got: list[StoredPacket] = []
    while part := await store.live_packets(
        cohort, after=got[-1].sequence if got else 0, limit=page
    ):
        assert len(part) <= page
        got += part
    return got


async def live_ids(store: Store, cohort: str = "health") -> list[str]:
    return [p.record.packet_id for p in await live(store, cohort)]


def test_public_names() -> None:
    assert storage.__all__ == [
        "JetStreamStore",
        "MemoryStore",
        "SqliteStore",
        "Store",
        "StoreError",
        "backup_database",
        "backup_log",
        "restore_backup",
        "restore_log",
    ]


# ONCE


async def test_append_keeps_every_field_and_the_order(store: Store) -> None:
    records = [
        packet("p1"),
        packet("p2", "sité-\N{GREEK SMALL LETTER ALPHA}", cohort="a\x00b", kind="pop", payload=b""),
        packet("p3", kind="ccs", quarantined=True, quarantine_reason="trust", emitted_at_us=-5),
    ]
    outcomes = await store.append(records)
    assert [o.status for o in outcomes] == ["stored"] * 3
    sequences = [o.sequence for o in outcomes]
    assert sequences == sorted(set(sequences))
    assert sequences[0] >= 1
    kept = await store.load()
    assert kept == [StoredPacket(s, r) for s, r in zip(sequences, records, strict=True)]
    (later,) = await store.append([packet("p4")])
    assert later.sequence > sequences[-1]
    assert await store.append([]) == []


async def test_repeat_gets_the_first_answer(store: Store) -> None:
    first = packet(quarantined=True, quarantine_reason="trust")
    (stored,) = await store.append([first])
    (again,) = await store.append([replace(first, received_at_us=5_000, quarantined=False)])
    assert again == replace(stored, status="duplicate")
    assert (again.received_at_us, again.quarantined, again.quarantine_reason) == (
        1_000,
        True,
        "trust",
    )
    (reused,) = await store.append([replace(first, content_hash=b"x" * 16, payload=b"other")])
    assert (reused.status, reused.sequence) == ("reused", stored.sequence)
    assert [p.record for p in await store.load()] == [first]


async def test_repeats_inside_one_call(store: Store) -> None:
    one, two = packet("p1"), packet("p2")
    other_site = packet("p1", "site-b")
    clash = replace(two, content_hash=b"x" * 16)
    outcomes = await store.append([one, one, two, clash, other_site, one])
    assert [o.status for o in outcomes] == [
        "stored",
        "duplicate",
        "stored",
        "reused",
        "stored",
        "duplicate",
    ]
    assert outcomes[1].sequence == outcomes[5].sequence == outcomes[0].sequence
    assert outcomes[3].sequence == outcomes[2].sequence
    assert [p.record for p in await store.load()] == [one, two, other_site]


async def test_concurrent_callers_store_a_packet_once(store: Store) -> None:
    records = [packet(f"p{i % 50}", f"site-{i % 50 % 7}") for i in range(400)]
    answers = await asyncio.gather(*(store.append([record]) for record in records))
    outcomes = [outcome for (outcome,) in answers]
    assert sum(o.status == "stored" for o in outcomes) == 50
    assert sum(o.status == "duplicate" for o in outcomes) == 350
    by_key: dict[str, set[int]] = {}
    for record, outcome in zip(records, outcomes, strict=True):
        by_key.setdefault(record.packet_id, set()).add(outcome.sequence)
    assert all(len(sequences) == 1 for sequences in by_key.values())
    assert len(await store.load()) == 50


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"packet_id": "\ud800"}, "packet_id"),
        ({"domain_id": "\udfff"}, "domain_id"),
        ({"cohort": None}, "cohort"),
        ({"received_at_us": 2**63}, "received_at_us"),
        ({"emitted_at_us": -(2**63) - 1}, "emitted_at_us"),
        ({"content_hash": b"short"}, "content_hash"),
        ({"kind": "xyz"}, "kind"),
        ({"payload": "text"}, "payload"),
    ],
)
async def test_a_bad_record_never_harms_its_neighbours(
    store: Store, changes: dict[str, object], field: str
) -> None:
    bad = replace(packet("bad"), **changes)
    (alone, mixed) = await asyncio.gather(
        store.append([packet("p0")]), store.append([packet("p1"), bad, packet("p2")])
    )
    assert alone[0].status == "stored"
    assert [o.status for o in mixed] == ["stored", "rejected", "stored"]
    assert mixed[1].problem.startswith(f"{field}: ")
    assert mixed[1].sequence == 0
    assert [p.record.packet_id for p in await store.load()] == ["p0", "p1", "p2"]
    assert store.stats().rejected == 1


CALLS = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from(["s1", "s2", "s3"]),
            st.sampled_from(["p1", "p2", "p3", "p4"]),
            st.sampled_from(["health", "retail"]),
            st.sampled_from(["msp", "pop", "ccs"]),
            st.sampled_from([b"a" * 16, b"b" * 16]),
            st.integers(0, 5),
            st.booleans(),
        ),
        max_size=6,
    ),
    max_size=8,
)
FLIPS = st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=6)
RETIREMENTS = st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=6)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(calls=CALLS, flips=FLIPS, retirements=RETIREMENTS, together=st.booleans())
def test_any_history_equals_the_model(  # noqa: PLR0915 - one history, one model
    make_store: Callable[[], Store],
    calls: list[list[tuple[str, str, str, str, bytes, int, bool]]],
    flips: list[tuple[int, bool]],
    retirements: list[tuple[int, bool]],
    *,
    together: bool,
) -> None:
    """A dictionary by key, and counters recomputed from scratch, say what must come out."""
    batches = [
        [
            packet(
                packet_id,
                domain,
                cohort=cohort,
                kind=kind,
                content_hash=content,
                emitted_at_us=emitted,
                received_at_us=100 * number + place,
                quarantined=held,
                quarantine_reason="r" if held else "",
            )
            for place, (domain, packet_id, cohort, kind, content, emitted, held) in enumerate(call)
        ]
        for number, call in enumerate(calls)
    ]

    async def scenario() -> None:  # noqa: PLR0912, PLR0915 - as above
        async with make_store() as store:
            if together:
                answers = await asyncio.gather(*(store.append(batch) for batch in batches))
            else:
                answers = [await store.append(batch) for batch in batches]
            model: dict[tuple[str, str], PacketRecord] = {}
            counters: dict[tuple[str, str], dict[str, int]] = {}
            for record, outcome in zip(
                itertools.chain(*batches), itertools.chain(*answers), strict=True
            ):
                key = (record.domain_id, record.packet_id)
                first = model.setdefault(key, record)
                if first is record:
                    expected = "stored"
                elif first.content_hash == record.content_hash:
                    expected = "duplicate"
                else:
                    expected = "reused"
                assert outcome.status == expected
                assert outcome.received_at_us == first.received_at_us
                assert outcome.quarantined == first.quarantined
                site = counters.setdefault((record.cohort, record.domain_id), {})
                word = record.kind if expected == "stored" else expected
                site[word] = site.get(word, 0) + 1
                site.setdefault("first", record.received_at_us)
                site["last"] = record.received_at_us
            kept = await store.load()
            assert [p.record for p in kept] == list(model.values())

            present = {p.sequence: p.record for p in kept}
            for index, held in flips:
                if not kept:
                    break
                sequence = kept[index % len(kept)].sequence
                old = present[sequence]
                changed = await store.set_quarantine(sequence, quarantined=held, reason="why")
                assert changed == (old.quarantined != held)
                present[sequence] = replace(
                    old, quarantined=held, quarantine_reason="why" if held else ""
                )
            assert await store.load() == [StoredPacket(s, r) for s, r in present.items()]

            for site in await store.sites():
                seen = counters.pop((site.cohort, site.domain_id))
                assert (site.msp_count, site.pop_count, site.ccs_count) == tuple(
                    seen.get(kind, 0) for kind in ("msp", "pop", "ccs")
                )
                assert site.duplicate_count == seen.get("duplicate", 0)
                assert site.reused_count == seen.get("reused", 0)
                assert (site.first_seen_us, site.last_seen_us) == (seen["first"], seen["last"])
                assert site.quarantined_count == sum(
                    r.quarantined and (r.cohort, r.domain_id) == (site.cohort, site.domain_id)
                    for r in present.values()
                )
            assert not counters

            sequences = [p.sequence for p in kept]
            retired: set[int] = set()
            for index, revived in retirements:
                chosen = sequences[index : index + 3]
                if revived and chosen:
                    record = present[chosen[0]]
                    mine = {
                        s
                        for s in retired
                        if present[s].cohort == record.cohort
                        and present[s].domain_id == record.domain_id
                    }
                    assert await store.revive(record.cohort, domain_id=record.domain_id) == len(
                        mine
                    )
                    retired -= mine
                else:
                    new = {s for s in chosen if not present[s].quarantined} - retired
                    assert await store.retire(chosen) == len(new)
                    retired |= new
            counts = await store.packet_counts()
            for cohort in sorted({r.cohort for r in present.values()}):
                expected_live = [
                    StoredPacket(s, r)
                    for s, r in present.items()
                    if r.cohort == cohort and not r.quarantined and s not in retired
                ]
                assert await live(store, cohort, page=2) == expected_live
                counted = [
                    r.kind for r in present.values() if r.cohort == cohort and not r.quarantined
                ]
                assert counts[cohort] == Counter(counted)
            assert await store.load() == [StoredPacket(s, r) for s, r in present.items()]

    asyncio.run(scenario())


# Reading


async def test_what_was_answered_is_seen_behind_catch_up(store: Store) -> None:
    await store.catch_up()
    await store.append([packet("p1")])
    await store.catch_up()
    assert [p.record.packet_id for p in await store.load()] == ["p1"]


async def test_load_in_pages(store: Store) -> None:
    await store.append([packet(f"p{i}", cohort="ab"[i % 2]) for i in range(25)])
    for cohort, expected in ((None, range(25)), ("a", range(0, 25, 2)), ("c", range(0))):
        got: list[StoredPacket] = []
        while part := await store.load(cohort, after=got[-1].sequence if got else 0, limit=4):
            assert len(part) <= 4
            got += part
        assert [p.record.packet_id for p in got] == [f"p{i}" for i in expected]


async def test_the_last_sequence_is_that_of_the_last_packet(store: Store) -> None:
    assert await store.last_sequence() == 0
    first, last = await store.append([packet("p1"), packet("p2", cohort="retail")])
    assert await store.last_sequence() == last.sequence > first.sequence
    await store.append([packet("p1")])
    assert await store.last_sequence() == last.sequence, "a repeat is no new packet"


async def test_packet_by_sequence_and_by_key(store: Store) -> None:
    (outcome,) = await store.append([packet()])
    by_key = await store.packet(PacketKey("site-a", "p1"))
    assert by_key == await store.packet(outcome.sequence)
    assert by_key is not None
    assert by_key.record == packet()
    assert await store.packet(PacketKey("p1", "site-a")) is None
    assert await store.packet(outcome.sequence + 1) is None
    assert await store.packet(0) is None


# What counts


async def test_a_retired_packet_is_known_and_not_live(store: Store) -> None:
    first, second, third = await store.append([packet(f"p{n}") for n in (1, 2, 3)])
    assert await store.retire([first.sequence, third.sequence, 99]) == 2
    assert await store.retire([first.sequence]) == 0
    assert await live_ids(store) == ["p2"]
    assert [p.record.packet_id for p in await store.load()] == ["p1", "p2", "p3"]
    (again,) = await store.append([packet("p1")])
    assert again == replace(first, status="duplicate")
    assert await store.retire([]) == 0
    assert await store.revive("health", domain_id="site-b") == 0
    assert await store.revive("retail") == 0
    assert await store.revive("health") == 2
    assert [p.sequence for p in await live(store)] == [o.sequence for o in (first, second, third)]


async def test_many_packets_are_retired_and_revived(store: Store) -> None:
    outcomes = await store.append([packet(f"p{n}") for n in range(1300)])
    assert await store.retire([o.sequence for o in outcomes[:1299]]) == 1299
    assert await live_ids(store) == ["p1299"]
    assert await store.revive("health", domain_id="site-a") == 1299
    assert len(await live(store)) == 1300


async def test_quarantine_and_retirement_exclude_each_other(store: Store) -> None:
    (outcome,) = await store.append([packet()])
    await store.set_quarantine(outcome.sequence, quarantined=True)
    assert await store.retire([outcome.sequence]) == 0
    assert await live_ids(store) == []
    await store.set_quarantine(outcome.sequence, quarantined=False)
    await store.retire([outcome.sequence])
    await store.set_quarantine(outcome.sequence, quarantined=True)
    assert await store.revive("health") == 0
    await store.set_quarantine(outcome.sequence, quarantined=False)
    assert await live_ids(store) == ["p1"], "a packet that is released is live"


async def test_only_what_does_not_count_and_is_old_is_forgotten(store: Store) -> None:
    records = {
        "live": packet("live"),
        "old": packet("old"),
        "received late": packet("received late", received_at_us=5_000),
        "emitted late": packet("emitted late", emitted_at_us=5_000),
        "elsewhere": packet("elsewhere", cohort="retail"),
        "held": packet("held", kind="pop", quarantined=True, quarantine_reason="trust"),
        "last": packet("last"),
    }
    outcomes = dict(zip(records, await store.append(list(records.values())), strict=True))
    await store.retire([outcomes[name].sequence for name in records if name != "live"])
    when = {"received_before_us": 2_000, "emitted_before_us": 1_000}
    assert await store.forgotten() == {}
    assert await store.forget("unknown", **when) == 0
    assert await store.forgotten() == {}
    assert await store.forget("health", **when) == 2
    assert await store.forget("health", **when) == 0
    # The last one stays although it is old: the sequences go on behind it.
    left = ["live", "received late", "emitted late", "elsewhere", "last"]
    assert [p.record.packet_id for p in await store.load()] == left
    assert await store.forgotten() == {"health": 1_000}
    (site,) = await store.sites("health")
    assert (site.msp_count, site.pop_count, site.quarantined_count) == (5, 0, 0)
    assert await store.packet_counts() == {"health": {"msp": 5}, "retail": {"msp": 1}}
    (known, new) = await store.append([packet("last"), packet("old")])
    assert (known.status, new.status) == ("duplicate", "stored")
    assert new.sequence > outcomes["last"].sequence


async def test_packets_are_forgotten_in_parts(store: Store) -> None:
    outcomes = await store.append([packet(f"p{n}") for n in range(600)])
    await store.retire([o.sequence for o in outcomes])
    when = {"received_before_us": 2_000, "emitted_before_us": 1_000}
    gone = [await store.forget("health", limit=250, **when) for _ in range(4)]
    assert gone == [250, 250, 99, 0]
    assert [p.record.packet_id for p in await store.load()] == ["p599"]
    await store.forget("health", received_before_us=500, emitted_before_us=500)
    assert await store.forgotten() == {"health": 1_000}, "the time never goes back"


async def test_sequences_are_never_given_again(make_store: Callable[[], Store]) -> None:
    async with make_store() as store:
        outcomes = await store.append([packet(f"p{n}") for n in range(3)])
        await store.retire([o.sequence for o in outcomes])
        await store.forget("health", received_before_us=9_999, emitted_before_us=9_999)
        (later,) = await store.append([packet("later")])
        assert later.sequence > outcomes[-1].sequence


async def test_quarantine_lists_and_releases(store: Store) -> None:
    outcomes = await store.append(
        [packet(f"p{i}", cohort="ab"[i % 2], quarantined=i != 3) for i in range(6)]
    )
    ids = [p.record.packet_id for p in await store.quarantined()]
    assert ids == ["p0", "p1", "p2", "p4", "p5"]
    assert [p.record.packet_id for p in await store.quarantined("b", limit=1)] == ["p1"]
    page = await store.quarantined("b", after=outcomes[1].sequence)
    assert [p.record.packet_id for p in page] == ["p5"]
    assert await store.set_quarantine(PacketKey("site-a", "p5"), quarantined=False, reason="ok")
    assert not await store.set_quarantine(PacketKey("site-a", "p5"), quarantined=False)
    released = await store.packet(outcomes[5].sequence)
    assert released is not None
    assert (released.record.quarantined, released.record.quarantine_reason) == (False, "")
    with pytest.raises(UnknownPacketError) as caught:
        await store.set_quarantine(10_000, quarantined=True)
    assert caught.value.packet == 10_000


# Updates


async def test_publish_and_read_back(store: Store) -> None:
    assert await store.next_update_sequence() == 1
    assert await store.latest_updates() == []
    first = [update(1, 1), update(2, 1, kind=2), update(3, 2)]
    assert await store.publish(first) == [1, 2, 3]
    second = [update(4, 1, "retail"), update(5, 3)]
    assert await store.publish(second) == [4, 5]
    assert await store.publish([]) == []
    assert await store.next_update_sequence() == 6
    assert await store.latest_updates() == [first[1], *second]
    assert await store.updates("health", 1) == [first[0], first[2], second[1]]
    assert await store.updates("health", 1, after_revision=1, limit=1) == [first[2]]
    assert await store.updates("nobody", 1) == []
    assert await store.updates_since(2) == [first[2], *second]
    assert await store.updates_since(0, limit=2) == first[:2]
    assert await store.update("health", 1, 2) == first[2]
    assert await store.update("health", 1, 9) is None


@pytest.mark.parametrize(
    "wrong",
    [
        [update(3, 4)],
        [update(3, 2)],
        [update(4, 3)],
        [update(2, 3)],
        [update(3, 3), update(3, 4)],
        [update(3, 3), update(4, 3)],
        [update(3, 3), update(4, 2, "retail")],
    ],
)
async def test_the_fence_writes_nothing(store: Store, wrong: list[UpdateRecord]) -> None:
    await store.publish([update(1, 1), update(2, 2)])
    with pytest.raises(RevisionConflictError) as caught:
        await store.publish(wrong)
    failed = wrong[-1]
    assert (caught.value.cohort, caught.value.kind) == (failed.cohort, failed.kind)
    assert (caught.value.revision, caught.value.sequence) == (failed.revision, failed.sequence)
    assert (caught.value.expected_revision, caught.value.expected_sequence) != (
        failed.revision,
        failed.sequence,
    )
    assert [u.sequence for u in await store.updates_since(0)] == [1, 2]
    assert await store.publish([update(3, 3)]) == [3]


async def test_what_does_not_hold_is_not_written(store: Store) -> None:
    with pytest.raises(SpecChangedError, match="the spec of cohort 'health'"):
        await store.publish([update(1, 1)], holds=lambda: False)
    with pytest.raises(SpecChangedError, match="the spec of cohort 'health'"):
        await store.put_cohort("health", b"spec", 1, holds=lambda: False)
    assert await store.updates_since(0) == []
    assert await store.cohorts() == []
    assert await store.publish([update(1, 1)], holds=lambda: True) == [1]
    await store.put_cohort("health", b"spec", 1, holds=lambda: True)
    assert [(c.name, c.spec) for c in await store.cohorts()] == [("health", b"spec")]


async def test_of_two_publishers_one_is_fenced_and_appends_go_through(store: Store) -> None:
    results = await asyncio.gather(
        store.append([packet("p1")]),
        store.publish([update(1, 1)]),
        store.publish([update(1, 1)]),
        store.append([packet("p2")]),
        return_exceptions=True,
    )
    assert results[1] == [1]
    assert isinstance(results[2], RevisionConflictError)
    assert [p.record.packet_id for p in await store.load()] == ["p1", "p2"]


async def test_retention_keeps_the_newest(store: Store) -> None:
    await store.publish([update(i, i) for i in range(1, 8)] + [update(8, 1, kind=2)])
    assert await store.oldest_revision("health", 1) == 1
    assert await store.trim_updates("health", 1, keep=3) == 4
    assert await store.trim_updates("health", 1, keep=3) == 0
    assert await store.oldest_revision("health", 1) == 5
    assert await store.oldest_revision("health", 2) == 1
    assert await store.oldest_revision("nobody", 1) is None
    keys = [("health", 1), ("health", 2), ("nobody", 1)]
    assert await store.oldest_updates(keys) == {("health", 1): (5, 5), ("health", 2): (1, 8)}
    assert [u.revision for u in await store.updates("health", 1)] == [5, 6, 7]
    with pytest.raises(ValueError, match="keep"):
        await store.trim_updates("health", 1, keep=0)
    assert await store.publish([update(9, 8)]) == [9]


async def test_many_updates_are_trimmed(store: Store) -> None:
    await store.publish([update(n, n) for n in range(1, 406)])
    assert await store.trim_updates("health", 1, keep=5) == 400
    assert [u.revision for u in await store.updates("health", 1)] == list(range(401, 406))


# Cohorts, sites, dictionaries


async def test_cohorts_are_replaced(store: Store) -> None:
    await store.put_cohort("b", b"spec", 1)
    await store.put_cohort("a", b"one", 1)
    await store.put_cohort("a", b"two", 2)
    assert [(c.name, c.spec, c.revision) for c in await store.cohorts()] == [
        ("a", b"two", 2),
        ("b", b"spec", 1),
    ]


async def test_sites_in_order_in_pages_with_reputation(store: Store) -> None:
    names = ["z", "a", "\N{LATIN SMALL LETTER E WITH ACUTE}", "\U0001f600", "\uffee"]
    await store.append([packet("p", n, cohort=c) for n in names for c in ("y", "x")])
    everything = await store.sites()
    assert [(s.cohort, s.domain_id) for s in everything] == sorted(
        (c, n) for n in names for c in ("x", "y")
    )
    got = await store.sites(limit=3)
    while part := await store.sites(after=(got[-1].cohort, got[-1].domain_id), limit=3):
        got += part
    assert got == everything
    assert {s.domain_id for s in await store.sites("x")} == set(names)
    await store.put_reputations("x", {"a": 0.1, "z": 1 / 3, "stranger": 0.5})
    reputations = {(s.cohort, s.domain_id): s.reputation for s in await store.sites()}
    assert reputations["x", "a"] == 0.1
    assert reputations["x", "z"] == 1 / 3
    assert reputations["y", "a"] is None
    assert ("x", "stranger") not in reputations
    with pytest.raises(ValueError, match="finite"):
        await store.put_reputations("x", {"a": 0.9, "z": float("nan")})
    assert (await store.sites("x", limit=1))[0].reputation == 0.1


async def test_reputation_of_many_sites_survives_new_packets(store: Store) -> None:
    names = [f"s{i:04d}" for i in range(600)]
    await store.append([packet("p", n) for n in names])
    await store.put_reputations("health", {n: i / 7 for i, n in enumerate(names)})
    await store.append([packet("q", n) for n in names])
    assert [s.reputation for s in await store.sites()] == [i / 7 for i in range(600)]
    assert all(s.msp_count == 2 for s in await store.sites())


async def test_a_dictionary_never_changes(store: Store) -> None:
    await store.put_dictionary(7, b"data", 100)
    await store.put_dictionary(7, b"data", 200)
    await store.put_dictionary(3, b"other", 300)
    with pytest.raises(DictionaryConflictError) as caught:
        await store.put_dictionary(7, b"changed", 400)
    assert caught.value.dictionary_id == 7
    assert await store.dictionaries() == [
        DictionaryRecord(3, b"other", 300),
        DictionaryRecord(7, b"data", 100),
    ]


# Lifecycle


async def test_stats(store: Store) -> None:
    one = packet(payload=b"12345")
    await store.append([one, packet("p2", payload=b"1")])
    await store.append([one, replace(one, content_hash=b"x" * 16)])
    stats = store.stats()
    assert (stats.groups, stats.failed_groups) == (2, 0)
    assert (stats.records_stored, stats.payload_bytes_stored) == (2, 6)
    assert (stats.duplicates, stats.reused, stats.rejected) == (1, 1, 0)
    assert (stats.largest_group, stats.last_group) == (2, 2)
    assert (stats.pending_records, stats.pending_bytes) == (0, 0)


async def test_a_closed_store_says_so(make_store: Callable[[], Store]) -> None:
    store = make_store()
    calls: list[Callable[[], object]] = [
        lambda: store.append([packet()]),
        store.load,
        lambda: store.publish([]),
        store.sites,
    ]

    async def refused() -> None:
        for call in calls:
            with pytest.raises(StoreUnavailableError) as caught:
                await call()  # type: ignore[misc]
            assert caught.value.cause == "closed"
            assert isinstance(caught.value, StoreError)
        with pytest.raises(StoreUnavailableError):
            _ = store.history_epoch

    await refused()
    async with store:
        await store.append([packet()])
        assert len(store.history_epoch) == 32
    await store.close()
    await refused()


async def test_histories_have_their_own_names(make_store: Callable[[], Store]) -> None:
    async with make_store() as one, make_store() as two:
        assert one.history_epoch != two.history_epoch


async def test_close_answers_what_was_accepted(make_store: Callable[[], Store]) -> None:
    store = make_store()
    await store.open()
    waiting = [asyncio.ensure_future(store.append([packet(f"p{i}")])) for i in range(200)]
    await asyncio.sleep(0)  # lets each reach the store
    await store.close()
    answers = await asyncio.gather(*waiting)
    assert all(outcome.status == "stored" for (outcome,) in answers)


async def test_cancelling_one_caller_leaves_the_others(store: Store) -> None:
    tasks = [asyncio.ensure_future(store.append([packet(f"p{i}")])) for i in range(20)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, list) for result in results) >= 19
    (again,) = await store.append([packet("p19")])
    assert again.status == "duplicate"
    assert store.stats().pending_records == 0


async def test_memory_says_that_nothing_is_durable(caplog: pytest.LogCaptureFixture) -> None:
    async with MemoryStore():
        pass
    (message,) = caplog.messages
    assert "nothing is durable" in message


# Privacy ledger


def spend(
    number: int, *, cohort: str = "health", period: int | None = None, rho: float = 0.25
) -> SpendRecord:
    at = 10 * number if period is None else period
    return SpendRecord(cohort, number, at, 1_000 * number, rho, "epoch")


async def test_what_is_spent_is_read_back_and_added_up(store: Store) -> None:
    assert await store.ledger_totals() == {}
    assert await store.spends("health") == []
    entries = [spend(n, rho=0.1 * n) for n in range(1, 6)]
    for entry in entries:
        await store.spend(entry)
    await store.spend(spend(1, cohort="bank", period=-3))
    assert await store.spends("health") == entries
    assert await store.spends("health", after_number=2, limit=2) == entries[2:4]
    assert await store.spends("health", after_number=5) == []
    totals = await store.ledger_totals()
    assert totals["health"] == LedgerTotal(5, pytest.approx(1.5), 5, 50, "epoch")
    assert totals["bank"] == LedgerTotal(1, 0.25, 1, -3, "epoch")


@pytest.mark.parametrize(
    "wrong", [spend(1), spend(2), spend(4), spend(3, period=20), spend(3, period=1)]
)
async def test_the_fence_of_the_ledger_lets_nothing_by(store: Store, wrong: SpendRecord) -> None:
    held = [spend(1), spend(2)]
    for entry in held:
        await store.spend(entry)
    with pytest.raises(LedgerConflictError, match="expected entry 3; the last is of period 20"):
        await store.spend(wrong)
    assert await store.spends("health") == held
    with pytest.raises(LedgerConflictError, match="expected entry 1; there is none yet"):
        await store.spend(spend(2, cohort="new"))
    assert set(await store.ledger_totals()) == {"health"}


async def test_of_two_who_spend_for_one_period_one_is_refused(store: Store) -> None:
    found = await asyncio.gather(
        *(store.spend(spend(1, period=7)) for _ in range(8)), return_exceptions=True
    )
    assert [error for error in found if error is None] == [None]
    assert all(isinstance(error, LedgerConflictError | None) for error in found)
    assert len(await store.spends("health")) == 1


@pytest.mark.parametrize("rho", [-1e-9, -1.0, float("nan"), float("inf")])
async def test_no_cost_takes_anything_back(store: Store, rho: float) -> None:
    with pytest.raises(ValueError, match="cost"):
        await store.spend(spend(1, rho=rho))
    assert await store.ledger_totals() == {}


async def test_a_ledger_is_opened_by_an_entry_that_costs_nothing(store: Store) -> None:
    await store.spend(spend(1, rho=0.0))
    opened = (await store.ledger_totals())["health"]
    assert (opened.entries, opened.rho, opened.last_number) == (0, 0.0, 1)
    await store.spend(spend(2, rho=0.25))
    paid = (await store.ledger_totals())["health"]
    assert (paid.entries, paid.rho, paid.last_number) == (1, 0.25, 2)
