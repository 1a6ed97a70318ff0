"""All subscribers lose their server at once and come back at once.

First the server is killed, then the network in front of the next one resets every connection, again and
again: all come back to where they were, the process does not grow with the number of storms, and a site that
emits meanwhile is answered.

FMI_STORM sets the number of subscribers; 1000 where it is not set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Sequence

import grpc
import pytest
from ports import lasting_address
from process import probing, resident_bytes
from proxy import bad_network
from server_harness import PRIOR, Client, eventually, msp
from server_process import started

from fmi.v1 import interchange_service_pb2 as wire_pb2

SUBSCRIBERS = int(os.environ.get("FMI_STORM", "1000"))
CHANNELS = 50
COHORT = "care"
QUICK = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    (
        "grpc.min_reconnect_backoff_ms",
        20_000,
    ),  # how long a connection may take to be made, no pause
    ("grpc.max_reconnect_backoff_ms", 500),
)
MAX_BYTES_PER_STREAM = 150_000
STORMS = 3
LONGEST_ANSWER_S = 10.0
"""A site waits no longer for its answer while all come back."""

BACK_S = 120.0
LULL_S = 1.0


class Subscriber:
    """Holds a subscription; after a break it comes back with jitter, where it was."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._token = ""
        self.live = False
        self.ends = 0
        self.revision = 0
        self.refused: list[grpc.StatusCode] = []

    async def run(self) -> None:
        while True:
            request = wire_pb2.SubscribeRequest(cohorts=[COHORT], resume_token=self._token)
            try:
                async for event in self._client.interchange.Subscribe(request):
                    self._token = event.resume_token or self._token
                    match event.WhichOneof("event"):
                        case "snapshot_end":
                            self.live = True
                        case "update" if event.update.kind == PRIOR:
                            assert event.update.revision > self.revision
                            self.revision = event.update.revision
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    self.refused.append(error.code())
            self.live = False
            self.ends += 1
            await asyncio.sleep(random.uniform(0.0, 0.5))


async def newest_everywhere(client: Client, subscribers: Sequence[Subscriber]) -> None:
    """Release once more, and wait until everybody has it."""
    tau = random.random()
    await client.emit(*(msp(f"s{i}", COHORT, controller={"tau": tau}) for i in range(3)))
    await client.release(COHORT)
    newest = (await client.update(COHORT)).revision
    await eventually(lambda: all(s.revision == newest for s in subscribers), 60.0)


async def released(client: Client) -> bool:
    return bool((await client.cohorts())[COHORT].revisions)


@pytest.mark.timeout(300)
async def test_all_subscribers_come_back_at_once(tmp_path):
    flags = ("--data-dir", str(tmp_path / "data"))
    async with contextlib.AsyncExitStack() as clients:
        target = lasting_address()
        async with started("--listen", target, *flags) as first:
            alone = resident_bytes(first.pid)
            channels = [
                await clients.enter_async_context(Client(target, QUICK)) for _ in range(CHANNELS)
            ]
            await channels[0].emit(*(msp(f"s{i}", COHORT) for i in range(3)))
            await eventually(lambda: released(channels[0]))
            subscribers = [Subscriber(channels[i % CHANNELS]) for i in range(SUBSCRIBERS)]
            tasks = [asyncio.create_task(subscriber.run()) for subscriber in subscribers]
            await eventually(lambda: all(s.live for s in subscribers), 120.0)
            grown = resident_bytes(first.pid) - alone
            first.process.kill()
            await first.process.wait()
        await eventually(lambda: not any(s.live for s in subscribers), BACK_S)
        async with (
            started("--listen", target, *flags) as second,
            Client(target) as other,
        ):
            begun = time.monotonic()
            await eventually(lambda: all(s.live for s in subscribers), BACK_S)
            back_s = time.monotonic() - begun
            await newest_everywhere(other, subscribers)
            again = resident_bytes(second.pid) - alone
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    print(  # noqa: T201 - the figures
        f"{SUBSCRIBERS} subscribers: back after {back_s:.1f} s, "
        f"{grown / SUBSCRIBERS / 1000:.0f} and {again / SUBSCRIBERS / 1000:.0f} kB each"
    )
    assert [s.refused for s in subscribers if s.refused] == []
    for growth in (grown, again):
        assert growth < SUBSCRIBERS * MAX_BYTES_PER_STREAM


@pytest.mark.timeout(300)
async def test_storm_after_storm_leaves_nothing_behind(tmp_path):
    flags = ("--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "data"))
    async with (
        started(*flags) as server,
        Client(server.target) as other,
        bad_network(server.target) as network,
        contextlib.AsyncExitStack() as clients,
    ):
        await other.emit(*(msp(f"s{i}", COHORT) for i in range(3)))
        await eventually(lambda: released(other))
        channels = [
            await clients.enter_async_context(Client(network.target, QUICK))
            for _ in range(CHANNELS)
        ]
        subscribers = [Subscriber(channels[i % CHANNELS]) for i in range(SUBSCRIBERS)]
        tasks = [asyncio.create_task(subscriber.run()) for subscriber in subscribers]
        await eventually(lambda: all(s.live for s in subscribers), BACK_S)
        held, storms, lulls = [], [], []
        async with probing(server.target, "others") as probe:
            for _ in range(STORMS):
                begun = time.monotonic()
                await asyncio.sleep(LULL_S)
                cut = time.monotonic()
                lulls.append((begun, cut))
                had = [subscriber.ends for subscriber in subscribers]
                network.cut()
                # The first may be back before the last has noticed.
                await eventually(
                    lambda had=had: all(s.ends > n for s, n in zip(subscribers, had, strict=True)),
                    BACK_S,
                )
                await eventually(lambda: all(s.live for s in subscribers), BACK_S)
                storms.append((cut, time.monotonic()))
                await newest_everywhere(other, subscribers)
                held.append(resident_bytes(server.pid))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    quiet, during = probe.during(lulls), probe.during(storms)
    back = ", ".join(f"{end - cut:.1f}" for cut, end in storms)
    memory = ", ".join(f"{bytes_ / 1e6:.0f}" for bytes_ in held)
    print(  # noqa: T201 - the figures
        f"{SUBSCRIBERS} subscribers, {STORMS} storms: back after {back} s; {memory} MB; Emit {quiet} before, "
        f"{during} meanwhile"
    )
    assert [s.refused for s in subscribers if s.refused] == []
    assert held[-1] < held[0] + SUBSCRIBERS * MAX_BYTES_PER_STREAM / 10
    assert during.p99_s < LONGEST_ANSWER_S
