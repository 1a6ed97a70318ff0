"""A real server process on a disk that is really full, and one that nobody may write to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_harness import PRIOR, Client, eventually, msp, packet_keys, refusal_of, rows, spec
from server_process import COMMAND, LOCAL, assert_refused, run, started

from fmi.descriptors import INGEST
from fmi.v1 import cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

FILLER = {f"m{i}": 1.0 for i in range(1000)}


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A file system of its own in a folder, for as long as the context lasts."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", *options, str(folder)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"this machine does not let us mount a file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MiB, 3 of which are taken by something else."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=6m", "tmpfs") as folder:
        (folder / "ballast").write_bytes(os.urandom(3 * 2**20))
        yield folder


@contextlib.asynccontextmanager
async def health_of(target: str) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    async with grpc.aio.insecure_channel(target) as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def fill(client: Client, kept: list[tuple[str, str]]) -> packet_pb2.Packet:
    """Emit until a packet is refused; return that one, and note those that were acknowledged."""
    while True:
        packet = msp("filler", metrics=FILLER)
        try:
            await client.emit(packet)
        except grpc.aio.AioRpcError:
            return packet
        kept.append(("filler", packet.header.packet_id))


async def test_a_full_disk_makes_the_server_read_only_until_there_is_room(small_disk):
    """DURABLE and EXPLAINED on a full disk: what was acknowledged stays, the rest is refused and told of."""
    flags = (*LOCAL, "--data-dir", str(small_disk / "data"), "--progress-interval-s", "0.5")
    async with (
        started(*flags) as server,
        Client(server.target) as client,
        health_of(server.target) as health,
        asyncio.timeout(90),
    ):

        async def states() -> tuple[int, int]:
            names = ("", INGEST)
            answers = [await health.Check(health_pb2.HealthCheckRequest(service=n)) for n in names]
            return answers[0].status, answers[1].status

        assert await states() == (SERVING, SERVING)
        aggregation = cohort_pb2.AggregationSpec(vote_min_sites=1)
        await client.put_spec(spec("care", aggregation=aggregation))
        await client.emit(msp("site", "care", controller={"tau": 0.5}))
        await client.release("care")
        kept = packet_keys(small_disk / "data")
        async with client.subscribed("care", kinds=[PRIOR]) as events:
            await events.until("snapshot_end")
            packet = await fill(client, kept)
            refused = await refusal_of(client.emit(packet))
            assert (refused.code, refused.reason) == (
                grpc.StatusCode.UNAVAILABLE,
                "STORE_UNAVAILABLE",
            )
            assert refused.metadata == {"cause": "disk_full"}
            assert refused.retry_s is not None

            async def told() -> bool:
                await refusal_of(client.emit(packet))
                return (await states()) == (SERVING, NOT_SERVING)

            await eventually(told)
            doctor = await asyncio.create_subprocess_exec(
                str(Path(COMMAND[0]).with_name("fmi")), "doctor", "--target", server.target,
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, _ = await doctor.communicate()
            assert (doctor.returncode, b"its store refuses writes" in out) == (5, True), out
            # Reads and subscriptions go on, and the server lives.
            await events.until("progress")
            await events.until("progress")
            assert (await client.update("care")).revision == 1
            await eventually(
                lambda: any("takes no writes (disk_full)" in line for line in server.err)
            )

            (small_disk / "ballast").unlink()

            async def recovered() -> bool:
                return (await states()) == (SERVING, SERVING)

            await eventually(recovered)  # without any packet
            await eventually(lambda: any("takes writes again" in line for line in server.err))
            await client.emit(packet)
            kept.append(("filler", packet.header.packet_id))
            await client.emit(msp("site", "care", controller={"tau": 0.7}))
            await client.release("care")
            update = (await events.until("update"))[-1].update
            assert (update.revision, update.prior_update.prior["tau"]) == (2, 0.7)
        os.kill(server.pid, signal.SIGKILL)
        await server.process.wait()
    async with started(*flags):
        found = packet_keys(small_disk / "data")
    assert found[: len(kept)] == kept
    assert len(found) == len(kept) + 1


async def test_a_release_on_a_full_disk_comes_after_it(small_disk):
    """ORDERED: what was acknowledged before is released when there is room, and no revision is left out."""
    data_dir = small_disk / "data"
    async with (
        started(*LOCAL, "--data-dir", str(data_dir)) as server,
        Client(server.target) as client,
        asyncio.timeout(90),
    ):
        care = spec("care", aggregation=cohort_pb2.AggregationSpec(vote_min_sites=1))
        care.release.min_interval.FromSeconds(8)
        care.release.max_interval.FromSeconds(8)
        await client.put_spec(care)
        fields = {"kinds": [PRIOR], "mode": wire_pb2.DELIVERY_MODE_EVERY}
        async with client.subscribed("care", **fields) as events:
            await events.until("snapshot_end")
            # Of so many signals that an update needs more room than the packet that is refused.
            many = dict.fromkeys(list(FILLER)[:250], 1.0)
            await client.emit(msp("site", "care", controller={"tau": 0.5}, metrics=many))
            (first,) = await events.updates(1)
            await client.emit(msp("site", "care", controller={"tau": 0.7}, metrics=many))
            free = os.statvfs(small_disk)  # most of it at once, before the release is due
            (small_disk / "rest").write_bytes(bytes(free.f_bavail * free.f_frsize - 2**19))
            taken = [("", "")]
            while taken:  # a refusal makes room once, as the log is folded in
                taken.clear()
                await fill(client, taken)
                with contextlib.suppress(OSError), (small_disk / "rest").open("ab", 0) as rest:
                    while rest.write(bytes(4096)):
                        pass
            assert (await refusal_of(client.release("care"))).reason == "STORE_UNAVAILABLE"
            said = "release of cohort care failed and will be tried again"
            await eventually(lambda: any(said in line for line in server.err))
            assert (await client.update("care")).revision == first.revision == 1
            (small_disk / "ballast").unlink()
            (second,) = await events.updates(1)  # without a packet, and without anybody's asking
            assert (second.revision, second.prior_update.prior["tau"]) == (2, 0.7)
            assert second.sequence > first.sequence
        revisions = [
            row[3] for row in rows(data_dir, "updates")["updates"] if row[1:3] == ("care", PRIOR)
        ]
        assert revisions == [1, 2]


async def test_a_disk_that_turns_read_only_is_told_of_and_left_as_it_is(tmp_path):
    """As a kernel does it after an error of the disk: remounted read-only under the server."""
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        data_dir = disk / "data"
        async with started(*LOCAL, "--data-dir", str(data_dir)) as server:
            async with Client(server.target) as client:
                await client.emit(msp())
            server.process.send_signal(signal.SIGTERM)
            assert await server.process.wait() == 0
        remount = ["mount", "-o", "remount,ro", str(disk)]
        await asyncio.to_thread(subprocess.run, remount, check=True)
        before = {path.name: path.read_bytes() for path in data_dir.iterdir()}
        ended = await run(*LOCAL, "--data-dir", str(data_dir))
        assert_refused(ended, str(data_dir), "Read-only file system")
        assert {path.name: path.read_bytes() for path in data_dir.iterdir()} == before
        inspected = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fmi_server", "inspect", "--json", "--data-dir", str(data_dir),
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await inspected.communicate()
        assert (inspected.returncode, b'"live": 1' in out) == (0, True), out
