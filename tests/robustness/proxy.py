"""A bad network between a client and a server, on loopback: real connections, cut and frozen for real."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

__all__ = ["BadNetwork", "bad_network"]


class BadNetwork:
    """Forwards TCP connections to a target, as badly as it is told to.

    Attributes:
        target: Where clients connect, `HOST:PORT`.
        delay_s: Seconds that each piece of data takes, both ways.
        connections: Connections that were made.
        cuts: Connections that were cut.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self.delay_s = 0.0
        self.connections = 0
        self.cuts = 0

    @property
    def target(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def freeze(self) -> None:
        """Let nothing through, and close nothing: the peers believe that they are connected."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def refuse(self, *, refusing: bool) -> None:
        """Close new connections at once."""
        self._refusing = refusing

    def cut(self) -> None:
        """Reset every connection, in the middle of whatever is under way."""
        for writer in list(self._open):
            writer.transport.abort()
            self.cuts += 1

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.thaw()
        self.cut()
        await self._server.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._open |= ends
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                await self._flowing.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        # One end is gone: so is the other.
        writer.transport.abort()


@contextlib.asynccontextmanager
async def bad_network(target: str) -> AsyncIterator[BadNetwork]:
    """Put a bad network in front of a server."""
    host, _, port = target.rpartition(":")
    network = BadNetwork(host, int(port))
    await network.start()
    try:
        yield network
    finally:
        await network.stop()
