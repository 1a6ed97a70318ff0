"""Processes that are killed: a replica in the middle of its work, and brokers of a cluster, leaders too."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import nats
import pytest
from broker import Broker, lasting_port
from test_jetstream import QUICK, ids, packet, stubborn, until, update

from fmi_server.storage import JetStreamStore
from fmi_server.storage.base import RevisionConflictError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WRITER = """
import asyncio, sys
sys.path.insert(0, sys.argv[3])
from test_jetstream import QUICK, packet
from fmi_server.storage import JetStreamStore

async def main():
    async with JetStreamStore(sys.argv[1], sys.argv[2], options=QUICK) as store:
        async def site(name):
            number = 0
            while True:
                batch = [packet(f"{name}.{number + i}", name, b"x" * 200) for i in range(5)]
                for record, outcome in zip(batch, await store.append(batch), strict=True):
                    print(record.packet_id, outcome.sequence, outcome.status, flush=True)
                number += 5
        await asyncio.gather(*(site(f"{sys.argv[4]}-s{n}") for n in range(4)))

asyncio.run(main())
"""


async def test_a_replica_is_killed_while_it_writes(tmp_path: Path) -> None:
    """What it had answered is in the log and once in every view; its own view goes on where it was."""
    here = Path(__file__).parent
    view = tmp_path / "killed.db"
    acknowledged: dict[str, int] = {}
    async with Broker(tmp_path / "broker") as broker:
        for life in range(4):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                WRITER,
                broker.url(),
                str(view),
                str(here),
                f"life{life}",
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            assert process.stdout is not None
            answered = 0
            while answered < 150 + 37 * life:
                line = (await process.stdout.readline()).decode().split()
                assert line, "the writer ended by itself"
                assert line[2] == "stored"
                acknowledged[line[0]] = int(line[1])
                answered += 1
            process.send_signal(signal.SIGKILL)
            for line in (await process.stdout.read()).decode().splitlines():
                if len(words := line.split()) == 3:
                    acknowledged[words[0]] = int(words[1])
            await process.wait()
        again = JetStreamStore(broker.url(), view, options=QUICK)
        anew = JetStreamStore(broker.url(), tmp_path / "anew.db", options=QUICK)
        async with again, anew:
            kept = await ids(again)
            assert len(kept) == len(set(kept))
            assert set(acknowledged) <= set(kept)
            assert await again.load(limit=100_000) == await anew.load(limit=100_000)
            assert await again.sites() == await anew.sites()
            assert sum(site.msp_count for site in await again.sites()) == len(kept)
            places = {p.record.packet_id: p.sequence for p in await again.load(limit=100_000)}
            assert all(places[name] == sequence for name, sequence in acknowledged.items())


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[list[Broker]]:
    routes = [lasting_port() for _ in range(3)]
    members = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)
    brokers = [
        Broker(
            tmp_path / f"broker{n}",
            sync="2m",
            extra=f"server_name: b{n}\n"
            f"cluster {{ name: c, listen: 127.0.0.1:{port}, routes: [{members}] }}",
        )
        for n, port in enumerate(routes)
    ]
    try:
        await asyncio.gather(*(broker.start() for broker in brokers))
        yield brokers
    finally:
        for broker in brokers:
            broker.kill()


async def opened(store: JetStreamStore) -> JetStreamStore:
    """Open a store as soon as the cluster has found a leader."""
    async with asyncio.timeout(60):
        while True:
            try:
                await store.open()
            except StoreUnavailableError:
                await asyncio.sleep(0.1)
            else:
                return store


async def leader(brokers: list[Broker], federation: str) -> Broker:
    running = next(broker for broker in brokers if broker.runs)
    client = await nats.connect(f"nats://{running.address}", allow_reconnect=False)
    try:
        async with asyncio.timeout(60):
            while True:
                info = await client.jetstream().stream_info(f"FMI-{federation}")
                name = info.cluster.leader if info.cluster is not None else None
                if name:
                    return brokers[int(name[1:])]
                await asyncio.sleep(0.05)
    finally:
        await client.close()


@pytest.fixture
async def two(cluster: list[Broker], tmp_path: Path) -> AsyncIterator[tuple[JetStreamStore, ...]]:
    options = replace(QUICK, replicas=3, ack_timeout_s=1.0, patience_s=8.0)
    url = "nats://" + ",".join(broker.address for broker in cluster) + "/three"
    one = await opened(JetStreamStore(url, tmp_path / "one.db", options=options))
    other = await opened(JetStreamStore(url, tmp_path / "other.db", options=options))
    yield one, other
    await one.close()
    await other.close()


async def test_the_leader_of_three_brokers_is_killed(
    cluster: list[Broker], two: tuple[JetStreamStore, ...]
) -> None:
    one, other = two
    acknowledged: set[str] = set()
    stop = False

    async def site(store: JetStreamStore, name: str) -> None:
        number = 0
        while not stop:
            record = packet(f"{name}-{number}", name)
            # What is not known to be there may be there: it is sent again.
            await stubborn(store, record)
            acknowledged.add(record.packet_id)
            number += 1

    async def more(count: int) -> None:
        known = len(acknowledged)
        await until(lambda: len(acknowledged) > known + count)

    async with asyncio.TaskGroup() as sites:
        for n in range(3):
            sites.create_task(site(one, f"a{n}"))
            sites.create_task(site(other, f"b{n}"))
        await more(100)
        assert await one.publish([update(1, 1)]) == [1]
        led = await leader(cluster, "three")
        led.kill()
        await more(200)
        with pytest.raises(RevisionConflictError):
            await other.publish([update(1, 1)])
        assert await other.publish([update(2, 2)]) == [2]
        await led.start()
        await more(100)
        stop = True
    await asyncio.gather(one.catch_up(), other.catch_up())
    kept = await ids(one)
    assert len(kept) == len(set(kept)) == len(acknowledged)
    assert set(kept) == acknowledged
    assert await one.load(limit=100_000) == await other.load(limit=100_000)
    assert await one.updates_since(0) == await other.updates_since(0)


async def test_of_many_who_publish_to_a_cluster_one_is_heard(
    two: tuple[JetStreamStore, ...],
) -> None:
    for revision in range(1, 11):
        found = await asyncio.gather(
            *(store.publish([update(revision, revision)]) for store in two * 3),
            return_exceptions=True,
        )
        assert [answer for answer in found if isinstance(answer, list)] == [[revision]], found
        assert sum(isinstance(answer, RevisionConflictError) for answer in found) == 5, found
    for store in two:
        await store.catch_up()
        assert [u.revision for u in await store.updates_since(0)] == list(range(1, 11))


async def test_without_a_majority_nothing_is_acknowledged(
    cluster: list[Broker], two: tuple[JetStreamStore, ...]
) -> None:
    one, other = two
    await one.append([packet("before")])
    cluster[0].kill()
    cluster[1].kill()
    with pytest.raises(StoreUnavailableError) as caught:
        await one.append([packet("alone")])
    assert caught.value.cause in ("no_quorum", "no_answer", "no_broker")
    await asyncio.gather(cluster[0].start(), cluster[1].start())
    outcome = await stubborn(other, packet("alone"))
    assert outcome.status in ("stored", "duplicate")
    await one.catch_up()
    assert await ids(one) == ["before", "alone"]


async def test_fewer_copies_than_asked_for_are_told_of_by_stream(
    cluster: list[Broker], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the snapshots too: after a restore, all that there is may stand there alone."""
    url = f"nats://{','.join(broker.address for broker in cluster)}/few"
    single = replace(QUICK, ack_timeout_s=1.0)
    async with await opened(JetStreamStore(url, tmp_path / "a.db", options=single)) as store:
        await store.leases(ttl_s=5.0)
    assert "fewer copies" not in caplog.text
    three = replace(single, replicas=3)
    async with await opened(JetStreamStore(url, tmp_path / "a.db", options=three)) as store:
        await store.leases(ttl_s=5.0)
    for stream in ("FMI-few", "FMI-few-snapshots", "KV_FMI-few-leases"):
        assert f"copies of the stream {stream} than asked for, 1 and not 3" in caplog.text


async def test_who_opens_waits_until_the_brokers_have_a_leader(
    cluster: list[Broker], tmp_path: Path
) -> None:
    url = f"nats://{','.join(broker.address for broker in cluster)}/fmi"
    quick = replace(QUICK, replicas=3, patience_s=1.0)
    async with await opened(JetStreamStore(url, tmp_path / "a.db", options=quick)) as store:
        await store.append([packet("p0")])
    for broker in cluster[1:]:
        broker.kill()
    # The one that is left knows after a while that it is alone, and says so.
    cause = ""
    async with asyncio.timeout(180):
        while cause != "no_quorum":
            with pytest.raises(StoreUnavailableError) as caught:
                await JetStreamStore(url, tmp_path / "b.db", options=quick).open()
            cause = caught.value.cause
    patient = replace(quick, open_patience_s=120.0)
    again = JetStreamStore(url, tmp_path / "a.db", options=patient)
    opening = asyncio.create_task(again.open())
    await asyncio.wait({opening}, timeout=1.0)
    for broker in cluster[1:]:
        await broker.start()
    await opening
    assert await ids(again) == ["p0"]
    await again.close()
