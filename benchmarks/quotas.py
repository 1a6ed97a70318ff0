"""What a site feels of another one that sends ten times its quota, beside one that keeps to it.

Two servers run with SQLite on disk, one with quotas and one without. A quiet site emits to each at even
times, in a process of its own. A loud one, in another process, sends nothing, its quota, or ten times that,
by turns and in an order that changes; it does not wait for answers, up to 256 at once, and does not heed the
time that it is told to wait.

What the loud site's own process takes of the processor is taken from the server too: on few cores it is part
of what the quiet site feels.

    make bench-quotas           or: python -m benchmarks.quotas --quota 100 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from benchmarks.abuse.run import Server, p50, p99, processor_s, serving
from fmi.plain import CURRENT_REVISION, new_packet_id
from fmi.v1 import interchange_service_pb2 as wire
from fmi.v1.interchange_service_pb2_grpc import InterchangeServiceStub
from fmi_server.tokens import changed_tokens, issue_token

COHORT: Final = "care"
SPEC: Final = f'name: {COHORT}\naccess: {{emit: ["*"], subscribe: ["*"]}}\n'
SETTLE_S: Final = 2.0
"""Seconds after a change of the loud site's rate that are not looked at: its burst is used up then."""

CALL_S: Final = 30.0

MOST_WAITING: Final = 256
"""Calls of a site that wait at once: more than a connection carries (100), so that there always is a next
one. What is due beyond them would not reach the server, and only keep the site's own process busy."""


# A site, in a process of its own


def _request(name: str, number: int) -> wire.EmitRequest:
    request = wire.EmitRequest()
    header = request.packet.header
    header.packet_id, header.domain_id, header.cohort = new_packet_id(), name, COHORT
    header.rev = CURRENT_REVISION
    header.emitted_at.GetCurrentTime()
    request.packet.msp.controller["tau"] = (number % 101) / 100
    return request


