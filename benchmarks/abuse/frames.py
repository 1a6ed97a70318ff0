"""HTTP/2 and gRPC on the wire, by hand: a client library would refuse to send what an attacker sends.

Headers are written as literals without Huffman coding (RFC 7541, 6.2); frames are those of RFC 9113.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

__all__ = [
    "ACK",
    "END_HEADERS",
    "END_STREAM",
    "INITIAL_WINDOW_SIZE",
    "LARGEST_WINDOW",
    "PREFACE",
    "Kind",
    "Peer",
    "block",
    "data",
    "frame",
    "headers",
    "literal",
    "message",
    "request",
    "reset",
    "settings",
    "window_update",
]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
INITIAL_WINDOW_SIZE: Final = 0x4
LARGEST_WINDOW: Final = 2**31 - 1


class Kind:
    """Types of frames."""

    DATA: Final = 0x0
    HEADERS: Final = 0x1
    PRIORITY: Final = 0x2
    RST_STREAM: Final = 0x3
    SETTINGS: Final = 0x4
    PING: Final = 0x6
    GOAWAY: Final = 0x7
    WINDOW_UPDATE: Final = 0x8
    CONTINUATION: Final = 0x9


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """Write a frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(values: Mapping[int, int] | None = None) -> bytes:
    """Write SETTINGS."""
    payload = b"".join(struct.pack(">HI", key, value) for key, value in (values or {}).items())
    return frame(Kind.SETTINGS, payload)


def window_update(stream: int, increment: int) -> bytes:
    """Write WINDOW_UPDATE."""
    return frame(Kind.WINDOW_UPDATE, struct.pack(">I", increment), stream=stream)


def reset(stream: int, code: int = 0x8) -> bytes:
    """Write RST_STREAM, as CANCEL where nothing else is said."""
    return frame(Kind.RST_STREAM, struct.pack(">I", code), stream=stream)


def data(stream: int, payload: bytes, *, end: bool = False, piece: int = 16_384) -> bytes:
    """Write DATA, in frames of the size that every peer takes."""
    pieces = [payload[start : start + piece] for start in range(0, len(payload), piece)] or [b""]
    last = len(pieces) - 1
    return b"".join(
        frame(Kind.DATA, part, flags=END_STREAM if end and index == last else 0, stream=stream)
        for index, part in enumerate(pieces)
    )


def _length(number: int, prefix_bits: int, first: int = 0) -> bytes:
    """Write a number of HPACK (RFC 7541, 5.1)."""
    most = (1 << prefix_bits) - 1
    if number < most:
        return bytes([first | number])
    out = bytearray([first | most])
    number -= most
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def literal(name: bytes, value: bytes, *, indexed: bool = False) -> bytes:
    """Write a header; `indexed` enters it into the peer's table."""
    first = b"\x40" if indexed else b"\x00"
    return first + _length(len(name), 7) + name + _length(len(value), 7) + value


def block(path: str, more: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """Write the headers of a gRPC call."""
    common = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"127.0.0.1"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    )
    return b"".join(literal(name, value) for name, value in (*common, *more))


def headers(stream: int, fields: bytes, *, end: bool = False) -> bytes:
    """Write HEADERS that are complete."""
    flags = END_HEADERS | (END_STREAM if end else 0)
    return frame(Kind.HEADERS, fields, flags=flags, stream=stream)


def message(payload: bytes, *, compressed: bool = False, declared: int | None = None) -> bytes:
    """Write a gRPC message; it may declare another length than it has."""
    return struct.pack(">BI", compressed, len(payload) if declared is None else declared) + payload


def request(stream: int, fields: bytes, payload: bytes) -> bytes:
    """Write a whole unary call."""
    return headers(stream, fields) + data(stream, message(payload), end=True)


