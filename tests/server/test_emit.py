"""Emit and EmitStream: taken once, answered when durable, a bad neighbour harms nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from server_harness import (
    DEADLINE_S,
    Client,
    ccs,
    changed,
    eventually,
    identity,
    msp,
    packet_keys,
    pop,
    refusal_of,
    rows,
    spec,
    trained_dictionary,
    zstd,
)

from fmi.v1 import admin_service_pb2, error_pb2, packet_pb2, update_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.storage import SqliteStore
from fmi_server.testing import running_server

ACCEPTED = wire_pb2.EMIT_STATUS_ACCEPTED
DUPLICATE = wire_pb2.EMIT_STATUS_DUPLICATE
REFUSED = wire_pb2.EMIT_STATUS_REFUSED


def plain_batch(*packets: packet_pb2.Packet, batch_id: int = 0) -> wire_pb2.EmitStreamRequest:
    return wire_pb2.EmitStreamRequest(
        batch_id=batch_id, packets=packet_pb2.PacketBatch(packets=packets)
    )


def enveloped(
    envelope: wire_pb2.EncodedPackets, *, batch_id: int = 0
) -> wire_pb2.EmitStreamRequest:
    return wire_pb2.EmitStreamRequest(batch_id=batch_id, encoded=envelope)


async def answer_to(client: Client, request: wire_pb2.EmitStreamRequest):
    call = client.interchange.EmitStream(timeout=DEADLINE_S)
    await call.write(request)
    answer = await call.read()
    call.cancel()
    return answer


@pytest.mark.parametrize("make", [msp, pop, ccs])
async def test_each_type_is_accepted_and_on_disk_when_it_is_answered(client, data_dir, make):
    packet = make("site-7")
    (result,) = await client.emit(packet)

    assert (result.status, result.index, result.sequence) == (ACCEPTED, 0, 1)
    assert result.packet_id == packet.header.packet_id
    assert not result.warnings
    assert not result.HasField("refusal")
    ((stored,)) = rows(data_dir, "packets")["packets"]
    assert stored[1:4] == ("site-7", packet.header.packet_id, "default")
    assert packet_pb2.Packet.FromString(stored[-1]) == packet


async def test_a_repeat_gets_the_first_answer_marked_duplicate(client, data_dir):
    packet = msp()
    (first,) = await client.emit(packet)
    before = rows(data_dir, "packets")
    (second,) = await client.emit(packet)

    assert second.status == DUPLICATE
    assert (second.sequence, second.received_at) == (first.sequence, first.received_at)
    assert rows(data_dir, "packets") == before
    site = (await client.sites())["default:site-1"]
    assert (site.packets["msp"], site.duplicates) == (1, 1)


async def test_a_repeat_is_known_however_it_is_sent(client, data_dir):
    """Plain, in an envelope, in a batch and after a restart it is the same packet."""
    packet = msp(metrics={f"m{i}": float(i) for i in range(30)})
    await client.emit(packet)
    for envelope in (identity(packet), zstd(packet)):
        (result,) = (await client.emit_encoded(envelope)).results
        assert result.status == DUPLICATE
    (answer,) = await client.batches(plain_batch(packet, packet))
    assert [r.status for r in answer.exceptions] == [DUPLICATE, DUPLICATE]
    assert len(packet_keys(data_dir)) == 1


async def test_a_repeat_is_known_after_a_restart(data_dir):
    packet = msp()
    async with running_server(data_dir) as server, Client(server.target) as client:
        (first,) = await client.emit(packet)
    async with running_server(data_dir) as server, Client(server.target) as client:
        (second,) = await client.emit(packet)
    assert (second.status, second.sequence) == (DUPLICATE, first.sequence)


async def test_a_repeat_inside_a_batch_counts_once(client, data_dir):
    packet = msp()
    (answer,) = await client.batches(plain_batch(packet, msp("site-2"), packet))
    assert (answer.packets, answer.accepted) == (3, 2)
    assert [(r.index, r.status) for r in answer.exceptions] == [(2, DUPLICATE)]
    assert len(packet_keys(data_dir)) == 2


async def test_many_repeats_at_once_count_once(client, data_dir):
    packet = msp()
    results = await asyncio.gather(*(client.emit(packet) for _ in range(50)))
    statuses = [result.status for (result,) in results]
    assert sorted(statuses) == [ACCEPTED] + [DUPLICATE] * 49
    assert {result.sequence for (result,) in results} == {1}
    assert len(packet_keys(data_dir)) == 1


async def test_a_reused_id_is_refused_and_the_first_content_stays(client, data_dir):
    packet = msp()
    await client.emit(packet)
    other = changed(packet, lambda p: p.msp.controller.update({"tau": 0.1}))
    refusal = await refusal_of(client.emit(other))

    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "PACKET_ID_REUSED",
    )
    assert refusal.metadata == {"domain_id": "site-1", "packet_id": packet.header.packet_id}
    assert refusal.retry_s is None
    ((stored,)) = rows(data_dir, "packets")["packets"]
    assert packet_pb2.Packet.FromString(stored[-1]) == packet


async def test_an_id_belongs_to_its_site(client):
    """Two sites may use one id: nobody can block another's packet by guessing it."""
    first = msp("site-1")
    second = changed(first, lambda p: setattr(p.header, "domain_id", "site-2"))
    assert [r.status for r in await client.emit(first, second)] == [ACCEPTED, ACCEPTED]


