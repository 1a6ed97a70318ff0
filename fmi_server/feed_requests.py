"""What a subscriber asks for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import update_pb2
from fmi_server.errors import InvalidFilterError
from fmi_server.patterns import PatternSet

__all__ = ["PAUSE_S", "FeedRequest", "Key", "kind_name"]

Key = tuple[str, int]
"""A cohort and a kind of update."""

PAUSE_S: Final = 0.005
"""Seconds for which names are matched before others get the event loop."""


def kind_name(kind: int) -> str:
    """Return the short name of a kind of update: `prior`, `warm_start` ..."""
    name = update_pb2.UpdateKind.Name(update_pb2.UpdateKind.ValueType(kind))
    return name.removeprefix("UPDATE_KIND_").lower()


@dataclass(frozen=True, slots=True)
class FeedRequest:
    """What a subscriber asked for, checked.

    Attributes:
        patterns: Patterns of cohort names.
        kinds: Kinds of update; empty means all.
        every: Whether every update is wanted, and not only the newest.
        start: First revision wanted, by cohort and kind.
        resume_after: The sequence behind which to go on; None for a snapshot.
        history_changed: Whether a start or token was left out because it is of another history.
    """

    patterns: tuple[str, ...]
    kinds: frozenset[int] = frozenset()
    every: bool = False
    start: Mapping[Key, int] = field(default_factory=dict)
    resume_after: int | None = None
    history_changed: bool = False
    _set: PatternSet = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_set", PatternSet(self.patterns))  # the values are frozen

    @classmethod
    def from_message(
        cls, request: wire_pb2.SubscribeRequest, *, history_epoch: str, head: int
    ) -> FeedRequest:
        """Read a request that keeps the contract's rules.

        Raises:
            InvalidFilterError: The start or the resume token cannot be meant.
        """
        resume_after: int | None = None
        changed = False
        if request.resume_token:
            if request.start_revisions:
                raise InvalidFilterError("resume_token", "cannot be given with start_revisions")
            epoch, _, sequence = request.resume_token.rpartition(":")
            if not epoch or not sequence.isdecimal() or len(sequence) > 19:
                raise InvalidFilterError("resume_token", "is not one that this server gave")
            if epoch != history_epoch:
                changed = True
            elif int(sequence) > head:
                raise InvalidFilterError("resume_token", "is ahead of the server's history")
            else:
                resume_after = int(sequence)
        start: dict[Key, int] = {}
        for index, item in enumerate(request.start_revisions):
            if item.history_epoch and item.history_epoch != history_epoch:
                changed = True
                continue
            key = (item.cohort, item.kind)
            if key in start:
                raise InvalidFilterError(
                    f"start_revisions[{index}]", "names a cohort and kind a second time"
                )
            start[key] = item.revision
        result = cls(
            patterns=tuple(request.cohorts),
            kinds=frozenset(request.kinds),
            every=request.mode == wire_pb2.DELIVERY_MODE_EVERY,
            start=start,
            resume_after=resume_after,
            history_changed=changed,
        )
        for cohort, kind in start:
            if not result.wants((cohort, kind)):
                raise InvalidFilterError(
                    "start_revisions",
                    f"names {kind_name(kind)} of cohort {cohort!r}, which the filter leaves out",
                )
        return result

    def wants(self, key: Key) -> bool:
        """Say whether a cohort and kind are asked for."""
        cohort, kind = key
        return self.wants_kind(kind) and self.wants_cohort(cohort)

    def wants_kind(self, kind: int) -> bool:
        """Say whether a kind of update is asked for."""
        return not self.kinds or kind in self.kinds

    def wants_cohort(self, cohort: str) -> bool:
        """Say whether something of a cohort is asked for."""
        return self._set.match(cohort)

    async def answers(self, cohorts: Iterable[str]) -> dict[str, bool]:
        """Say of each cohort whether something of it is asked for, and let others run in between."""
        result: dict[str, bool] = {}
        pause = time.monotonic() + PAUSE_S
        for cohort in list(dict.fromkeys(cohorts)):
            result[cohort] = self.wants_cohort(cohort)
            if time.monotonic() > pause:
                await asyncio.sleep(0)
                pause = time.monotonic() + PAUSE_S
        return result
