"""The store at NATS JetStream brokers beside bare publishing of the same bytes, in one run.

A broker runs as a process of its own on loopback, once with `sync_interval: always` and once with its
default. Rounds alternate, so that a machine whose speed drifts does not favour one side; the median of each
is printed.

* bare: nats-py publishes each packet as a message with an id, by `publish_async`, its fastest way, and waits
  for all acknowledgements. The reference.
* store: `JetStreamStore.append` in calls of many packets: acknowledged, and in the view.
* sqlite: `SqliteStore.append` in the same calls, with each commit synced.

    make bench-jetstream        or: python -m benchmarks.jetstream --rounds 7 --packets 50000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import nats
from nats.aio.client import Client

from benchmarks.emit import SIGNALS, packets
from fmi_server.storage import JetStreamStore, SqliteStore, Store
from fmi_server.storage.records import PacketRecord, content_hash

CALLERS = 16
"""Calls that are on their way at a time, on either side."""


def records(count: int) -> list[PacketRecord]:
    """Return packets of 25 signals as the store takes them."""
    made = []
    for packet in packets(count):
        payload = packet.SerializeToString()
        header = packet.header
        digest = content_hash(payload)
        made.append(
            PacketRecord(
                header.domain_id, header.packet_id, "bench", "msp", digest, 1, 1, False, "", payload
            )
        )
    return made


@contextlib.contextmanager
def broker(folder: Path, sync: str, port: int) -> Iterator[str]:
    """Run a broker; yield its URL."""
    config = folder / "broker.conf"
    config.write_text(
        f'listen: 127.0.0.1:{port}\njetstream {{ store_dir: "{folder}/files", sync_interval: {sync} }}\n'
    )
    binary = Path(sys.executable).with_name("nats-server")
    with (folder / "broker.log").open("wb") as log:
        process = subprocess.Popen([str(binary), "-c", str(config)], stderr=log)
    try:
        while not (folder / "broker.log").read_bytes().count(b"Server is ready"):
            time.sleep(0.01)
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10)


async def store_rate(store: Store, made: Sequence[PacketRecord], batch: int) -> float:
    """Return packets a second that a store takes in calls of a batch."""
    calls = iter([made[start : start + batch] for start in range(0, len(made), batch)])

    async def caller() -> None:
        for call in calls:
            outcomes = await store.append(call)
            assert all(outcome.status == "stored" for outcome in outcomes)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return len(made) / (time.perf_counter() - started)


async def bare_rate(client: Client, made: Sequence[PacketRecord]) -> float:
    """Return messages a second that the client publishes and the broker acknowledges."""
    jetstream = client.jetstream(publish_async_max_pending=CALLERS * 100)
    answers = []
    started = time.perf_counter()
    for record in made:
        headers = {"Nats-Msg-Id": f"{record.domain_id}/{record.packet_id}"}
        answers.append(
            await jetstream.publish_async(
                "bare.packets", record.payload, headers=headers, wait_stall=30
            )
        )
    await asyncio.gather(*answers)
    return len(made) / (time.perf_counter() - started)


async def measure(url: str, folder: Path, rounds: int, count: int, batch: int) -> None:
    """Measure one broker and print what came out."""
    rates: dict[str, list[float]] = {"bare": [], "store": [], "sqlite": []}
    client = await nats.connect(url)
    await client.jetstream().add_stream(name="bare", subjects=["bare.>"], storage="file")
    for number in range(rounds):
        rates["bare"].append(await bare_rate(client, records(count)))
        name = secrets.token_hex(4)
        async with JetStreamStore(f"{url}/r{number}", folder / f"{name}.view.db") as store:
            rates["store"].append(await store_rate(store, records(count), batch))
        async with SqliteStore(folder / f"{name}.db") as own:
            rates["sqlite"].append(await store_rate(own, records(count), batch))
    await client.close()
    for what, found in rates.items():
        print(f"  {what:7} {statistics.median(found):10,.0f} packets/s")
    ratios = [s / b for s, b in zip(rates["store"], rates["bare"], strict=True)]
    print(f"  store / bare {statistics.median(ratios):6.1f}")


async def alone(url: str, folder: Path) -> None:
    """Print how long one packet takes that comes alone."""
    async with JetStreamStore(f"{url}/alone", folder / "alone.view.db") as store:
        times = []
        for record in records(500):
            started = time.perf_counter()
            await store.append([record])
            times.append(time.perf_counter() - started)
    cuts = statistics.quantiles(times, n=100)
    print(f"  one packet alone: median {cuts[49] * 1e3:.2f} ms, 99 % below {cuts[98] * 1e3:.2f} ms")


def main() -> None:
    """Measure with both settings of the broker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packets", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--port", type=int, default=14_222)
    asked = parser.parse_args()
    size = statistics.mean(len(record.payload) for record in records(1000))
    print(
        f"packets of {SIGNALS} signals, {size:.0f} bytes; calls of {asked.batch}, {CALLERS} at a time"
    )
    for sync in ("always", "2m"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            print(f"sync_interval: {sync}")
            with broker(folder, sync, asked.port) as url:
                asyncio.run(measure(url, folder, asked.rounds, asked.packets, asked.batch))
                asyncio.run(alone(url, folder))


if __name__ == "__main__":
    main()
