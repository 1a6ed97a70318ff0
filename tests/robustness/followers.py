"""Subscribers that find their place again after each kill, and write down what they get."""

from __future__ import annotations

import asyncio
import contextlib
import random

import grpc
from guarantees import Compacted
from rig import COHORT, QUICK_RECONNECT, SHORT, Rig
from server_harness import CAUSES, HINT, PRIOR, WARM_START, Client, Refusal, eventually

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_client import AsyncFMIClient, RetryPolicy

__all__ = ["KINDS", "Follower", "SdkFollower"]

CUT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""How a stream ends that is cut; the second where a server ends that had not yet seen it."""

LONGEST_S = 4.0
"""Seconds that a subscriber stays away at most."""

KINDS = {"prior": PRIOR, "warm_start": WARM_START, "policy_hint": HINT, "causal_consensus": CAUSES}
PATIENT = RetryPolicy(initial_s=0.02, max_s=0.2, max_attempts=100_000, deadline_s=60.0)


class Follower:
    """A subscriber with raw stubs: a token, or start revisions after COMPACTED, and nothing else.

    Args:
        rig: The server and the notebook.
        name: The name of its record.
        every: Whether it wants every update, and not only the newest.
        target: Where it connects, if not where the rig says.
        away: Whether it leaves now and then, and comes back after a while.
    """

    def __init__(
        self, rig: Rig, name: str, *, every: bool, target: str = "", away: bool = False
    ) -> None:
        self._rig = rig
        self._target = target
        self._away = away
        self._every = every
        self._chance = random.Random(rig.chance.random())
        self._token = ""
        self._start: dict[tuple[str, int], int] = {}
        self.record = rig.history.record(name, every=every)
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            await self._rig.up.wait()
            patience_s = self._chance.uniform(0.1, 1.0) if self._may_leave() else None
            async with Client(self._target or self._rig.somewhere(), QUICK_RECONNECT) as client:
                try:
                    async with asyncio.timeout(patience_s):
                        await self._follow(client)
                except TimeoutError:
                    await self._miss_some()
                except grpc.aio.AioRpcError as error:
                    self._ended(Refusal.read(error))
            await asyncio.sleep(0.02)

    async def _miss_some(self) -> None:
        """Stay away while others get a few updates, or many."""
        others = self._rig.history.records[0].events
        goal = len(others) + self._chance.choice((1, 20, 50))
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: len(others) >= goal or self._rig.stopping.is_set(), LONGEST_S)

    def _may_leave(self) -> bool:
        return self._away and self.ready.is_set() and not self._rig.stopping.is_set()

    async def _follow(self, client: Client) -> None:
        request = wire_pb2.SubscribeRequest(
            cohorts=[COHORT, SHORT],
            mode=wire_pb2.DELIVERY_MODE_EVERY if self._every else wire_pb2.DELIVERY_MODE_LATEST,
            resume_token=self._token,
            start_revisions=[
                wire_pb2.StartRevision(cohort=cohort, kind=kind, revision=revision)
                for (cohort, kind), revision in self._start.items()
            ],
        )
        async for event in client.interchange.Subscribe(request):
            self.record.take(event)
            kind = event.WhichOneof("event")
            if kind == "snapshot_end":
                assert not event.snapshot_end.history_changed
                self._start.clear()
                self.ready.set()
            if kind == "update" and self._start:
                # A token says one place for all, so it does not hold before all have begun.
                self._start[event.update.cohort, event.update.kind] = event.update.revision + 1
            if not self._start:
                self._token = event.resume_token or self._token

    def _ended(self, refusal: Refusal) -> None:
        if refusal.reason != "COMPACTED":
            assert refusal.code in CUT, refusal
            return
        told = refusal.metadata
        line = (told["cohort"], KINDS[told["kind"]])
        oldest = int(told["oldest_revision"])
        self.record.events.append(Compacted(line, int(told["revision"]), oldest))
        if not self._start:
            lines = [(cohort, kind) for cohort in (COHORT, SHORT) for kind in KINDS.values()]
            newest = self.record.newest
            self._start = {each: newest.get(each, 0) + 1 for each in lines}
            self._token = ""
        self._start[line] = oldest


class SdkFollower:
    """A subscriber with the SDK, which finds its place by itself.

    Args:
        rig: The server and the notebook.
        name: The name of its record.
        target: Where it connects.
    """

    def __init__(self, rig: Rig, name: str, target: str) -> None:
        self._target = target
        self.record = rig.history.record(name, COHORT)
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Follow until cancelled."""
        async with contextlib.AsyncExitStack() as stack:
            client = AsyncFMIClient(self._target, domain_id=self.record.name, retry=PATIENT)
            await stack.enter_async_context(client)
            updates = client.subscribe(COHORT, mode="every")
            await stack.enter_async_context(updates)
            async for event in updates.events():
                self.record.take(event)
                self.ready.set()
