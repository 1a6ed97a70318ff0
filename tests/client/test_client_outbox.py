"""The outbox in memory: bounds, order, once, and what becomes of packets that are refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import grpc
import pytest
from scripted_server import FAST, aborts, answers, packet_of_bytes, status

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_client import (
    AsyncFMIClient,
    CohortRuleError,
    ConfigurationError,
    ContractError,
    FMIClient,
    FMIEncoder,
    Outbox,
    OutboxFullError,
    PacketIdReusedError,
    PacketTooLargeError,
    RetryPolicy,
)
from fmi_client.receipts import EmitStatus

WAIT_S = 60.0
DOWN = aborts(grpc.StatusCode.UNAVAILABLE)
REFUSAL = status(grpc.StatusCode.INVALID_ARGUMENT, "COHORT_RULE_VIOLATION", "not in the vocabulary")


def msps(emitter, count):
    return [emitter.emit_msp(controller={"tau": i}) for i in range(count)]


async def until(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  what is watched is not in this event loop
            await asyncio.sleep(0.001)


def ids(packets):
    return [packet.header.packet_id for packet in packets]


def settled(outbox):
    found = outbox.statistics
    return found.sent + found.refused + found.dropped + found.waiting == found.spooled


async def test_emit_returns_before_the_server_answers(server, connect):
    await server.stop()
    client = await connect(outbox=Outbox())
    receipt = await client.emit_msp(controller={"tau": 0.9})
    assert receipt.status is EmitStatus.SPOOLED
    assert not receipt.ok
    assert not receipt.refused
    assert not await client.flush(0.05)
    assert client.outbox.statistics.waiting == 1

    await server.restart()
    assert await client.flush(WAIT_S)
    assert list(server.taken) == [receipt.packet_id]
    found = client.outbox.statistics
    assert (found.spooled, found.sent, found.waiting, found.bytes) == (1, 1, 0, 0)
    assert found.retried >= 1
    assert found.oldest_age_s == 0.0


async def test_a_backlog_is_sent_in_order_in_batches_over_a_stream(server, connect, emitter):
    await server.stop()
    client = await connect(outbox=Outbox())
    packets = msps(emitter, 1200)
    receipts = await client.emit_many(packets[:700])
    for packet in packets[700:]:
        await client.emit(packet)
    assert [receipt.packet_id for receipt in receipts] == ids(packets[:700])
    await server.restart()
    assert await client.flush(WAIT_S)
    assert list(server.taken) == ids(packets)
    assert len(server.seen("Emit")) == 0
    assert server.seen("EmitStream")


async def test_a_single_packet_is_sent_with_a_unary_call(server, connect):
    client = await connect(outbox=Outbox())
    await client.emit_msp(controller={"tau": 1})
    assert await client.flush(WAIT_S)
    assert len(server.seen("Emit")) == 1
    assert not server.seen("EmitStream")


async def test_no_packet_overtakes_one_that_the_server_cannot_take_now(server, connect, emitter):
    """Neither a batch nor a single one: what came first is tried until it is settled."""
    server.script("Emit", DOWN, DOWN, DOWN)
    client = await connect(outbox=Outbox())
    packets = msps(emitter, 20)
    for packet in packets:
        await client.emit(packet)
        await asyncio.sleep(0)
    assert await client.flush(WAIT_S)
    assert list(server.taken) == ids(packets)


async def test_an_attempt_without_an_answer_counts_once(server, connect):
    async def takes_and_breaks(request, context):
        server.take(request.packet.header.packet_id)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "")

    server.script("Emit", takes_and_breaks)
    client = await connect(outbox=Outbox())
    await client.emit_msp(controller={"tau": 1})
    assert await client.flush(WAIT_S)
    assert len(server.taken) == 1
    found = client.outbox.statistics
    assert (found.sent, found.duplicates, found.retried) == (1, 1, 1)


async def test_retry_info_is_honoured_and_flush_does_not_hurry_it(server, connect):
    busy = status(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after_s=0.4)
    server.script("Emit", aborts(busy))
    client = await connect(outbox=Outbox())
    await client.emit_msp(controller={"tau": 1})
    await until(lambda: client.outbox.statistics.retried)
    assert not await client.flush(0.2)
    assert len(server.seen("Emit")) == 1
    assert await client.flush(WAIT_S)
    assert len(server.seen("Emit")) == 2


async def test_flush_does_not_wait_for_the_backoff(server, connect):
    server.script("Emit", DOWN)
    slow = RetryPolicy(initial_s=3600.0, max_s=3600.0)
    client = await connect(outbox=Outbox(), retry=slow)
    await client.emit_msp(controller={"tau": 1})
    await until(lambda: client.outbox.statistics.retried)
    assert await client.flush(WAIT_S)


async def test_a_refused_packet_leaves_and_is_told(server, connect, caplog):
    told = []
    server.script("Emit", aborts(REFUSAL))
    outbox = Outbox(on_refused=lambda packet, error: told.append((packet, error)))
    client = await connect(outbox=outbox)
    bad = await client.emit_msp(controller={"tau": 1})
    assert await client.flush(WAIT_S)
    good = await client.emit_msp(controller={"tau": 2})
    assert await client.flush(WAIT_S)
    assert list(server.taken) == [good.packet_id]
    ((packet, error),) = told
    assert packet.header.packet_id == bad.packet_id
    assert isinstance(error, CohortRuleError)
    (kept,) = client.outbox.refused
    assert kept.packet == packet
    assert kept.error is error
    assert client.outbox.statistics.refused == 1
    assert settled(outbox)
    (line,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert bad.packet_id in line.getMessage()


async def test_a_refusal_in_a_batch_harms_no_neighbour(server, connect, emitter):
    packets = msps(emitter, 3)

    async def refuses_the_second(requests, _context):
        async for request in requests:
            answer = server.answer(request)
            answer.accepted = 2
            refused = answer.exceptions.add(index=1, status=wire_pb2.EMIT_STATUS_REFUSED)
            refused.refusal.message = "no"
            yield answer

    await server.stop()
    server.script("EmitStream", refuses_the_second)
    client = await connect(outbox=Outbox())
    await client.emit_many(packets)
    await server.restart()
    assert await client.flush(WAIT_S)
    (kept,) = client.outbox.refused
    assert kept.packet == packets[1]
    assert client.outbox.statistics.sent == 2


async def test_a_callback_that_fails_stops_nothing(server, connect, caplog):
    def fails(_packet, _error):
        raise LookupError

    server.script("Emit", aborts(REFUSAL))
    client = await connect(outbox=Outbox(on_refused=fails))
    await client.emit_msp(controller={"tau": 1})
    assert await client.flush(WAIT_S)
    await client.emit_msp(controller={"tau": 2})
    assert await client.flush(WAIT_S)
    assert len(server.taken) == 1
    assert "on_refused failed" in caplog.text


async def test_only_the_newest_refusals_are_kept(server, connect):
    server.script("Emit", *[aborts(REFUSAL)] * 3)
    client = await connect(outbox=Outbox(keep_refused=2))
    sent = []
    for i in range(3):
        sent.append((await client.emit_msp(controller={"tau": i})).packet_id)
        assert await client.flush(WAIT_S)
    assert [kept.packet.header.packet_id for kept in client.outbox.refused] == sent[1:]


@pytest.mark.parametrize(
    "failure",
    [
        status(grpc.StatusCode.UNAUTHENTICATED, message="token expired"),
        status(grpc.StatusCode.INTERNAL, "INTERNAL"),
        status(grpc.StatusCode.INVALID_ARGUMENT, message="a proxy, not the server"),
        status(grpc.StatusCode.RESOURCE_EXHAUSTED, message="a quota"),
    ],
)
async def test_what_is_no_verdict_on_the_packet_keeps_it(server, connect, failure):
    server.script("Emit", aborts(failure), aborts(failure))
    client = await connect(outbox=Outbox())
    receipt = await client.emit_msp(controller={"tau": 1})
    assert await client.flush(WAIT_S)
    assert list(server.taken) == [receipt.packet_id]
    assert client.outbox.refused == ()


async def test_a_batch_that_cannot_be_taken_as_a_whole_is_sent_packet_by_packet(
    server, connect, emitter
):
    async def refuses_the_batch(requests, _context):
        async for request in requests:
            answer = wire_pb2.EmitStreamResponse(batch_id=request.batch_id)
            answer.refusal.message = "too many packets"
            yield answer

    await server.stop()
    server.script("EmitStream", refuses_the_batch)
    server.script("Emit", aborts(REFUSAL))
    client = await connect(outbox=Outbox())
    packets = msps(emitter, 5)
    await client.emit_many(packets)
    await server.restart()
    assert await client.flush(WAIT_S)
    assert list(server.taken) == ids(packets[1:])
    assert ids(kept.packet for kept in client.outbox.refused) == ids(packets[:1])
    assert len(server.seen("Emit")) == 5


async def test_a_dictionary_that_the_server_does_not_know_stops_nothing(server, connect, emitter):
    samples = [emitter.emit_msp(controller={"tau": i / 500}) for i in range(500)]
    encoder = FMIEncoder(dictionary=FMIEncoder.train(samples, dictionary_bytes=2048))
    unknown = status(grpc.StatusCode.FAILED_PRECONDITION, "DICTIONARY_UNKNOWN")
    server.script("Emit", aborts(unknown))
    client = await connect(outbox=Outbox(), encoder=encoder)
    receipt = await client.emit(samples[0])
    assert await client.flush(WAIT_S)
    assert list(server.taken) == [receipt.packet_id]
    sent = [request.WhichOneof("payload") for request in server.seen("Emit")]
    assert sent == ["encoded", "packet"]


async def test_a_packet_that_breaks_the_contract_is_not_taken(connect, emitter):
    client = await connect(outbox=Outbox())
    packet = emitter.emit_msp(controller={"tau": 1})
    packet.header.packet_id = "!"
    with pytest.raises(ContractError) as caught:
        await client.emit(packet)
    assert caught.value.packet == packet
    with pytest.raises(PacketTooLargeError):
        await client.emit(packet_of_bytes(8 * 2**20, emitter.emit_msp(controller={"tau": 1})))
    assert client.outbox.statistics.spooled == 0


async def test_a_full_outbox_refuses(server, connect, emitter):
    await server.stop()
    client = await connect(outbox=Outbox(max_packets=2))
    packets = msps(emitter, 3)
    await client.emit(packets[0])
    await client.emit(packets[1])
    with pytest.raises(OutboxFullError, match="2 packets of at most 2") as caught:
        await client.emit(packets[2])
    assert caught.value.retryable
    assert caught.value.packet == packets[2]
    await server.restart()
    assert await client.flush(WAIT_S)
    await client.emit(packets[2])
    assert await client.flush(WAIT_S)
    assert list(server.taken) == ids(packets)


async def test_bytes_are_bounded_too(server, connect, emitter):
    await server.stop()
    packets = msps(emitter, 3)
    size = max(packet.ByteSize() for packet in packets)
    client = await connect(outbox=Outbox(max_bytes=2 * size))
    await client.emit_many(packets[:2])
    with pytest.raises(OutboxFullError):
        await client.emit(packets[2])
    assert 0 < client.outbox.statistics.bytes <= 2 * size
    with pytest.raises(PacketTooLargeError, match="more than the whole outbox"):
        Outbox(max_bytes=10).put(packets[:1])
    await client.aclose(flush_s=0)


async def test_a_full_outbox_may_drop_what_waited_longest(server, connect, emitter, caplog):
    await server.stop()
    client = await connect(outbox=Outbox(max_packets=3, when_full="drop_oldest"))
    packets = msps(emitter, 10)
    for packet in packets:
        await client.emit(packet)
    assert client.outbox.statistics.dropped == 7
    assert client.outbox.statistics.waiting == 3
    await server.restart()
    assert await client.flush(WAIT_S)
    taken = list(server.taken)
    assert taken[-3:] == ids(packets[-3:])
    # What was under way when it was dropped may have come all the same: in order, and once.
    assert [packet for packet in ids(packets) if packet in taken] == taken
    assert settled(client.outbox)
    lines = [r.getMessage() for r in caplog.records if "dropped" in r.getMessage()]
    assert len(lines) == 2, "one when it begins, one when it is over"
    assert "7 packets" in lines[1]


async def test_an_outage_is_told_once(server, connect, caplog):
    caplog.set_level(logging.INFO, "fmi_client")
    await server.stop()
    client = await connect(outbox=Outbox())
    for i in range(5):
        await client.emit_msp(controller={"tau": i})
    await until(lambda: client.outbox.statistics.retried >= 5)
    await server.restart()
    assert await client.flush(WAIT_S)
    lines = [(r.levelno, r.getMessage()) for r in caplog.records if "outbox" in r.name]
    assert [level for level, _ in lines] == [logging.WARNING, logging.INFO]
    assert server.target in lines[0][1]


async def test_the_same_packet_is_taken_once_and_another_with_its_id_not(server, connect, emitter):
    await server.stop()
    client = await connect(outbox=Outbox())
    packet = emitter.emit_msp(controller={"tau": 1})
    await client.emit(packet)
    assert (await client.emit(packet)).status is EmitStatus.SPOOLED
    assert client.outbox.statistics.spooled == 1
    packet.msp.controller["tau"] = 2
    with pytest.raises(PacketIdReusedError):
        await client.emit(packet)
    await client.aclose(flush_s=0)


async def test_emit_many_tells_of_each_packet_what_became_of_it(server, connect, emitter):
    await server.stop()
    client = await connect(outbox=Outbox(max_packets=3))
    good = msps(emitter, 4)
    bad = emitter.emit_msp(controller={"tau": 1})
    bad.header.packet_id = "!"
    receipts = await client.emit_many([good[0], {"type": "nonsense"}, bad, good[1]])
    assert [str(receipt.status) for receipt in receipts] == [
        "spooled",
        "refused",
        "refused",
        "spooled",
    ]
    with pytest.raises(OutboxFullError) as caught:
        await client.emit_many(good[2:])
    assert [receipt is not None for receipt in caught.value.receipts] == [True, False]
    assert list(caught.value.unanswered) == good[3:]
    await client.aclose(flush_s=0)


async def test_closing_sends_what_waits(server, emitter):
    async with AsyncFMIClient(server.target, outbox=Outbox(), retry=FAST) as client:
        packets = msps(emitter, 30)
        await client.emit_many(packets)
    assert list(server.taken) == ids(packets)


async def test_closing_gives_up_in_time_and_says_how_many_are_lost(server, emitter, caplog):
    await server.stop()
    client = AsyncFMIClient(server.target, outbox=Outbox(), retry=FAST)
    await client.emit_many(msps(emitter, 3))
    async with asyncio.timeout(60):
        await client.aclose(flush_s=0.1)
    assert "3 packets were not sent, and are lost" in caplog.text


class SwallowingProxy:
    """Carries bytes to a server and back; a connection that is `swallowing` loses all of them."""

    def __init__(self, target):
        self._address = target.split(":")
        self._connections = []
        self.swallowing = []
        self.target = ""

    async def __aenter__(self):
        self._listener = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_error):
        self._listener.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _carry(self, reader, writer):
        self._connections.append(asyncio.current_task())
        place = len(self.swallowing)
        self.swallowing.append(False)
        there, back = await asyncio.open_connection(*self._address)

        async def pump(source, sink):
            while data := await source.read(65536):
                if not self.swallowing[place]:
                    sink.write(data)

        try:
            await asyncio.gather(pump(reader, back), pump(there, writer))
        except asyncio.CancelledError:
            pass  # asyncio's own callback would raise it
        finally:
            for end in (back, writer):
                end.close()
                with contextlib.suppress(ConnectionError):
                    await end.wait_closed()


async def test_a_connection_that_carries_nothing_is_replaced(server, emitter):
    async with SwallowingProxy(server.target) as proxy:
        options = {"outbox": Outbox(), "retry": FAST, "timeout_s": 1.0}
        async with AsyncFMIClient(proxy.target, **options) as client:
            packets = msps(emitter, 2)
            await client.emit(packets[0])
            assert await client.flush(WAIT_S)
            proxy.swallowing[0] = True
            await client.emit(packets[1])
            assert await client.flush(WAIT_S)
        assert list(server.taken) == ids(packets)
        assert len(proxy.swallowing) == 2


async def test_an_outbox_belongs_to_one_client(server, connect):
    outbox = Outbox()
    await connect(outbox=outbox)
    with pytest.raises(ConfigurationError, match="one client"):
        AsyncFMIClient(server.target, outbox=outbox)


async def test_without_an_outbox_there_is_none(connect):
    client = await connect()
    with pytest.raises(ConfigurationError, match="outbox"):
        await client.flush()
    with pytest.raises(ConfigurationError, match="outbox"):
        _ = client.outbox


@pytest.mark.parametrize(
    "wrong", [{"max_packets": 0}, {"max_bytes": 0}, {"keep_refused": 0}, {"when_full": "wait"}]
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ConfigurationError):
        Outbox(**wrong)


async def test_the_blocking_client_has_it_too(server, emitter):
    await server.stop()

    def work():
        with FMIClient(server.target, retry=FAST, outbox=Outbox()) as client:
            packets = msps(emitter, 3)
            assert client.emit(packets[0]).status is EmitStatus.SPOOLED
            assert len(client.emit_many(packets[1:])) == 2
            assert not client.flush(0.05)
            assert client.outbox.statistics.waiting == 3
            asyncio.run_coroutine_threadsafe(server.restart(), loop).result()
            assert client.flush(WAIT_S)
            return packets

    loop = asyncio.get_running_loop()
    packets = await asyncio.to_thread(work)
    assert list(server.taken) == ids(packets)


async def test_an_answer_that_makes_no_sense_settles_nothing(server, connect):
    server.script("Emit", answers(wire_pb2.EmitResponse()))
    client = await connect(outbox=Outbox())
    receipt = await client.emit_msp(controller={"tau": 1})
    assert await client.flush(WAIT_S)
    assert list(server.taken) == [receipt.packet_id]
    assert client.outbox.statistics.retried == 1
