"""Twins of several servers: two clusters live the same life, one with the packets of a site and one without.

Whatever the others see, at a server that follows, at one that takes over and at one that joins, must be the
same, but for when: these servers go by the real clock, and it is only looked at what is due when. The noise
is replaced by numbers that do not depend on who is there, so that what differs leaks. `test_private_twins.py`
does it with one service and many lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import sys
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from broker import Broker
from cluster_harness import heard_of, member, owner, shared_out
from server_harness import PRIOR, Client, Refusal, ccs, eventually, msp, pop, spec

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import packet_pb2, registry_service_pb2, update_pb2
from fmi_server import broker_settings
from fmi_server.app import RunningServer
from fmi_server.config import ServerSettings
from fmi_server.privacy.budget import BudgetPlan
from fmi_server.privacy.noisy_means import NoisySums, PrivateSums
from fmi_server.storage.jetstream_broker import BrokerOptions

VICTIM = "victim"
EVERY, LATEST = wire_pb2.DELIVERY_MODE_EVERY, wire_pb2.DELIVERY_MODE_LATEST

SPEC = spec(
    "care",
    signals=[
        *({"name": name, "section": 2, "lower": 0.0, "upper": 1.0} for name in ("tau", "eta")),
        {"name": "gain", "section": 1, "lower": -2.0, "upper": 2.0},
    ],
    privacy={"dp_epsilon": 5000.0, "dp_delta": 1e-6, "dp_epochs": 1000},
)
PERIOD_MS = 300
SPEC.ClearField("release")
SPEC.release.max_interval.FromMilliseconds(PERIOD_MS)

BY_CHANCE_OR_CLOCK = ("history_epoch", "request_id", "epsilon_spent")
"""Names of the store's histories and of calls, and how many periods had their release."""

NUMBERS = ("revision", "rev", "sequence", "prior_revision", "resume_token")
"""How many releases there were, which is by the clock too."""

NEVER = 10**6
"""A revision that no life comes to."""


def timeless(message: Message, *, but: Collection[str] = ()) -> bytes:
    """The message without what the clock and chance put there, and but for some fields."""
    copy = type(message)()
    copy.CopyFrom(message)
    _clear(copy, {*BY_CHANCE_OR_CLOCK, *but})
    return copy.SerializeToString(deterministic=True)


def _clear(message: Message, names: Collection[str]) -> None:
    for field, value in message.ListFields():
        of_messages = field.message_type is not None
        if field.name in names or isinstance(value, Timestamp):
            message.ClearField(field.name)
        elif field.name == "resume_token":  # the name of the history, and a place
            setattr(message, field.name, value.rpartition(":")[2])
        elif of_messages and hasattr(value, "ListFields"):
            _clear(value, names)
        elif of_messages:
            entries = value.values() if hasattr(value, "values") else value
            for entry in entries:
                if isinstance(entry, Message):
                    _clear(entry, names)


def numbered(make: Any, number: int, site: str, **fields: Any) -> packet_pb2.Packet:
    """A packet with the same id in each world."""
    packet = make(site, "care", **fields)
    packet.header.packet_id = f"{number:08x}-0000-7000-8000-{number:012x}"
    return packet


def others(first_number: int) -> list[packet_pb2.Packet]:
    """What the other sites send: of all kinds, one of them late, one of a class that the victim had first."""
    made = [numbered(msp, first_number + n, f"s{n}", controller={"tau": 0.2 * n}) for n in range(5)]
    made.append(numbered(pop, first_number + 10, "s1"))
    made.append(numbered(ccs, first_number + 11, "s2"))
    made[0].header.emitted_at.seconds -= 30
    if first_number:
        _rare(made[3])
    return made


def of_victim(first_number: int) -> list[packet_pb2.Packet]:
    """What the site sends that is there or not: extreme, of a rare class and regime."""
    made = [
        numbered(msp, first_number, VICTIM, controller={"tau": 1.0, "eta": 1.0}),
        numbered(msp, first_number + 1, VICTIM, controller={"tau": 1.0}, metrics={"gain": -1.0}),
        numbered(pop, first_number + 2, VICTIM),
        numbered(ccs, first_number + 3, VICTIM),
    ]
    for packet in made:
        _rare(packet)
    return made


