"""emit_many: packets that never leave, and what an error says of the others."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import duration_pb2
from scripted_server import packet_of_bytes

from fmi.v1 import error_pb2, interchange_service_pb2
from fmi_client import (
    AccessDeniedError,
    ConnectionFailedError,
    ContractError,
    PacketTooLargeError,
)
from fmi_client._channel import MAX_SEND_BYTES
from fmi_client.receipts import EmitStatus


@pytest.fixture
def packets(emitter):
    return [emitter.emit_msp(controller={"tau": i / 100}) for i in range(100)]


def ids(packets):
    return [packet.header.packet_id for packet in packets]


async def denies(_requests, context):
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, "")
    yield


async def test_what_is_no_packet_does_not_harm_the_others(server, connect, packets):
    bad = {"type": "msp", "nothing": 1}
    client = await connect()
    receipts = await client.emit_many([bad, *packets[:5], bad, packets[5], bad], batch_packets=2)
    assert [index for index, receipt in enumerate(receipts) if receipt.refused] == [0, 6, 8]
    assert all(isinstance(receipts[index].error, ContractError) for index in (0, 6, 8))
    assert receipts[0].packet_id == ""
    assert [r.packet_id for r in receipts if r.ok] == ids(packets[:6]) == list(server.taken)
    (only,) = await client.emit_many([bad])
    assert only.refused


async def test_packet_that_fits_no_message_does_not_harm_the_others(server, connect, packets):
    huge = packet_of_bytes(MAX_SEND_BYTES, packets[1])
    client = await connect()
    receipts = await client.emit_many([packets[0], huge, packets[2]], batch_bytes=2**30)
    assert [receipt.ok for receipt in receipts] == [True, False, True]
    assert isinstance(receipts[1].error, PacketTooLargeError)
    assert receipts[1].error.reason == "PACKET_TOO_LARGE"
    assert [receipt.packet_id for receipt in receipts] == ids(packets[:3])
    assert list(server.taken) == [packets[0].header.packet_id, packets[2].header.packet_id]


async def test_packets_that_together_fit_no_message_are_sent_apart(server, connect, packets):
    large = [packet_of_bytes(MAX_SEND_BYTES // 2, packet) for packet in packets[:2]]
    client = await connect()
    receipts = await client.emit_many(large, batch_bytes=2**30)
    assert [receipt.packet_id for receipt in receipts] == ids(large) == list(server.taken)
    assert all(receipt.ok for receipt in receipts)


async def test_error_has_the_receipts_and_the_packets_without_one(server, connect):
    """The server takes a batch that it does not answer: to send the rest again counts it once."""

    async def answers_one(requests, context):
        async for request in requests:
            response = server.answer(request)
            if request.batch_id == 2:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, "")
            yield response

    server.script("EmitStream", answers_one, denies)
    plain = [{"type": "msp", "controller": {"tau": i}} for i in range(30)]
    plain[3] = {"type": "msp", "nothing": 1}
    client = await connect()
    with pytest.raises(AccessDeniedError) as caught:
        await client.emit_many(plain, batch_packets=10)
    error = caught.value
    assert [receipt is not None for receipt in error.receipts[:11]] == [True] * 11
    assert error.receipts[3] is not None
    assert error.receipts[3].refused
    assert error.receipts[11:] == (None,) * (len(error.receipts) - 11)
    assert len(error.unanswered) == len(error.receipts) - 11 >= 10
    server.scripts.clear()  # the second stream is opened only where the first hid the status
    again = await client.emit_many(error.unanswered)
    assert [receipt.status for receipt in again[:10]] == [EmitStatus.DUPLICATE] * 10
    assert len(server.taken) == len(error.receipts) - 1


async def test_error_of_the_source_has_the_receipts_too(connect, packets):
    def fails():
        yield from packets[:15]
        raise ConnectionFailedError("from a call inside the source")

    client = await connect()
    with pytest.raises(ConnectionFailedError) as caught:
        await client.emit_many(fails(), batch_packets=10)
    error = caught.value
    answered = [receipt.packet_id for receipt in error.receipts if receipt is not None]
    assert answered + ids(error.unanswered) == ids(packets[:15])
    assert len(error.receipts) == 15


async def test_items_sent_again_count_as_unanswered(server, connect, packets):
    async def no_room_then_away(requests, context):
        async for request in requests:
            if request.batch_id == 2:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, "")
            response = interchange_service_pb2.EmitStreamResponse(
                batch_id=request.batch_id, packets=100
            )
            response.exceptions.add(
                index=5,
                status=interchange_service_pb2.EMIT_STATUS_REFUSED,
                refusal=error_pb2.Refusal(
                    reason=error_pb2.ERROR_REASON_OVERLOADED,
                    retry_delay=duration_pb2.Duration(nanos=1_000_000),
                ),
            )
            yield response

    server.script("EmitStream", no_room_then_away, denies)
    client = await connect()
    with pytest.raises(AccessDeniedError) as caught:
        await client.emit_many(packets)
    assert [i for i, r in enumerate(caught.value.receipts) if r is None] == [5]
    assert ids(caught.value.unanswered) == [packets[5].header.packet_id]
