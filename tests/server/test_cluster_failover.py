"""Servers of a cluster as processes of their own: killed, standing still, restarted one by one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from broker import Broker
from ports import lasting_port
from server_harness import PRIOR, Client, eventually, msp, spec
from server_process import COMMAND, START_S, ServerProcess, started

from fmi.v1 import admin_service_pb2 as admin_pb2
from fmi.v1 import cohort_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2

COHORTS = tuple(f"care-{n}" for n in range(12))
"""So many that hardly ever a server has none of them."""

LEASE_S = 2.0
LONG_S = 120.0
PRIVATE_SERVER = Path(__file__).parents[1] / "robustness" / "private_server.py"

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
async def broker(tmp_path) -> AsyncIterator[Broker]:
    async with Broker(tmp_path / "broker", sync="2m") as started_:
        yield started_


class Member:
    """A server of the cluster, on one port and one folder through all its lives."""

    def __init__(self, broker: Broker, folder: Path, command: Sequence[str] = COMMAND) -> None:
        self.target = f"127.0.0.1:{lasting_port()}"
        self.log: list[str] = []
        self._command = command
        self._flags = (
            *("--listen", self.target, "--data-dir", str(folder), "--lease-s", str(LEASE_S)),
            *("--store", broker.url(), "--drain-s", "2"),
        )
        self._life = contextlib.AsyncExitStack()
        self._process: ServerProcess | None = None

    async def start(self) -> None:
        life = started(*self._flags, command=self._command)
        self._process = await self._life.enter_async_context(life)

    async def end(self, number: signal.Signals) -> int:
        """End it by a signal; return its exit code."""
        assert self._process is not None
        process = self._process.process
        process.send_signal(number)
        async with asyncio.timeout(START_S):
            code = await process.wait()
        await self.close()
        return code

    def tell(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.process.send_signal(number)

    async def close(self) -> None:
        await self._life.aclose()
        if self._process is not None:
            self.log += self._process.err
            self._process = None


@contextlib.asynccontextmanager
async def cluster(
    broker: Broker, folder: Path, size: int, command: Sequence[str] = COMMAND
) -> AsyncIterator[list[Member]]:
    """Servers that are closed at the end; whatever was done to them, none has an error in its log."""
    members = [Member(broker, folder / f"server-{n}", command) for n in range(size)]
    try:
        for member in members:
            await member.start()
        yield members
    finally:
        for member in members:
            await member.close()
    for member in members:
        log = "".join(member.log)
        for word in ("Traceback", "[error", "[critical", "damaged"):
            assert word not in log, log


class Follower:
    """Follows every update, at the first of some servers that takes it, and writes down the revisions."""

    def __init__(self, *targets: str) -> None:
        self.seen: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        self.ready = asyncio.Event()
        self._targets = targets
        self._token = ""

    async def run(self) -> None:
        turn = 0
        while True:
            target = self._targets[turn % len(self._targets)]
            with contextlib.suppress(grpc.aio.AioRpcError):
                async with Client(target) as client:
                    await self._follow(client)
            turn += 1
            await asyncio.sleep(0.05)

    async def _follow(self, client: Client) -> None:
        request = wire_pb2.SubscribeRequest(
            cohorts=["care-*"], mode=wire_pb2.DELIVERY_MODE_EVERY, resume_token=self._token
        )
        async for event in client.interchange.Subscribe(request):
            self._token = event.resume_token or self._token
            self.ready.set()
            if event.HasField("update"):
                self.seen[event.update.cohort, event.update.kind].append(event.update.revision)

    async def moves(self) -> None:
        """Wait until every cohort has released once more, and once again: all servers had their turn."""
        before = {cohort: len(self.seen[cohort, PRIOR]) for cohort in COHORTS}
        await eventually(
            lambda: all(len(self.seen[c, PRIOR]) >= before[c] + 2 for c in COHORTS), LONG_S
        )

    def assert_whole(self) -> None:
        assert self.seen.keys() >= {(cohort, PRIOR) for cohort in COHORTS}
        for key, revisions in self.seen.items():
            assert revisions == list(range(1, len(revisions) + 1)), key


class Sites:
    """Three sites of each cohort, which emit all the while, wherever they find a server."""

    def __init__(self, *targets: str) -> None:
        self.accepted = 0
        self._targets = targets
        self._ended = asyncio.Event()

    async def run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client(t)) for t in self._targets]
            value = 0
            while not self._ended.is_set():
                value += 1
                for cohort in COHORTS:
                    for site in range(3):
                        tau = 0.001 * value + 0.1 * site
                        await self._send(clients, msp(f"s{site}", cohort, controller={"tau": tau}))

    async def _send(self, clients: Sequence[Client], packet) -> None:
        """Send a packet until one of the servers has it."""
        request = wire_pb2.EmitRequest(packet=packet)
        turn = 0
        while True:
            call = clients[turn % len(clients)].interchange.Emit
            with contextlib.suppress(grpc.aio.AioRpcError):
                (result,) = (await call(request, timeout=10.0)).results
                # A duplicate where the answer to the first try was lost.
                assert result.status in (
                    wire_pb2.EMIT_STATUS_ACCEPTED,
                    wire_pb2.EMIT_STATUS_DUPLICATE,
                )
                self.accepted += 1
                return
            turn += 1
            await asyncio.sleep(0.02)

    def end(self) -> None:
        self._ended.set()


@contextlib.asynccontextmanager
async def busy(
    members: Sequence[Member], emit_at: Sequence[Member], *followers: Follower
) -> AsyncIterator[Sites]:
    """Let sites emit and followers follow; in the end all servers have the same, and nothing is missing."""
    async with Client(members[0].target) as client:
        for cohort in COHORTS:
            made = spec(cohort)
            made.release.min_interval.FromMilliseconds(50)
            made.release.max_interval.FromSeconds(1)
            await client.put_spec(made)
    sites = Sites(*(member.target for member in emit_at))
    async with asyncio.TaskGroup() as tasks:
        following = [tasks.create_task(follower.run()) for follower in followers]
        await asyncio.gather(*(follower.ready.wait() for follower in followers))
        emitting = tasks.create_task(sites.run())
        for follower in followers:
            await follower.moves()
        yield sites
        sites.end()
        await emitting
        await eventually(lambda: everywhere_the_same(members, sites.accepted), LONG_S)
        newest = await newest_revisions(members[0])
        for follower in followers:
            await eventually(
                lambda follower=follower: all(
                    len(follower.seen[cohort, PRIOR]) >= newest[cohort] for cohort in COHORTS
                ),
                LONG_S,
            )
            follower.assert_whole()
        for task in following:
            task.cancel()


async def newest_revisions(member: Member) -> dict[str, int]:
    async with Client(member.target) as client:
        return {name: found.revisions["prior"] for name, found in (await client.cohorts()).items()}


async def everywhere_the_same(members: Sequence[Member], accepted: int) -> bool:
    """Say whether every server has every packet once, and the same newest updates."""
    told = []
    for member in members:
        async with Client(member.target) as client:
            if sum(found.packets for found in (await client.cohorts()).values()) != accepted:
                return False
            told.append([await client.update(cohort) for cohort in COHORTS])
            estimates = [update.prior_update.estimates["tau"].sites for update in told[-1]]
            assert estimates == [3] * len(COHORTS)
    return all(each == told[0] for each in told)


async def test_a_server_is_killed_and_comes_back(broker, tmp_path):
    async with cluster(broker, tmp_path, 3) as members:
        stays, also, killed = members
        follower = Follower(also.target, stays.target)
        async with busy(members, [killed, stays], follower):
            assert await killed.end(signal.SIGKILL) == -signal.SIGKILL
            await follower.moves()
            await killed.start()
            await follower.moves()


async def test_a_server_that_stood_still_loses_its_cohorts_and_breaks_nothing(broker, tmp_path):
    async with cluster(broker, tmp_path, 2) as members:
        stands, goes_on = members
        there, here = Follower(stands.target), Follower(goes_on.target)
        async with busy(members, [goes_on], there, here):
            stands.tell(signal.SIGSTOP)
            await here.moves()
            stands.tell(signal.SIGCONT)
            await asyncio.gather(here.moves(), there.moves())


async def test_all_servers_are_restarted_one_after_the_other(broker, tmp_path):
    async with cluster(broker, tmp_path, 2) as members:
        targets = [member.target for member in members]
        follower, reverse = Follower(*targets), Follower(*targets[::-1])
        async with busy(members, members, follower, reverse):
            for member in members:
                assert await member.end(signal.SIGTERM) == 0
                await follower.moves()
                await member.start()
                await reverse.moves()


async def test_noise_is_drawn_and_paid_for_once_for_a_period_whoever_stands_still(broker, tmp_path):
    witness = tmp_path / "witness"
    command = (sys.executable, str(PRIVATE_SERVER), "anywhere", str(witness), "serve")
    private = spec(
        "care-0",
        signals=[
            {"name": "tau", "section": cohort_pb2.SIGNAL_SECTION_CONTROLLER, "lower": 0, "upper": 1}
        ],
        privacy={"dp_noise_sigma": 5.0, "dp_delta": 1e-6, "dp_epochs": 1000},
    )
    private.release.ClearField("min_interval")
    private.release.max_interval.FromMilliseconds(500)

    async def paid(member: Member) -> list[int]:
        async with Client(member.target) as client:
            request = admin_pb2.ListPrivacySpendsRequest(cohort="care-0", page_size=1000)
            spends = (await client.admin.ListPrivacySpends(request, timeout=60)).spends
            return [spend.period_start.ToMicroseconds() for spend in spends if spend.rho > 0]

    async def more(member: Member) -> None:
        before = len(await paid(member))

        async def grown() -> bool:
            return len(await paid(member)) >= before + 3

        await eventually(grown, LONG_S)

    async with cluster(broker, tmp_path, 2, command) as members:
        async with Client(members[0].target) as client:
            await client.put_spec(private)
            await client.emit(
                *(msp(f"s{n}", "care-0", controller={"tau": n / 10}) for n in range(8))
            )
        await more(members[0])
        # Whichever has the cohort is one of them.
        for stands, goes_on in (members, members[::-1]):
            stands.tell(signal.SIGSTOP)
            await more(goes_on)
            stands.tell(signal.SIGCONT)
            await more(stands)
        drawn = witness.stat().st_size  # they go on: what is paid for is read later
        periods = await paid(members[0])
        assert drawn <= len(periods), "more was drawn than paid for"
        assert periods == sorted(set(periods))
        async with Client(members[1].target) as client:
            newest = (await client.update("care-0")).revision
            released = [
                (await client.update("care-0", PRIOR, revision)).released_at.ToMicroseconds()
                for revision in range(1, newest + 1)
            ]
        assert released == sorted(set(released))
        assert newest >= 6
        assert set(released) <= set(await paid(members[1]))
