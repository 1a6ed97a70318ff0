"""Servers of a cluster in the process of the test, on one store at a real broker."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from broker import Broker
from server_harness import Client, eventually, msp, spec

from fmi_server import partitions
from fmi_server.app import RunningServer, running
from fmi_server.config import ServerSettings

__all__ = ["care", "heard_of", "member", "owner", "prior_of", "shared_out", "taus", "two"]

LEASE_S = 2.0


@contextlib.asynccontextmanager
async def member(broker: Broker, folder: Path, **settings) -> AsyncIterator[RunningServer]:
    """A server of the cluster, in this process."""
    chosen = {"listen": "127.0.0.1:0", "drain_s": 1.0, "lease_s": LEASE_S, **settings}
    async with running(ServerSettings(store=broker.url(), data_dir=folder, **chosen)) as server:
        yield server


@contextlib.asynccontextmanager
async def two(broker: Broker, folder: Path) -> AsyncIterator[tuple[RunningServer, ...]]:
    """Two servers, each with its share."""
    async with (
        member(broker, folder / "a") as first,
        member(broker, folder / "b") as second,
    ):
        await shared_out(first, second)
        yield first, second


async def shared_out(*servers: RunningServer) -> None:
    """Wait until each of the servers, which are all that run, has its share: from then on nothing moves."""
    found = [server.service.cluster.partitions for server in servers]
    names = [one._server for one in found]

    def done() -> bool:
        return all(one.owned == partitions.share_of(one._server, names) for one in found)

    await eventually(done)


def owner(cohort: str, *servers: RunningServer) -> RunningServer:
    (found,) = [server for server in servers if server.service.cluster.partitions.owns(cohort)]
    return found


def care(**fields):
    made = spec("care", **fields)
    made.release.min_interval.FromMilliseconds(20)
    return made


def taus(*values, cohort="care"):
    return [msp(f"s{n}", cohort, controller={"tau": value}) for n, value in enumerate(values)]


async def heard_of(call: Awaitable[Any]) -> Any:
    """What a call gives; None where the server has not heard of what is asked for yet."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise
        return None


async def prior_of(client: Client, revision_from: int = 0) -> dict[str, float]:
    """The newest prior, as soon as it is of a later revision."""

    async def newest():
        found = await heard_of(client.update("care"))
        return found if found is not None and found.revision > revision_from else None

    return dict((await eventually(newest)).prior_update.prior)
