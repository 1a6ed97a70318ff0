"""Quotas over a real server: who takes too much is told when to come again, and nobody else is."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import weakref

import grpc
import pytest
from identity_harness import OPERATOR, Office, calling, secured
from server_harness import DEADLINE_S, Client, Refusal, eventually, identity, msp

from fmi.v1 import admin_service_pb2 as admin_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import packet_pb2
from fmi.v1 import registry_service_pb2 as registry_pb2
from fmi_client import AsyncFMIClient, QuotaExceededError, RetryPolicy, TLSConfig
from fmi_server import errors, quotas
from fmi_server.config import DEFAULT_QUOTA
from fmi_server.quotas import Quota
from fmi_server.testing import running_server
from fmi_server.transport import interchange

EMIT = "fmi.v1.InterchangeService/Emit"
STREAM = "fmi.v1.InterchangeService/EmitStream"
SUBSCRIBE = "fmi.v1.InterchangeService/Subscribe"
CONTRACT = "fmi.v1.RegistryService/GetContract"
VALIDATE = "fmi.v1.RegistryService/ValidatePacket"
SLOW = 0.001
"""A rate so low that what was taken is not paid for while a test runs."""


@pytest.fixture(autouse=True)
def _told_at_once(monkeypatch):
    monkeypatch.setattr(quotas, "STALL_S", 0.01)
    monkeypatch.setattr(interchange, "MAX_UNREAD_S", 3600.0)


@pytest.fixture
def office(tmp_path) -> Office:
    return Office(tmp_path / "office")


def one(site="emitter", cohort="care"):
    return wire_pb2.EmitRequest(packet=msp(site, cohort))


def batch(count, site="emitter", cohort="care", batch_id=0):
    packets = packet_pb2.PacketBatch(packets=[msp(site, cohort) for _ in range(count)])
    return wire_pb2.EmitStreamRequest(packets=packets, batch_id=batch_id)


def enveloped(count, site="emitter", cohort="care"):
    envelope = identity(*(msp(site, cohort) for _ in range(count)))
    return wire_pb2.EmitRequest(encoded=envelope)


async def refusal(call) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(DEADLINE_S):
            await call
    return Refusal.read(caught.value)


async def stored(server) -> int:
    return await server.service.store.last_sequence()


@contextlib.asynccontextmanager
async def callers(office, *names, **settings):
    """A server with quotas, and callers with tokens."""
    tokens = [office.token(name, *sites).text for name, *sites in names]
    async with (
        secured(**office.tls, tokens=office.tokens, **settings) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        connections = [calling(server.target, ca=office.ca, token=token) for token in tokens]
        yield (server, *[await stack.enter_async_context(each) for each in connections])


@pytest.mark.parametrize("request_of", [one, lambda: enveloped(3)], ids=["packet", "envelope"])
async def test_too_many_packets_are_refused_with_a_time_to_wait_and_nothing_is_stored(
    office, request_of
):
    async with callers(office, ("emitter",), ("member",), quota_packets_per_s=SLOW) as (
        server,
        loud,
        other,
    ):
        await loud(EMIT, request_of())
        before = await stored(server)
        for _ in range(3):
            told = await refusal(loud(EMIT, request_of()))
            assert (told.code, told.reason) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "QUOTA_EXCEEDED",
            )
            assert told.metadata == {"resource": "packets", "limit": "0.001 per second"}
            assert told.retry_s == 300.0
        assert await stored(server) == before
        await other(EMIT, one("member"))


async def test_too_many_bytes_are_refused(office):
    async with callers(office, ("emitter",), quota_bytes_per_s=1.0) as (_, loud):
        await loud(EMIT, one())
        assert (await refusal(loud(EMIT, one()))).metadata["resource"] == "bytes"
        assert (await refusal(loud(EMIT, enveloped(2)))).metadata["resource"] == "bytes"


async def test_calls_of_any_kind_count(office):
    async with callers(office, ("emitter",), ("member",), quota_calls_per_s=SLOW) as (
        _,
        loud,
        other,
    ):
        await loud(CONTRACT, registry_pb2.GetContractRequest())
        for method, request in (
            (CONTRACT, registry_pb2.GetContractRequest()),
            (EMIT, one()),
            (SUBSCRIBE, wire_pb2.SubscribeRequest(cohorts=["care"])),
            (STREAM, batch(1)),
        ):
            told = await refusal(loud(method, request))
            assert (told.reason, told.metadata["resource"]) == ("QUOTA_EXCEEDED", "calls")
        await other(CONTRACT, registry_pb2.GetContractRequest())


async def test_a_stream_is_not_read_while_its_caller_owes(office):
    async with callers(office, ("emitter",), ("member",), quota_packets_per_s=SLOW) as (
        server,
        loud,
        other,
    ):
        call = loud.open(STREAM, *(batch(5, batch_id=number) for number in range(1, 4)))
        async with asyncio.timeout(DEADLINE_S):
            first = await call.read()
        assert (first.batch_id, first.accepted) == (1, 5)
        reading = asyncio.ensure_future(call.read())
        await asyncio.wait({reading}, timeout=0.3)
        assert not reading.done()
        assert await stored(server) == 5
        await other(EMIT, one("member"))
        reading.cancel()
        call.cancel()


async def test_a_batch_that_comes_beside_what_is_owed_is_refused_and_the_stream_goes_on(office):
    async with callers(office, ("emitter",), quota_packets_per_s=SLOW) as (server, loud):
        ready = asyncio.Event()

        async def requests():
            await ready.wait()
            yield batch(2, batch_id=7)

        call = loud.channel.stream_stream(
            f"/{STREAM}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=wire_pb2.EmitStreamResponse.FromString,
        )(requests(), metadata=loud.metadata)
        # It waits for its first request when the quota is used up by another call.
        await eventually(lambda: server.service.quotas._streams["emitter"] == 1)
        await loud(EMIT, one())
        ready.set()
        async with asyncio.timeout(DEADLINE_S):
            answer = await call.read()
        assert answer.batch_id == 7
        assert answer.packets == answer.accepted == 0
        assert "quota of packets" in answer.refusal.message
        assert answer.refusal.retry_delay.seconds == 300
        assert await stored(server) == 1
        call.cancel()


async def test_a_stream_whose_caller_owes_for_long_ends_with_the_time_to_wait(office, monkeypatch):
    monkeypatch.setattr(interchange, "MAX_UNREAD_S", 0.05)
    async with callers(office, ("emitter",), quota_packets_per_s=SLOW) as (server, loud):
        call = loud.open(STREAM, *(batch(5, batch_id=number) for number in range(1, 4)))
        async with asyncio.timeout(DEADLINE_S):
            first = await call.read()
        assert (first.batch_id, first.accepted) == (1, 5)
        told = await refusal(call.read())
        assert (told.code, told.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUOTA_EXCEEDED",
        )
        assert told.metadata["resource"] == "packets"
        assert told.retry_s == 300.0
        assert await stored(server) == 5


async def test_a_stream_without_a_batch_stays_while_its_caller_owes(office, monkeypatch):
    monkeypatch.setattr(interchange, "MAX_UNREAD_S", 0.01)
    async with callers(office, ("emitter",), quota_packets_per_s=10.0) as (server, loud):
        ready = asyncio.Event()

        async def requests():
            yield batch(105, batch_id=1)  # half a second more than the burst
            await ready.wait()
            yield batch(1, batch_id=2)

        call = loud.channel.stream_stream(
            f"/{STREAM}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=wire_pb2.EmitStreamResponse.FromString,
        )(requests(), metadata=loud.metadata)
        async with asyncio.timeout(DEADLINE_S):
            assert (await call.read()).accepted == 105
            await eventually(lambda: not server.service.quotas.owed_s("emitter"))
            ready.set()
            assert (await call.read()).accepted == 1
        call.cancel()


async def test_a_draining_server_does_not_wait_for_what_is_owed(office):
    async with callers(office, ("emitter",), quota_packets_per_s=SLOW) as (server, loud):
        call = loud.open(STREAM, *(batch(5, batch_id=number) for number in range(1, 4)))
        async with asyncio.timeout(DEADLINE_S):
            await call.read()
        server.service.closing.set()
        told = await refusal(call.read())
        assert told.reason == "SERVER_DRAINING"


async def test_streams_at_once_are_counted_and_given_back(office):
    async with callers(office, ("member",), ("reader",), quota_streams=2) as (server, loud, other):
        ask = wire_pb2.SubscribeRequest(cohorts=["care"])
        held = [loud.open(SUBSCRIBE, ask) for _ in range(2)]
        for call in held:
            async with asyncio.timeout(DEADLINE_S):
                await call.read()
        for method, request in ((SUBSCRIBE, ask), (STREAM, batch(1, "member"))):
            told = await refusal(loud(method, request))
            assert (told.reason, told.metadata["resource"]) == ("QUOTA_EXCEEDED", "streams")
            assert told.retry_s == 5.0
        await other(SUBSCRIBE, ask)
        held[0].cancel()
        await eventually(lambda: server.service.quotas._streams["member"] == 1)
        await loud(STREAM, batch(1, "member"))
        held[1].cancel()


async def test_operators_are_not_charged_and_exceptions_hold(office):
    settings = {
        "quota_calls_per_s": SLOW,
        "quotas": {"member": Quota(calls_per_s=0)},
    }
    async with callers(office, (OPERATOR,), ("member",), ("emitter",), **settings) as (
        _,
        operator,
        spared,
        site,
    ):
        for _ in range(5):
            await operator("fmi.v1.AdminService/ListCohorts", admin_pb2.ListCohortsRequest())
            await spared(EMIT, one("member"))
        await site(EMIT, one())
        assert (await refusal(site(EMIT, one()))).reason == "QUOTA_EXCEEDED"


async def test_two_tokens_of_one_principal_have_one_quota_and_two_principals_two(office):
    async with callers(
        office, ("emitter",), ("emitter",), ("member", "emitter"), quota_packets_per_s=SLOW
    ) as (_, first, second, other):
        await first(EMIT, one())
        assert (await refusal(second(EMIT, one()))).reason == "QUOTA_EXCEEDED"
        await other(EMIT, one("emitter"))


async def test_where_nobody_is_authenticated_an_address_is_charged_if_it_is_asked_for():
    async with running_server(quota_packets_per_s=SLOW) as server, calling(server.target) as caller:
        await caller(EMIT, one("any", "open"))
        assert (await refusal(caller(EMIT, one("other", "open")))).reason == "QUOTA_EXCEEDED"


async def test_an_address_opens_as_many_cohorts_as_it_may(caplog):
    caplog.set_level(logging.INFO)
    async with running_server(quota_cohorts=3) as server, calling(server.target) as caller:
        for number in range(3):
            await caller(EMIT, one("site", f"open-{number}"))
        told = await refusal(caller(EMIT, one("site", "open-3")))
        assert told.reason == "COHORT_UNKNOWN"
        (item,) = (await caller(STREAM, batch(1, "site", "open-4"))).exceptions
        assert "not known" in item.refusal.message
        await caller(EMIT, one("site", "open-1"))
        assert len(server.service.cohorts) == 3


async def test_the_defaults_are_for_callers_who_are_authenticated(office):
    office.token("emitter")
    async with secured(**office.tls, tokens=office.tokens) as server:
        assert server.service.quotas.of("anybody") == DEFAULT_QUOTA
    async with running_server() as server:
        assert not server.service.quotas.limited


async def test_the_sdk_waits_as_it_is_told_and_everything_arrives(office):
    token = office.token("member").text
    settings = {"quota_packets_per_s": 20.0}
    async with secured(**office.tls, tokens=office.tokens, **settings) as server:
        async with AsyncFMIClient(
            server.target,
            domain_id="member",
            cohort="care",
            token=token,
            tls=TLSConfig(office.ca_file),
        ) as client:
            packets = [{"type": "msp", "controller": {"tau": n / 300}} for n in range(230)]
            receipts = await client.emit_many(packets, batch_packets=50)
            assert [receipt.status for receipt in receipts] == ["accepted"] * 230
            await client.emit(packets[0])
        assert await stored(server) == 231


async def test_the_sdk_says_what_it_took_too_much_of(office):
    token = office.token("member").text
    async with secured(**office.tls, tokens=office.tokens, quota_packets_per_s=SLOW) as server:
        async with AsyncFMIClient(
            server.target,
            domain_id="member",
            cohort="care",
            token=token,
            tls=TLSConfig(office.ca_file),
            retry=RetryPolicy(max_attempts=1),
        ) as client:
            await client.emit({"type": "msp", "controller": {"tau": 1.0}})
            with pytest.raises(QuotaExceededError) as caught:
                await client.emit({"type": "msp", "controller": {"tau": 2.0}})
        assert caught.value.resource == "packets"
        assert caught.value.retry_after_s == 300.0


async def test_emit_many_says_which_quota_stopped_it_and_what_arrived(office, monkeypatch):
    """The time to wait is longer than the policy allows: it does not wait for nothing."""
    monkeypatch.setattr(interchange, "MAX_UNREAD_S", 0.5)
    token = office.token("member").text
    async with secured(**office.tls, tokens=office.tokens, quota_packets_per_s=SLOW) as server:
        async with AsyncFMIClient(
            server.target,
            domain_id="member",
            cohort="care",
            token=token,
            tls=TLSConfig(office.ca_file),
        ) as client:
            packets = [{"type": "msp", "controller": {"tau": n / 300}} for n in range(70)]
            with pytest.raises(QuotaExceededError) as caught:
                await client.emit_many(packets, batch_packets=20)
        error = caught.value
        assert (error.resource, error.retry_after_s) == ("packets", 300.0)
        assert [receipt.status for receipt in error.receipts if receipt] == ["accepted"] * 20
        # What was read of the source and has no answer is handed back, and nothing else.
        rest = [packet.msp.controller["tau"] for packet in error.unanswered]
        assert rest == [n / 300 for n in range(20, 20 + len(rest))]
        assert len(error.receipts) == 20 + len(rest)
        assert await stored(server) == 20


async def test_emit_many_goes_on_as_a_low_quota_allows(office, monkeypatch):
    """Each batch is owed for longer than a stream is left unread."""
    monkeypatch.setattr(interchange, "MAX_UNREAD_S", 0.1)
    token = office.token("member").text
    async with secured(**office.tls, tokens=office.tokens, quota_packets_per_s=4.0) as server:
        async with AsyncFMIClient(
            server.target,
            domain_id="member",
            cohort="care",
            token=token,
            tls=TLSConfig(office.ca_file),
        ) as client:
            packets = [{"type": "msp", "controller": {"tau": n / 300}} for n in range(52)]
            receipts = await client.emit_many(packets, batch_packets=4)
        assert [receipt.status for receipt in receipts] == ["accepted"] * 52
        assert await stored(server) == 52


async def test_envelopes_that_come_together_are_not_all_taken(office):
    """Each is admitted before anybody knows how many packets it has."""
    async with callers(office, ("emitter",), quota_packets_per_s=SLOW) as (server, loud):
        calls = [loud(EMIT, enveloped(40)) for _ in range(12)]
        done = await asyncio.gather(*calls, return_exceptions=True)
        refused = [Refusal.read(each) for each in done if isinstance(each, grpc.aio.AioRpcError)]
        assert {told.reason for told in refused} == {"QUOTA_EXCEEDED"}
        assert len(refused) == 11
        assert await stored(server) == 40


NOTHING = {
    "no content": wire_pb2.EmitStreamRequest(batch_id=1),
    "empty batch": wire_pb2.EmitStreamRequest(batch_id=1, packets=packet_pb2.PacketBatch()),
    "malformed": wire_pb2.EmitStreamRequest(
        batch_id=1,
        encoded=wire_pb2.EncodedPackets(encoding=1, uncompressed_size=9, data=b"."),
    ),
    "no envelope": wire_pb2.EmitStreamRequest(batch_id=1, encoded=wire_pb2.EncodedPackets()),
    "too large": wire_pb2.EmitStreamRequest(
        batch_id=1,
        encoded=wire_pb2.EncodedPackets(encoding=1, uncompressed_size=2**31, data=b"."),
    ),
    "no dictionary": wire_pb2.EmitStreamRequest(
        batch_id=1,
        encoded=wire_pb2.EncodedPackets(
            encoding=2, uncompressed_size=1, dictionary_id=7, data=b"(\xb5/\xfd!\x07\x01"
        ),
    ),
}


@pytest.mark.parametrize("request_", NOTHING.values(), ids=NOTHING)
async def test_a_stream_pays_for_what_has_no_packets(office, request_):
    """Else one call could ask for as much as it likes, and be answered each time."""
    async with callers(office, ("emitter",), quota_packets_per_s=SLOW) as (_, loud):
        call = loud.open(STREAM, *[request_] * 20)
        async with asyncio.timeout(DEADLINE_S):
            first = await call.read()
        assert first.HasField("refusal")
        reading = asyncio.ensure_future(call.read())
        await asyncio.wait({reading}, timeout=0.3)
        assert not reading.done()
        reading.cancel()
        call.cancel()


@pytest.mark.parametrize("kind", ["batch", "envelope"])
@pytest.mark.parametrize("tail", [b"", b"\xff"], ids=["too many", "malformed"])
async def test_packets_of_a_batch_that_is_refused_as_a_whole_are_charged(office, kind, tail):
    settings = {"quota_packets_per_s": 1.0, "max_batch_packets": 50}
    data = b"\x0a\x00" * (49 if tail else 5000) + tail
    if kind == "batch":
        request = wire_pb2.EmitStreamRequest(batch_id=1).SerializeToString()
        request += b"\x12" + _varint(len(data)) + data
        assert _field(2).message_type == packet_pb2.PacketBatch.DESCRIPTOR
    else:
        envelope = wire_pb2.EncodedPackets(encoding=1, uncompressed_size=len(data), data=data)
        request = wire_pb2.EmitStreamRequest(batch_id=1, encoded=envelope).SerializeToString()
    async with callers(office, ("emitter",), **settings) as (server, loud):
        call = loud.channel.stream_stream(
            f"/{STREAM}", response_deserializer=wire_pb2.EmitStreamResponse.FromString
        )(metadata=loud.metadata)
        await call.write(request)
        async with asyncio.timeout(DEADLINE_S):
            answer = await call.read()
        assert answer.HasField("refusal")
        # 49 or 51, less the burst of 10 and the time that went by.
        assert 0.0 < server.service.quotas.owed_s("emitter") <= 41.0
        call.cancel()


def _field(number):
    return wire_pb2.EmitStreamRequest.DESCRIPTOR.fields_by_number[number]


def _varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


async def test_what_is_only_checked_is_charged_too(office):
    async with callers(office, ("emitter",), quota_packets_per_s=SLOW) as (_, loud):
        ask = registry_pb2.ValidatePacketRequest(packet=msp("emitter", "care"))
        assert (await loud(VALIDATE, ask)).valid
        told = await refusal(loud(VALIDATE, ask))
        assert (told.reason, told.metadata["resource"]) == ("QUOTA_EXCEEDED", "packets")


@pytest.mark.parametrize("count", [1, 200], ids=["held back", "too large for that"])
async def test_what_is_refused_is_let_go_of_without_the_garbage_collector(
    office, monkeypatch, count
):
    """Its frames have the request."""
    async with callers(office, ("emitter",), quota_packets_per_s=SLOW) as (server, loud):
        admit, raised = server.service.quotas._admit, []

        def noting(account, amounts):
            try:
                admit(account, amounts)
            except errors.QuotaExceededError as error:
                raised.append(weakref.ref(error))
                raise

        monkeypatch.setattr(server.service.quotas, "_admit", noting)
        await loud(EMIT, one())
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                await refusal(loud(EMIT, enveloped(count)))
            await eventually(lambda: not any(error() for error in raised))
        finally:
            gc.enable()
        assert len(raised) == 3


async def test_where_nobody_is_authenticated_addresses_take_turns(monkeypatch):
    """Also without quotas: a caller is an address then."""
    seen = []
    async with running_server() as server, Client(server.target) as client:
        taken = server.service._checking.turns.taken

        def noting(caller):
            seen.append(caller)
            return taken(caller)

        monkeypatch.setattr(server.service._checking.turns, "taken", noting)
        await client.emit_encoded(identity(msp("emitter", "care")))
    assert seen == ["127.0.0.1"]


async def test_who_hangs_up_while_it_is_held_back_is_counted(office, monkeypatch):
    monkeypatch.setattr(quotas, "STALL_S", 3600.0)
    counter = 'fmi_refusals_total{reason="QUOTA_EXCEEDED"}'
    async with callers(office, ("emitter",), quota_packets_per_s=SLOW) as (server, loud):
        await loud(EMIT, one())
        held = [loud.open(EMIT, one()) for _ in range(5)]
        await eventually(lambda: server.service.quotas._stalled["emitter"] == 5)
        assert server.service.telemetry.snapshot().get(counter, 0.0) == 0.0
        for call in held:
            call.cancel()
        await eventually(lambda: server.service.telemetry.snapshot().get(counter, 0.0) == 5.0)
        assert not server.service.quotas._stalled


async def test_a_server_that_stops_does_not_wait_for_refusals_that_are_held_back(
    office, monkeypatch
):
    monkeypatch.setattr(quotas, "STALL_S", 3600.0)
    token = office.token("emitter").text
    settings = {**office.tls, "tokens": office.tokens, "quota_packets_per_s": SLOW}
    async with contextlib.AsyncExitStack() as clients:
        async with secured(**settings) as server:
            caller = calling(server.target, ca=office.ca, token=token)
            loud = await clients.enter_async_context(caller)
            await loud(EMIT, one())
            held = loud.open(EMIT, one())
            await eventually(lambda: server.service.quotas._stalled["emitter"] == 1)
        with pytest.raises(grpc.aio.AioRpcError):
            async with asyncio.timeout(DEADLINE_S):
                await held


async def test_one_site_with_much_to_check_keeps_another_waiting_for_one_turn_of_it(
    office, monkeypatch
):
    """Large packets and batches are checked in turns: each caller has one after the other."""
    limits = {"quota_packets_per_s": 0, "quota_bytes_per_s": 0, "quota_calls_per_s": 0}
    async with callers(office, ("emitter",), ("member",), **limits) as (server, loud, other):
        checking = server.service._checking
        order = []
        monkeypatch.setattr(
            checking._intake, "inspect_many", _noting(order, checking._intake.inspect_many)
        )
        async with checking.turns.taken("nobody"):
            calls = [asyncio.ensure_future(loud(EMIT, enveloped(40))) for _ in range(10)]
            await eventually(lambda: len(checking.turns._waiting.get("emitter", ())) == 10)
            late = asyncio.ensure_future(other(EMIT, enveloped(40, "member")))
            await eventually(lambda: "member" in checking.turns._waiting)
        await asyncio.gather(*calls, late)
        assert order.index("member") <= 3, "its envelope is decoded second, and checked soon after"


def _noting(order, check):
    def noting(items, **given):
        order.append(given["caller"].name)
        return check(items, **given)

    return noting


def broken():
    """A packet of 1 kB that breaks more rules than are told of one."""
    packet = msp("emitter", "care")
    packet.ClearField("msp")
    packet.ccs.MergeFromString(b"\x0a\x00" * 400)
    return packet


@pytest.mark.parametrize(
    ("method", "request_of"),
    [
        (EMIT, lambda: wire_pb2.EmitRequest(packet=broken())),
        (EMIT, lambda: wire_pb2.EmitRequest(encoded=identity(broken()))),
        (STREAM, lambda: wire_pb2.EmitStreamRequest(encoded=identity(broken()))),
        (VALIDATE, lambda: registry_pb2.ValidatePacketRequest(packet=broken())),
    ],
    ids=["packet", "envelope", "stream", "only checked"],
)
async def test_each_rule_that_a_packet_is_told_to_break_counts_as_one_more(
    office, method, request_of
):
    """To tell them takes longer than to take packets that break none."""
    async with callers(office, ("emitter",), quota_packets_per_s=1.0) as (server, loud):
        with contextlib.suppress(grpc.aio.AioRpcError):
            await loud(method, request_of())
        # 101 less the burst of 10 and the time that went by.
        assert 0.0 < server.service.quotas.owed_s("emitter") <= 91.0
