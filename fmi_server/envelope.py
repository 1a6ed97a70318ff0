"""Envelopes: bounded decoding of many packets in one message; `fmi.envelope` opens them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import zstandard
from google.protobuf.message import DecodeError

from fmi.envelope import EnvelopeDecodeError, open_envelope
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import packet_pb2
from fmi_server.errors import (
    DictionaryUnknownError,
    EnvelopeMalformedError,
    EnvelopeTooLargeError,
    OverloadedError,
)

__all__ = ["ByteBudget", "EnvelopeDecoder", "EnvelopeLimits"]


@dataclass(frozen=True, slots=True)
class EnvelopeLimits:
    """What an envelope may hold: bytes when decoded, and packets.

    `max_decoded_bytes` bounds the envelopes that are being taken at the same time, together: a small message
    may decode to a large one, and a parsed packet takes about ten times its size in memory.
    """

    max_bytes: int = 16 * 2**20
    max_packets: int = 10_000
    max_decoded_bytes: int = 32 * 2**20


class ByteBudget:
    """Bytes that may be under way at once. Who finds no room waits, in order; past a bound, nobody may.

    A single piece of work that is larger than the whole budget is let in alone.

    Args:
        limit_bytes: The budget.
        max_waiting: How many may wait; past it `OverloadedError` is raised.
    """

    def __init__(self, limit_bytes: int, *, max_waiting: int = 256) -> None:
        self._limit = limit_bytes
        self._max_waiting = max_waiting
        self._spent = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def spending(self, size: int) -> AsyncIterator[None]:
        """Hold so many bytes of the budget for as long as the context lasts.

        Raises:
            OverloadedError: Too many are waiting already.
        """
        if self._waiting or not self._fits(size):
            await self._wait(size)
        else:
            self._spent += size
        try:
            yield
        finally:
            self._spent -= size
            self._let_in()

    def _fits(self, size: int) -> bool:
        return not self._spent or self._spent + size <= self._limit

    async def _wait(self, size: int) -> None:
        if len(self._waiting) >= self._max_waiting:
            raise OverloadedError("envelopes to decode")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._spent -= size  # let in and cancelled at the same time
            self._let_in()
            raise

    def _let_in(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.done():
                if not self._fits(size):
                    return
                self._spent += size
                turn.set_result(None)
            self._waiting.popleft()


@dataclass(slots=True)
class EnvelopeDecoder:
    """Decodes envelopes. May be shared by threads; dictionaries are replaced as a whole.

    Attributes:
        limits: What an envelope may hold.
        dictionaries: Compression dictionaries by id.
    """

    limits: EnvelopeLimits = field(default_factory=EnvelopeLimits)
    dictionaries: Mapping[int, zstandard.ZstdCompressionDict] = field(default_factory=dict)

    def decode(self, envelope: wire_pb2.EncodedPackets) -> list[bytes]:
        """Return the serialised packets in an envelope, each still to be parsed.

        Raises:
            EnvelopeMalformedError: It cannot be decoded, or its sizes do not agree.
            EnvelopeTooLargeError: It would decode to too many bytes or packets.
            DictionaryUnknownError: It names a dictionary that is not known.
        """
        try:
            data = open_envelope(
                envelope, limit_bytes=self.limits.max_bytes, dictionary=self.dictionaries.get
            )
        except EnvelopeDecodeError as error:
            if error.kind == "too_large":
                raise EnvelopeTooLargeError(error.number, self.limits.max_bytes) from None
            if error.kind == "dictionary_unknown":
                raise DictionaryUnknownError(error.number) from None
            raise EnvelopeMalformedError(str(error)) from None
        return self.split(data)

    def refuse_too_large(self, envelope: wire_pb2.EncodedPackets) -> None:
        """Refuse an envelope that says itself that it is too large, before anything is spent on it.

        Raises:
            EnvelopeTooLargeError: It would decode to too many bytes.
        """
        if envelope.uncompressed_size > self.limits.max_bytes:
            raise EnvelopeTooLargeError(envelope.uncompressed_size, self.limits.max_bytes)

    def split(self, data: bytes) -> list[bytes]:
        """Split a serialised `PacketBatch` into serialised packets.

        Raises:
            EnvelopeMalformedError: It is no batch, or an empty one.
            EnvelopeTooLargeError: It has too many packets.
        """
        self._refuse_too_many(data)
        try:
            packets = packet_pb2.RawPacketBatch.FromString(data).packets
        except DecodeError:
            raise EnvelopeMalformedError("the content is no PacketBatch") from None
        if not packets:
            raise EnvelopeMalformedError("the content has no packets")
        return list(packets)

    def _refuse_too_many(self, data: bytes) -> None:
        """Count the packets before any is parsed: empty ones are 2 bytes here and 32 when parsed."""
        packets = place = 0
        try:
            while place < len(data):
                if data[place] != _PACKET_TAG:
                    raise EnvelopeMalformedError("the content is no PacketBatch", packets)
                size, place = _varint(data, place + 1)
                place += size
                packets += 1
                if packets > self.limits.max_packets:
                    # Not counted to the end, which would cost as much as it protects from.
                    raise EnvelopeTooLargeError(packets, self.limits.max_packets, "packets")
        except IndexError:
            raise EnvelopeMalformedError("the content is no PacketBatch", packets) from None


_PACKET_TAG: Final = 0x0A  # field 1 of a PacketBatch, length-delimited; it has no other field


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Read a varint; return its value and the place behind it.

    Raises:
        IndexError: The data ends before the varint does.
    """
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise IndexError