class _Site:
    """Emits at even times, as many a second as it was told last."""

    def __init__(self, target: str, name: str, token: str) -> None:
        self._target, self._name = target, name
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._per_s = 0.0
        self._told = asyncio.Event()
        self._answers: list[tuple[float, float, str]] = []

    async def run(self) -> None:
        waiting: set[asyncio.Task[None]] = set()
        reading = asyncio.create_task(self._read())
        async with grpc.aio.insecure_channel(self._target) as channel:
            stub = InterchangeServiceStub(channel)
            print("begun", flush=True)
            due = time.monotonic()
            for number in range(2**62):
                self._told.clear()
                pause = due + 1.0 / self._per_s - time.monotonic() if self._per_s else None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause and max(0.0, pause)):
                        await self._told.wait()
                if reading.done():
                    break
                if self._told.is_set() or not self._per_s:
                    if not self._per_s:  # what is under way belongs to what is over
                        for task in waiting:
                            task.cancel()
                    due = time.monotonic()
                    continue
                due += 1.0 / self._per_s
                if len(waiting) >= MOST_WAITING:
                    continue
                task = asyncio.create_task(self._emit(stub, number, due))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
            await asyncio.gather(*waiting, return_exceptions=True)
        print(json.dumps(self._answers))

    async def _emit(self, stub: InterchangeServiceStub, number: int, due: float) -> None:
        code = "OK"
        try:
            await stub.Emit(_request(self._name, number), metadata=self._metadata, timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        self._answers.append((due, time.monotonic() - due, code))

    async def _read(self) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        async for line in reader:
            self._per_s = float(line)
            self._told.set()
        self._told.set()


class _SiteProcess:
    """A site, told through its standard input how much to send."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def send(self, per_s: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{per_s}\n".encode())
        await self._process.stdin.drain()

    async def end(self) -> list[tuple[float, float, str]]:
        said, _ = await self._process.communicate(b"")  # which is the end of its input
        return [(due, took, code) for due, took, code in json.loads(said)]


@contextlib.asynccontextmanager
async def _site(target: str, name: str, token: str) -> AsyncIterator[_SiteProcess]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.quotas", "--site", target, name, token),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**26,
    )
    assert process.stdout is not None
    try:
        if await process.stdout.readline() != b"begun\n":
            raise SystemExit("a site did not start")
        yield _SiteProcess(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# The measurement


@dataclass(frozen=True)
class Arm:
    """What the loud site does, and to which server."""

    name: str
    limited: bool
    times: float


ARMS: Final = (
    Arm("nothing", limited=True, times=0.0),
    Arm("its quota", limited=True, times=1.0),
    Arm("10 x its quota", limited=True, times=10.0),
    Arm("nothing, no quotas", limited=False, times=0.0),
    Arm("10 x, no quotas", limited=False, times=10.0),
)


@dataclass(frozen=True)
class Measured:
    """What the quiet site felt while the loud one did one thing.

    Attributes:
        rounds: Milliseconds until each answer, by round.
        processor: Cores that the server used.
        codes: How the loud site's calls ended.
    """

    rounds: Sequence[Sequence[float]]
    processor: float
    codes: Counter[str]

    @property
    def all(self) -> list[float]:
        """All answers."""
        return [value for values in self.rounds for value in values]


async def measure(
    arms: Sequence[Arm], quota: float, per_s: float, rounds: int, round_s: float, seed: int
) -> dict[Arm, Measured]:
    """Run all arms in each round."""
    chance = random.Random(seed)
    spans: dict[Arm, list[tuple[float, float, float]]] = {arm: [] for arm in arms}
    async with contextlib.AsyncExitStack() as stack:
        servers: dict[bool, Server] = {}
        quiet: dict[bool, _SiteProcess] = {}
        loud: dict[bool, _SiteProcess] = {}
        for limited in {arm.limited for arm in arms}:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "cohorts").mkdir()
            (folder / "cohorts" / "care.yaml").write_text(SPEC, encoding="utf-8")
            tokens = folder / "tokens.json"
            texts = {}
            with changed_tokens(tokens) as records:
                for name in ("quiet", "loud"):
                    issued = issue_token(name, domain_ids=(), now=time.time(), lifetime_s=86_400.0)
                    records[issued.record.token_id] = issued.record
                    texts[name] = issued.text
            flags = ["--tokens", str(tokens), "--cohorts", str(folder / "cohorts")]
            rates = ("--quota-packets-per-s", "--quota-calls-per-s", "--quota-bytes-per-s")
            for rate in rates[: 1 if limited else 3]:
                flags += [rate, str(quota if limited else 0)]
            server = await stack.enter_async_context(serving(folder / "data", flags))
            servers[limited] = server
            for name, sites in (("quiet", quiet), ("loud", loud)):
                sites[limited] = await stack.enter_async_context(
                    _site(server.target, name, texts[name])
                )
        for number in range(rounds + 1):  # the first one warms up
            for arm in chance.sample(arms, len(arms)):
                await quiet[arm.limited].send(per_s)
                await loud[arm.limited].send(arm.times * quota)
                await asyncio.sleep(SETTLE_S)
                begun, used = time.monotonic(), processor_s(servers[arm.limited].pid)
                await asyncio.sleep(round_s)
                used = processor_s(servers[arm.limited].pid) - used
                if number:
                    spans[arm].append((begun, time.monotonic(), used / round_s))
                await loud[arm.limited].send(0.0)
                await quiet[arm.limited].send(0.0)
                await asyncio.sleep(SETTLE_S)
            print(".", end="", flush=True)
        heard = {limited: await quiet[limited].end() for limited in quiet}
        shouted = {limited: await loud[limited].end() for limited in quiet}
    print()
    return {
        arm: Measured(
            [
                [took * 1e3 for due, took, _ in heard[arm.limited] if begun <= due < ended]
                for begun, ended, _ in found
            ],
            statistics.mean(used for _, _, used in found),
            Counter(
                code
                for due, took, code in shouted[arm.limited]
                if any(begun <= due + took < ended for begun, ended, _ in found)
            ),
        )
        for arm, found in spans.items()
    }


def report(measured: dict[Arm, Measured], chance: random.Random) -> None:
    """Print what was measured, and the ratios with the spread that rounds alone would give."""
    print(
        "the loud site sends | quiet p50 ms | p99 ms | by round, median p99 | server's cores | loud"
    )
    for arm, found in measured.items():
        tails = statistics.median(p99(values) for values in found.rounds)
        codes = ", ".join(f"{count} {code}" for code, count in sorted(found.codes.items()))
        print(
            f"{arm.name:>19} | {p50(found.all):12.2f} | {p99(found.all):6.2f} | {tails:20.2f} | "
            f"{found.processor:14.2f} | {codes}"
        )
    for arm, found in measured.items():
        print(
            f"{arm.name:>19} | p99 of each round: {', '.join(f'{p99(r):.1f}' for r in found.rounds)}"
        )
    by_name = {arm.name: found for arm, found in measured.items()}
    for above, below in (
        ("10 x its quota", "its quota"),
        ("10 x its quota", "nothing"),
        ("10 x, no quotas", "nothing, no quotas"),
    ):
        if above not in by_name:
            continue
        first, second = by_name[above], by_name[below]
        rounds = statistics.median(
            p99(one) / p99(other) for one, other in zip(first.rounds, second.rounds, strict=True)
        )
        drawn = sorted(
            p99([v for values in chance.choices(first.rounds, k=len(first.rounds)) for v in values])
            / p99(
                [
                    v
                    for values in chance.choices(second.rounds, k=len(second.rounds))
                    for v in values
                ]
            )
            for _ in range(1000)
        )
        print(
            f"p99, {above} over {below}: {p99(first.all) / p99(second.all):.2f} "
            f"(95 % of resampled rounds: {drawn[25]:.2f} to {drawn[975]:.2f}); "
            f"of the median round {rounds:.2f}"
        )


def main() -> None:
    """Measure, and print."""
    if sys.argv[1:2] == ["--site"]:
        asyncio.run(_Site(*sys.argv[2:]).run())
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quotas",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--quota", type=float, default=50.0, help="packets a second of each site")
    parser.add_argument("--rate", type=float, default=40.0, help="packets a second, quiet site")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each arm in a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--limited", action="store_true", help="leave the server without quotas out"
    )
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"grpcio {grpc.__version__}; a quota of {options.quota:g} packets/s, the quiet site sends "
        f"{options.rate:g}/s"
    )
    arms = [arm for arm in ARMS if arm.limited or not options.limited]
    measured = asyncio.run(
        measure(arms, options.quota, options.rate, options.rounds, options.seconds, options.seed)
    )
    report(measured, random.Random(options.seed))


if __name__ == "__main__":
    main()
