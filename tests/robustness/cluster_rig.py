"""Three brokers and three servers as processes of their own, of which any may die, stand still or be cut off.

Each server reaches each broker through a network of its own, which can be cut or frozen: a server is then
cut off from the brokers while its clients still reach it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from broker import Broker
from guarantees import History, Store
from ports import lasting_port
from proxy import BadNetwork
from server_harness import rows
from server_process import COMMAND, START_S, environment

__all__ = ["ClusterRig", "Replica", "cluster_rig"]

SIZE = 3
CLUSTER_START_S = 60.0


class Replica:
    """A server of the cluster, on one port and one folder through all its lives.

    Attributes:
        name: Its name in what is told.
        target: Where it listens.
        up: Whether it is there and was not told to stand still.
        variables: Of its environment, from its next start on.
    """

    def __init__(self, name: str, folder: Path, brokers: Sequence[Broker]) -> None:
        self.name = name
        self.variables: dict[str, str] = {}
        self.target = f"127.0.0.1:{lasting_port()}"
        self.data_dir = folder / name
        self.log = folder / f"{name}.log"
        self.up = False
        self.networks = [BadNetwork("127.0.0.1", broker.port) for broker in brokers]
        self._process: asyncio.subprocess.Process | None = None

    async def connect(self) -> None:
        """Make the networks on which it reaches the brokers."""
        await asyncio.gather(*(network.start() for network in self.networks))

    async def disconnect(self) -> None:
        await asyncio.gather(*(network.stop() for network in self.networks))

    async def start(self) -> None:
        """Start it and wait until it listens."""
        url = "nats://" + ",".join(network.target for network in self.networks)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *COMMAND,
                *("--listen", self.target, "--data-dir", str(self.data_dir)),
                *("--store", url, "--store-replicas", str(SIZE)),
                env=environment(**self.variables),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(CLUSTER_START_S):
            line = await self._process.stdout.readline()
        assert line.startswith(b"listening on "), self.log.read_text()
        self.up = True

    def tell(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        assert self._process is not None
        self._process.send_signal(number)
        self.up = number is signal.SIGCONT

    async def kill(self) -> None:
        assert self._process is not None
        self.tell(signal.SIGKILL)
        assert await self._process.wait() == -signal.SIGKILL, self.log.read_text()

    async def end(self) -> None:
        """Let it end in good order."""
        assert self._process is not None
        self.tell(signal.SIGTERM)
        async with asyncio.timeout(START_S):
            assert await self._process.wait() == 0, self.log.read_text()

    def cut_off(self) -> None:
        """Let nothing through between it and the brokers; the connections stay open."""
        for network in self.networks:
            network.freeze()

    def reconnect(self) -> None:
        """Cut what was frozen, and let everything through again."""
        for network in self.networks:
            network.cut()
            network.heal()

    def abandon(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def view(self) -> Store:
        """Read its view, which must be whole."""
        file = self.data_dir / "view.sqlite3"
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as found:
            assert found.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return Store.from_rows(rows(file, "packets", "updates", "sites"))


class ClusterRig:
    """Brokers, servers, and the clients' common notebook.

    Args:
        folder: An empty folder.
        seed: Of everything that is left to chance.

    Attributes:
        brokers: The brokers.
        replicas: The servers.
        history: What clients wrote down.
        up: Set while clients shall try to connect, which is always.
        stopping: Set when clients shall come to an end.
        answered: Set at each answer to a packet.
        sent: Set at each packet that is sent.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.brokers = _brokers(folder)
        self.replicas = [Replica(f"replica-{n}", folder, self.brokers) for n in range(SIZE)]
        self.history = History()
        self.up = asyncio.Event()
        self.up.set()
        self.stopping = asyncio.Event()
        self.answered = asyncio.Event()
        self.sent = asyncio.Event()

    def somewhere(self) -> str:
        """Return where a client connects next: any server, whether it is there or not."""
        return self.chance.choice(self.replicas).target

    @property
    def target(self) -> str:
        """Where a client connects that needs a server now."""
        return self.chance.choice([r for r in self.replicas if r.up] or self.replicas).target

    def views(self) -> list[Store]:
        """Read the view of each server."""
        return [replica.view() for replica in self.replicas]


def _brokers(folder: Path) -> list[Broker]:
    routes = [lasting_port() for _ in range(SIZE)]
    members = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)
    return [
        Broker(
            folder / f"broker-{n}",
            # Not told where the others are: it would go round the networks of the servers.
            extra=f"server_name: broker-{n}\n"
            f"cluster {{ name: c, listen: 127.0.0.1:{port}, routes: [{members}], no_advertise: true }}",
        )
        for n, port in enumerate(routes)
    ]


@contextlib.asynccontextmanager
async def cluster_rig(
    folder: Path, seed: int, variables: Mapping[str, str] | None = None
) -> AsyncIterator[ClusterRig]:
    """Run a cluster, its servers with variables of the environment; nothing of it is left behind."""
    rig = ClusterRig(folder, seed)
    for replica in rig.replicas:
        replica.variables = dict(variables or {})
    try:
        await asyncio.gather(*(broker.start() for broker in rig.brokers))
        await asyncio.gather(*(replica.connect() for replica in rig.replicas))
        for replica in rig.replicas:
            await replica.start()
        yield rig
    finally:
        for replica in rig.replicas:
            replica.abandon()
        for broker in rig.brokers:
            broker.kill()
        await asyncio.gather(*(replica.disconnect() for replica in rig.replicas))