@pytest.mark.parametrize("encode", [identity, zstd])
async def test_an_envelope_has_a_result_for_each_packet(client, data_dir, encode):
    packets = [msp("site-1"), msp("", controller={"tau": 1.0}), pop("site-2"), ccs("site-3")]
    response = await client.emit_encoded(encode(*packets))

    assert [r.index for r in response.results] == [0, 1, 2, 3]
    assert [r.status for r in response.results] == [ACCEPTED, REFUSED, ACCEPTED, ACCEPTED]
    refused = response.results[1]
    assert refused.refusal.reason == error_pb2.ERROR_REASON_CONTRACT_VIOLATION
    assert [(v.field, v.rule_id) for v in refused.refusal.violations] == [
        ("header.domain_id", "required")
    ]
    assert refused.sequence == 0
    assert not refused.HasField("received_at")
    assert [r.sequence for r in response.results if r.sequence] == [1, 2, 3]
    assert [key[1] for key in packet_keys(data_dir)] == [
        p.header.packet_id for p in (packets[0], packets[2], packets[3])
    ]


async def test_an_envelope_of_one_refused_packet_fails_like_the_packet(client):
    refusal = await refusal_of(client.emit_encoded(identity(msp(""))))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "CONTRACT_VIOLATION",
    )


@pytest.mark.parametrize("sent", ["alone", "envelope of one", "envelope", "stream", "bad batch"])
async def test_what_is_refused_is_counted_once_however_it_is_sent(sent):
    async with running_server() as server, Client(server.target) as client:
        counted = 'fmi_refusals_total{reason="CONTRACT_VIOLATION"}'
        match sent:
            case "alone":
                await refusal_of(client.emit(msp("")))
            case "envelope of one":
                await refusal_of(client.emit_encoded(identity(msp(""))))
            case "envelope":
                await client.emit_encoded(identity(msp("a"), msp("")))
            case "stream":
                answer = await answer_to(client, plain_batch(msp("a"), msp("")))
                assert answer.exceptions[0].HasField("refusal")
            case "bad batch":
                counted = 'fmi_refusals_total{reason="ENVELOPE_MALFORMED"}'
                garbage = wire_pb2.EncodedPackets(encoding=1, uncompressed_size=1, data=b"\xff")
                answer = await answer_to(client, enveloped(garbage))
                assert answer.HasField("refusal")
        assert server.service.telemetry.snapshot()[counted] == 1.0


async def test_a_dictionary_is_used_in_an_envelope(client, data_dir):
    dictionary = trained_dictionary()
    request = admin_service_pb2.RegisterDictionaryRequest(data=dictionary.as_bytes())
    await client.admin.RegisterDictionary(request, timeout=DEADLINE_S)
    packet = msp(metrics={f"m{j}": 1.0 for j in range(20)})
    envelope = zstd(packet, dictionary=dictionary)
    assert envelope.dictionary_id == dictionary.dict_id() != 0
    (result,) = (await client.emit_encoded(envelope)).results
    assert result.status == ACCEPTED
    assert packet_keys(data_dir) == [("site-1", packet.header.packet_id)]


# Batches


@pytest.mark.parametrize("kind", ["plain", "identity", "zstd"])
async def test_batches_are_answered_in_order_and_a_good_one_is_a_few_bytes(client, data_dir, kind):
    make = {
        "plain": plain_batch,
        "identity": lambda *p, batch_id: enveloped(identity(*p), batch_id=batch_id),
        "zstd": lambda *p, batch_id: enveloped(zstd(*p), batch_id=batch_id),
    }[kind]
    batches = [[msp(f"site-{i}") for i in range(40)] for _ in range(5)]
    answers = await client.batches(
        *(make(*packets, batch_id=100 + number) for number, packets in enumerate(batches))
    )
    assert [a.batch_id for a in answers] == [100, 101, 102, 103, 104]
    assert all((a.packets, a.accepted, len(a.exceptions)) == (40, 40, 0) for a in answers)
    assert all(a.ByteSize() < 16 for a in answers)
    expected = [(p.header.domain_id, p.header.packet_id) for batch in batches for p in batch]
    assert packet_keys(data_dir) == expected


