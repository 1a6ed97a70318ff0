"""kill -9 under load: what was acknowledged is there, once, in order, and everybody finds his place again.

A real server process is killed at random moments, in the middle of single Emits, of batches, of releases
and of its own start, and started again on the same data and the same port. Clients send again what was
not acknowledged, and now and then what was. In the end the history that they wrote down is held against
the store's file; see `guarantees`.

FMI_SIGKILL_ROUNDS sets the number of kills; 8 where it is not set.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from guarantees import Answer, History, Store, broken
from server_harness import PRIOR, Client, ccs, eventually, identity, msp, pop, rows, zstd
from server_process import COMMAND, START_S, environment

from fmi.v1 import cohort_pb2, packet_pb2, update_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2

ROUNDS = int(os.environ.get("FMI_SIGKILL_ROUNDS", "8"))

COHORT = "care"
STATUSES = {
    wire_pb2.EMIT_STATUS_ACCEPTED: "accepted",
    wire_pb2.EMIT_STATUS_DUPLICATE: "duplicate",
}
QUICK_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)
CALL_S = 5.0


class Rig:
    """The server process, and the clients' common notebook."""

    def __init__(self, data_dir: Path, seed: int, command: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.target = f"127.0.0.1:{free.getsockname()[1]}"
        self.data_dir = data_dir
        self.log = data_dir.with_name("server.log")
        self.history = History()
        self.chance = random.Random(seed)
        self.up = asyncio.Event()
        self.stopping = asyncio.Event()
        self.kills = 0
        self._command = command
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, *, kill_after_s: float | None = None) -> bool:
        """Start the server and wait until it listens, or kill it while it starts."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                "--listen",
                self.target,
                "--data-dir",
                str(self.data_dir),
                env=environment(),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        line = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_S if kill_after_s is None else kill_after_s):
                line = await self._process.stdout.readline()
        if kill_after_s is not None:
            await self.kill()
            return False
        assert line.startswith(b"listening on "), self.log.read_text()
        self.up.set()
        return True

    async def kill(self) -> None:
        assert self._process is not None
        self.up.clear()
        self._process.send_signal(signal.SIGKILL)
        assert await self._process.wait() == -signal.SIGKILL
        self.kills += 1

    async def end(self) -> None:
        """Let the server end in good order."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(START_S):
                assert await self._process.wait() == 0

    async def abandon(self) -> None:
        """Leave no process behind, whatever happened."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def store(self) -> Store:
        found = rows(self.data_dir, "packets", "updates")
        return Store(
            packets=[(r[0], r[1], r[2], r[-1]) for r in found["packets"]],
            updates=[(r[0], r[1], r[2], r[3], r[-1]) for r in found["updates"]],
        )


class Emitter(ABC):
    """A site that emits as fast as it is answered, and sends again what was not."""

    def __init__(self, rig: Rig, site: str) -> None:
        self._rig = rig
        self._site = site
        self._chance = random.Random(rig.chance.random())
        self._pending: dict[str, packet_pb2.Packet] = {}
        self._acknowledged: list[packet_pb2.Packet] = []

    async def run(self) -> None:
        while not self._rig.stopping.is_set() or self._pending:
            await self._rig.up.wait()
            async with Client(self._rig.target, QUICK_RECONNECT) as client:
                with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
                    await self.emit(client)

    @abstractmethod
    async def emit(self, client: Client) -> None:
        """Emit over one connection, until it breaks or there is nothing left to send."""

    def batch(self, size: int) -> list[packet_pb2.Packet]:
        """What to send next: what waits for its answer, then new packets, then a repeat or two."""
        packets = list(self._pending.values())[:size]
        while len(packets) < size and not self._rig.stopping.is_set():
            packet = self._new()
            self._pending[packet.header.packet_id] = packet
            packets.append(packet)
        if self._acknowledged and self._chance.random() < 0.2:
            packets.append(self._chance.choice(self._acknowledged))
        return packets

    def answered(self, packet: packet_pb2.Packet, status: int, sequence: int = 0) -> None:
        header = packet.header
        key = (header.domain_id, header.packet_id)
        self._rig.history.answers.append(Answer(key, STATUSES[status], sequence))
        if self._pending.pop(header.packet_id, None) is not None:
            self._acknowledged.append(packet)

    def _new(self) -> packet_pb2.Packet:
        kind = self._chance.random()
        if kind < 0.9:
            return msp(self._site, COHORT, controller={"tau": self._chance.random()})
        if kind < 0.95:
            return pop(self._site, COHORT, after={"gain": self._chance.random()})
        return ccs(self._site, COHORT)


class SingleEmitter(Emitter):
    """Emits packet by packet."""

    async def emit(self, client: Client) -> None:
        while packets := self.batch(1):
            for packet in packets:
                request = wire_pb2.EmitRequest(packet=packet)
                response = await client.interchange.Emit(request, timeout=CALL_S)
                (result,) = response.results
                self.answered(packet, result.status, result.sequence)


class StreamEmitter(Emitter):
    """Emits batches on a stream, in envelopes and plain."""

    async def emit(self, client: Client) -> None:
        call = client.interchange.EmitStream()
        while packets := self.batch(self._chance.randint(1, 40)):
            match self._chance.randint(0, 2):
                case 0:
                    batch = packet_pb2.PacketBatch(packets=packets)
                    request = wire_pb2.EmitStreamRequest(packets=batch)
                case 1:
                    request = wire_pb2.EmitStreamRequest(encoded=identity(*packets))
                case _:
                    request = wire_pb2.EmitStreamRequest(encoded=zstd(*packets))
            async with asyncio.timeout(CALL_S):
                await call.write(request)
                answer = await call.read()
            if answer is grpc.aio.EOF:
                return
            assert not answer.HasField("refusal"), answer
            exceptions = {result.index: result for result in answer.exceptions}
            assert answer.accepted + len(exceptions) == answer.packets == len(packets)
            for index, packet in enumerate(packets):
                result = exceptions.get(index)
                if result is None:
                    self.answered(packet, wire_pb2.EMIT_STATUS_ACCEPTED)
                else:
                    self.answered(packet, result.status, result.sequence)
        await call.done_writing()


class Follower:
    """A subscriber to every update, that finds its place again after each kill."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._token = ""
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            await self._rig.up.wait()
            async with Client(self._rig.target, QUICK_RECONNECT) as client:
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    await self._follow(client)
                assert ended.value.code() == grpc.StatusCode.UNAVAILABLE, ended.value

    async def _follow(self, client: Client) -> None:
        request = wire_pb2.SubscribeRequest(
            cohorts=[COHORT], mode=wire_pb2.DELIVERY_MODE_EVERY, resume_token=self._token
        )
        async for event in client.interchange.Subscribe(request):
            self._token = event.resume_token
            match event.WhichOneof("event"):
                case "update":
                    self._rig.history.updates.append(event.update)
                case "snapshot_end":
                    assert not event.snapshot_end.history_changed
                    self.ready.set()
                case other:
                    assert other == "progress", event