def _rare(packet: packet_pb2.Packet) -> None:
    packet.header.provenance.regime_tag = packet.header.profile_class = "rare"


def refused(error: grpc.aio.AioRpcError) -> Refusal:
    """What a refusal says, without the name of the call."""
    return replace(Refusal.read(error), request_id="", trailing_request_id="")


async def _two_more_releases(client: Client) -> None:
    """Wait until a server told of two releases more: all that it was sent before is in the second."""

    async def revision() -> int:
        newest = await heard_of(client.update("care"))
        return newest.revision if newest is not None else 0

    before = await revision()

    async def told() -> bool:
        return await revision() >= before + 2

    await eventually(told)


async def _first_prior(client: Client, mode: int) -> update_pb2.Update:
    """The prior that a subscription begins with, or the next one where that is overtaken at once."""
    async with client.subscribed("**", mode=mode) as events:
        while (event := await events.next()).update.kind != PRIOR:
            pass
    return event.update


async def _behind_the_first(client: Client) -> list[bytes]:
    """The updates that a subscription begins with which goes on behind the first one."""
    token = f"{(await client.update('care')).history_epoch}:1"
    async with client.subscribed("**", mode=EVERY, resume_token=token) as events:
        return [timeless(update) for update in await events.updates(4)]


async def _both(look: Callable[[], Awaitable[Message]]) -> list[bytes]:
    """Look until both of what there is in turns was seen."""
    found: set[bytes] = set()

    async def seen() -> bool:
        found.add(timeless(await look(), but=NUMBERS))
        return len(found) >= 2

    await eventually(seen)
    return sorted(found)


@dataclass(frozen=True, slots=True)
class Member:
    """A server, and what ends it."""

    server: RunningServer
    life: contextlib.AsyncExitStack


