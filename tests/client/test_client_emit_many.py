"""emit_many against a real server that breaks in every way a stream can break."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf import duration_pb2
from scripted_server import FAST, status

from fmi.v1 import error_pb2, interchange_service_pb2
from fmi_client import (
    AccessDeniedError,
    AsyncFMIClient,
    ClientClosedError,
    CohortRuleError,
    ConfigurationError,
    ConnectionFailedError,
    EnvelopeError,
    OverloadedError,
    ProtocolError,
    RetryPolicy,
)
from fmi_client.receipts import EmitStatus, raise_for_refused


@pytest.fixture
def packets(emitter):
    return [emitter.emit_msp(controller={"tau": i / 100}) for i in range(100)]


def ids(packets):
    return [packet.header.packet_id for packet in packets]


def refused(reason, *, retry_s=None):
    refusal = error_pb2.Refusal(reason=reason, message="no")
    if retry_s is not None:
        refusal.retry_delay.CopyFrom(duration_pb2.Duration(nanos=int(retry_s * 1e9)))
    return refusal


async def test_receipts_come_in_the_order_of_the_packets(server, connect, packets):
    client = await connect()
    receipts = await client.emit_many(packets, batch_packets=7)
    assert [receipt.packet_id for receipt in receipts] == ids(packets)
    assert all(receipt.status is EmitStatus.ACCEPTED for receipt in receipts)
    assert list(server.taken) == ids(packets)


async def test_nothing_to_send(server, connect):
    client = await connect()
    assert await client.emit_many([]) == []
    assert server.taken == {}


async def test_plain_packets_and_asynchronous_sources(server, connect):
    async def source():
        for i in range(5):
            await asyncio.sleep(0)
            yield {"type": "msp", "controller": {"tau": i}}

    client = await connect()
    receipts = await client.emit_many(source(), batch_packets=2)
    assert [receipt.packet_id for receipt in receipts] == list(server.taken)


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [({"batch_packets": 40}, [40, 40, 20]), ({"batch_bytes": 1}, [1] * 100)],
)
async def test_batches_are_bounded(server, connect, packets, limits, sizes):
    seen = []

    async def counting(requests, _context):
        async for request in requests:
            response = server.answer(request)
            seen.append(response.packets)
            yield response

    server.script("EmitStream", counting)
    client = await connect()
    await client.emit_many(packets, **limits)
    assert seen == sizes


async def test_batches_under_way_are_bounded(server, connect, packets):
    """A server that does not answer stops the source: memory stays bounded."""
    taken = 0
    blocked = asyncio.Event()

    async def withholds(requests, _context):
        held = []
        async for request in requests:
            if not server.taken:
                yield server.answer(request)
                continue
            held.append(request)
            if len(held) == 8:
                break
        blocked.set()
        for request in held:
            yield server.answer(request)
        async for request in requests:
            yield server.answer(request)

    def source():
        nonlocal taken
        for packet in packets:
            if not blocked.is_set():
                taken += 1
            yield packet

    server.script("EmitStream", withholds)
    client = await connect()
    await client.emit_many(source(), batch_packets=1)
    assert taken == 9
    assert list(server.taken) == ids(packets)


async def test_refused_packet_does_not_harm_its_neighbours(server, connect, packets):
    async def refuses_one(requests, _context):
        async for request in requests:
            response = server.answer(request)
            response.accepted -= 1
            response.exceptions.add(
                index=3,
                status=interchange_service_pb2.EMIT_STATUS_REFUSED,
                refusal=refused(error_pb2.ERROR_REASON_COHORT_RULE_VIOLATION),
            )
            yield response

    server.script("EmitStream", refuses_one)
    client = await connect()
    receipts = await client.emit_many(packets)
    assert [index for index, receipt in enumerate(receipts) if not receipt.ok] == [3]
    assert receipts[3].packet_id == packets[3].header.packet_id
    with pytest.raises(CohortRuleError):
        receipts[3].raise_for_refused()
    with pytest.raises(CohortRuleError) as caught:
        raise_for_refused(receipts)
    assert "first of 1 refused" in caught.value.__notes__[0]
    assert receipts[4].raise_for_refused() is receipts[4]
    raise_for_refused(receipts[4:])


@pytest.mark.parametrize("answered", [0, 1, 3])
async def test_cut_stream_goes_on_with_what_was_not_answered(server, connect, packets, answered):
    """The server took one batch more than it answered: those packets are duplicates, and count once."""

    async def breaks(requests, context):
        count = 0
        async for request in requests:
            response = server.answer(request)
            if count == answered:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "")
            count += 1
            yield response

    server.script("EmitStream", breaks)
    client = await connect()
    receipts = await client.emit_many(packets, batch_packets=10)
    assert [receipt.packet_id for receipt in receipts] == ids(packets)
    assert all(receipt.ok for receipt in receipts)
    assert sorted(server.taken) == sorted(ids(packets))
    # An answer that was on its way when the stream broke may be lost with it.
    duplicates = sum(receipt.status is EmitStatus.DUPLICATE for receipt in receipts)
    assert 10 <= duplicates <= 10 * (answered + 1)


async def test_stream_that_fails_to_open_is_opened_again(server, connect, packets):
    async def rejects(_requests, context):
        await context.abort(grpc.StatusCode.CANCELLED, "")
        yield

    server.script("EmitStream", rejects, rejects)
    client = await connect()
    receipts = await client.emit_many(packets)
    assert all(receipt.status is EmitStatus.ACCEPTED for receipt in receipts)
    assert len(server.seen("EmitStream")) == 3


async def test_stream_that_ends_early_is_opened_again(server, connect, packets):
    async def ends(requests, _context):
        async for request in requests:
            yield server.answer(request)
            return

    server.script("EmitStream", ends, ends)
    client = await connect()
    receipts = await client.emit_many(packets, batch_packets=10)
    assert [receipt.packet_id for receipt in receipts] == ids(packets)
    assert all(receipt.ok for receipt in receipts)


async def test_silent_stream_is_opened_again(server, connect, packets):
    async def hangs(_requests, _context):
        await asyncio.Event().wait()
        yield

    server.script("EmitStream", hangs)
    client = await connect(timeout_s=1.0)
    receipts = await client.emit_many(packets)
    assert all(receipt.ok for receipt in receipts)


async def test_lost_connection_is_replaced(server, connect, packets):
    async def stops(requests, _context):
        async for request in requests:
            yield server.answer(request)
            restart.set()
            await asyncio.Event().wait()

    restart = asyncio.Event()
    server.script("EmitStream", stops)
    client = await connect(
        retry=RetryPolicy(initial_s=0.05, max_s=0.2, max_attempts=100, deadline_s=30)
    )
    sending = asyncio.create_task(client.emit_many(packets, batch_packets=10))
    await restart.wait()
    await server.restart()
    receipts = await sending
    assert [receipt.packet_id for receipt in receipts] == ids(packets)
    assert all(receipt.ok for receipt in receipts)
    assert len(server.taken) == 100


async def test_progress_renews_the_attempts(server, connect, packets):
    """More breaks than `max_attempts`, with progress between them, are survived."""

    async def answers_one(requests, context):
        async for request in requests:
            yield server.answer(request)
            break
        await asyncio.sleep(0.01)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "")

    server.script("EmitStream", *[answers_one] * 9)
    client = await connect(retry=RetryPolicy(initial_s=0.001, max_s=0.001, max_attempts=3))
    receipts = await client.emit_many(packets, batch_packets=10)
    assert [receipt.packet_id for receipt in receipts] == ids(packets)


async def test_server_that_stays_away_is_told_of_with_what_was_done(server, connect, packets):
    async def answers_one(requests, context):
        async for request in requests:
            yield server.answer(request)
            break
        await asyncio.sleep(0.05)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "")

    async def away(_requests, context):
        await context.abort(grpc.StatusCode.UNAVAILABLE, "")
        yield

    server.script("EmitStream", answers_one, *[away] * 9)
    client = await connect()
    with pytest.raises(ConnectionFailedError) as caught:
        await client.emit_many(packets, batch_packets=10)
    assert caught.value.__notes__ == ["10 packets were answered before"]


async def test_nobody_listens(packets):
    async with AsyncFMIClient("127.0.0.1:9", retry=FAST) as client:
        with pytest.raises(ConnectionFailedError) as caught:
            await client.emit_many(packets)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def test_closing_the_client_under_it_says_so(server, connect, packets):
    started = asyncio.Event()

    async def hangs(_requests, _context):
        started.set()
        await asyncio.Event().wait()
        yield

    server.script("EmitStream", hangs)
    client = await connect()
    sending = asyncio.create_task(client.emit_many(packets))
    await started.wait()
    await client.aclose()
    with pytest.raises(ClientClosedError):
        await sending


async def test_status_that_a_retry_cannot_help_ends_it(server, connect, packets):
    async def denies(_requests, context):
        await context.abort_with_status(status(grpc.StatusCode.PERMISSION_DENIED))
        yield

    server.script("EmitStream", denies)
    client = await connect()
    with pytest.raises(AccessDeniedError):
        await client.emit_many(packets)
    assert len(server.seen("EmitStream")) == 1


async def test_refused_batch_raises(server, connect, packets):
    async def refuses(requests, _context):
        async for request in requests:
            yield interchange_service_pb2.EmitStreamResponse(
                batch_id=request.batch_id,
                refusal=refused(error_pb2.ERROR_REASON_ENVELOPE_TOO_LARGE),
            )

    server.script("EmitStream", refuses)
    client = await connect()
    with pytest.raises(EnvelopeError):
        await client.emit_many(packets)
    assert len(server.seen("EmitStream")) == 1


async def test_overloaded_batch_is_sent_again_on_the_same_stream(server, connect, packets):
    async def overloaded_once(requests, _context):
        first = True
        async for request in requests:
            if first:
                first = False
                yield interchange_service_pb2.EmitStreamResponse(
                    batch_id=request.batch_id,
                    refusal=refused(error_pb2.ERROR_REASON_OVERLOADED, retry_s=0.01),
                )
            else:
                yield server.answer(request)

    server.script("EmitStream", overloaded_once)
    client = await connect()
    receipts = await client.emit_many(packets, batch_packets=10)
    assert [receipt.packet_id for receipt in receipts] == ids(packets)
    assert all(receipt.ok for receipt in receipts)
    assert len(server.seen("EmitStream")) == 1


async def test_batch_that_stays_overloaded_raises(server, connect, packets):
    async def overloaded(requests, _context):
        async for request in requests:
            yield interchange_service_pb2.EmitStreamResponse(
                batch_id=request.batch_id,
                refusal=refused(error_pb2.ERROR_REASON_OVERLOADED, retry_s=0),
            )

    server.script("EmitStream", overloaded)
    client = await connect()
    with pytest.raises(OverloadedError) as caught:
        await client.emit_many(packets)
    assert caught.value.retryable


async def test_overloaded_items_are_sent_again(server, connect, packets):
    """Items that the server had no room for come again in a batch of their own, and in order."""

    async def no_room(requests, _context):
        async for request in requests:
            sent = server.encoder.decode(request.encoded)
            sizes.append(len(sent))
            response = interchange_service_pb2.EmitStreamResponse(
                batch_id=request.batch_id, packets=len(sent)
            )
            for index, packet in enumerate(sent):
                if len(sizes) == 1 and index % 2:
                    response.exceptions.add(
                        index=index,
                        status=interchange_service_pb2.EMIT_STATUS_REFUSED,
                        refusal=refused(error_pb2.ERROR_REASON_OVERLOADED, retry_s=0.001),
                    )
                else:
                    server.take(packet.header.packet_id)
            yield response

    sizes: list[int] = []
    server.script("EmitStream", no_room)
    client = await connect()
    receipts = await client.emit_many(packets)
    assert sizes == [100, 50]
    assert [receipt.packet_id for receipt in receipts] == ids(packets)
    assert all(receipt.ok for receipt in receipts)
    assert len(server.taken) == 100


async def test_items_that_stay_overloaded_are_refused_in_their_receipts(server, connect, packets):
    async def no_room(requests, _context):
        async for request in requests:
            sent = server.encoder.decode(request.encoded)
            response = interchange_service_pb2.EmitStreamResponse(
                batch_id=request.batch_id, packets=len(sent)
            )
            for index, packet in enumerate(sent):
                if packet.header.packet_id == packets[5].header.packet_id:
                    response.exceptions.add(
                        index=index,
                        status=interchange_service_pb2.EMIT_STATUS_REFUSED,
                        refusal=refused(error_pb2.ERROR_REASON_OVERLOADED, retry_s=0),
                    )
            yield response

    server.script("EmitStream", no_room)
    client = await connect()
    receipts = await client.emit_many(packets)
    assert [index for index, receipt in enumerate(receipts) if receipt.refused] == [5]
    assert isinstance(receipts[5].error, OverloadedError)


@pytest.mark.parametrize("wrong", ["batch_id", "packets", "index"])
async def test_answer_that_does_not_fit_breaks_the_contract(server, connect, packets, wrong):
    async def misfits(requests, _context):
        async for request in requests:
            response = server.answer(request)
            if wrong == "index":
                response.exceptions.add(index=100)
            else:
                setattr(response, wrong, 77)
            yield response

    server.script("EmitStream", misfits)
    client = await connect()
    with pytest.raises(ProtocolError):
        await client.emit_many(packets)


async def test_error_of_the_source_comes_out(connect, packets):
    def fails():
        yield packets[0]
        raise LookupError("the file ends here")

    def fails_with_ours():
        yield packets[0]
        raise ConnectionFailedError("from a call inside the source")

    client = await connect()
    with pytest.raises(LookupError):
        await client.emit_many(fails())
    with pytest.raises(ConnectionFailedError, match="inside the source"):
        await client.emit_many(fails_with_ours())


async def test_batch_limits_must_be_at_least_one(connect, packets):
    client = await connect(retry=FAST)
    with pytest.raises(ConfigurationError):
        await client.emit_many(packets, batch_packets=0)


async def test_large_packet_is_a_batch_of_its_own(server, connect, emitter):
    """Over 32 KiB a batch is compressed in a thread; the result is the same."""
    large = emitter.emit_msp(controller={f"p{i}": i / 7 for i in range(1024)})
    small = emitter.emit_msp(controller={"tau": 1})
    client = await connect()
    receipts = await client.emit_many([small, *[large] * 3, small], batch_bytes=40_000)
    assert [receipt.ok for receipt in receipts] == [True] * 5
    assert len(server.taken) == 2
