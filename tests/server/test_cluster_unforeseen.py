"""Servers of a cluster that fail at their part by what nobody foresaw: they end, where others go on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from broker import Broker
from cluster_harness import LEASE_S, care, member, prior_of, taus, two
from server_harness import Client, eventually, spec
from server_process import started

from fmi_server import following, partitions
from fmi_server.app import RunningServer
from fmi_server.cluster import UnfitError
from fmi_server.partitions import PARTITIONS

ENDS_S = 200.0
"""Most of it is waiting: for tries, and to see whether others go on."""

SOON = 0.05, 4
"""Seconds between tries, and after how many it is no passing trouble."""

FAULTY = """
import sys
from pathlib import Path
from fmi_server import cli, following, partitions
from {module} import {owner}

following.RETRY_S, following.LASTING = {soon!r}
partitions.LASTING = 2

whole = {owner}.{method}

def failing(self, *given):
    if Path({trigger!r}).exists():
        raise KeyError("planted")
    return whole(self, *given)

{owner}.{method} = failing
cli.main()
"""


@pytest.fixture
async def broker(tmp_path) -> AsyncIterator[Broker]:
    async with Broker(tmp_path / "broker", sync="2m") as started:
        yield started


@pytest.fixture
def soon(monkeypatch) -> None:
    """What is tried again is tried again soon."""
    monkeypatch.setattr(following, "RETRY_S", SOON[0])
    monkeypatch.setattr(following, "LASTING", SOON[1])


def faulty(module: str, owner: str, method: str, trigger: Path) -> tuple[str, ...]:
    """The command of a server of which one method fails once a file is there."""
    script = FAULTY.format(
        module=module, owner=owner, method=method, trigger=str(trigger), soon=SOON
    )
    return (sys.executable, "-c", script, "serve")


def flags(broker: Broker, folder: Path) -> tuple[str, ...]:
    at = ("--listen", "127.0.0.1:0", "--store", broker.url(), "--data-dir", str(folder))
    return (*at, "--lease-s", str(LEASE_S), "--drain-s", "1")


@pytest.mark.parametrize(
    ("module", "owner", "method"),
    [
        ("fmi_server.storage.jetstream_replica", "Replica", "_with_command"),
        ("fmi_server.following", "Following", "_take"),
        ("fmi_server.cluster", "Cluster", "_take_over"),
        ("fmi_server.cluster", "Cluster", "_look"),
    ],
)
async def test_who_fails_by_what_nobody_foresaw_ends_to_be_started_again(
    broker, tmp_path, module, owner, method
):
    trigger = tmp_path / "trigger"
    command = faulty(module, owner, method, trigger)
    async with member(broker, tmp_path / "a") as well, Client(well.target) as client:
        own = well.service.cluster.partitions
        await client.put_spec(care())
        if method == "_take_over":
            trigger.touch()  # what it has it keeps
        async with started(*flags(broker, tmp_path / "b"), command=command) as failing:
            if method != "_take_over":
                await eventually(lambda: 0 < len(own.owned) < PARTITIONS)
            trigger.touch()
            await client.put_spec(spec("other"))  # something to take in
            async with asyncio.timeout(ENDS_S):
                assert await failing.ended() == 1
        said = "".join(failing.err)
        assert "Traceback" in said
        assert "KeyError: 'planted'" in said
        if method != "_look":  # which is a task of the service itself: that ends with its traceback
            (line,) = [text for text in failing.err if text.startswith("fmi-server: ")]
            assert "KeyError('planted')" in line
        # The other one has everything, and goes on.
        await eventually(lambda: len(own.owned) == PARTITIONS)
        await client.emit(*taus(0.1, 0.2, 0.3))
        assert (await prior_of(client))["tau"] == pytest.approx(0.2)
        # Started again without the fault it takes its share.
        trigger.unlink()
        async with started(*flags(broker, tmp_path / "b"), command=command):
            await eventually(lambda: 0 < len(own.owned) < PARTITIONS)


def plant(server: RunningServer, monkeypatch, failing: asyncio.Event) -> list[bool]:
    """Let taking in fail while an event is set; return what it finds out about others."""
    cluster = server.service.cluster
    take, asked = cluster.following._take, []
    go_on_elsewhere = cluster.partitions.go_on_elsewhere

    async def fails(change):
        if failing.is_set():
            raise ValueError("planted")
        await take(change)

    async def ask() -> bool:
        asked.append(await go_on_elsewhere())
        return asked[-1]

    monkeypatch.setattr(cluster.following, "_take", fails)
    monkeypatch.setattr(cluster.partitions, "go_on_elsewhere", ask)
    return asked


@pytest.mark.usefixtures("soon")
async def test_what_fails_at_every_server_ends_none_of_them(broker, tmp_path, monkeypatch):
    """Such as a packet that nobody can count: who could send it would else end them all."""
    failing = asyncio.Event()
    async with (
        two(broker, tmp_path) as servers,
        member(broker, tmp_path / "c") as third,
        Client(servers[0].target) as client,
    ):
        asked = [plant(server, monkeypatch, failing) for server in servers]
        await client.put_spec(care())
        await eventually(lambda: all("care" in server.service.cohorts for server in servers))
        # The third one is well for now, and gone by when they ask.
        await third.service.cluster.leave()
        failing.set()
        await third.service.put_cohort_spec(spec("other"))
        for server, found in zip(servers, asked, strict=True):
            await eventually(lambda found=found: len(found) >= 2)
            assert server.service.cluster.following.trouble is not None
            assert not server.stop.is_set()
            assert server.service.cluster.end is None
        assert not any(found[-1] for found in asked)
        await client.emit(*taus(0.1, 0.2, 0.3))  # packets are taken
        failing.clear()
        for server in servers:
            await eventually(lambda server=server: "other" in server.service.cohorts)
            await eventually(lambda server=server: server.service.cluster.following.trouble is None)
        assert await prior_of(client)


@pytest.mark.usefixtures("soon")
async def test_who_fails_alone_says_why_it_ends(broker, tmp_path, monkeypatch, caplog):
    failing = asyncio.Event()
    failing.set()
    async with two(broker, tmp_path) as servers, Client(servers[1].target) as client:
        plant(servers[0], monkeypatch, failing)
        await client.put_spec(care())
        await eventually(servers[0].stop.is_set)
        end = servers[0].service.cluster.end
        assert isinstance(end, UnfitError)
        assert "ValueError('planted')" in str(end)
        assert not servers[0].service.cluster.partitions.owned
        assert not servers[1].stop.is_set()
    told = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert len(told) == 1
    assert told[0].exc_info


async def test_who_cannot_begin_with_a_partition_does_not_keep_it(broker, tmp_path, monkeypatch):
    """Its lease would be renewed, and its cohorts released by nobody."""
    monkeypatch.setattr(partitions, "LASTING", 1_000_000)
    async with member(broker, tmp_path / "a") as well, member(broker, tmp_path / "b") as failing:
        own, tried = well.service.cluster.partitions, 0

        async def gain(_new) -> None:
            nonlocal tried
            tried += 1
            raise ValueError("planted")

        await failing.service.cluster.partitions.give_back()
        monkeypatch.setattr(failing.service.cluster.partitions, "_on_gain", gain)
        failing.service.cluster.partitions._closing = False
        await eventually(lambda: tried >= 2)
        await eventually(lambda: len(own.owned) == PARTITIONS)
