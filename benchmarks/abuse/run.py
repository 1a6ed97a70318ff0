"""One attack on one server: the honest site before and during it, and the server before, during and after."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

__all__ = ["Outcome", "Server", "attacked", "descriptors", "healthy", "resident", "serving"]

LOOK_S = 0.05
READY_S = 10.0


def resident(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def descriptors(pid: int) -> int:
    """Return how many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - only their number is wanted


def processor_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def healthy(target: str, *, timeout_s: float = READY_S) -> bool:
    """Tell whether a server says that it is ready, to somebody who connects anew."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        check: grpc.aio.UnaryUnaryMultiCallable[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ] = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        request = health_pb2.HealthCheckRequest(service="fmi.v1.InterchangeService/Emit")
        try:
            answer = await check(request, timeout=timeout_s, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@dataclass
class Server:
    """A server process that listens on loopback."""

    process: asyncio.subprocess.Process
    target: str

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self.process.returncode is None


@contextlib.asynccontextmanager
async def serving(data_dir: Path, flags: Sequence[str] = ()) -> AsyncIterator[Server]:
    """Run `fmi-server serve` as a process of its own."""
    command = [sys.executable, "-m", "fmi_server", "serve", "--listen", "127.0.0.1:0"]
    command += ["--data-dir", str(data_dir), "--log-level", "error", *flags]
    # What is set for this run is no setting of the server.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FMI_")}
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env=kept
    )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        if not line.startswith("listening on "):
            raise SystemExit("the server did not start")
        yield Server(process, line.removeprefix("listening on ").strip())
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(20.0):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


@contextlib.asynccontextmanager
async def helper(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a module of this package as a process of its own, from its first line to SIGTERM."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
        if line != b"begun\n":
            raise SystemExit(f"{arguments[0]} did not start")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def told(process: asyncio.subprocess.Process) -> Any:
    """End a helper; return what it says."""
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(30.0):
        said, _ = await process.communicate()
    return json.loads(said)


@dataclass
class Outcome:
    """What came of an attack.

    Latencies are in milliseconds, of packets that were due before and during the attack; memory is in bytes.
    """

    attack: str
    before_ms: list[float] = field(default_factory=list)
    during_ms: list[float] = field(default_factory=list)
    unanswered: Counter[str] = field(default_factory=Counter)
    tally: Counter[str] = field(default_factory=Counter)
    memory: tuple[int, int, int] = (0, 0, 0)
    descriptors: tuple[int, int, int] = (0, 0, 0)
    processor: float = 0.0
    alive: bool = False
    ready: bool = False


def p99(values: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return sorted(values)[int(len(values) * 0.99)] if values else float("nan")


def p50(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values) if values else float("nan")


@dataclass
class _Peak:
    """The most that a process had while it was looked at."""

    pid: int
    memory: int = 0
    descriptors: int = 0

    async def watch(self) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while True:
                self.memory = max(self.memory, resident(self.pid))
                self.descriptors = max(self.descriptors, descriptors(self.pid))
                await asyncio.sleep(LOOK_S)


async def attacked(
    name: str,
    data_dir: Path,
    *,
    before_s: float,
    attack_s: float,
    after_s: float,
    rate: float,
    scale: float = 1.0,
    flags: Sequence[str] = (),
) -> Outcome:
    """Attack a server of its own, and look at it and at an honest site meanwhile."""
    outcome = Outcome(name)
    async with serving(data_dir, flags) as server:
        async with helper("benchmarks.abuse.site", server.target, str(rate)) as site:
            await asyncio.sleep(1.0)  # what is only slow the first time
            quiet = time.monotonic()
            await asyncio.sleep(before_s)
            memory, opened = resident(server.pid), descriptors(server.pid)
            peak = _Peak(server.pid)
            watching = asyncio.create_task(peak.watch())
            used = processor_s(server.pid)
            begun = time.monotonic()
            async with helper(
                "benchmarks.abuse.attacker", server.target, name, str(scale)
            ) as attacker:
                await asyncio.sleep(attack_s)
                ended = time.monotonic()
                outcome.processor = (
                    (processor_s(server.pid) - used) / (ended - begun) if server.alive else 0.0
                )
                outcome.tally = Counter(await told(attacker))
            await asyncio.sleep(after_s)
            watching.cancel()
            said = await told(site)
        outcome.before_ms = [took * 1e3 for due, took in said["answers"] if quiet <= due < begun]
        outcome.during_ms = [took * 1e3 for due, took in said["answers"] if begun <= due < ended]
        outcome.unanswered = Counter(code for due, code in said["failed"])
        outcome.alive = server.alive
        outcome.ready = server.alive and await healthy(server.target)
        after = (resident(server.pid), descriptors(server.pid)) if server.alive else (0, 0)
        outcome.memory = (memory, peak.memory, after[0])
        outcome.descriptors = (opened, peak.descriptors, after[1])
    return outcome
