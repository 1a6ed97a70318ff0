"""BOUNDED: subscribers who never read cost a bounded amount of memory, and slow nobody.

A real server process: half of its subscribers read nothing while updates of 60 kB pass by. How long an Emit
takes, and an update to whoever reads, is measured without them and with them, in turns.

FMI_NEVER_READ sets the number of those who do not read; 100 where it is not set.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time

import pytest
from process import probing, resident_bytes
from server_harness import PRIOR, Client, eventually, spec
from server_process import started
from test_subscribe import EVERY, LATEST, SLOW_READER, Publisher

from fmi.v1 import cohort_pb2

ASLEEP = int(os.environ.get("FMI_NEVER_READ", "100"))
COHORT = "care"
UPDATES = 20
TURNS = 3
HELD_BYTES = 1_000_000
"""What one who never reads may hold: what is under way to it, and a page."""


async def deliveries(client: Client, publish: Publisher) -> list[float]:
    """Publish updates; return how long each took to one who reads."""
    took = []
    async with client.subscribed(COHORT, kinds=[PRIOR], mode=EVERY) as events:
        await events.snapshot()
        for _ in range(UPDATES):
            begun = time.monotonic()
            published = await publish()
            (update,) = await events.updates(1)
            took.append(time.monotonic() - begun)
            assert update.revision == published.revision
    return took


@pytest.mark.timeout(300)
async def test_who_never_reads_slows_nobody_and_holds_little(tmp_path):
    flags = ("--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "data"))
    delivered: dict[bool, list[list[float]]] = {False: [], True: []}
    spans: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    grown = []
    async with started(*flags) as server, Client(server.target) as client:
        aggregation = cohort_pb2.AggregationSpec(vote_min_sites=1)
        await client.put_spec(spec(COHORT, aggregation=aggregation))
        publish = Publisher(client, COHORT, signals=500)
        await publish(5)
        async with probing(server.target, "other") as probe:
            for _ in range(TURNS):
                begun = time.monotonic()
                delivered[False].append(await deliveries(client, publish))
                spans[False].append((begun, time.monotonic()))
                before = resident_bytes(server.pid)
                async with contextlib.AsyncExitStack() as stack:
                    for number in range(ASLEEP):
                        sleeper = Client(server.target, SLOW_READER)
                        await stack.enter_async_context(sleeper)
                        mode = EVERY if number % 2 else LATEST
                        await stack.enter_async_context(sleeper.subscribed("**", mode=mode))
                    await eventually(lambda: subscribers(client, ASLEEP))
                    begun = time.monotonic()
                    delivered[True].append(await deliveries(client, publish))
                    spans[True].append((begun, time.monotonic()))
                    grown.append(resident_bytes(server.pid) - before)
                await eventually(lambda: subscribers(client, 0))
    # The best turn of each: what else the machine does slows some turns, who never reads would slow all.
    quick, slow = (min(map(statistics.median, delivered[asleep])) for asleep in (False, True))
    alone, among = (
        min(
            (found for span in spans[asleep] if (found := probe.during([span])).values_s),
            key=lambda found: found.median_s,
        )
        for asleep in (False, True)
    )
    print(  # noqa: T201 - the figures
        f"{ASLEEP} who never read: Emit {alone} without, {among} with; an update {quick * 1e3:.0f} and "
        f"{slow * 1e3:.0f} ms; memory grew by {', '.join(f'{g / 1e6:.1f}' for g in grown)} MB"
    )
    assert among.median_s < 3 * alone.median_s + 0.02
    assert slow < 3 * quick + 0.05
    assert max(grown) < ASLEEP * HELD_BYTES
    assert grown[-1] < grown[0] + ASLEEP * HELD_BYTES / 10, "what they held is given back"


async def subscribers(client: Client, number: int) -> bool:
    return (await client.cohorts())[COHORT].subscribers == number
