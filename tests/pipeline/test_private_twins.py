"""Twins: two services live the same life, one with the packets of a site and one without.

Whatever the other sites and the subscribers see must be the same byte for byte, from the moment at which the
cohort is private. The noise is replaced by numbers that do not depend on who is there, so that what differs
leaks. Time moves with each look at the clock, as it does where computing takes time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from parts import NOW, ccs, msp, packet_id, pop

from fmi.v1 import cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import registry_service_pb2 as registry_pb2
from fmi_server.access import TRUSTED
from fmi_server.cohorts import DAY_S
from fmi_server.counted_time import NewestSignals
from fmi_server.errors import FMIError, SpecChangeUnsafeError
from fmi_server.feed_requests import kind_name
from fmi_server.privacy.noisy_means import NoisySums, PrivateSums
from fmi_server.service import FMIService
from fmi_server.storage import MemoryStore
from fmi_server.transport.identity import Caller
from fmi_server.transport.interchange import InterchangeServicer
from fmi_server.transport.registry import RegistryServicer
from fmi_server.transport.requests import (
    RawEmitStreamRequest,
    read_emit,
    read_emit_stream,
    read_validate_packet,
)
from fmi_server.transport.status import status_message

START = NOW // DAY_S * DAY_S + 3600.0
NOBODY = Caller(TRUSTED)
"""Who calls a server that authenticates nobody."""

VICTIM = "victim"
OTHERS = ("a", "b", "c")
LOOK_S = 0.001
STEP_S = 1.0
MINUTE_S = 60.0
LATEST, EVERY = wire_pb2.DELIVERY_MODE_LATEST, wire_pb2.DELIVERY_MODE_EVERY


class MovingClock:
    """A clock that moves with each look.

    Each task has looks of its own: who looks in between is left to chance, and no doing of the service's.
    """

    def __init__(self) -> None:
        self.now = START

    @property
    def now(self) -> float:
        """When the present step began."""
        return self._now

    @now.setter
    def now(self, now: float) -> None:
        self._now = now
        self._looks: Counter[asyncio.Task[Any] | None] = Counter()

    def __call__(self) -> float:
        task = asyncio.current_task()
        self._looks[task] += 1
        return self._now + self._looks[task] * LOOK_S


class LastingStore(MemoryStore):
    """Outlives its server, and has the same name in each world."""

    async def open(self) -> None:
        await super().open()
        self._epoch = "0" * 32

    async def close(self) -> None:
        """Keep everything."""


# What happens


@dataclass(frozen=True)
class Packet:
    """A packet that a site sends, or asks about; its time is relative to the moment at which it does."""

    site: str
    kind: str = "msp"
    at_s: float = 0.0
    cohort: str = "care"
    more: Mapping[str, Any] = field(default_factory=dict)

    def typed(self, number: int, now: float) -> packet_pb2.Packet:
        make = {"msp": msp, "pop": pop, "ccs": ccs}[self.kind]
        header = {"at": now + self.at_s, "cohort": self.cohort, "packet_id": packet_id(number)}
        return make(self.site, **header, **self.more)


@dataclass(frozen=True)
class Emit:
    packet: Packet


@dataclass(frozen=True)
class EmitTogether:
    """A batch, of one of the others: a site sends its own packets."""

    packets: tuple[Packet, ...]


@dataclass(frozen=True)
class EmitAgain:
    """Send again what was sent before, so many packets ago."""

    ago: int


@dataclass(frozen=True)
class Validate:
    packet: Packet


@dataclass(frozen=True)
class Wait:
    """Let days pass, and the server do what it does in an hour: let values go, compact."""

    days: float
    tidied: bool = False


@dataclass(frozen=True)
class Compact:
    pass


@dataclass(frozen=True)
class Sweep:
    pass


@dataclass(frozen=True)
class Restart:
    pass


@dataclass(frozen=True)
class PutSpec:
    """Change the spec.

    Attributes:
        silent: Whether the cohort releases nothing as long as it is public: that would stay served.
    """

    max_age_d: float = 20.0
    packets_d: float = 1.0
    site_ttl_d: float = 10.0
    period_d: float = 1.0
    epochs: int = 40
    min_sites: int = 1
    more_signals: int = 0
    estimator: str = "mean"
    clip_norm: float | None = None
    min_trust: float = 0.0
    silent: bool = True

    def message(self, *, private: bool) -> cohort_pb2.CohortSpec:
        days = {
            "ingest.maxAge": self.max_age_d,
            "retention.packets": self.packets_d,
            "retention.siteTtl": self.site_ttl_d,
            "policy.window": self.site_ttl_d,
        }
        names = ["tau", *(f"more_{i}" for i in range(self.more_signals))]
        bounds = {"lower": 0.0, "upper": 1.0}
        spec: dict[str, Any] = {
            "name": "care",
            "signals": [
                *({"name": n, "section": "SIGNAL_SECTION_CONTROLLER", **bounds} for n in names),
                {"name": "gain", "section": "SIGNAL_SECTION_METRICS", "lower": -1.0, "upper": 1.0},
            ],
            "ingest": {"minTrust": self.min_trust},
            "policy": {},
            "retention": {},
            "aggregation": {"metricsAggregation": self.estimator, "voteMinSites": self.min_sites},
        }
        for path, value in days.items():
            part, name = path.split(".")
            spec[part][name] = f"{value * DAY_S:.0f}s"
        if private:
            spec["release"] = {"maxInterval": f"{self.period_d * DAY_S:.0f}s"}
            spec["privacy"] = {"dpEpsilon": 40.0, "dpDelta": 1e-6, "dpEpochs": self.epochs}
            if self.clip_norm is not None:
                spec["privacy"]["dpClipNorm"] = self.clip_norm
        elif self.silent:
            spec["release"] = {"maxInterval": f"{10_000 * DAY_S:.0f}s"}
            spec["aggregation"]["voteMinSites"] = 1_000
        return json_format.ParseDict(spec, cohort_pb2.CohortSpec())


@dataclass(frozen=True)
class AskWarmStart:
    profile_class: str = ""
    regime: str = ""
    concepts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AskUpdate:
    kind: int
    revision: int


@dataclass(frozen=True)
class Subscribe:
    """Read what a new subscription begins with, behind the last token or not."""

    mode: int
    resume: bool


Step = (
    Emit | EmitTogether | EmitAgain | Validate | Wait | Compact | Sweep | Restart | PutSpec
    | AskWarmStart | AskUpdate | Subscribe
)  # fmt: skip


# A world


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the service has no event for it
            await asyncio.sleep(LOOK_S)


class Follower:
    """A subscription that stays open as long as its server.

    Attributes:
        heard: the sequence of the newest update; -1 until the snapshot is complete.
    """

    def __init__(self, wire: InterchangeServicer, mode: int) -> None:
        self.mode = mode
        self.heard = -1
        self._wire = wire
        self._events: list[wire_pb2.SubscribeResponse] = []

    async def __aenter__(self) -> Self:
        self._task = asyncio.ensure_future(self._read())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _read(self) -> None:
        newest = 0
        request = wire_pb2.SubscribeRequest(cohorts=["**"], mode=self.mode)
        async for raw in self._wire.Subscribe(request, NOBODY):
            response = wire_pb2.SubscribeResponse.FromString(raw)
            self._events.append(response)
            newest = max(newest, response.update.sequence)
            if self.heard >= 0 or response.HasField("snapshot_end"):
                self.heard = newest

    def take(self) -> list[wire_pb2.SubscribeResponse]:
        """Return what was heard since the last time."""
        taken, self._events = self._events, []
        return taken


class World:
    """One of the twins.

    Attributes:
        seen: what others than the victim saw since the cohort is private: by what they did, in order.
        sums: the exact sums behind each release, and the most by which one site may move them.
    """

    def __init__(self, *, with_victim: bool, private: bool) -> None:
        self.with_victim = with_victim
        self.private = private
        self.clock = MovingClock()
        self.seen: list[tuple[str, bytes]] = []
        self.sums: list[tuple[NoisySums, int]] = []
        self._base = START
        self._store = LastingStore()
        self._sent: list[packet_pb2.Packet] = []
        self._token = ""
        self._lives = contextlib.AsyncExitStack()

    async def live(self, spec: PutSpec | None, steps: list[Step]) -> None:
        await self._begin()
        try:
            if spec is not None:
                await self.put_spec(spec, private=self.private)
            town = {"name": "town", "release": {"maxInterval": "864000000s"}}
            town |= {"aggregation": {"voteMinSites": 1000}}
            message = json_format.ParseDict(town, cohort_pb2.CohortSpec())
            await self.service.put_cohort_spec(message)
            for number, step in enumerate(steps):
                self._base += STEP_S
                self.clock.now = self._base
                await self._take(number, step)
            await self._settle()
        finally:
            await self._lives.aclose()

    async def put_spec(self, spec: PutSpec, *, private: bool) -> None:
        # By force a change may tell more than was promised, so none is forced.
        with contextlib.suppress(SpecChangeUnsafeError):
            await self.service.put_cohort_spec(spec.message(private=private))
        self.private = self.service.cohorts.rules("care").privacy is not None
        await self._settle()

    async def _begin(self) -> None:
        self.service = FMIService(store=self._store, clock=self.clock)
        self._wire = InterchangeServicer(self.service)
        self._registry = RegistryServicer(self.service, version="twin")
        await self._lives.enter_async_context(self.service)
        self._followers = [Follower(self._wire, mode) for mode in (LATEST, EVERY)]
        for follower in self._followers:
            await self._lives.enter_async_context(follower)
        await self._settle()

    async def _take(self, number: int, step: Step) -> None:
        await (self._send(number, step) or self._ask_for(number, step) or self._operate(step))
        asked = registry_pb2.GetCohortSpecRequest(cohort="care")
        await self._ask("spec", self._registry.GetCohortSpec(asked, NOBODY))

    def _send(self, number: int, step: Step) -> Coroutine[Any, Any, None] | None:
        match step:
            case Emit(packet):
                return self._emit(packet.typed(number, self._base))
            case EmitTogether(packets):
                numbered = enumerate(packets, start=1000 * (number + 1))
                return self._emit_batch([p.typed(i, self._base) for i, p in numbered])
            case EmitAgain(ago) if len(self._sent) > ago:
                return self._emit(self._sent[-1 - ago])
        return None

    def _ask_for(self, number: int, step: Step) -> Coroutine[Any, Any, None] | None:
        match step:
            case Validate(packet):
                check = registry_pb2.ValidatePacketRequest(packet=packet.typed(number, self._base))
                asked = read_validate_packet(check.SerializeToString())
                return self._ask("validate", self._registry.ValidatePacket(asked, NOBODY))
            case AskWarmStart(profile_class, regime, concepts):
                wanted = wire_pb2.GetWarmStartRequest(
                    cohort="care", profile_class=profile_class, regime_tag=regime, concepts=concepts
                )
                return self._ask("warm start", self._wire.GetWarmStart(wanted, NOBODY))
            case AskUpdate(kind, revision):
                one = wire_pb2.GetUpdateRequest(cohort="care", kind=kind, revision=revision)
                return self._ask(f"get {kind_name(kind)}", self._wire.GetUpdate(one, NOBODY))
            case Subscribe(mode, resume):
                return self._subscribe(mode, self._token if resume else "")
        return None

    async def _operate(self, step: Step) -> None:
        match step:
            case Wait(days, tidied):
                self._base += days * DAY_S
                self.clock.now = self._base
                await self._settle()
                if tidied:
                    await self._operate(Compact())
                    await self._operate(Sweep())
            case Compact():
                await self.service.compactor.compact("care")
            case Sweep():
                await self.service.releaser._expire("care")
            case Restart():
                await self._lives.aclose()
                await self._begin()
            case PutSpec():
                await self.put_spec(step, private=True)

    async def _emit(self, packet: packet_pb2.Packet) -> None:
        self._sent.append(packet)
        sent = wire_pb2.EmitRequest(packet=packet).SerializeToString()
        call = self._wire.Emit(read_emit(sent), NOBODY)
        if packet.header.domain_id != VICTIM:
            await self._ask(f"emit {packet.WhichOneof('body')}", call)
        elif self.with_victim:
            with contextlib.suppress(FMIError):
                await call
        else:
            call.close()

    async def _emit_batch(self, packets: list[packet_pb2.Packet]) -> None:
        request = wire_pb2.EmitStreamRequest(batch_id=1)
        request.packets.packets.extend(packets)

        async def requests() -> AsyncIterator[RawEmitStreamRequest]:
            yield read_emit_stream(request.SerializeToString())

        async for response in self._wire.EmitStream(requests(), NOBODY):
            self._saw("batch", response)

    async def _subscribe(self, mode: int, token: str) -> None:
        request = wire_pb2.SubscribeRequest(cohorts=["**"], mode=mode, resume_token=token)
        events = self._wire.Subscribe(request, NOBODY)
        async with contextlib.aclosing(events):
            async for raw in events:
                response = wire_pb2.SubscribeResponse.FromString(raw)
                self._saw(f"snapshot of {mode}", response)
                self._token = response.resume_token or self._token
                if response.HasField("snapshot_end"):
                    return

    async def _ask(self, what: str, call: Any) -> None:
        try:
            self._saw(what, await call)
        except FMIError as error:
            self._saw(what, status_message(error, request_id="twin"))

    def _saw(self, what: str, message: Message) -> None:
        if self.private:
            self.seen.append((what, message.SerializeToString(deterministic=True)))

    async def _settle(self) -> None:
        """Wait until everything that is due is released, and told to those who follow."""
        releaser, log = self.service.releaser, self.service.releaser.publisher.log

        def quiet() -> bool:
            releaser._wake.set()
            due = releaser._due().values()
            return not releaser._releasing and all(at > self.clock.now for at in due)

        await until(quiet)
        await until(lambda: all(one.heard >= log.head for one in self._followers))
        for follower in self._followers:
            for response in follower.take():
                self._saw(f"follow {follower.mode}", response)


async def lived(
    spec: PutSpec | None, steps: list[Step], *, with_victim: bool, private: bool = True
) -> World:
    """Live a life."""
    world = World(with_victim=with_victim, private=private)

    def constant(self: PrivateSums, exact: NoisySums, _entropy: object = None) -> NoisySums:
        world.sums.append((exact, self.sensitivity_squared))
        # Another one in each release, so that each has something new to say.
        share = 7 + len(world.sums) % 5
        return NoisySums(
            np.full_like(exact.values, share * self.value_bound),
            np.full_like(exact.weights, 40 * self.weight_bound),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateSums, "noisy", constant)
        # Room for the newest signals of two sites, where a server has it for very many.
        patch.setitem(NewestSignals.__init__.__kwdefaults__, "max_sites", 2)
        await world.live(spec, steps)
    return world


async def compare(spec: PutSpec | None, steps: list[Step], *, private: bool = True) -> list[str]:
    """Live a life in both worlds, and compare; return what was seen in either."""
    one, other = [
        await lived(spec, steps, with_victim=who, private=private) for who in (True, False)
    ]
    for with_it, without in zip(one.seen, other.seen, strict=True):
        assert with_it == without
    for (with_it, most), (without, _) in zip(one.sums, other.sums, strict=True):
        moved = np.concatenate([with_it.values - without.values, with_it.weights - without.weights])
        assert sum(step * step for step in moved.tolist()) <= most
    return [what for what, _ in one.seen]


# Whole lives

SHARES = st.floats(0.0, 1.0)
TIMES_S = [
    *([0.0] * 6),
    *(-5.0, -MINUTE_S, -MINUTE_S, 30.0, 250.0, 900.0),
    *(days * DAY_S for days in (-0.5, -1.5, -1.5, -4.0, -9.0, -40.0)),
]
SITES = st.sampled_from([*OTHERS, VICTIM, VICTIM])


@st.composite
def packets(draw: st.DrawFn, sites: st.SearchStrategy[str] = SITES) -> Packet:
    more: dict[str, Any] = {
        "profile_class": draw(st.sampled_from(["", "", "big", "rare"])),
        "regime": draw(st.sampled_from(["", "", "north", "rare"])),
    }
    kind = draw(st.sampled_from(["msp", "msp", "msp", "pop", "ccs"]))
    if kind == "pop":
        more |= {"bundle": {"step": draw(SHARES)}, "before": {"gain": 0.1}}
        more |= {"after": {"gain": draw(SHARES)}}
    elif kind == "ccs":
        more |= {"pairs": (("x", "y", draw(SHARES)),), "concepts": {"drift": draw(SHARES)}}
        more |= {"trust": draw(st.none() | SHARES)}
    else:
        more |= {"confidence": draw(st.none() | SHARES)}
        more |= {"controller": {"tau": draw(SHARES)}}
        if draw(st.booleans()):
            more |= {"metrics": {"gain": draw(st.floats(-1.2, 1.2))}}  # beyond the bounds too
        if draw(st.integers(0, 7)) == 7:
            more["controller"] |= {"more_0": draw(SHARES)}
    at_s = draw(st.sampled_from(TIMES_S))
    site = draw(sites)
    # What it says in public is public.
    in_town = site != VICTIM and draw(st.integers(0, 4)) == 4
    return Packet(site, kind, at_s, "town" if in_town else "care", more)


SPECS = st.builds(
    PutSpec,
    max_age_d=st.sampled_from([1.0, 1.0, 60.0]),
    packets_d=st.sampled_from([0.5, 0.5, 5.0]),
    site_ttl_d=st.sampled_from([1.0, 10.0, 10.0, 60.0]),
    period_d=st.sampled_from([0.5, 1.0, 1.0, 7.0]),
    epochs=st.sampled_from([3, 40, 60]),
    min_sites=st.sampled_from([1, 3]),
    more_signals=st.integers(0, 2),
    estimator=st.sampled_from(["mean", "weighted_mean"]),
    clip_norm=st.sampled_from([None, 0.8]),
    min_trust=st.sampled_from([0.0, 0.5]),
)
KINDS = st.sampled_from([1, 2, 3, 4])
EMITS = st.builds(Emit, packets())
WAITS = st.builds(Wait, st.sampled_from([0.01, 0.6, 1.0, 3.0, 5.0, 12.0]), st.booleans())
TOGETHER = st.builds(
    EmitTogether,
    st.sampled_from(OTHERS).flatmap(
        lambda site: st.lists(packets(st.just(site)), min_size=1, max_size=4).map(tuple)
    ),
)
WARM_STARTS = st.builds(
    AskWarmStart,
    st.sampled_from(["", "big", "rare"]),
    st.sampled_from(["", "north", "rare"]),
    st.sampled_from([{}, {"drift": 0.3}]),
)
# Drawn by place, since of equal strategies side by side one would count.
STEPS: st.SearchStrategy[Step] = st.sampled_from(
    [
        *([EMITS] * 14),
        *([WAITS] * 4),
        *([SPECS] * 2),
        TOGETHER,
        WARM_STARTS,
        st.builds(EmitAgain, st.integers(0, 8)),
        st.builds(Validate, packets(st.sampled_from(OTHERS))),
        st.just(Compact()),
        st.just(Sweep()),
        st.just(Restart()),
        st.builds(AskUpdate, KINDS, st.integers(0, 4)),
        st.builds(Subscribe, st.sampled_from([LATEST, EVERY]), st.booleans()),
    ]
).flatmap(lambda steps: steps)


@given(
    st.none() | st.tuples(SPECS, st.lists(STEPS, max_size=12)),
    SPECS,
    st.lists(STEPS, min_size=15, max_size=40),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
async def test_nobody_sees_whether_a_site_was_there(past, spec, steps):
    """Also where the cohort was public first, and released nothing in that time."""
    first = spec
    if past is not None:
        first, before = past
        steps = [*(step for step in before if not isinstance(step, PutSpec)), spec, *steps]
    seen = await compare(first, steps, private=past is None)
    for what in dict.fromkeys(seen):
        event(what)


# Lives in which something was seen once


def signals(site: str, **more: Any) -> Emit:
    return Emit(Packet(site, more={"controller": {"tau": 0.3}}, **more))


async def test_who_is_remembered_does_not_hang_on_who_else_sends():
    """Room for the times of the newest signals is shared, so that one site may push another's out."""
    old = signals("a", at_s=-MINUTE_S)
    await compare(PutSpec(), [signals("a"), signals("b"), signals(VICTIM), old])
    await compare(PutSpec(), [signals("a"), signals(VICTIM), signals("b"), old, Restart(), old])


