"""The demo's cluster: three real brokers and three real servers, of which one of each is killed."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fmi_demo.errors import DemoError, DemoExtraMissingError
from fmi_demo.server import DemoServer

__all__ = ["Broker", "DemoCluster", "brokers"]

_SIZE: Final = 3
_STOP_S: Final = 10.0
_SHARE: Final = re.compile(r"^(\S+) .*this server releases (\d+) of (\d+) partitions", re.MULTILINE)


class DemoCluster:
    """Three brokers and three servers on this machine, for the time of a `with` block.

    Args:
        data_dir: Folder for what the brokers keep, and the servers' views of it.
        cohorts: Folder of cohort files.
        log: File in whose folder the logs go; each has a number of its own.

    Attributes:
        target: Where clients connect: all the servers, of which each client takes one at random.
    """

    def __init__(self, *, data_dir: Path, cohorts: Path, log: Path) -> None:
        self._stack = AsyncExitStack()
        self._brokers = brokers(data_dir.absolute(), log)
        url = "nats://" + ",".join(broker.address for broker in self._brokers)
        self._servers = [
            DemoServer(
                data_dir=data_dir / f"server-{number}",
                cohorts=cohorts,
                log=log.with_name(f"server-{number}.log"),
                flags=("--store", url, "--store-replicas", str(_SIZE)),
            )
            for number in range(1, _SIZE + 1)
        ]
        self._updates: list[float] = []
        self._killed_at: dict[str, float] = {}
        self.target = ""

    async def __aenter__(self) -> Self:
        """Start everything.

        Raises:
            DemoError: Something did not start.
            DemoExtraMissingError: There is no `nats-server`, or its client is not installed.
        """
        async with AsyncExitStack() as stack:
            for broker in self._brokers:
                await stack.enter_async_context(broker)
            for server in self._servers:
                await stack.enter_async_context(server)
            self._stack = stack.pop_all()
        self.target = "ipv4:" + ",".join(server.target for server in self._servers)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop what still runs."""
        await self._stack.__aexit__(kind, error, traceback)

    def note_update(self) -> None:
        """Note that a subscriber got an update now."""
        self._updates.append(time.time())

    def kill_broker(self) -> str:
        """Kill a broker as `kill -9` does; say which."""
        return self._kill("broker 1", self._brokers[0])

    def kill_server(self) -> str:
        """Kill a server as `kill -9` does, under the clients that are connected to it; say which."""
        return self._kill("server 1", self._servers[0])

    def story(self) -> list[str]:
        """Tell what was killed, and what came of it."""
        lines = []
        for name, at in self._killed_at.items():
            after = next((seen - at for seen in self._updates if seen > at), None)
            told = (
                "no update came after that"
                if after is None
                else f"an update came {after:.1f} s later"
            )
            lines.append(f"{name} was killed (SIGKILL): {told}")
        if "server 1" in self._killed_at:
            moved = self._moved_after(self._killed_at["server 1"])
            lines.append(
                "what server 1 released, the others released "
                + ("not before the end" if moved is None else f"{moved:.1f} s later")
            )
        return lines

    def _moved_after(self, at: float) -> float | None:
        """Return how long after a moment the servers that are left had all partitions."""
        shares: list[tuple[float, int, int, int]] = []
        for number, server in enumerate(self._servers[1:]):
            text = server.log.read_text(encoding="utf-8", errors="replace")
            shares += [
                (datetime.fromisoformat(when).timestamp(), number, int(owned), int(total))
                for when, owned, total in _SHARE.findall(text)
            ]
        owned_by: dict[int, int] = {}
        for when, number, owned, total in sorted(shares):
            owned_by[number] = owned
            if when > at and sum(owned_by.values()) == total:
                return when - at
        return None

    def _kill(self, name: str, part: Broker | DemoServer) -> str:
        part.kill()
        self._killed_at[name] = time.time()
        return name


class Broker:
    """A `nats-server` process with JetStream.

    Attributes:
        address: Where it listens, `HOST:PORT`.
    """

    def __init__(
        self, folder: Path, log: Path, *, name: str, port: int, cluster: str, sync: str
    ) -> None:
        self._folder = folder
        self._log = log
        self._settings = (
            f"server_name: {name}\n"
            f"listen: 127.0.0.1:{port}\n"
            f'jetstream {{ store_dir: "{folder}", sync_interval: {sync} }}\n'
            f"{cluster}\n"
        )
        self._process: asyncio.subprocess.Process | None = None
        self.address = f"127.0.0.1:{port}"

    async def __aenter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = self._folder / "broker.conf"
        settings.write_text(self._settings, encoding="utf-8")
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(_program(), "--config", str(settings)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    def kill(self) -> None:
        """Kill it as `kill -9` does.

        Raises:
            DemoError: It had ended by itself.
        """
        if self._process is None or self._process.returncode is not None:
            raise DemoError(f"a broker ended by itself; see {self._log}")
        self._process.kill()


def brokers(folder: Path, log: Path, *, sync: str = "always") -> Sequence[Broker]:
    """Make three brokers of one cluster.

    Args:
        folder: Where they keep what they have.
        log: File in whose folder the logs go.
        sync: When they sync their disk.
    """
    ports = _free_ports(2 * _SIZE)
    clients, routes = ports[:_SIZE], ports[_SIZE:]
    members = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)
    return [
        Broker(
            folder / f"broker-{number}",
            log.with_name(f"broker-{number}.log"),
            name=f"broker-{number}",
            port=client,
            sync=sync,
            cluster=f"cluster {{ name: demo, listen: 127.0.0.1:{route}, routes: [{members}] }}",
        )
        for number, (client, route) in enumerate(zip(clients, routes, strict=True), 1)
    ]


def _free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on, all at once so that no two are the same."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _program() -> str:
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise DemoExtraMissingError("nats-server", extra="demo-cluster")
    return found
