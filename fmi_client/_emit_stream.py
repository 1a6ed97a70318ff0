"""Sending many packets: batches over one stream, resumed where it breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import grpc

from fmi.v1 import error_pb2, interchange_service_pb2, packet_pb2
from fmi_client._calls import Caller
from fmi_client._channel import MAX_SEND_BYTES
from fmi_client._counts import counted
from fmi_client._translation import error_from_refusal, error_from_rpc, reason_name
from fmi_client.encoder import FMIEncoder
from fmi_client.errors import (
    ConnectionFailedError,
    FMIError,
    PacketRefusedError,
    PacketTooLargeError,
    ProtocolError,
)
from fmi_client.receipts import EmitStatus, Receipt
from fmi_client.retry import Backoff

__all__ = ["BATCH_BYTES", "BATCH_PACKETS", "BatchSender"]

BATCH_PACKETS: Final = 500
BATCH_BYTES: Final = 1024 * 1024
"""Serialised bytes of a batch, before compression. A larger single packet is a batch of its own."""

_MAX_IN_FLIGHT: Final = 8
_INLINE_BYTES: Final = 32 * 1024  # below this, handing over to a thread costs more than compressing

_EmitStreamCall: TypeAlias = grpc.aio.StreamStreamCall[
    interchange_service_pb2.EmitStreamRequest, interchange_service_pb2.EmitStreamResponse
]


_Source: TypeAlias = AsyncIterator[packet_pb2.Packet | PacketRefusedError]


@dataclass(frozen=True, slots=True)
class _Item:
    """A packet on its way: where its receipt goes, and its bytes."""

    place: int
    packet_id: str
    data: bytes


@dataclass(frozen=True, slots=True)
class _Batch:
    items: list[_Item]
    request: interchange_service_pb2.EmitStreamRequest


class BatchSender:
    """Sends the packets of one source and collects their receipts.

    Memory is bounded by `_MAX_IN_FLIGHT` batches, beside the receipts. A batch is kept until it is
    answered, so that a broken stream goes on with the batches that were not.
    """

    def __init__(
        self, caller: Caller, encoder: FMIEncoder, *, batch_packets: int, batch_bytes: int
    ) -> None:
        self._caller = caller
        self._target = caller.target
        self._encoder = encoder
        self._batch_packets = batch_packets
        self._batch_bytes = batch_bytes
        self._streams = Backoff(caller.retry)
        self._items = Backoff(caller.retry)
        self._receipts: list[Receipt | None] = []
        self._open: dict[int, _Item] = {}
        self._unanswered: dict[int, _Batch] = {}
        self._unsent: deque[int] = deque()
        self._next_batch_id = 1
        self._held: _Item | None = None
        self._source_ended = False

    async def send(self, packets: _Source) -> list[Receipt]:
        """Send all packets; return one receipt per packet, in their order.

        Args:
            packets: The packets; in the place of what is no packet the error that says why.

        Raises:
            FMIError: A batch as a whole was refused, or the server could not be reached any more.
                What was answered before is in its `receipts`, what was not in its `unanswered`.
        """
        try:
            with self._caller.under_way():
                return await self._send(packets)
        except FMIError as error:
            self._account(error)
            raise

    async def _send(self, packets: _Source) -> list[Receipt]:
        while not self._source_ended or self._unanswered:
            try:
                await self._run_stream(packets)
            except _FinalError as final:
                raise final.error from None
            except FMIError as error:
                await self._streams.wait_or_raise(error)
        return [receipt for receipt in self._receipts if receipt is not None]

    def _account(self, error: FMIError) -> None:
        answered = sum(receipt is not None for receipt in self._receipts)
        were = "was" if answered == 1 else "were"
        error.add_note(f"{counted(answered, 'packet')} {were} answered before")
        error.receipts = tuple(self._receipts)
        error.unanswered = tuple(
            packet_pb2.Packet.FromString(item.data) for _, item in sorted(self._open.items())
        )

    async def _run_stream(self, packets: _Source) -> None:
        stream = self._caller.stubs().interchange.EmitStream(metadata=self._caller.metadata)
        self._unsent = deque(self._unanswered)
        in_flight = 0
        allowed = (
            1  # until the first answer, so that a refusal of the stream is seen for what it is
        )
        try:
            await self._connect(stream)
            while True:
                while in_flight < allowed and await self._has_batch(packets):
                    batch_id = self._unsent.popleft()
                    await self._write(stream, self._unanswered[batch_id].request)
                    in_flight += 1
                if not in_flight:
                    break
                await self._settle(await self._answer(stream))
                in_flight -= 1
                allowed = _MAX_IN_FLIGHT
            await stream.done_writing()
            with contextlib.suppress(
                FMIError
            ):  # everything is answered: how the stream ends does not matter
                await self._answer(stream)
        finally:
            stream.cancel()

    async def _has_batch(self, packets: _Source) -> bool:
        while not self._unsent:
            items = await self._gather(packets)
            if not items:
                return False
            await self._enqueue(items)
        return True

    async def _gather(self, packets: _Source) -> list[_Item]:
        items: list[_Item] = []
        size = 0
        while len(items) < self._batch_packets:
            item, self._held = self._held, None
            if item is None:
                item = await self._next_item(packets)
            if item is None:
                break
            if items and size + len(item.data) > self._batch_bytes:
                self._held = item
                break
            items.append(item)
            size += len(item.data)
        return items

    async def _next_item(self, packets: _Source) -> _Item | None:
        while not self._source_ended:
            try:
                packet = await anext(packets)
            except StopAsyncIteration:
                self._source_ended = True
                break
            except FMIError as error:
                raise _FinalError(error) from error  # the source's own: it cannot be asked again
            if isinstance(packet, PacketRefusedError):
                self._receipts.append(Receipt(packet.packet_id, EmitStatus.REFUSED, error=packet))
                continue
            place = len(self._receipts)
            item = _Item(place, packet.header.packet_id, packet.SerializeToString())
            self._receipts.append(None)
            self._open[place] = item
            return item
        return None

    async def _enqueue(self, items: list[_Item]) -> None:
        serialized = [item.data for item in items]
        if sum(map(len, serialized)) < _INLINE_BYTES:
            encoded = self._encoder.encode_serialized(serialized)
        else:
            encoded = await asyncio.to_thread(self._encoder.encode_serialized, serialized)
        request = interchange_service_pb2.EmitStreamRequest(
            batch_id=self._next_batch_id, encoded=encoded
        )
        if request.ByteSize() > MAX_SEND_BYTES:
            await self._divide(items, request.ByteSize())
            return
        self._next_batch_id += 1
        self._unanswered[request.batch_id] = _Batch(items, request)
        self._unsent.append(request.batch_id)

    async def _divide(self, items: list[_Item], size: int) -> None:
        """Make two batches of one that does not fit into a message; refuse a packet that does not."""
        if len(items) > 1:
            half = len(items) // 2
            await self._enqueue(items[:half])
            await self._enqueue(items[half:])
            return
        (item,) = items
        error = PacketTooLargeError(
            f"the packet needs a message of {size} bytes; the most is {MAX_SEND_BYTES}",
            reason=reason_name(error_pb2.ERROR_REASON_PACKET_TOO_LARGE),
        )
        self._answered(item, Receipt(item.packet_id, EmitStatus.REFUSED, error=error))

    def _answered(self, item: _Item, receipt: Receipt) -> None:
        self._receipts[item.place] = receipt
        self._open.pop(item.place, None)

    async def _connect(self, stream: _EmitStreamCall) -> None:
        with _translated(self._target):
            async with asyncio.timeout(self._caller.timeout_s):
                await stream.wait_for_connection()

    async def _write(
        self, stream: _EmitStreamCall, request: interchange_service_pb2.EmitStreamRequest
    ) -> None:
        try:
            async with asyncio.timeout(self._caller.timeout_s):
                await stream.write(request)
        except asyncio.InvalidStateError:
            await self._answer(stream)  # the stream is over: raises what ended it
            raise ConnectionFailedError(f"{self._target}: the server ended the stream") from None
        except (grpc.aio.AioRpcError, TimeoutError):
            # Where a write meets the end of a stream, grpc.aio hides the server's status behind an
            # internal one. The next stream tells: its first answer is waited for.
            raise ConnectionFailedError(f"{self._target}: the stream broke under a write") from None

    async def _answer(self, stream: _EmitStreamCall) -> interchange_service_pb2.EmitStreamResponse:
        with _translated(self._target):
            async with asyncio.timeout(self._caller.timeout_s):
                response = await stream.read()
        if isinstance(response, interchange_service_pb2.EmitStreamResponse):
            return response
        if response is grpc.aio.EOF:
            raise ConnectionFailedError(f"{self._target}: the server ended the stream")
        raise ProtocolError(f"{self._target}: an answer cannot be read")

    async def _settle(self, response: interchange_service_pb2.EmitStreamResponse) -> None:
        batch = self._unanswered.get(response.batch_id)
        if batch is None:
            raise ProtocolError(f"the server answered batch {response.batch_id}, which is not open")
        if response.HasField("refusal"):
            await self._settle_refused(response.batch_id, error_from_refusal(response.refusal))
            return
        if response.packets != len(batch.items) or any(
            result.index >= len(batch.items) for result in response.exceptions
        ):
            raise ProtocolError(
                f"the server answered {response.packets} packets of a batch of {len(batch.items)}"
            )
        del self._unanswered[response.batch_id]
        self._streams.progressed()
        results = {result.index: result for result in response.exceptions}
        again: list[_Item] = []
        last: FMIError | None = None
        for index, item in enumerate(batch.items):
            result = results.get(index)
            if result is None:
                receipt = Receipt(item.packet_id, EmitStatus.ACCEPTED)
            else:
                receipt = Receipt.from_result(result, item.packet_id)
            self._answered(item, receipt)
            if receipt.refused and receipt.error is not None and receipt.error.retryable:
                again.append(item)
                last = receipt.error
        if last is None:
            self._items.progressed()
            return
        try:
            await self._items.wait_or_raise(last)
        except FMIError:
            return  # the receipts keep the refusals
        for item in again:  # no refusal is the last word on what is sent again
            self._receipts[item.place] = None
            self._open[item.place] = item
        await self._enqueue(again)

    async def _settle_refused(self, batch_id: int, error: FMIError) -> None:
        try:
            await self._items.wait_or_raise(error)
        except FMIError:
            raise _FinalError(error) from None
        self._unsent.append(batch_id)


@contextlib.contextmanager
def _translated(target: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise ConnectionFailedError(f"{target}: no answer in time") from None
    except grpc.aio.AioRpcError as failure:
        raise error_from_rpc(failure, target) from None


class _FinalError(Exception):
    """What another stream cannot change: a batch was refused for good, or the source failed."""

    def __init__(self, error: FMIError) -> None:
        super().__init__(str(error))
        self.error = error
