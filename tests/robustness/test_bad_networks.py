"""Sites and subscribers behind a network that delays, freezes, cuts, refuses and half-opens, with the SDK.

The sites' network also lets connections arrive twice. The subscribers' does not: a twin has their secret
`instance_id` and would end their stream (SUPERSEDED), as a second subscriber under it shall.

FMI_NETWORK_FAULTS sets the number of faults; 25 where it is not set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random

import pytest
from followers import KINDS
from guarantees import Answer, History, Record, Store, broken
from proxy import BadNetwork, bad_network
from server_harness import Client, eventually, rows

from fmi.v1 import cohort_pb2
from fmi_client import AsyncFMIClient, FMIError, RetryPolicy
from fmi_server.testing import running_server

FAULTS = int(os.environ.get("FMI_NETWORK_FAULTS", "25"))
COHORT = "care"
PATIENT = RetryPolicy(initial_s=0.02, max_s=0.2, max_attempts=1000, deadline_s=60.0)


async def emitting(client: AsyncFMIClient, history: History, stop: asyncio.Event, chance) -> None:
    """Emit as fast as it is answered, alone and in batches; what got no answer is sent again."""
    while not stop.is_set():
        count = chance.choice((1, 1, 1, 30))
        packets = [
            client.emitter.emit_msp(controller={"tau": chance.random()}) for _ in range(count)
        ]
        while packets:
            try:
                receipts = await client.emit_many(packets)
            except FMIError as error:
                receipts = [receipt for receipt in error.receipts or () if receipt is not None]
                packets = list(error.unanswered or packets)
            else:
                packets = []
            for receipt in receipts:
                key = (client.emitter.domain_id, receipt.packet_id)
                history.answers.append(Answer(key, receipt.status, receipt.sequence or 0))


async def following(client: AsyncFMIClient, record: Record, ready: asyncio.Event) -> None:
    mode = "every" if record.every else "latest"
    async with client.subscribe([COHORT], mode=mode) as updates:
        async for event in updates.events():
            ready.set()
            record.take(event)


async def torment(network: BadNetwork, chance: random.Random, *, twice: bool) -> None:
    faults = ["cut", "cut", "delay", "freeze", "half open", "refuse", *["twice"] * twice]
    for _ in range(FAULTS):
        await asyncio.sleep(chance.uniform(0.02, 0.25))
        match chance.choice(faults):
            case "cut":
                network.cut()
            case "half open":
                network.deafen()
                network.cut()  # who connects anew is taken, heard, and never answered
                await asyncio.sleep(chance.uniform(0.05, 0.4))
                network.thaw()
            case "twice":
                network.twice = not network.twice
                network.cut()
            case "delay":
                network.delay_s = chance.uniform(0.0, 0.05)
            case "freeze":
                network.freeze()
                await asyncio.sleep(chance.uniform(0.05, 0.4))
                if chance.random() < 0.5:
                    network.cut()
                network.thaw()
            case "refuse":
                network.refuse(refusing=True)
                network.cut()
                await asyncio.sleep(chance.uniform(0.05, 0.4))
                network.refuse(refusing=False)
    network.heal()


@pytest.mark.timeout(400 + 2 * FAULTS)
async def test_a_bad_network_breaks_no_guarantee(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - to run it again
    chance, history, stop = random.Random(seed), History(), asyncio.Event()
    async with (
        running_server(tmp_path) as server,
        Client(server.target) as direct,
        bad_network(server.target) as network,
        bad_network(server.target) as subscribers_network,
        contextlib.AsyncExitStack() as clients,
    ):
        spec = cohort_pb2.CohortSpec(name=COHORT)
        spec.release.min_interval.FromMilliseconds(20)
        spec.retention.updates = 1_000_000
        await direct.put_spec(spec)
        behind = [
            await clients.enter_async_context(
                AsyncFMIClient(
                    target, domain_id=f"site-{i}", cohort=COHORT, retry=PATIENT, timeout_s=2
                )
            )
            for i, target in enumerate([network.target] * 4 + [subscribers_network.target] * 2)
        ]
        records = [history.record(mode, every=mode == "every") for mode in ("every", "latest")]
        async with asyncio.TaskGroup() as tasks:
            watches = []
            for client, record in zip(behind[4:], records, strict=True):
                ready = asyncio.Event()
                watches.append(tasks.create_task(following(client, record, ready)))
                await ready.wait()
            emitters = [
                tasks.create_task(emitting(client, history, stop, random.Random(chance.random())))
                for client in behind[:4]
            ]
            await asyncio.gather(
                torment(network, random.Random(chance.random()), twice=True),
                torment(subscribers_network, random.Random(chance.random()), twice=False),
            )
            await eventually(lambda: len(history.answers) > FAULTS)
            stop.set()
            await asyncio.gather(*emitters)
            while await direct.release(COHORT):
                pass
            released = (await direct.cohorts())[COHORT].revisions
            newest = {(COHORT, KINDS[kind]): revision for kind, revision in released.items()}
            await eventually(
                lambda: all(
                    record.newest.get(line) == revision
                    for record in records
                    for line, revision in newest.items()
                )
            )
            for watch in watches:
                watch.cancel()
        store = Store.from_rows(rows(tmp_path, "packets", "updates", "sites"))
    assert broken(history, store) == []
    for each, clients_behind in ((network, 4), (subscribers_network, 2)):
        assert each.cuts > 0
        assert each.connections > clients_behind
    assert len(history.answers) > FAULTS


async def test_what_arrives_twice_counts_once(tmp_path):
    """ONCE: each connection reaches the server a second time, and both copies are taken at once."""
    history = History()
    async with (
        running_server(tmp_path) as server,
        Client(server.target) as direct,
        bad_network(server.target) as network,
    ):
        network.twice = True
        async with AsyncFMIClient(network.target, domain_id="site", cohort=COHORT) as client:
            packets = [client.emitter.emit_msp(controller={"tau": i / 100}) for i in range(100)]
            for packet in packets[:50]:
                receipt = await client.emit(packet)
                answer = Answer(("site", receipt.packet_id), receipt.status, receipt.sequence)
                history.answers.append(answer)
            for receipt in await client.emit_many(packets[50:]):
                answer = Answer(("site", receipt.packet_id), receipt.status, receipt.sequence or 0)
                history.answers.append(answer)

            async def repeated() -> bool:
                return (await direct.sites(COHORT))[f"{COHORT}:site"].duplicates == len(packets)

            await eventually(repeated)  # the twin may be behind, and ends with its connection
        store = Store.from_rows(rows(tmp_path, "packets", "updates", "sites"))
    found = {finding.guarantee for finding in broken(history, store)}
    assert not found & {"DURABLE", "ONCE"}
    assert len(store.packets) == len(packets)
    assert network.twins == 1
