"""What a subscriber asks for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import update_pb2
from fmi_server.access import TRUSTED, Principal
from fmi_server.errors import InvalidFilterError
from fmi_server.patterns import PatternSet

__all__ = ["PAUSE_S", "FeedRequest", "Handover", "Key", "everything", "kind_name"]

Key = tuple[str, int]
"""A cohort and a kind of update."""

MAX_DIGITS: Final = 19
"""Digits of the largest sequence that a store can count to."""

PAUSE_S: Final = 0.005
"""Seconds for which names are matched before others get the event loop."""


def kind_name(kind: int) -> str:
    """Return the short name of a kind of update: `prior`, `warm_start` ..."""
    name = update_pb2.UpdateKind.Name(update_pb2.UpdateKind.ValueType(kind))
    return name.removeprefix("UPDATE_KIND_").lower()


@dataclass(frozen=True, slots=True)
class Handover:
    """What a subscriber received under the filter that it had before.

    Attributes:
        patterns: Patterns of cohort names that it had.
        kinds: Kinds that it had; empty means all.
        after: The sequence up to which it received what these cover.
    """

    patterns: tuple[str, ...]
    kinds: frozenset[int]
    after: int
    _set: PatternSet = field(init=False, repr=False, compare=False)
    _answers: dict[str, bool] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_set", PatternSet(self.patterns))  # the values are frozen

    def covers(self, key: Key) -> bool:
        """Say whether a cohort and kind were asked for before."""
        cohort, kind = key
        return (not self.kinds or kind in self.kinds) and self.covers_cohort(cohort)

    def covers_cohort(self, cohort: str) -> bool:
        """Say whether something of a cohort was asked for before. The answer is kept."""
        answer = self._answers.get(cohort)
        if answer is None:
            answer = self._answers[cohort] = self._set.match(cohort)
        return answer


def everything(cohort: str) -> bool:
    """Permit every cohort."""
    del cohort
    return True


@dataclass(frozen=True, slots=True)
class FeedRequest:
    """What a subscriber asked for, checked.

    Attributes:
        patterns: Patterns of cohort names.
        kinds: Kinds of update; empty means all.
        every: Whether every update is wanted, and not only the newest.
        start: First revision wanted, by cohort and kind.
        resume_after: The sequence behind which to go on; None for a snapshot.
        handover: What was received under another filter; None where there was none.
        history_changed: Whether a start or token was left out because it is of another history.
        subscriber: Who subscribes; empty where that was not said.
        instance_id: What tells its subscriptions apart; empty where that was not said.
        caller: Who asks.
        permits: Says of a cohort whether the caller may read it, at the moment when it is asked. What it
            may not read is as if it did not exist.
    """

    patterns: tuple[str, ...]
    kinds: frozenset[int] = frozenset()
    every: bool = False
    start: Mapping[Key, int] = field(default_factory=dict)
    resume_after: int | None = None
    handover: Handover | None = None
    history_changed: bool = False
    subscriber: str = ""
    instance_id: str = ""
    caller: Principal = TRUSTED
    permits: Callable[[str], bool] = everything
    _set: PatternSet = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_set", PatternSet(self.patterns))  # the values are frozen

    @classmethod
    def from_message(
        cls,
        request: wire_pb2.SubscribeRequest,
        *,
        history_epoch: str,
        head: int,
        caller: Principal = TRUSTED,
        permits: Callable[[str], bool] = everything,
    ) -> FeedRequest:
        """Read a request that keeps the contract's rules.

        Args:
            request: The request.
            history_epoch: The present history.
            head: The sequence of the last update.
            caller: Who asks.
            permits: Says of a cohort whether the caller may read it.

        Raises:
            InvalidFilterError: The start or the resume token cannot be meant.
        """
        if request.instance_id and not request.subscriber:
            raise InvalidFilterError("instance_id", "is only for a subscriber with a name")
        resume_after, changed = None, False
        if request.resume_token:
            if request.start_revisions:
                raise InvalidFilterError("resume_token", "cannot be given with start_revisions")
            resume_after = _place("resume_token", request.resume_token, history_epoch, head)
            changed = resume_after is None
        handover = None
        if request.HasField("handover"):
            if request.start_revisions:
                raise InvalidFilterError("handover", "cannot be given with start_revisions")
            had = request.handover
            after = _place("handover.resume_token", had.resume_token, history_epoch, head)
            if after is not None:
                handover = Handover(tuple(had.cohorts), frozenset(had.kinds), after)
            elif resume_after is None:
                changed = True
        start, left_out = _starts(request.start_revisions, history_epoch)
        result = cls(
            patterns=tuple(request.cohorts),
            kinds=frozenset(request.kinds),
            every=request.mode == wire_pb2.DELIVERY_MODE_EVERY,
            start=start,
            resume_after=resume_after,
            handover=handover,
            history_changed=changed or left_out,
            subscriber=request.subscriber,
            instance_id=request.instance_id,
            caller=caller,
            permits=permits,
        )
        for cohort, kind in start:
            if not (result.wants_kind(kind) and result.matches(cohort)):
                raise InvalidFilterError(
                    "start_revisions",
                    f"names {kind_name(kind)} of cohort {cohort!r}, which the filter leaves out",
                )
        return result

    def after(self, key: Key) -> int | None:
        """Return the sequence up to which a cohort and kind were received; None for a snapshot of it."""
        if self.handover is not None and self.handover.covers(key):
            return max(self.handover.after, self.resume_after or 0)
        return self.resume_after

    @property
    def oldest_token(self) -> int | None:
        """The sequence behind which something is missed at the earliest; None where no token was given."""
        if self.handover is None or self.resume_after is not None:
            return self.resume_after
        return self.handover.after

    def wants(self, key: Key) -> bool:
        """Say whether a cohort and kind are asked for."""
        cohort, kind = key
        return self.wants_kind(kind) and self.wants_cohort(cohort)

    def wants_kind(self, kind: int) -> bool:
        """Say whether a kind of update is asked for."""
        return not self.kinds or kind in self.kinds

    def wants_cohort(self, cohort: str) -> bool:
        """Say whether something of a cohort is asked for, and may be read."""
        return self._set.match(cohort) and self.permits(cohort)

    def matches(self, cohort: str) -> bool:
        """Say whether something of a cohort is asked for, whether or not it may be read."""
        return self._set.match(cohort)

    async def answers(self, cohorts: Iterable[str]) -> dict[str, bool]:
        """Say of each cohort whether something of it is asked for, and let others run in between."""
        result: dict[str, bool] = {}
        pause = time.monotonic() + PAUSE_S
        for cohort in list(dict.fromkeys(cohorts)):
            result[cohort] = self.wants_cohort(cohort)
            if self.handover is not None:
                self.handover.covers_cohort(cohort)
            if time.monotonic() > pause:
                await asyncio.sleep(0)
                pause = time.monotonic() + PAUSE_S
        return result


def _starts(
    items: Iterable[wire_pb2.StartRevision], history_epoch: str
) -> tuple[dict[Key, int], bool]:
    """Read the start revisions, and whether some were left out because they are of another history."""
    start: dict[Key, int] = {}
    left_out = False
    for index, item in enumerate(items):
        if item.history_epoch and item.history_epoch != history_epoch:
            left_out = True
            continue
        key = (item.cohort, item.kind)
        if key in start:
            raise InvalidFilterError(
                f"start_revisions[{index}]", "names a cohort and kind a second time"
            )
        start[key] = item.revision
    return start, left_out


def _place(field_name: str, token: str, history_epoch: str, head: int) -> int | None:
    """Read a token's sequence; None where it is of another history."""
    epoch, _, sequence = token.rpartition(":")
    if not epoch or not sequence.isdecimal() or len(sequence) > MAX_DIGITS:
        raise InvalidFilterError(field_name, "is not one that this server gave")
    if epoch != history_epoch:
        return None
    if int(sequence) > head:
        raise InvalidFilterError(field_name, "is ahead of the server's history")
    return int(sequence)
