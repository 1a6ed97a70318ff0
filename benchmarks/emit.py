"""Durable ingest beside a bare gRPC echo, in one run.

Three servers run as processes of their own on loopback; this process is the client of all of them, with the
same code. Rounds alternate, so that a machine whose speed drifts does not favour one side; ratios are taken
round by round and their median is printed.

* echo: a bare grpc.aio server that parses the request and sends it back. The reference.
* Emit: `fmi-server serve` with SQLite on disk, `synchronous=FULL`; one packet a call, acknowledged after its
  commit.
* EmitStream: the same server; zstd envelopes of many packets, acknowledged after their commit.

    make bench            or: python benchmarks/emit.py --rounds 7 --calls 4000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import zstandard

from fmi.plain import CURRENT_REVISION, new_packet_id
from fmi.v1 import interchange_service_pb2 as wire
from fmi.v1 import packet_pb2
from fmi.v1.interchange_service_pb2_grpc import InterchangeServiceStub

SIGNALS = 25


def packets(count: int, *, sites: int = 100, cohort: str = "bench") -> Iterator[packet_pb2.Packet]:
    """Make packets of 25 signals, as 100 sites would send them."""
    for index in range(count):
        packet = packet_pb2.Packet()
        header = packet.header
        header.packet_id = new_packet_id()
        header.domain_id = f"site_{index % sites:03}"
        header.cohort = cohort
        header.rev = CURRENT_REVISION
        header.emitted_at.GetCurrentTime()
        for number in range(10):
            packet.msp.metrics[f"metric_{number}"] = index * 0.001 + number
        for number in range(SIGNALS - 10):
            packet.msp.controller[f"control_{number}"] = number / (1 + index % 17)
        yield packet


async def echo_server() -> None:
    """Serve Emit as a bare echo, until killed."""

    async def echo(request: wire.EmitRequest, _context: object) -> wire.EmitRequest:
        return request

    handler = grpc.unary_unary_rpc_method_handler(
        echo,
        request_deserializer=wire.EmitRequest.FromString,
        response_serializer=wire.EmitRequest.SerializeToString,
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("fmi.v1.InterchangeService", {"Emit": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


@contextlib.contextmanager
def server_process(command: Sequence[str]) -> Iterator[str]:
    """Run a server as a process; yield where it listens."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit(f"{command[0]} did not start")
        yield line.removeprefix("listening on ").strip()
    finally:
        process.terminate()
        process.wait(30)


@contextlib.asynccontextmanager
async def stub_of(target: str) -> AsyncIterator[InterchangeServiceStub]:
    """Connect to a server."""
    async with grpc.aio.insecure_channel(target) as channel:
        await channel.channel_ready()
        yield InterchangeServiceStub(channel)


async def unary_rate(
    stub: InterchangeServiceStub, requests: Sequence[wire.EmitRequest], *, concurrency: int
) -> float:
    """Return calls per second, with as many callers at once as are asked for."""
    waiting = iter(requests)

    async def caller() -> None:
        for request in waiting:
            await stub.Emit(request)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return len(requests) / (time.perf_counter() - started)


async def stream_rate(
    stub: InterchangeServiceStub, batches: Sequence[wire.EmitStreamRequest], size: int
) -> float:
    """Return packets per second over one stream, at most eight batches ahead of their answers."""
    room = asyncio.Semaphore(8)

    async def requests() -> AsyncIterator[wire.EmitStreamRequest]:
        for batch in batches:
            await room.acquire()
            yield batch

    accepted = 0
    started = time.perf_counter()
    async for response in stub.EmitStream(requests()):
        accepted += response.accepted
        room.release()
    seconds = time.perf_counter() - started
    assert accepted == len(batches) * size, "the server refused packets of the benchmark"
    return accepted / seconds


def batches_of(count: int, size: int) -> list[wire.EmitStreamRequest]:
    """Make zstd envelopes of `size` packets each."""
    compressor = zstandard.ZstdCompressor(level=3)
    result = []
    for _ in range(count):
        data = packet_pb2.PacketBatch(packets=packets(size)).SerializeToString()
        envelope = wire.EncodedPackets(
            encoding=wire.ENCODING_ZSTD,
            uncompressed_size=len(data),
            data=compressor.compress(data),
        )
        result.append(wire.EmitStreamRequest(encoded=envelope))
    return result


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    rounds: int
    calls: int
    batches: int
    batch_size: int


async def measure(echo: str, fmi: str, options: Options) -> None:
    """Measure in alternating rounds, and print rates and ratios."""
    size = len(next(packets(1)).SerializeToString())
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()},",
        end=" ",
    )
    print(f"grpcio {grpc.__version__}; packets of {SIGNALS} signals, {size} bytes")
    print(f"{options.rounds} rounds after one to warm up; medians\n")
    async with stub_of(echo) as echo_stub, stub_of(fmi) as fmi_stub:
        bare = 0.0
        for concurrency in (1, 16, 64):
            rows: list[tuple[float, float]] = []
            for _ in range(options.rounds + 1):
                calls = options.calls if concurrency > 1 else options.calls // 8
                requests = [wire.EmitRequest(packet=packet) for packet in packets(calls)]
                bare = await unary_rate(echo_stub, requests, concurrency=concurrency)
                durable = await unary_rate(fmi_stub, requests, concurrency=concurrency)
                rows.append((bare, durable))
            ratio = statistics.median(durable / bare for bare, durable in rows[1:])
            bare = statistics.median(row[0] for row in rows[1:])
            durable = statistics.median(row[1] for row in rows[1:])
            print(
                f"unary, {concurrency:2} callers:  echo {bare:7,.0f}/s   durable Emit {durable:7,.0f}/s   "
                f"ratio {ratio:.2f}  (target at 64 callers: 0.8)"
            )
        rates: list[float] = []
        for _ in range(options.rounds + 1):
            batches = batches_of(options.batches, options.batch_size)
            rates.append(await stream_rate(fmi_stub, batches, options.batch_size))
        rate = statistics.median(rates[1:])
        print(
            f"\nbatched, {options.batch_size} packets an envelope:  durable EmitStream {rate:,.0f} packets/s"
            f"   {rate / bare:.1f} x the bare echo's calls   (target: 50,000)"
        )


def main() -> None:
    """Start the servers and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--echo-server", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.echo_server:
        asyncio.run(echo_server())
        return
    with tempfile.TemporaryDirectory() as data_dir:
        server = [sys.executable, "-m", "fmi_server", "serve", "--listen", "127.0.0.1:0"]
        with (
            server_process([sys.executable, str(Path(__file__)), "--echo-server"]) as echo,
            server_process([*server, "--data-dir", data_dir, "--log-level", "warning"]) as fmi,
        ):
            chosen = Options(options.rounds, options.calls, options.batches, options.batch_size)
            asyncio.run(measure(echo, fmi, chosen))


if __name__ == "__main__":
    main()
