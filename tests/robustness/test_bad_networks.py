"""Sites and a subscriber behind a network that delays, freezes, cuts and refuses, with the SDK.

FMI_NETWORK_FAULTS sets the number of faults; 25 where it is not set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random

import pytest
from guarantees import Answer, History, Store, broken
from proxy import BadNetwork, bad_network
from server_harness import PRIOR, Client, eventually, rows

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


async def following(client: AsyncFMIClient, history: History, ready: asyncio.Event) -> None:
    async with client.subscribe([COHORT], mode="every") as updates:
        async for event in updates.events():
            ready.set()
            if event.WhichOneof("event") == "update":
                history.updates.append(event.update)


async def torment(network: BadNetwork, chance: random.Random) -> None:
    for _ in range(FAULTS):
        await asyncio.sleep(chance.uniform(0.02, 0.25))
        match chance.choice(("cut", "cut", "delay", "freeze", "refuse")):
            case "cut":
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
    network.delay_s = 0.0


@pytest.mark.timeout(90 + 2 * FAULTS)
async def test_a_bad_network_breaks_no_guarantee(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - to run it again
    chance, history, stop = random.Random(seed), History(), asyncio.Event()
    async with (
        running_server(tmp_path) as server,
        Client(server.target) as direct,
        bad_network(server.target) as network,
        contextlib.AsyncExitStack() as clients,
    ):
        spec = cohort_pb2.CohortSpec(name=COHORT)
        spec.release.min_interval.FromMilliseconds(20)
        spec.retention.updates = 1_000_000
        await direct.put_spec(spec)
        behind = [
            await clients.enter_async_context(
                AsyncFMIClient(
                    network.target, domain_id=f"site-{i}", cohort=COHORT, retry=PATIENT, timeout_s=2
                )
            )
            for i in range(5)
        ]
        async with asyncio.TaskGroup() as tasks:
            ready = asyncio.Event()
            watch = tasks.create_task(following(behind[-1], history, ready))
            await ready.wait()
            emitters = [
                tasks.create_task(emitting(client, history, stop, random.Random(chance.random())))
                for client in behind[:-1]
            ]
            await torment(network, chance)
            stop.set()
            await asyncio.gather(*emitters)
            while await direct.release(COHORT):
                pass
            newest = await direct.update(COHORT, PRIOR)
            await eventually(
                lambda: any(u.sequence == newest.sequence for u in history.updates), 30.0
            )
            watch.cancel()
        held = rows(tmp_path, "packets", "updates")
    store = Store(
        packets=[(r[0], r[1], r[2], r[-1]) for r in held["packets"]],
        updates=[(r[0], r[1], r[2], r[3], r[-1]) for r in held["updates"]],
    )
    assert broken(history, store) == []
    assert network.cuts > 0
    assert network.connections > 5
    assert len(history.answers) > FAULTS
