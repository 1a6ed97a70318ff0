"""Sending what waits in an outbox: in order, until the server has answered for each packet.

One task sends; a packet leaves the outbox when it was answered for and not before, and nothing is sent
before what was taken earlier is settled. So order is kept, and what is sent twice has one id.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Final, TypeAlias, TypeVar

from fmi.v1 import error_pb2, interchange_service_pb2, packet_pb2
from fmi_client._calls import Caller
from fmi_client._causes import last_cause
from fmi_client._channel import MAX_SEND_BYTES
from fmi_client._contract import check_packet
from fmi_client._emit_stream import BATCH_BYTES, BATCH_PACKETS
from fmi_client._outbox_store import Item, RefusedPacket
from fmi_client._outbox_stream import OrderedStream
from fmi_client._translation import reason_name
from fmi_client.encoder import FMIEncoder
from fmi_client.errors import (
    ClientClosedError,
    CohortUnknownError,
    DeadlineError,
    EnvelopeError,
    FMIError,
    OutboxCorruptError,
    OutboxFullError,
    PacketRefusedError,
    PacketTooLargeError,
    ProtocolError,
)
from fmi_client.outbox import FileOutbox, Outbox
from fmi_client.receipts import EmitStatus, Receipt
from fmi_client.retry import NO_RETRY, Backoff

__all__ = ["FLUSH_S", "OutboxSender"]

FLUSH_S: Final = 5.0
"""Seconds that closing a client waits for what is in its outbox."""

PacketSource: TypeAlias = AsyncIterator[packet_pb2.Packet | PacketRefusedError]
"""Packets; in the place of what is no packet the error that says why."""

_REQUEST_BYTES: Final = 16  # what a request adds to its one packet, at most

_T = TypeVar("_T")
_log: Final = logging.getLogger(__name__)


class OutboxSender:
    """Owns an outbox and sends from it, over a connection of its own.

    Args:
        outbox: What waits.
        caller: Of the client, for its settings.
        encoder: Packs batches; and single packets, if it has a dictionary.

    Raises:
        ConfigurationError: The outbox belongs to another client.
    """

    def __init__(self, outbox: Outbox, caller: Caller, encoder: FMIEncoder) -> None:
        outbox.acquire()
        self.outbox = outbox
        self._caller = caller.sibling(retry=NO_RETRY)
        self._encoder = encoder
        self._backoff = Backoff(caller.retry, endless=True)
        self._stream = OrderedStream(self._caller, encoder)
        # One thread, so that what was given first is taken first.
        self._disk = ThreadPoolExecutor(1, "fmi-outbox") if outbox.blocks else None
        self._task: asyncio.Task[None] | None = None
        self._more = asyncio.Event()
        self._empty = asyncio.Event()
        self._hurry = asyncio.Event()
        self._singly = 0
        self._down_since: float | None = None
        self._failed: FMIError | None = None
        self._closed = False

    def start(self) -> None:
        """Send from now on. Needs a running event loop; starting twice does nothing.

        Raises:
            ClientClosedError: The client is closed, or gRPC cannot be used in this process.
            ConfigurationError: It is used from another event loop, or TLS files cannot be read.
        """
        self._check_open()
        self._caller.stubs()
        if self._task is None or self._task.done():
            self._note_level()
            self._task = asyncio.create_task(self._run(), name="fmi-outbox")

    async def put(self, packets: Sequence[packet_pb2.Packet]) -> list[Receipt]:
        """Take packets, all or none; return when they are as safe as the store makes them.

        Raises:
            ContractError: One breaks rules of the contract.
            PacketTooLargeError: One does not fit into a message.
            OutboxError: As `Outbox.put`; or the file was found damaged, and nothing more is sent.
            ClientClosedError: As `start`.
        """
        for packet in packets:
            check_packet(packet)
            _check_size(packet.ByteSize() + _REQUEST_BYTES)
        if self._failed is not None:
            raise self._failed
        self.start()
        taking = asyncio.ensure_future(self._step(lambda: self.outbox.put(packets)))
        taking.add_done_callback(self._taken)
        return await asyncio.shield(taking)  # what is being written is sent, whoever waits for it

    async def put_many(self, source: PacketSource, batch_packets: int) -> list[Receipt]:
        """Take packets as they come; return one receipt for each, in order.

        Raises:
            FMIError: As `put`, but for packets that break rules, whose receipts say so. What was
                taken before is in its `receipts`, what was not in its `unanswered`.
        """
        receipts: list[Receipt | None] = []
        packets: dict[int, packet_pb2.Packet] = {}
        try:
            async for packet in source:
                if isinstance(packet, PacketRefusedError):
                    receipts.append(Receipt(packet.packet_id, EmitStatus.REFUSED, error=packet))
                    continue
                packets[len(receipts)] = packet
                receipts.append(None)
                if len(packets) == batch_packets:
                    await self._put_chunk(packets, receipts)
            await self._put_chunk(packets, receipts)
        except FMIError as error:
            error.receipts = tuple(receipts)
            error.unanswered = tuple(packets.values())
            raise
        return [receipt for receipt in receipts if receipt is not None]

    async def _put_chunk(
        self, packets: dict[int, packet_pb2.Packet], receipts: list[Receipt | None]
    ) -> None:
        """Take `packets`, which stand at their places, and note their receipts there."""
        if not packets:
            return
        try:
            taken = await self.put(list(packets.values()))
        except (PacketRefusedError, OutboxFullError):
            await self._put_singly(packets, receipts)
            return
        for place, receipt in zip(packets, taken, strict=True):
            receipts[place] = receipt
        packets.clear()

    async def _put_singly(
        self, packets: dict[int, packet_pb2.Packet], receipts: list[Receipt | None]
    ) -> None:
        for place, packet in list(packets.items()):
            try:
                (receipts[place],) = await self.put([packet])
            except PacketRefusedError as error:
                receipts[place] = Receipt(packet.header.packet_id, EmitStatus.REFUSED, error=error)
            del packets[place]

    async def flush(self, timeout_s: float | None) -> bool:
        """Wait until nothing waits; say whether that is so.

        Raises:
            OutboxCorruptError: The file was found damaged, and nothing more is sent.
            ClientClosedError: The client is closed.
        """
        self.start()
        self._hurry.set()
        assert self._task is not None  # noqa: S101 - start() made it
        empty = asyncio.ensure_future(self._empty.wait())
        try:
            await asyncio.wait(
                {empty, self._task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            empty.cancel()
        if self._failed is not None:
            raise self._failed
        return not len(self.outbox)

    async def aclose(self, flush_s: float) -> None:
        """Send for at most `flush_s` seconds what waits, and end. Closing twice does nothing."""
        if self._closed:
            return
        if self._caller.foreign:
            self._closed = True
            return  # all that it has belongs to the parent
        try:
            if len(self.outbox) and flush_s > 0:
                with contextlib.suppress(FMIError):
                    await self.flush(flush_s)
        finally:
            self._closed = True
            await self._end()

    async def _end(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self._stream.drop()
        await self._caller.aclose()
        self._empty.set()
        waiting = len(self.outbox)
        if self._disk is not None:
            self._disk.shutdown(wait=False)
        self.outbox.close()
        if not waiting:
            return
        if isinstance(self.outbox, FileOutbox):
            _log.info("outbox: %d packets wait in %s", waiting, self.outbox.path)
        else:
            _log.warning("outbox: %d packets were not sent, and are lost", waiting)

    async def _run(self) -> None:
        while True:
            await self._more.wait()
            try:
                await self._send_some()
            except OutboxCorruptError as error:
                _log.critical("outbox: %s; nothing more is sent", error)
                self._failed = error
                return
            except ClientClosedError:
                return
            except FMIError as error:
                await self._recover(error)
            except Exception as failure:
                _log.exception("outbox: sending failed in a way that is not foreseen")
                await self._recover(FMIError(f"{type(failure).__name__}: {failure}"))
            else:
                self._arrived()
            self._note_level()
            if self._empty.is_set():
                self._stream.drop()

    async def _send_some(self) -> None:
        """Send what is first, and settle what was answered."""
        most = 1 if self._singly else BATCH_PACKETS
        batch = await self._step(lambda: self.outbox.head(most, BATCH_BYTES))
        if len(batch) > 1:
            receipts = await self._send_batch(batch)
        else:
            self._stream.drop()
            receipts = [await self._send_one(item, data) for item, data in batch]
            self._singly = max(0, self._singly - 1)
        answered = [
            (entry, receipt)
            for entry, receipt in zip(batch, receipts, strict=True)
            if not _to_be_repeated(receipt)
        ]
        refused = [_refused(data, receipt) for (_, data), receipt in answered if receipt.refused]
        pairs = [(item, receipt) for (item, _), receipt in answered]
        await self._step(lambda: self.outbox.settle(pairs, refused))
        for one in refused:
            self.outbox.tell_refused(one)
        again = [receipt.error for receipt in receipts if _to_be_repeated(receipt)]
        if again and again[0] is not None:
            raise again[0]

    async def _send_batch(self, batch: Sequence[tuple[Item, bytes]]) -> list[Receipt]:
        try:
            return await self._stream.send(batch)
        except FMIError as error:
            if (
                not error.retryable
            ):  # one of them may be what is wrong: it shall not stop the others
                self._singly = len(batch)
            raise

    async def _send_one(self, item: Item, data: bytes) -> Receipt:
        """Send a packet, and return its receipt, of a refusal too."""
        packet = packet_pb2.Packet.FromString(data)
        plain = interchange_service_pb2.EmitRequest(packet=packet)
        try:
            if self._encoder.dictionary_id:
                encoded = interchange_service_pb2.EmitRequest(
                    encoded=self._encoder.encode_serialized([data])
                )
                with contextlib.suppress(EnvelopeError):  # the packet itself may be good
                    return await self._emit(item, encoded)
            return await self._emit(item, plain)
        except FMIError as error:
            if not _is_verdict(error):
                raise
            return Receipt(item.packet_id, EmitStatus.REFUSED, error=error)

    async def _emit(self, item: Item, request: interchange_service_pb2.EmitRequest) -> Receipt:
        _check_size(request.ByteSize())
        response = await self._caller.call(self._caller.stubs().interchange.Emit, request)
        if len(response.results) != 1:
            raise ProtocolError(f"the server gave {len(response.results)} results for one packet")
        return Receipt.from_result(response.results[0], item.packet_id)

    async def _recover(self, error: FMIError) -> None:
        """Tell of an outage once, and wait before the next attempt."""
        self._stream.drop()
        self.outbox.note_retry()
        if self._down_since is None:
            self._down_since = monotonic()
            _log.warning(
                "outbox: nothing can be sent to %s (%s); %d packets wait, trying again",
                self._caller.target,
                last_cause(str(error), self._caller.target),
                len(self.outbox),
            )
        if isinstance(error, DeadlineError):
            # A connection that carries nothing can look alive for hours.
            await self._caller.reconnect()
        self._hurry.clear()
        delay_s = self._backoff.next_delay_s(error)
        if error.retry_after_s is not None:  # the server is there, and asked for the time
            await asyncio.sleep(delay_s)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._hurry.wait()

    def _arrived(self) -> None:
        self._backoff.progressed()
        if self._down_since is not None:
            _log.info(
                "outbox: %s takes packets again after %.1f s; %d wait",
                self._caller.target,
                monotonic() - self._down_since,
                len(self.outbox),
            )
            self._down_since = None

    def _taken(self, taking: asyncio.Future[list[Receipt]]) -> None:
        if not taking.cancelled():
            taking.exception()  # seen: whoever waited for it may be gone
        self._note_level()

    def _note_level(self) -> None:
        waiting = bool(len(self.outbox))
        for event, level in ((self._more, waiting), (self._empty, not waiting)):
            if level:
                event.set()
            else:
                event.clear()

    def _check_open(self) -> None:
        self._caller.check_open()
        if self._closed:
            raise ClientClosedError("the client is closed; make a new one")

    async def _step(self, work: Callable[[], _T]) -> _T:
        """Do a step of the outbox, out of the event loop if it waits for a disk."""
        if self._disk is None:
            return work()
        try:
            future = self._disk.submit(work)
        except RuntimeError:  # the interpreter ends, and its threads with it
            return work()
        return await asyncio.wrap_future(future)


def _is_verdict(error: FMIError) -> bool:
    """Say whether a failure is about the packet and for good, so that sending it again is in vain."""
    if error.retryable or not isinstance(error, PacketRefusedError | CohortUnknownError):
        return False
    return bool(error.reason) or isinstance(error, PacketTooLargeError)


def _check_size(size: int) -> None:
    if size > MAX_SEND_BYTES:
        raise PacketTooLargeError(
            f"the packet needs a message of {size} bytes; the most is {MAX_SEND_BYTES}",
            reason=reason_name(error_pb2.ERROR_REASON_PACKET_TOO_LARGE),
        )


def _to_be_repeated(receipt: Receipt) -> bool:
    return receipt.refused and receipt.error is not None and receipt.error.retryable


def _refused(data: bytes, receipt: Receipt) -> RefusedPacket:
    error = receipt.error or FMIError("refused without a reason")
    return RefusedPacket(packet_pb2.Packet.FromString(data), error, dt.datetime.now(dt.UTC))