async def torment(data_dir: Path, *, rounds: int, seed: int, command: Sequence[str]) -> Rig:
    """Run the load, kill the server again and again, and bring everything to an end."""
    rig = Rig(data_dir, seed, command)
    follower = Follower(rig)
    try:
        await rig.start()
        async with Client(rig.target) as client:
            declared = cohort_pb2.CohortSpec(name=COHORT)
            declared.release.min_interval.FromMilliseconds(30)
            declared.aggregation.vote_min_sites = 3
            declared.retention.updates = 1_000_000
            await client.put_spec(declared)
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(follower.run())
            await follower.ready.wait()
            emitters = [
                tasks.create_task(emitter.run())
                for emitter in (
                    *(SingleEmitter(rig, f"single-{i}") for i in range(3)),
                    *(StreamEmitter(rig, f"stream-{i}") for i in range(2)),
                )
            ]
            for number in range(rounds):
                goal = len(rig.history.answers) + rig.chance.randint(30, 900)
                await eventually(lambda goal=goal: len(rig.history.answers) >= goal)
                await rig.kill()
                if number % 4 == 1:
                    await rig.start(kill_after_s=rig.chance.uniform(0.2, 1.5))
                await rig.start()
            rig.stopping.set()
            async with asyncio.timeout(60):
                await asyncio.gather(*emitters)
            await everything_seen(rig)
            following.cancel()
        await rig.end()
    finally:
        await rig.abandon()
    return rig


async def everything_seen(rig: Rig) -> None:
    """Wait until nothing is left to release and the follower has what was released last."""
    async with Client(rig.target) as client:

        async def quiet() -> bool:
            await client.release(COHORT)
            return not await client.release(COHORT)

        await eventually(quiet)
        last = max(dict((await client.cohorts())[COHORT].revisions).items())
        assert last
        newest = await client.update(COHORT, PRIOR)

        def caught_up() -> bool:
            store = rig.store()
            seen = {u.sequence for u in rig.history.updates}
            return {row[0] for row in store.updates} <= seen and newest.sequence in seen

        with contextlib.suppress(TimeoutError):  # the checker says what is missing
            await eventually(caught_up, 5.0)


