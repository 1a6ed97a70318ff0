"""Twins of several servers: two clusters live the same life, one with the packets of a site and one without.

Whatever the others see, at a server that follows, at one that takes over and at one that joins, must be the
same, but for when: these servers go by the real clock. The noise is replaced by numbers that do not depend on
who is there, so that what differs leaks. `test_private_twins.py` does it with one service and many lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
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
from cluster_harness import member, owner, shared_out
from server_harness import PRIOR, Client, Refusal, ccs, eventually, msp, pop, spec

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import packet_pb2, registry_service_pb2, update_pb2
from fmi_server.app import RunningServer
from fmi_server.privacy.noisy_means import NoisySums, PrivateSums

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
SPEC.ClearField("release")
SPEC.release.max_interval.FromMilliseconds(400)

BY_CHANCE_OR_CLOCK = ("history_epoch", "resume_token", "request_id", "epsilon_spent")
"""Names of the store's histories and of calls, and how many periods had their release."""

NUMBERS = ("revision", "rev", "sequence", "prior_revision")
"""How many releases there were, which is by the clock too."""


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
    """What the other sites send: of all kinds, one of them late."""
    made = [numbered(msp, first_number + n, f"s{n}", controller={"tau": 0.2 * n}) for n in range(5)]
    made.append(numbered(pop, first_number + 10, "s1"))
    made.append(numbered(ccs, first_number + 11, "s2"))
    made[0].header.emitted_at.seconds -= 30
    return made


def of_victim(first_number: int) -> list[packet_pb2.Packet]:
    """What the site sends that is there or not: extreme, of a class and a regime of its own."""
    made = [
        numbered(msp, first_number, VICTIM, controller={"tau": 1.0, "eta": 1.0}),
        numbered(msp, first_number + 1, VICTIM, controller={"tau": 1.0}, metrics={"gain": -1.0}),
        numbered(pop, first_number + 2, VICTIM),
        numbered(ccs, first_number + 3, VICTIM),
    ]
    for packet in made:
        packet.header.provenance.regime_tag = "rare"
        packet.header.profile_class = "rare"
    return made


async def _two_more_releases(client: Client) -> None:
    """Wait until a server told of two releases more: all that it was sent before is in the second."""

    async def revision() -> int:
        with contextlib.suppress(grpc.aio.AioRpcError):
            return (await client.update("care")).revision
        return 0

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


async def _both(look: Callable[[], Awaitable[Message]]) -> list[bytes]:
    """Look until both of what there is in turns was seen."""
    found: set[bytes] = set()

    async def seen() -> bool:
        found.add(timeless(await look(), but=NUMBERS))
        return len(found) >= 2

    await eventually(seen)
    return sorted(found)


class World:
    """One of the twins.

    Attributes:
        seen: what others than the victim saw, by what they did, in order.
        heard: the updates that each of who subscribed heard, in order.
        sums: the exact sums behind a release when nothing was under way, and the most by which a site may
            move them.
        draws: how many releases were drawn.
    """

    def __init__(self, *, with_victim: bool) -> None:
        self.with_victim = with_victim
        self.seen: list[tuple[str, bytes]] = []
        self.heard: dict[str, list[bytes]] = {}
        self.sums: list[tuple[NoisySums, int]] = []
        self.draws = 0
        self._newest: tuple[NoisySums, int] | None = None

    async def live(self, broker: Broker, folder: Path) -> None:
        async with contextlib.AsyncExitStack() as lives:
            members: dict[RunningServer, contextlib.AsyncExitStack] = {}
            for name in ("a", "b"):
                life = await lives.enter_async_context(contextlib.AsyncExitStack())
                members[await life.enter_async_context(member(broker, folder / name))] = life
            await shared_out(*members)
            releases = owner("care", *members)
            (follows,) = (one for one in members if one is not releases)
            beside = await lives.enter_async_context(Client(follows.target))
            async with Client(releases.target) as there:
                following = [
                    await self._follow(lives, name, client, mode)
                    for name, client in (("there", there), ("beside", beside))
                    for mode in (EVERY, LATEST)
                ]
                await beside.put_spec(SPEC)
                await self._send(0, there, beside)
                await self._look(0, "beside", beside)
                await self._look(0, "there", there)
                await members[releases].aclose()
            await eventually(lambda: follows.service.cluster.partitions.owns("care"))
            await self._send(100, beside, beside)
            await self._look(100, "taken over", beside)
            joins = await lives.enter_async_context(member(broker, folder / "c"))
            await shared_out(follows, joins)
            new = await lives.enter_async_context(Client(joins.target))
            await self._send(200, new, beside)
            await self._look(200, "joined", new)
            await self._look(200, "stayed", beside)
            for task in following:
                task.cancel()

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
            with contextlib.suppress(grpc.aio.AioRpcError):
                while True:
                    event = await events.next()
                    if event.WhichOneof("event") != "progress":
                        heard.append(timeless(event, but=() if mode == EVERY else NUMBERS))

        return asyncio.ensure_future(hear())

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
        for client in (one, other):
            await _two_more_releases(client)
        assert self._newest is not None
        self.sums.append(self._newest)

    async def _look(self, number: int, where: str, client: Client) -> None:
        """See what a server shows of a cohort."""
        for packet in others(number):
            request = registry_service_pb2.ValidatePacketRequest(packet=packet)
            await self._ask(f"validate {where}", client.registry.ValidatePacket(request))
        for kind in update_pb2.UpdateKind.values()[1:]:
            for revision in (1, 2, 3):
                get = wire_pb2.GetUpdateRequest(cohort="care", kind=kind, revision=revision)
                await self._ask(f"get {where}", client.interchange.GetUpdate(get))
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
            refusal = replace(Refusal.read(error), request_id="", trailing_request_id="")
            found = repr(refusal).encode()
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateSums, "noisy", constant)
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
    # What is drawn hangs on it, by no more than is paid for, whoever counted.
    for (with_it, most), (without, _) in zip(one.sums, other.sums, strict=True):
        moved = np.concatenate([with_it.values - without.values, with_it.weights - without.weights])
        assert 0 < sum(step * step for step in moved.tolist()) <= most