async def test_a_batch_is_answered_after_its_commit(client, data_dir):
    """When the answer is there, a fresh connection of another program sees every packet."""
    call = client.interchange.EmitStream(timeout=DEADLINE_S)
    count = 0
    for size in (1, 50, 3):
        await call.write(plain_batch(*(msp(f"site-{i}") for i in range(size))))
        answer = await call.read()
        count += size
        assert answer.accepted == size
        assert len(packet_keys(data_dir)) == count
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_the_good_items_of_a_batch_are_kept(client, data_dir):
    first = msp("site-1")
    reused = changed(first, lambda p: p.msp.controller.update({"tau": 0.5}))
    packets = [
        first,
        msp("site-2", controller={"tau": float("nan")}),
        msp("site-3"),
        first,
        reused,
        pop("site-4"),
    ]
    (answer,) = await client.batches(plain_batch(*packets))
    assert (answer.packets, answer.accepted) == (6, 3)
    assert [(r.index, r.status, r.refusal.reason) for r in answer.exceptions] == [
        (1, REFUSED, error_pb2.ERROR_REASON_CONTRACT_VIOLATION),
        (3, DUPLICATE, 0),
        (4, REFUSED, error_pb2.ERROR_REASON_PACKET_ID_REUSED),
    ]
    assert answer.exceptions[0].packet_id == packets[1].header.packet_id
    assert [key[0] for key in packet_keys(data_dir)] == ["site-1", "site-3", "site-4"]


async def test_a_bad_batch_does_not_end_the_stream(client, data_dir):
    garbled = zstd(msp())
    garbled.data = b"\x00" * 20
    requests = [
        plain_batch(msp("site-1"), batch_id=1),
        enveloped(garbled, batch_id=2),
        wire_pb2.EmitStreamRequest(batch_id=3),
        wire_pb2.EmitStreamRequest(batch_id=4, packets=packet_pb2.PacketBatch()),
        plain_batch(msp("site-2"), batch_id=5),
    ]
    answers = await client.batches(*requests)
    assert [(a.batch_id, a.accepted, a.refusal.reason) for a in answers] == [
        (1, 1, 0),
        (2, 0, error_pb2.ERROR_REASON_ENVELOPE_MALFORMED),
        (3, 0, error_pb2.ERROR_REASON_CONTRACT_VIOLATION),
        (4, 0, error_pb2.ERROR_REASON_ENVELOPE_MALFORMED),
        (5, 1, 0),
    ]
    assert [key[0] for key in packet_keys(data_dir)] == ["site-1", "site-2"]


async def test_a_warning_is_told_though_the_packet_is_taken(client):
    wrong = msp(schema_hash="0" * 64)
    (single,) = await client.emit(wrong)
    assert single.status == ACCEPTED
    assert "header.schema_hash" in single.warnings[0]
    (answer,) = await client.batches(plain_batch(msp("a"), msp("b", schema_hash="0" * 64)))
    assert (answer.packets, answer.accepted) == (2, 1)
    ((told,)) = answer.exceptions
    assert (told.index, told.status) == (1, ACCEPTED)
    assert "GetCohortSpec" in told.warnings[0]


async def test_many_streams_and_single_emits_at_once_lose_nothing(client, data_dir):
    sent: list[tuple[str, str]] = []

    async def stream(number: int) -> None:
        batches = [[msp(f"s{number}-{i}") for i in range(25)] for _ in range(4)]
        sent.extend((p.header.domain_id, p.header.packet_id) for b in batches for p in b)
        answers = await client.batches(*(plain_batch(*batch) for batch in batches))
        assert [a.accepted for a in answers] == [25] * 4

    async def single(number: int) -> None:
        packets = [msp(f"u{number}") for _ in range(10)]
        sent.extend((p.header.domain_id, p.header.packet_id) for p in packets)
        assert {r.status for r in await client.emit(*packets)} == {ACCEPTED}

    await asyncio.gather(*(stream(n) for n in range(8)), *(single(n) for n in range(8)))
    stored = packet_keys(data_dir)
    assert len(stored) == len(set(stored)) == 8 * 100 + 8 * 10
    assert sorted(stored) == sorted(sent)
    sequences = [row[0] for row in rows(data_dir, "packets")["packets"]]
    assert sequences == sorted(set(sequences))