class Peer:
    """A connection, and what the server said on it.

    Attributes:
        said: Frames of the server, by type.
        resets: Streams that it reset, by error code.
        goaway: The error code of its GOAWAY; None while there is none.
        received: Bytes of DATA.
        closed: Set when it closed the connection.
        credit: Bytes that may be sent on the connection.
        credits: The same of each stream, over the initial window.
        window: The initial window of each stream.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        reads: bool = True,
        acknowledges: bool = True,
        settings_sent: Mapping[int, int] | None = None,
    ) -> None:
        self._host, self._port = host, port
        self._reads = reads
        self._acknowledges = acknowledges
        self._settings = settings_sent
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self.said: Counter[int] = Counter()
        self.resets: Counter[int] = Counter()
        self.goaway: int | None = None
        self.received = 0
        self.closed = asyncio.Event()
        self.credit = 65_535
        self.credits: Counter[int] = Counter()
        self.window = 65_535
        self._credited = asyncio.Event()
        self._said = asyncio.Event()

    async def open(self, *, preface: bool = True) -> None:
        """Connect; greet, where nothing else is said."""
        reader, self._writer = await asyncio.open_connection(self._host, self._port)
        if self._reads:
            self._reading = asyncio.create_task(self._read(reader))
        if preface:
            await self.send(PREFACE + settings(self._settings))

    async def send(self, octets: bytes) -> bool:
        """Send; tell whether the connection is still there."""
        if self._writer is None or self.closed.is_set():
            return False
        try:
            self._writer.write(octets)
            await self._writer.drain()
            await asyncio.sleep(0)  # what the server says is read meanwhile
        except OSError:
            self.closed.set()
            return False
        return True

    async def send_within_windows(self, stream: int, payload: bytes) -> bool:
        """Send DATA as far as the server's windows let it; tell whether all of it went."""
        place = 0
        while place < len(payload):
            room = min(self.credit, self.window + self.credits[stream], 16_384)
            if room <= 0:
                self._credited.clear()
                try:
                    async with asyncio.timeout(2.0):
                        await self._credited.wait()
                except TimeoutError:
                    return False
                if self.closed.is_set():
                    return False
                continue
            part = payload[place : place + room]
            self.credit -= len(part)
            self.credits[stream] -= len(part)
            place += len(part)
            if not await self.send(frame(Kind.DATA, part, stream=stream)):
                return False
        return True

    async def heard(self, what: Callable[[], bool]) -> None:
        """Wait until the server said something, or closed the connection."""
        while not what() and not self.closed.is_set():
            self._said.clear()
            await self._said.wait()

    def abort(self) -> None:
        """Reset the connection, as a peer does that goes away without a word."""
        if self._writer is not None:
            raw = self._writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()

    async def close(self) -> None:
        """Close the connection."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        if self._writer is not None:
            self._writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                head = await reader.readexactly(9)
                length = int.from_bytes(head[:3], "big")
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = await reader.readexactly(length)
                self._note(kind, flags, stream, payload)
                if self._acknowledges and not flags & ACK and kind in (Kind.SETTINGS, Kind.PING):
                    answer = payload if kind == Kind.PING else b""
                    await self.send(frame(kind, answer, flags=ACK))
        except (asyncio.IncompleteReadError, OSError):
            self.closed.set()
            self._credited.set()
            self._said.set()

    def _note(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.said[kind] += 1
        self._said.set()
        match kind:
            case Kind.RST_STREAM:
                self.resets[int.from_bytes(payload[:4], "big")] += 1
            case Kind.GOAWAY:
                self.goaway = int.from_bytes(payload[4:8], "big")
            case Kind.DATA:
                self.received += len(payload)
            case Kind.SETTINGS if not flags & ACK:
                for place in range(0, len(payload), 6):
                    key, value = struct.unpack(">HI", payload[place : place + 6])
                    if key == INITIAL_WINDOW_SIZE:
                        self.window = value
                self._credited.set()
            case Kind.WINDOW_UPDATE:
                increment = int.from_bytes(payload[:4], "big") & LARGEST_WINDOW
                if stream == 0:
                    self.credit += increment
                else:
                    self.credits[stream] += increment
                self._credited.set()
