"""All subscribers lose their server at once and come back at once.

FMI_STORM sets the number of subscribers; 1000 where it is not set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import time
from pathlib import Path

import grpc
import pytest
from server_harness import PRIOR, Client, eventually, msp
from server_process import started

from fmi.v1 import interchange_service_pb2 as wire_pb2

SUBSCRIBERS = int(os.environ.get("FMI_STORM", "1000"))
CHANNELS = 50
COHORT = "care"
MAX_BYTES_PER_STREAM = 150_000


class Subscriber:
    """Holds a subscription; after a break it comes back with jitter, where it was."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._token = ""
        self.live = False
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
            await asyncio.sleep(random.uniform(0.0, 0.5))


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


async def released(client: Client) -> bool:
    return bool((await client.cohorts())[COHORT].revisions)


@pytest.mark.timeout(300)
async def test_all_subscribers_come_back_at_once(tmp_path):
    options = (
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
    )
    flags = ("--data-dir", str(tmp_path / "data"))
    async with contextlib.AsyncExitStack() as clients:
        async with started("--listen", "127.0.0.1:0", *flags) as first:
            target = first.target
            alone = resident_bytes(first.pid)
            channels = [
                await clients.enter_async_context(Client(target, options)) for _ in range(CHANNELS)
            ]
            await channels[0].emit(*(msp(f"s{i}", COHORT) for i in range(3)))
            await eventually(lambda: released(channels[0]))
            subscribers = [Subscriber(channels[i % CHANNELS]) for i in range(SUBSCRIBERS)]
            tasks = [asyncio.create_task(subscriber.run()) for subscriber in subscribers]
            await eventually(lambda: all(s.live for s in subscribers), 120.0)
            grown = resident_bytes(first.pid) - alone
            first.process.kill()
            await first.process.wait()
        await eventually(lambda: not any(s.live for s in subscribers), 30.0)
        async with started("--listen", target, *flags) as second:
            begun = time.monotonic()
            await eventually(lambda: all(s.live for s in subscribers), 120.0)
            back_s = time.monotonic() - begun
            async with Client(target) as other:
                await other.emit(*(msp(f"s{i}", COHORT, controller={"tau": 0.1}) for i in range(3)))
                await other.release(COHORT)
                newest = (await other.update(COHORT)).revision
            await eventually(lambda: all(s.revision == newest for s in subscribers), 60.0)
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