async def test_a_stream_that_its_client_drops_leaves_the_server_well(client, server, data_dir):
    for _ in range(5):
        call = client.interchange.EmitStream()
        await call.write(plain_batch(msp()))
        assert (await call.read()).accepted == 1
        await call.write(plain_batch(msp(), msp()))
        call.cancel()
    assert (await client.emit(msp("after")))[0].status == ACCEPTED
    assert packet_keys(data_dir)[-1][0] == "after" or len(packet_keys(data_dir)) >= 6
    await eventually(lambda: server.service._inflight == 0)


async def test_a_full_cohort_list_refuses_only_what_would_open_another(data_dir):
    """A good item is never lost because of a bad neighbour, and the stream goes on."""
    async with (
        running_server(data_dir, max_cohorts=1) as server,
        Client(server.target) as client,
    ):
        packets = [msp("s", "one"), msp("s", "two"), msp("s", "three"), msp("t", "one")]
        first, second = await client.batches(plain_batch(*packets), plain_batch(msp("u", "one")))
        assert first.accepted == 1  # what opened a cohort is told of
        opening, *refused = first.exceptions
        assert (opening.index, opening.status) == (0, ACCEPTED)
        assert [(r.index, r.status, r.refusal.reason) for r in refused] == [
            (1, REFUSED, error_pb2.ERROR_REASON_COHORT_UNKNOWN),
            (2, REFUSED, error_pb2.ERROR_REASON_COHORT_UNKNOWN),
        ]
        assert second.accepted == 1
        assert set(await client.cohorts()) == {"one"}


# A caller that gives up


class HeldStore(SqliteStore):
    """Answers appends only while the gate is open; they are carried out all the same."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate = asyncio.Event()
        self.gate.set()
        self.stored = asyncio.Event()

    async def append(self, records):
        answer = await super().append(records)
        self.stored.set()
        await self.gate.wait()
        return answer


@pytest.mark.parametrize("way", ["packet", "batch"])
async def test_a_packet_counts_though_its_caller_gave_up_waiting(tmp_path, way):
    """DURABLE and ONCE: what was stored counts, also where the answer met nobody."""
    store = HeldStore(tmp_path / "held.sqlite3")
    async with running_server(store=store) as server, Client(server.target) as client:
        await client.put_spec(spec("care"))
        packets = [msp(f"site-{i}", "care") for i in range(4)]
        await client.emit(*packets[:3])
        store.stored.clear()
        store.gate.clear()
        if way == "packet":
            request = wire_pb2.EmitRequest(packet=packets[3])
        else:
            request = wire_pb2.EmitRequest(encoded=identity(packets[3], msp("site-3", "care")))
        call = asyncio.ensure_future(client.interchange.Emit(request, timeout=DEADLINE_S))
        async with asyncio.timeout(DEADLINE_S):
            await store.stored.wait()
        call.cancel()
        await eventually(lambda: server.service._inflight == 0)
        store.gate.set()

        # The client tries again, as the SDK does, and is told that the packet is there.
        (again,) = await client.emit(packets[3])
        assert again.status == DUPLICATE

        async def counted() -> bool:
            await client.release("care")
            return (await client.update("care")).prior_update.estimates["tau"].sites == 4

        await eventually(counted)


async def test_a_large_batch_counts_though_its_caller_gave_up_waiting(server, client, monkeypatch):
    """Past a bound of uncounted bytes who emits waits for the cohort, and may be gone before it is free."""
    bound = 100_000
    monkeypatch.setattr("fmi_server.releases.MAX_UNCOUNTED_BYTES", bound)
    await client.put_spec(spec("care"))
    work = server.service.releaser._work["care"]
    packets = [msp(f"site-{i}", "care") for i in range(5000)]
    async with work.lock:
        request = wire_pb2.EmitRequest(encoded=identity(*packets))
        call = client.interchange.Emit(request)
        await eventually(lambda: work.uncounted_bytes >= bound)
        call.cancel()
        await eventually(lambda: server.service._inflight == 0)

    async def counted() -> bool:
        await client.release("care")
        return (await client.update("care")).prior_update.estimates["tau"].sites == 5000

    await eventually(counted)


async def test_packets_of_different_ages_count_with_the_newest(client):
    """ONE SITE, ONE VOTE: a packet that arrives late does not undo a newer one."""
    await client.put_spec(spec("care", aggregation={"vote_min_sites": 1}))
    new = msp("site-1", "care", controller={"tau": 2.0})
    old = msp("site-1", "care", controller={"tau": 1.0})
    old.header.emitted_at.FromSeconds(new.header.emitted_at.seconds - 100)
    await client.emit(new, old)
    await client.release("care")
    prior = (await client.update("care", update_pb2.UPDATE_KIND_PRIOR)).prior_update
    assert dict(prior.prior) == {"tau": 2.0}