class World:
    """One of the twins.

    Attributes:
        seen: what others than the victim saw, by what they did, in order.
        heard: the updates that each of who subscribed heard, in order.
        ended: how their subscriptions ended, where the server had time to say so.
        clocked: of each update that was heard, when it was released, in ns, and the epsilon spent by then.
        signs: of each sign of life, whether its token was that of the event before it.
        plan: the budget of the cohort.
        sums: the exact sums behind a release when nothing was under way, and the most by which a site may
            move them.
        draws: how many releases were drawn.
    """

    def __init__(self, *, with_victim: bool) -> None:
        self.with_victim = with_victim
        self.seen: list[tuple[str, bytes]] = []
        self.heard: dict[str, list[bytes]] = {}
        self.ended: dict[str, Refusal] = {}
        self.clocked: list[tuple[int, float]] = []
        self.signs: list[bool] = []
        self.plan: BudgetPlan | None = None
        self.sums: list[tuple[NoisySums, int]] = []
        self.draws = 0
        self._newest: tuple[NoisySums, int] | None = None

    async def live(self, broker: Broker, folder: Path) -> None:
        async with contextlib.AsyncExitStack() as lives:
            first, second = [await self._begin(lives, broker, folder / name) for name in ("a", "b")]
            await shared_out(first.server, second.server)
            if owner("care", first.server, second.server) is second.server:
                first, second = second, first
            async with Client(first.server.target) as there, Client(second.server.target) as beside:
                following = [
                    await self._follow(lives, name, client, mode)
                    for name, client in (("there", there), ("beside", beside))
                    for mode in (EVERY, LATEST)
                ]
                await beside.put_spec(SPEC)
                await self._send(0, there, beside)
                await self._look(0, "beside", beside)
                await self._look(0, "there", there)
                await self._releases(first.server)
                await first.life.aclose()
                await self._releases(second.server)
                await self._send(100, beside, beside)
                await self._look(100, "taken over", beside)
                await self._releases(second.server)
                # Who joins begins with a snapshot, of what is left of the packets.
                compacted = await second.server.service.compactor.compact("care")
                assert compacted.retired > 0
                assert await second.server.service.store.shorten_log() > 0
                third = await self._begin(lives, broker, folder / "c")
                await shared_out(second.server, third.server)
                async with Client(third.server.target) as new:
                    await self._send(200, new, beside)
                    await self._look(200, "joined", new)
                    await self._look(200, "stayed", beside)
                    await second.life.aclose()
                    await self._releases(third.server)
                    await self._send(300, new, new)
                    await self._look(300, "alone", new)
                    self.plan = third.server.service.cohorts.rules("care").privacy
                await asyncio.gather(*following)

    async def _begin(
        self, lives: contextlib.AsyncExitStack, broker: Broker, folder: Path
    ) -> Member:
        life = await lives.enter_async_context(contextlib.AsyncExitStack())
        server = await life.enter_async_context(member(broker, folder, progress_interval_s=1.0))
        return Member(server, life)

    async def _releases(self, server: RunningServer) -> None:
        """Wait until a server is the one that releases, whenever a period begins and not later."""
        releaser, period_us = server.service.releaser, PERIOD_MS * 1000

        def due() -> bool:
            total = releaser.private.totals.get("care")
            coming_us = (total.last_period // period_us + 1) * period_us if total else 0
            return releaser._due().get("care") == coming_us / 1e6

        await eventually(due)

    def drawn(self, sums: NoisySums, most: int) -> None:
        self._newest = (sums, most)
        self.draws += 1

    async def _follow(
        self, lives: contextlib.AsyncExitStack, name: str, client: Client, mode: int
    ) -> asyncio.Task[None]:
        events = await lives.enter_async_context(client.subscribed("**", mode=mode))
        assert await events.snapshot() == []
        heard = self.heard.setdefault(f"{name} {mode}", [])

        async def hear() -> None:
            token = ""
            try:
                while True:
                    event = await events.next()
                    if event.HasField("progress"):
                        self.signs.append(event.resume_token == (token or event.resume_token))
                    elif event.HasField("update"):
                        heard.append(timeless(event, but=() if mode == EVERY else NUMBERS))
                        self._note(event.update)
                    else:  # what is left out for newer ones is by the clock
                        assert event.HasField("lagged"), event
                        assert mode == LATEST, event
                    token = event.resume_token
            except grpc.aio.AioRpcError as error:
                end = replace(refused(error), retry_s=None)  # which is by chance
                if end.reason:
                    self.ended[f"{name} {mode}"] = end

        return asyncio.ensure_future(hear())

    def _note(self, update: update_pb2.Update) -> None:
        """Note what an update tells of the clock."""
        bodies = [update.prior_update, *update.warm_start.profiles]
        (spent,) = {body.lineage.epsilon_spent for body in bodies if body.HasField("lineage")}
        self.clocked.append((update.released_at.ToNanoseconds(), spent))

    async def _send(self, number: int, one: Client, other: Client) -> None:
        """Send what sites send, to either server, and some of it again."""
        sent = others(number)
        for packets in (sent, sent, others(number), of_victim(number + 50)):
            for n, packet in enumerate(packets):
                client = (one, other)[n % 2]
                if packet.header.domain_id != VICTIM:
                    request = wire_pb2.EmitRequest(packet=packet)
                    await self._ask("emit", client.interchange.Emit(request))
                elif self.with_victim:
                    (result,) = await client.emit(packet)
                    assert result.status == wire_pb2.EMIT_STATUS_ACCEPTED
        batch = packet_pb2.PacketBatch(packets=[*sent, *others(number)])
        (answer,) = await other.batches(wire_pb2.EmitStreamRequest(batch_id=1, packets=batch))
        self.seen.append(("batch", timeless(answer)))
        for client in dict.fromkeys((one, other)):
            await _two_more_releases(client)
        assert self._newest is not None
        self.sums.append(self._newest)

    async def _look(self, number: int, where: str, client: Client) -> None:
        """See what a server shows of a cohort."""
        for packet in others(number):
            request = registry_service_pb2.ValidatePacketRequest(packet=packet)
            await self._ask(f"validate {where}", client.registry.ValidatePacket(request))
        for kind in update_pb2.UpdateKind.values()[1:]:
            for revision in (1, 2, 3, NEVER):
                get = wire_pb2.GetUpdateRequest(cohort="care", kind=kind, revision=revision)
                await self._ask(f"get {where}", client.interchange.GetUpdate(get))
        self.seen.extend((f"resumed {where}", one) for one in await _behind_the_first(client))
        spec_of = registry_service_pb2.GetCohortSpecRequest(cohort="care")
        await self._ask(f"spec {where}", client.registry.GetCohortSpec(spec_of))
        looks: list[tuple[str, Callable[[], Awaitable[Message]]]] = [
            (f"begins {mode} {where}", partial(_first_prior, client, mode))
            for mode in (EVERY, LATEST)
        ]
        for profile_class, regime in itertools.product(("", "rare"), repeat=2):
            wanted = wire_pb2.GetWarmStartRequest(
                cohort="care", profile_class=profile_class, regime_tag=regime
            )
            looks.append((f"warm start {where}", partial(client.interchange.GetWarmStart, wanted)))
        found = await asyncio.gather(*(_both(look) for _, look in looks))
        self.seen.extend(
            (what, one) for (what, _), both in zip(looks, found, strict=True) for one in both
        )

    async def _ask(self, what: str, call: Awaitable[Message]) -> None:
        try:
            found = timeless(await call)
        except grpc.aio.AioRpcError as error:
            found = repr(refused(error)).encode()
        self.seen.append((what, found))


async def lived(folder: Path, *, with_victim: bool) -> World:
    """Live a life at a broker of its own."""
    world = World(with_victim=with_victim)

    def constant(self: PrivateSums, exact: NoisySums, _entropy: object = None) -> NoisySums:
        world.drawn(exact, self.sensitivity_squared)
        # One of two, in turns: what was told last is not told again, so that each release has its own, also
        # behind one that was paid for and went with its server.
        share = 7 + world.draws % 2
        return NoisySums(
            np.full_like(exact.values, share * self.value_bound),
            np.full_like(exact.weights, 40 * self.weight_bound),
        )

    options = broker_settings.broker_options

    def short(settings: ServerSettings) -> BrokerOptions:
        return replace(options(settings), kept_entries=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateSums, "noisy", constant)
        patch.setattr(broker_settings, "broker_options", short)
        async with Broker(folder / "broker", sync="2m") as broker:
            await world.live(broker, folder)
    return world


async def test_nobody_sees_at_any_server_whether_a_site_was_there(tmp_path):
    one, other = [await lived(tmp_path / str(who), with_victim=who) for who in (True, False)]
    for with_it, without in zip(one.seen, other.seen, strict=True):
        assert with_it == without
    for name, heard in one.heard.items():
        assert len(heard) >= 3
        if name.endswith(f" {EVERY}"):
            for with_it, without in zip(heard, other.heard[name], strict=False):
                assert with_it == without
        else:  # which of them are left out for newer ones is by the clock
            assert set(heard) == set(other.heard[name])
    for name in one.ended.keys() & other.ended.keys():
        assert one.ended[name] == other.ended[name]
    for world in (one, other):
        assert world.signs
        assert all(world.signs)
        _by_the_clock_alone(world)
    # What is drawn hangs on it, by no more than is paid for, whoever counted.
    for (with_it, most), (without, _) in zip(one.sums, other.sums, strict=True):
        moved = np.concatenate([with_it.values - without.values, with_it.weights - without.weights])
        assert 0 < sum(step * step for step in moved.tolist()) <= most


def _by_the_clock_alone(world: World) -> None:
    """Each release is told as of the beginning of a period, and as paid for."""
    assert world.plan is not None
    # Of a server that goes, releases may be paid for that are never drawn.
    paid = [world.plan.spent(releases) for releases in range(1, world.draws + 10)]
    period_ns = PERIOD_MS * 10**6
    for at_ns, spent in world.clocked:
        past_ns = at_ns % period_ns
        assert min(past_ns, period_ns - past_ns) < 1000  # rounded to microseconds and less
        assert any(math.isclose(spent, some, rel_tol=1e-9) for some in paid)