async def test_nor_on_who_sent_before_the_cohort_was_private():
    in_town = signals("a", cohort="town")
    old = signals("a", cohort="town", at_s=-MINUTE_S)
    steps = [in_town, signals("b", cohort="town"), signals(VICTIM), PutSpec(), old]
    await compare(PutSpec(), steps, private=False)


@pytest.mark.parametrize("private", [True, False], ids=["private before", "public before"])
@pytest.mark.parametrize("restarts", [False, True], ids=["", "restarted"])
async def test_what_is_forgotten_does_not_hang_on_whose_it_was(restarts, private):
    """A packet of a time of which something was deleted is refused, as it could be a repeat."""
    later = [Restart()] if restarts else []
    old = [
        Packet("a", at_s=-days * DAY_S, more={"controller": {"tau": 0.3}}) for days in (1.5, 4, 15)
    ]
    await compare(
        PutSpec(max_age_d=1.0, packets_d=0.5),
        [
            signals(VICTIM),
            signals(VICTIM),
            Wait(5.0),
            Compact(),
            *later,
            PutSpec(max_age_d=60.0),
            *(Validate(packet) for packet in old),
            *(Emit(packet) for packet in old),
        ],
        private=private,
    )


async def test_nor_on_whose_it_was_in_a_cohort_that_was_open():
    old = [Packet("a", at_s=-days * DAY_S, more={"controller": {"tau": 0.3}}) for days in (7.5, 9)]
    seen = await compare(
        None,
        [
            signals("b"),  # so that the cohort is open with the victim and without
            signals(VICTIM),
            signals(VICTIM),
            Wait(8.0),
            Compact(),
            PutSpec(max_age_d=60.0),
            *(Validate(packet) for packet in old),
        ],
        private=False,
    )
    assert "validate" in seen or not seen


