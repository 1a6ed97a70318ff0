"""One, two and three servers on one store at brokers: what they take, and how soon one goes on for another.

Everything runs on this machine: three brokers, up to three servers, and what sends to them share its cores.
So throughput says what a packet costs more than what three machines would take. Rounds alternate.

* throughput: sites in processes of their own send batches on streams, spread over 1, 2 or 3 servers.
* publish: `Emit` of one packet, again and again by eight callers, beside nats-py publishing the same bytes
  with an acknowledgement each, by as many.
* failover: sites emit to twelve cohorts; a server that the subscriber is not connected to is killed, told to
  end, or stopped without a word (SIGSTOP). Until each cohort was released again is measured at the
  subscriber, and the longest of the twelve counts.

    make bench-cluster          or: python -m benchmarks.cluster failover --rounds 10
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

import grpc
import nats

from benchmarks.abuse.run import Server, serving
from benchmarks.emit import packets
from fmi.plain import CURRENT_REVISION, new_packet_id
from fmi.v1 import cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as wire
from fmi.v1.admin_service_pb2 import PutCohortSpecRequest
from fmi.v1.admin_service_pb2_grpc import AdminServiceStub
from fmi.v1.interchange_service_pb2_grpc import InterchangeServiceStub
from fmi_demo.cluster import brokers

SIZE: Final = 3
BATCH: Final = 100
CALLERS: Final = 8
COHORT: Final = "bench"
"""Of `benchmarks.emit.packets`."""

COHORTS: Final = [f"cohort-{number}" for number in range(12)]
SETTLED_S: Final = 5.0
"""Seconds until a server that came has its share."""

RELEASED_S: Final = 60.0


@contextlib.asynccontextmanager
async def cluster(folder: Path, size: int = SIZE) -> AsyncIterator[list[Server]]:
    """Run three brokers, and servers on them."""
    async with contextlib.AsyncExitStack() as stack:
        found = brokers(folder / "brokers", folder / "broker.log")
        for broker in found:
            await stack.enter_async_context(broker)
        url = "nats://" + ",".join(broker.address for broker in found)
        yield [
            await stack.enter_async_context(
                serving(
                    folder / f"server-{number}", ("--store", url, "--store-replicas", str(SIZE))
                )
            )
            for number in range(size)
        ]


# Throughput


async def send_batches(target: str, count: int) -> None:
    """Send packets in batches on a stream, as a process of its own; say how long it took."""
    made = list(packets(count))
    async with grpc.aio.insecure_channel(target) as channel:
        call = InterchangeServiceStub(channel).EmitStream()
        print("begun", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        started = time.perf_counter()
        for start in range(0, count, BATCH):
            batch = packet_pb2.PacketBatch(packets=made[start : start + BATCH])
            await call.write(wire.EmitStreamRequest(packets=batch))
            answer = await call.read()
            assert isinstance(answer, wire.EmitStreamResponse), "the stream ended"
            assert answer.accepted == len(batch.packets), answer
        print(json.dumps(time.perf_counter() - started))


async def throughput(servers: Sequence[Server], count: int) -> float:
    """Return packets a second that servers take together, from one site for each of them."""
    sites = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.cluster", "--send", server.target, str(count)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for server in servers
    ]
    for site in sites:
        assert site.stdout is not None
        assert await site.stdout.readline() == b"begun\n"
    started = time.perf_counter()
    await asyncio.gather(*(site.communicate(b"go\n") for site in sites))
    took = time.perf_counter() - started
    if any(site.returncode for site in sites):
        raise SystemExit("a site failed")
    return len(servers) * count / took


async def measure_throughput(rounds: int, count: int) -> None:
    """Print what one, two and three servers take."""
    rates: dict[int, list[float]] = {1: [], 2: [], 3: []}
    with tempfile.TemporaryDirectory() as folder:
        async with cluster(Path(folder)) as servers:
            async with grpc.aio.insecure_channel(servers[0].target) as channel:
                spec = cohort_pb2.CohortSpec(name=COHORT)
                await AdminServiceStub(channel).PutCohortSpec(PutCohortSpecRequest(spec=spec))
            await asyncio.sleep(SETTLED_S)
            for number in range(rounds + 1):  # the first one warms up
                for size, found in rates.items():
                    rate = await throughput(servers[:size], count)
                    if number:
                        found.append(rate)
    one = statistics.median(rates[1])
    for size, found in rates.items():
        middle = statistics.median(found)
        print(f"  {size} of 3 servers take {middle:8,.0f} packets/s ({middle / one:.2f} x one)")


# Publishing


async def emit_rate(target: str, count: int) -> float:
    """Return calls of Emit a second, of eight callers."""
    made = iter([wire.EmitRequest(packet=packet) for packet in packets(count)])
    async with grpc.aio.insecure_channel(target) as channel:
        stub = InterchangeServiceStub(channel)

        async def caller() -> None:
            for request in made:
                await stub.Emit(request)

        started = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return count / (time.perf_counter() - started)


async def publish_rate(url: str, count: int) -> float:
    """Return messages a second that nats-py publishes and the brokers acknowledge, of eight callers."""
    made = iter([packet.SerializeToString() for packet in packets(count)])
    client = await nats.connect(url)
    jetstream = client.jetstream()

    async def caller() -> None:
        for data in made:
            await jetstream.publish("bare.packets", data, headers={"Nats-Msg-Id": new_packet_id()})

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    took = time.perf_counter() - started
    await client.close()
    return count / took


async def measure_publishing(rounds: int, count: int) -> None:
    """Print what an Emit costs beside a raw publish of the same bytes."""
    emits, publishes = [], []
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            found = brokers(Path(folder) / "brokers", Path(folder) / "broker.log")
            for broker in found:
                await stack.enter_async_context(broker)
            urls = [f"nats://{broker.address}" for broker in found]
            flags = ("--store", "nats://" + ",".join(b.address for b in found))
            server = await stack.enter_async_context(
                serving(Path(folder) / "server", (*flags, "--store-replicas", str(SIZE)))
            )
            client = await nats.connect(urls[0])
            await client.jetstream().add_stream(
                name="bare", subjects=["bare.>"], storage="file", num_replicas=SIZE
            )
            await client.close()
            for number in range(rounds + 1):
                emit, publish = (
                    await emit_rate(server.target, count),
                    await publish_rate(urls[0], count),
                )
                if number:
                    emits.append(emit)
                    publishes.append(publish)
    ratio = statistics.median(e / p for e, p in zip(emits, publishes, strict=True))
    print(f"  Emit {statistics.median(emits):8,.0f}/s, {CALLERS} callers")
    print(f"  nats-py publish {statistics.median(publishes):8,.0f}/s, {CALLERS} callers")
    print(f"  Emit / publish {ratio:.2f}")


# Failover


class Watch:
    """Notes when each cohort was last released, as a subscriber sees it."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    async def follow(self, target: str) -> None:
        """Follow until cancelled."""
        async with grpc.aio.insecure_channel(target) as channel:
            request = wire.SubscribeRequest(cohorts=["cohort-*"])
            async for event in InterchangeServiceStub(channel).Subscribe(request):
                if event.WhichOneof("event") == "update":
                    self.last[event.update.cohort] = time.monotonic()

    async def released_since(self, moment: float) -> float:
        """Wait until each cohort was released after a moment; return the seconds until the last was."""
        async with asyncio.timeout(RELEASED_S):
            first: dict[str, float] = {}
            while len(first) < len(COHORTS):
                for cohort, at in self.last.items():
                    if at > moment:
                        first.setdefault(cohort, at)
                await asyncio.sleep(0.005)
        return max(first.values()) - moment


