"""A bad network between a client and a server, on loopback: real connections, cut and frozen for real."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

__all__ = ["BadNetwork", "bad_network"]


class BadNetwork:
    """Forwards TCP connections to a target, as badly as it is told to.

    Attributes:
        target: Where clients connect, `HOST:PORT`.
        delay_s: Seconds that each piece of data takes, both ways.
        twice: Whether what clients say on new connections arrives a second time, on a twin whose answers
            nobody hears.
        connections: Connections that were made.
        cuts: Connections that were cut.
        twins: Connections that arrived a second time.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._answering = asyncio.Event()
        self._answering.set()
        self._refusing = False
        self.delay_s = 0.0
        self.twice = False
        self.connections = 0
        self.cuts = 0
        self.twins = 0

    @property
    def target(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def freeze(self) -> None:
        """Let nothing through, and close nothing: the peers believe that they are connected."""
        self._flowing.clear()

    def deafen(self) -> None:
        """Let what clients say through and none of the answers: a connection that is open one way only."""
        self._answering.clear()

    def thaw(self) -> None:
        """Let everything through again."""
        self._flowing.set()
        self._answering.set()

    def heal(self) -> None:
        """Become a good network."""
        self.thaw()
        self.refuse(refusing=False)
        self.twice = False
        self.delay_s = 0.0

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
        async with contextlib.AsyncExitStack() as ends:
            ends.enter_context(self._known(writer))
            try:
                far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
                ends.enter_context(self._known(far_writer))
                writers = [far_writer]
                if self.twice:
                    twin_reader, twin = await asyncio.open_connection(self._host, self._port)
                    ends.enter_context(self._known(twin))
                    writers.append(twin)
                    unheard = asyncio.create_task(_swallow(twin_reader))
                    ends.callback(unheard.cancel)
                    self.twins += 1
            except OSError:
                return
            await asyncio.gather(
                self._pump(reader, writers, self._flowing),
                self._pump(far_reader, [writer], self._flowing, self._answering),
            )

    @contextlib.contextmanager
    def _known(self, end: asyncio.StreamWriter) -> Iterator[None]:
        self._open.add(end)
        try:
            yield
        finally:
            self._open.discard(end)
            end.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writers: Sequence[asyncio.StreamWriter],
        *gates: asyncio.Event,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                for gate in gates:
                    await gate.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                for writer in writers:
                    writer.write(data)
                await writers[0].drain()
        # One end is gone: so are the others.
        for writer in writers:
            writer.transport.abort()


async def _swallow(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(65_536):
            pass


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
