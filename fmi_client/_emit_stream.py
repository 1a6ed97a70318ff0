"""Sending many packets: batches over one stream, resumed where it breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import grpc

from fmi.v1 import interchange_service_pb2, packet_pb2
from fmi_client._calls import Caller
from fmi_client.encoder import FMIEncoder
from fmi_client.errors import (
    ConnectionFailedError,
    FMIError,
    ProtocolError,
    error_from_refusal,
    error_from_rpc,
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
        self._encoder = encoder
        self._batch_packets = batch_packets
        self._batch_bytes = batch_bytes
        self._streams = Backoff(caller.retry)
        self._items = Backoff(caller.retry)
        self._receipts: list[Receipt | None] = []
        self._unanswered: dict[int, _Batch] = {}
        self._unsent: deque[int] = deque()
        self._next_batch_id = 1
        self._held: _Item | None = None
        self._source_ended = False

    async def send(self, packets: AsyncIterator[packet_pb2.Packet]) -> list[Receipt]:
        """Send all packets; return one receipt per packet, in their order.

        Raises:
            FMIError: A batch as a whole was refused, or the server could not be reached any more.
                What was answered before is durable; a note says how much.
        """
        with self._caller.under_way():
            return await self._send(packets)

    async def _send(self, packets: AsyncIterator[packet_pb2.Packet]) -> list[Receipt]:
        while not self._source_ended or self._unanswered:
            try:
                await self._run_stream(packets)
            except _FinalError as final:
                raise self._noted(final.error) from None
            except FMIError as error:
                try:
                    await self._streams.wait_or_raise(error)
                except FMIError:
                    raise self._noted(error) from None
        return [receipt for receipt in self._receipts if receipt is not None]

    def _noted(self, error: FMIError) -> FMIError:
        answered = sum(receipt is not None for receipt in self._receipts)
        error.add_note(f"{answered} packets were answered before")
        return error

    async def _run_stream(self, packets: AsyncIterator[packet_pb2.Packet]) -> None:
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

    async def _has_batch(self, packets: AsyncIterator[packet_pb2.Packet]) -> bool:
        if not self._unsent:
            items = await self._gather(packets)
            if items:
                await self._enqueue(items)
        return bool(self._unsent)

    async def _gather(self, packets: AsyncIterator[packet_pb2.Packet]) -> list[_Item]:
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

    async def _next_item(self, packets: AsyncIterator[packet_pb2.Packet]) -> _Item | None:
        if self._source_ended:
            return None
        try:
            packet = await anext(packets)
        except StopAsyncIteration:
            self._source_ended = True
            return None
        except FMIError as error:
            raise _FinalError(error) from error  # the source's own: it cannot be asked again
        self._receipts.append(None)
        return _Item(len(self._receipts) - 1, packet.header.packet_id, packet.SerializeToString())

    async def _enqueue(self, items: list[_Item]) -> None:
        serialized = [item.data for item in items]
        if sum(map(len, serialized)) < _INLINE_BYTES:
            encoded = self._encoder.encode_serialized(serialized)
        else:
            encoded = await asyncio.to_thread(self._encoder.encode_serialized, serialized)
        batch_id = self._next_batch_id
        self._next_batch_id += 1
        self._unanswered[batch_id] = _Batch(
            items, interchange_service_pb2.EmitStreamRequest(batch_id=batch_id, encoded=encoded)
        )
        self._unsent.append(batch_id)

    async def _connect(self, stream: _EmitStreamCall) -> None:
        with _translated():
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
            raise ConnectionFailedError("the server ended the stream") from None
        except (grpc.aio.AioRpcError, TimeoutError):
            # Where a write meets the end of a stream, grpc.aio hides the server's status behind an
            # internal one. The next stream tells: its first answer is waited for.
            raise ConnectionFailedError("the stream broke under a write") from None

    async def _answer(self, stream: _EmitStreamCall) -> interchange_service_pb2.EmitStreamResponse:
        with _translated():
            async with asyncio.timeout(self._caller.timeout_s):
                response = await stream.read()
        if isinstance(response, interchange_service_pb2.EmitStreamResponse):
            return response
        raise ConnectionFailedError("the server ended the stream")

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
            self._receipts[item.place] = receipt
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
        await self._enqueue(again)

    async def _settle_refused(self, batch_id: int, error: FMIError) -> None:
        try:
            await self._items.wait_or_raise(error)
        except FMIError:
            raise _FinalError(error) from None
        self._unsent.append(batch_id)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise ConnectionFailedError("the stream is silent: no answer in time") from None
    except grpc.aio.AioRpcError as failure:
        raise error_from_rpc(failure) from None


class _FinalError(Exception):
    """What another stream cannot change: a batch was refused for good, or the source failed."""

    def __init__(self, error: FMIError) -> None:
        super().__init__(str(error))
        self.error = error
