"""An in-process message bus, and the adapter that joins the federation to it.

Packets come in on the topic `federation.packet`, released priors go out on `meta.fmi_update`. What
crosses the bus is plain data: a message of the contract arrives at a handler as a dict with the
contract's names, so that the meta layer needs no protobuf.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from google.protobuf import json_format
from google.protobuf.message import Message

from fmi.v1 import packet_pb2, update_pb2
from fmi_server.errors import FMIError, OverloadedError

__all__ = ["PACKET_TOPIC", "UPDATE_TOPIC", "Bus", "FederationBusAdapter", "InProcessBus"]

PACKET_TOPIC: Final = "federation.packet"
UPDATE_TOPIC: Final = "meta.fmi_update"

Handler = Callable[[str, Mapping[str, Any]], object]

_log = logging.getLogger(__name__)


class Bus(Protocol):
    """What the adapter needs of a bus."""

    def subscribe(self, topic: str, handler: Handler) -> Callable[[], None]:
        """Call `handler(topic, payload)` for every message on a topic; return how to stop that."""

    def publish(self, topic: str, payload: Mapping[str, Any] | Message) -> int:
        """Give a payload to the handlers of a topic; return how many there were."""


class InProcessBus:
    """A synchronous publish-subscribe bus inside one process.

    Handlers run in the order in which they subscribed, in the publisher's thread. One that raises does
    not keep the message from the others: its error is logged and counted.

    Attributes:
        failures: Handler calls that raised.
    """

    def __init__(self) -> None:
        self._handlers: defaultdict[str, list[Handler]] = defaultdict(list)
        self._counting = threading.Lock()
        self.failures = 0

    def subscribe(self, topic: str, handler: Handler) -> Callable[[], None]:
        """Call `handler(topic, payload)` for every message on a topic.

        Returns:
            A function that ends the subscription; calling it twice does nothing more.
        """
        handlers = self._handlers[topic]
        handlers.append(handler)

        def unsubscribe() -> None:
            if handler in handlers:
                handlers.remove(handler)

        return unsubscribe

    def publish(self, topic: str, payload: Mapping[str, Any] | Message) -> int:
        """Give a payload to the handlers of a topic.

        Args:
            topic: The topic.
            payload: Plain data, or a message of the contract, which is translated to plain data once.

        Returns:
            How many handlers took it.
        """
        handlers = list(self._handlers.get(topic, ()))
        if not handlers:
            return 0
        plain = _plain(payload) if isinstance(payload, Message) else payload
        taken = 0
        for handler in handlers:
            try:
                handler(topic, plain)
            except Exception:
                with self._counting:
                    self.failures += 1
                _log.exception("a handler of topic %s failed", topic)
            else:
                taken += 1
        return taken


def _plain(message: Message) -> dict[str, Any]:
    """Translate a message so that a handler finds every field, empty ones too, and numbers as such."""
    plain = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    if isinstance(message, update_pb2.MetaPriorUpdate):
        plain["rev"] = message.rev  # ProtoJSON writes 64-bit numbers as text
    return plain


class _Ingest(Protocol):
    """The part of `FMIService` that the adapter feeds."""

    async def emit(self, packet: packet_pb2.Packet | Mapping[str, Any]) -> object: ...


class FederationBusAdapter:
    """Feeds the packets of a bus to the service, and the service's priors to the bus.

    Packets may be published from any thread; they are handed to the event loop of `run`.

    Args:
        bus: The bus.
        service: Takes the packets.
        queue_packets: Packets that may wait for the service. Past it the publisher gets
            `OverloadedError`; the bus logs it, and the packet is dropped and counted.

    Attributes:
        refused: Packets that the service refused; each is logged with its reason.
        dropped: Packets for which there was no room.
    """

    def __init__(self, bus: Bus, service: _Ingest, *, queue_packets: int = 1024) -> None:
        self._bus = bus
        self._service = service
        # It has no bound of its own: a packet on its way from another thread needs its room already.
        self._queue: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
        self._room = queue_packets
        self._counting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.refused = 0
        self.dropped = 0

    async def run(self) -> None:
        """Take packets from the bus until cancelled. Run it as a task of the service's task group."""
        self._loop = asyncio.get_running_loop()
        unsubscribe = self._bus.subscribe(PACKET_TOPIC, self._take)
        try:
            while True:
                payload = await self._queue.get()
                with self._counting:
                    self._room += 1
                try:
                    await self._service.emit(payload)
                except FMIError as error:
                    self.refused += 1
                    _log.warning("a packet from the bus was refused: %s", error)
                except Exception:
                    # One packet's fault must not keep the others from being taken.
                    self.refused += 1
                    _log.exception("a packet from the bus could not be taken")
                finally:
                    self._queue.task_done()
        finally:
            unsubscribe()

    async def drained(self) -> None:
        """Wait until every packet taken from the bus so far has been emitted or refused."""
        await asyncio.sleep(0)  # what other threads have handed over is put into the queue first
        await self._queue.join()

    def publish(self, update: update_pb2.Update) -> None:
        """Give a released prior to the bus; other kinds of update are passed over."""
        if update.WhichOneof("body") == "prior_update":
            self._bus.publish(UPDATE_TOPIC, update.prior_update)

    def _take(self, topic: str, payload: Mapping[str, Any]) -> None:
        loop = self._loop
        with self._counting:
            if self._room <= 0 or loop is None or loop.is_closed():
                self.dropped += 1
                raise OverloadedError(f"packets waiting on topic {topic}")
            self._room -= 1
        if _running_loop() is loop:
            self._queue.put_nowait(payload)
        else:
            loop.call_soon_threadsafe(self._queue.put_nowait, payload)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
