"""Checking of packets: what is small at once, what takes long in a thread, in turns.

Checks are Python and hold the interpreter, so that several threads at once would only take turns with the
event loop. One thread checks, a slice of one caller's packets after that of another's (`turns`), and packets
that are few and small and keep the contract's rules do not wait for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from fmi.rules import LongToTellError
from fmi.v1 import packet_pb2
from fmi_server.access import Principal
from fmi_server.cohorts import CohortRegistry
from fmi_server.emission import Answer, Candidate, Intake, opening_warnings, size_of, slices
from fmi_server.errors import PacketRefusedError, Reason
from fmi_server.threads import in_thread
from fmi_server.turns import Turns
from fmi_server.validator import FMIValidator, Inspection

__all__ = ["Checking"]

THREAD_FROM_PACKETS: Final = 32
"""Batches of this size and larger are checked in a thread, so that single Emits do not wait for them."""

THREAD_FROM_BYTES: Final = 32 * 1024
"""The same by their bytes. What breaks rules of the contract is told in the thread however small it is: of a
packet of 1 kB that may take 25 ms."""

TURN_S: Final = 0.03
"""Seconds after which a turn ends with the packet that it is at: what breaks rules takes long to tell."""

_T = TypeVar("_T")


class Checking:
    """Checks packets of all callers.

    Args:
        intake: What a packet becomes.
        validator: The rules.
        cohorts: The cohorts that there are.
        clock: Unix time in seconds.

    Attributes:
        turns: Who works in the thread.
    """

    def __init__(
        self,
        intake: Intake,
        validator: FMIValidator,
        cohorts: CohortRegistry,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.turns = Turns()
        self._intake = intake
        self._validator = validator
        self._cohorts = cohorts
        self._clock = clock

    async def in_turn(self, work: Callable[[], _T], *, of: Principal) -> _T:
        """Decode or check in a thread what takes long, one after the other, of each caller one by turns."""
        async with self.turns.taken(of.name or of.account):
            return await in_thread(work)

    async def check(
        self,
        items: Sequence[bytes | packet_pb2.Packet],
        *,
        caller: Principal,
        first: int | None = 0,
    ) -> list[Candidate | Answer]:
        """Check packets; see `Intake.inspect_many`."""
        now_us = int(self._clock() * 1e6)
        check = self._intake.inspect_many
        if len(items) < THREAD_FROM_PACKETS and sum(map(size_of, items)) <= THREAD_FROM_BYTES:
            with contextlib.suppress(LongToTellError):
                return check(items, received_at_us=now_us, caller=caller, first=first, at_once=True)
        checked: list[Candidate | Answer] = []
        check = partial(check, received_at_us=now_us, caller=caller, within_s=TURN_S)
        for turn in slices(items):
            end = len(checked) + len(turn)
            while (done := len(checked)) < end:
                rest = turn[len(turn) - (end - done) :]
                checked += await self.in_turn(
                    partial(check, rest, first=None if first is None else done), of=caller
                )
        return checked

    async def inspect(self, packet: bytes, *, caller: Principal) -> Inspection:
        """Say what the rules say of a packet."""

        def inspect(*, at_once: bool = False) -> Inspection:
            try:
                typed = self._intake.parsed(packet)
            except PacketRefusedError as refusal:
                return Inspection(tuple(refusal.violations))
            found = self._validator.inspect(typed, caller=caller, at_once=at_once)
            cohort = typed.header.cohort
            if found.violations or cohort in self._cohorts:
                return found
            return replace(found, warnings=(*found.warnings, *opening_warnings(cohort)))

        if len(packet) <= THREAD_FROM_BYTES:
            with contextlib.suppress(LongToTellError):
                return inspect(at_once=True)
        return await self.in_turn(inspect, of=caller)

    def is_strange(self, item: Candidate | Answer) -> bool:
        """Say whether an item is of a cohort that is not known here: another server may know it."""
        if isinstance(item, Candidate):
            return item.record.cohort not in self._cohorts
        return item.error is not None and item.error.reason == Reason.COHORT_UNKNOWN