async def test_a_public_past_does_not_show():
    steps = [
        *(signals(site) for site in (*OTHERS, VICTIM)),
        Emit(Packet(VICTIM, "pop", more={"before": {"gain": 0.1}, "after": {"gain": 0.4}})),
        AskWarmStart("rare", "north"),
        PutSpec(),
        AskWarmStart("rare", "north", {"drift": 0.3}),
        signals("a"),
        Wait(1.0),
        Subscribe(EVERY, resume=False),
        Restart(),
        Wait(1.0),
        Subscribe(EVERY, resume=True),
        *(AskUpdate(kind, revision) for kind in (1, 2, 3, 4) for revision in (0, 1, 2)),
    ]
    seen = await compare(PutSpec(), steps, private=False)
    assert {"emit msp", "warm start", "get prior", "snapshot of 2", "follow 1"} <= set(seen)


async def test_the_places_of_packets_are_told_in_no_cohort():
    town = signals("a", cohort="town")
    await compare(PutSpec(), [town, signals(VICTIM), town, EmitAgain(0), signals("b")])


# What is drawn is paid for


CHANGES = {
    "fewer releases": PutSpec(epochs=3),
    "a signal more": PutSpec(more_signals=1),
    "longer periods": PutSpec(period_d=7.0),
    "a norm for vectors": PutSpec(clip_norm=0.5),
}