async def emit_evenly(target: str, number: int) -> None:
    """Be three sites of each cohort, which send a new value five times a second, until cancelled."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = InterchangeServiceStub(channel)
        turn = 0
        while True:
            batch = packet_pb2.PacketBatch()
            for cohort in COHORTS:
                for site in range(3):
                    header = batch.packets.add().header
                    header.packet_id, header.cohort = new_packet_id(), cohort
                    header.domain_id, header.rev = f"site-{number}-{site}", CURRENT_REVISION
                    header.emitted_at.GetCurrentTime()
                    batch.packets[-1].msp.controller["tau"] = (turn % 997) / 997
            call = stub.EmitStream()
            await call.write(wire.EmitStreamRequest(packets=batch))
            await call.read()
            await call.done_writing()
            turn += 1
            await asyncio.sleep(0.2)


async def fail_over(folder: Path, how: str) -> float:
    """Take one of three servers away; return the seconds until all cohorts were released again."""
    async with cluster(folder) as servers:
        async with grpc.aio.insecure_channel(servers[0].target) as channel:
            for cohort in COHORTS:
                spec = cohort_pb2.CohortSpec(name=cohort)
                spec.release.min_interval.FromMilliseconds(50)
                await AdminServiceStub(channel).PutCohortSpec(PutCohortSpecRequest(spec=spec))
        await asyncio.sleep(SETTLED_S)
        watch = Watch()
        work = [
            asyncio.create_task(watch.follow(servers[0].target)),
            asyncio.create_task(emit_evenly(servers[0].target, 0)),
        ]
        try:
            await watch.released_since(time.monotonic())
            gone = servers[1]
            signals = {"killed": signal.SIGKILL, "ended": signal.SIGTERM, "frozen": signal.SIGSTOP}
            gone.process.send_signal(signals[how])
            took = await watch.released_since(time.monotonic())
            if how == "frozen":
                gone.process.send_signal(signal.SIGCONT)
            return took
        finally:
            for task in work:
                task.cancel()
            await asyncio.wait(work)


async def measure_failover(rounds: int) -> None:
    """Print how long it takes, however a server goes."""
    times: dict[str, list[float]] = {"killed": [], "ended": [], "frozen": []}
    for _ in range(rounds):
        for how, found in times.items():
            with tempfile.TemporaryDirectory() as folder:
                found.append(await fail_over(Path(folder), how))
            print(".", end="", flush=True)
    print()
    for how, found in times.items():
        ordered = sorted(found)
        print(
            f"  {how:7} {len(found)} times: median {statistics.median(found):5.2f} s, "
            f"{ordered[0]:.2f} to {ordered[-1]:.2f} s"
        )


def main() -> None:
    """Measure what is asked for."""
    if sys.argv[1:2] == ["--send"]:
        asyncio.run(send_batches(sys.argv[2], int(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    what = ("throughput", "publish", "failover")
    parser.add_argument("what", nargs="*", metavar="WHAT", help=", ".join(what))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packets", type=int, default=5000, help="of each site in a round")
    options = parser.parse_args()
    if unknown := set(options.what) - set(what):
        parser.error(f"there is no measurement {', '.join(sorted(unknown))}")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"grpcio {grpc.__version__}; three brokers and all servers on this machine"
    )
    for name in options.what or what:
        print(name)
        match name:
            case "throughput":
                asyncio.run(measure_throughput(options.rounds, options.packets))
            case "publish":
                asyncio.run(measure_publishing(options.rounds, options.packets))
            case "failover":
                asyncio.run(measure_failover(options.rounds))


if __name__ == "__main__":
    main()
