"""An honest site in a process of its own: it emits at even times until SIGTERM.

site.py TARGET PACKETS_PER_S    says of each packet when it was due, how long it took, and what came of it
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections import Counter
from typing import Final

import grpc

from benchmarks.abuse.attacks import COHORT
from fmi.plain import CURRENT_REVISION, new_packet_id
from fmi.v1 import interchange_service_pb2 as wire
from fmi.v1 import packet_pb2
from fmi.v1.interchange_service_pb2_grpc import InterchangeServiceStub

SITES: Final = 3
SIGNALS: Final = 300
"""Signals of a large packet of each site at the start: each update of the cohort has all of them."""

CALL_S: Final = 10.0
OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


def emit(site: int, controller: dict[str, float]) -> wire.EmitRequest:
    """Make a packet of a site."""
    packet = packet_pb2.Packet()
    packet.header.packet_id = new_packet_id()
    packet.header.domain_id = f"site-{site}"
    packet.header.cohort = COHORT
    packet.header.rev = CURRENT_REVISION
    packet.header.emitted_at.GetCurrentTime()
    for name, value in controller.items():
        packet.msp.controller[name] = value
    return wire.EmitRequest(packet=packet)


async def emit_until_told(target: str, per_s: float) -> None:
    """Emit at even times; print what was measured as JSON at the end."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    measured: list[tuple[float, float]] = []
    failed: list[tuple[float, str]] = []
    waiting: set[asyncio.Task[None]] = set()
    started = time.monotonic()

    async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel:
        stub = InterchangeServiceStub(channel)
        for site in range(SITES):
            large = {f"control_{number}": number + site / 7 for number in range(SIGNALS)}
            await stub.Emit(emit(site, large))

        async def one(number: int, due: float) -> None:
            request = emit(number % SITES, {"tau": (number % 101) / 100})
            try:
                await stub.Emit(request, timeout=CALL_S)
                measured.append((due, time.monotonic() - due))
            except grpc.aio.AioRpcError as error:
                failed.append((due, error.code().name))

        print("begun", flush=True)
        number = 0
        while not ended.is_set():
            due = started + number / per_s
            if due < time.monotonic() - 1.0:  # the start took its time
                started += time.monotonic() - due
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, due - time.monotonic())):
                    await ended.wait()
            # Not one after the other: a slow answer must not make the next one look quick.
            task = asyncio.create_task(one(number, due))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
            number += 1
        await asyncio.gather(*waiting)
    codes = Counter(code for _, code in failed)
    print(json.dumps({"answers": measured, "failed": failed, "codes": codes}))


if __name__ == "__main__":
    asyncio.run(emit_until_told(sys.argv[1], float(sys.argv[2])))