@pytest.fixture
def draws(monkeypatch) -> list[float]:
    """What each draw of noise costs, by the mechanism that draws."""
    costs: list[float] = []
    noisy = PrivateSums.noisy

    def counted(self, *args):
        costs.append(float(self.rho))
        return noisy(self, *args)

    monkeypatch.setattr(PrivateSums, "noisy", counted)
    return costs


@dataclass(frozen=True)
class Held:
    """A world in which somebody holds the lock of the cohort."""

    world: World
    lock: asyncio.Lock

    async def wait_for(self, waiters: int) -> None:
        """Wait until so many wait for the lock."""
        await until(lambda: len(self.lock._waiters or ()) >= waiters)

    async def change(self, then: PutSpec) -> asyncio.Task[Any]:
        """Begin to put another spec in force, as far as the lock lets it."""
        before = len(self.lock._waiters or ())
        message = then.message(private=True)
        put = self.world.service.put_cohort_spec(message, force=True)
        changing = asyncio.ensure_future(put)
        await self.wait_for(before + 1)
        return changing


@contextlib.asynccontextmanager
async def held(*, private: bool) -> AsyncIterator[Held]:
    """Hold the lock of a cohort with some sites until the context is left; then let all who wait have it."""
    world = World(with_victim=False, private=private)
    await world._begin()
    try:
        await world.put_spec(PutSpec(silent=False), private=private)
        for number, site in enumerate(OTHERS):
            await world._emit(signals(site).packet.typed(number, START))
        await world._settle()
        lock = world.service.releaser._work["care"].lock
        async with lock:
            yield Held(world, lock)
        await world._settle()
    finally:
        await world._lives.aclose()