@pytest.mark.timeout(60 + 15 * ROUNDS)
async def test_kill_9_under_load_breaks_no_guarantee(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - to run it again
    (tmp_path / "data").mkdir()
    rig = await torment(tmp_path / "data", rounds=ROUNDS, seed=seed, command=COMMAND)

    assert broken(rig.history, rig.store()) == []
    statuses = [answer.status for answer in rig.history.answers]
    assert rig.kills >= ROUNDS
    assert statuses.count("duplicate") >= ROUNDS, "repeats were part of it"
    assert len({u.kind for u in rig.history.updates}) == 4
    log = rig.log.read_text()
    assert "Traceback" not in log, log


@pytest.mark.timeout(90)
async def test_a_server_that_answers_before_it_writes_is_caught(tmp_path):
    """The same load against a server with that fault: the checker must name DURABLE."""
    (tmp_path / "data").mkdir()
    early = (sys.executable, str(Path(__file__).with_name("early_server.py")), "serve")
    rig = await torment(tmp_path / "data", rounds=2, seed=1, command=early)
    assert "DURABLE" in {found.guarantee for found in broken(rig.history, rig.store())}


# The checker itself: each guarantee is broken by hand, and named


def sound() -> tuple[History, Store]:
    packets = [msp(f"s{i}", COHORT, controller={"tau": 0.5}) for i in range(3)]
    keys = [(p.header.domain_id, p.header.packet_id) for p in packets]
    updates = []
    for revision in (1, 2, 3):
        update = update_pb2.Update(cohort=COHORT, kind=PRIOR, revision=revision, sequence=revision)
        estimate = update.prior_update.estimates["tau"]
        estimate.value, estimate.sites = 0.5, 3
        updates.append(update)
    history = History([Answer(key, "accepted", i) for i, key in enumerate(keys, 1)], updates)
    store = Store(
        [
            (i, *key, p.SerializeToString())
            for i, (key, p) in enumerate(zip(keys, packets, strict=True), 1)
        ],
        [(u.sequence, COHORT, PRIOR, u.revision, u.SerializeToString()) for u in updates],
    )
    return history, store


def named(history: History, store: Store) -> set[str]:
    return {found.guarantee for found in broken(history, store)}


def test_a_sound_history_breaks_nothing():
    history, store = sound()
    assert named(history, store) == set()
    repeat = dataclasses.replace(history.answers[1], status="duplicate")
    history.answers.append(repeat)
    assert named(history, store) == set()


def test_a_lost_packet_breaks_durable():
    history, store = sound()
    assert "DURABLE" in named(history, dataclasses.replace(store, packets=store.packets[:2]))


def test_a_packet_at_another_place_breaks_durable():
    history, store = sound()
    moved = [(row[0] + 1, *row[1:]) for row in store.packets]
    assert named(history, dataclasses.replace(store, packets=moved)) == {"DURABLE"}


def test_a_packet_stored_or_accepted_twice_breaks_once():
    history, store = sound()
    twice = [*store.packets, (9, *store.packets[0][1:])]
    assert "ONCE" in named(
        History([a for a in history.answers if a.sequence != 1], history.updates),
        dataclasses.replace(store, packets=twice),
    )
    history.answers.append(history.answers[0])
    assert named(history, store) == {"ONCE"}


def test_an_update_out_of_order_breaks_ordered():
    history, store = sound()
    first, second, third = history.updates
    assert named(History(history.answers, [second, first, third]), store) == {"ORDERED"}


@pytest.mark.parametrize("fault", ["gap", "repeat", "other content", "taken back"])
def test_a_history_that_is_not_the_stores_breaks_resumable(fault):
    history, store = sound()
    first, second, third = history.updates
    other = update_pb2.Update()
    other.CopyFrom(second)
    other.prior_update.confidence = 0.25
    seen = {
        "gap": [first, third],
        "repeat": [first, second, second, third],
        "other content": [first, other, third],
        "taken back": [first, second, third],
    }[fault]
    if fault == "taken back":
        store = dataclasses.replace(store, updates=store.updates[:2])
    assert "RESUMABLE" in named(History(history.answers, seen), store)


def test_a_site_that_does_not_count_breaks_one_vote():
    history, store = sound()
    extra = msp("s9", COHORT, controller={"tau": 0.5})
    uncounted = [*store.packets, (4, "s9", extra.header.packet_id, extra.SerializeToString())]
    assert named(history, dataclasses.replace(store, packets=uncounted)) == {"ONE SITE, ONE VOTE"}