@pytest.mark.parametrize("then", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("private", [True, False], ids=["private before", "public before"])
async def test_a_release_that_waits_while_the_spec_changes_is_paid_for_as_it_is_drawn(
    draws, private, then
):
    async with held(private=private) as waiting:
        world = waiting.world
        await world._emit(signals("a").packet.typed(99, START))
        world.clock.now = START + DAY_S + 100.0
        world.service.releaser._wake.set()
        await waiting.wait_for(1)
        changing = await waiting.change(then)
    await changing
    spends = await world._store.spends("care")
    assert [spend.rho for spend in spends if spend.rho] == pytest.approx(draws)


async def test_a_warm_start_that_waits_while_privacy_comes_into_force_tells_nothing_that_is_held():
    asked = wire_pb2.GetWarmStartRequest(cohort="care")
    async with held(private=False) as waiting:
        world = waiting.world
        await world._emit(Packet("a", more={"controller": {"tau": 0.9}}).typed(99, START + 1.0))
        answering = asyncio.ensure_future(world._wire.GetWarmStart(asked, NOBODY))
        await waiting.wait_for(1)
        changing = await waiting.change(PutSpec())
        in_force = world.service.cohorts.rules("care").privacy is not None
        released = await world._wire.GetWarmStart(asked, NOBODY) if in_force else None
    await changing
    assert await answering == released or not in_force
