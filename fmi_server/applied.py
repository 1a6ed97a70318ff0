"""Who applied what: the newest report of each subscriber on each cohort and kind, within bounds.

Reports are an operator's view and nothing that the server acts on. They are kept in memory: after a restart
each subscriber is seen again with its next report. Where callers are not authenticated, whoever can call can
report under any name.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from fmi_server.errors import UpdateNotFoundError
from fmi_server.feed_requests import Key, kind_name
from fmi_server.update_log import UpdateLog

__all__ = ["Applied", "AppliedBook", "Failure", "Report"]

MAX_PER_SUBSCRIBER: Final = 1024
"""Cohorts and kinds kept of one subscriber; past it the one longest without a report goes."""

MAX_TOTAL: Final = 16_384
"""The same of all subscribers together: about 20 MB with the longest names and texts."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an update could not be put to use; see `fmi.v1.ApplyFailure`."""

    code: int
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """What became of an update at a subscriber; see `fmi.v1.ApplyReport`."""

    key: Key
    revision: int
    history_epoch: str = ""
    failure: Failure | None = None


@dataclass(slots=True)
class Applied:
    """What a subscriber reported of a cohort and kind; see `fmi.v1.AppliedStatus`.

    Attributes:
        number: Rises with each report, over all subscribers.
    """

    subscriber: str
    key: Key
    number: int = 0
    applied_revision: int = 0
    applied_at_ns: int = 0
    failed_revision: int = 0
    failed_at_ns: int = 0
    failure: Failure | None = None

    def take(self, report: Report, now_ns: int) -> None:
        """Note a report. What comes later is what holds, also where it goes back to an older revision."""
        if report.failure is not None:
            self.failed_revision = report.revision
            self.failed_at_ns = now_ns
            self.failure = report.failure
            return
        self.applied_revision = report.revision
        self.applied_at_ns = now_ns
        if report.revision >= self.failed_revision:
            self.failed_revision = self.failed_at_ns = 0
            self.failure = None


class AppliedBook:
    """Keeps what subscribers reported, the one longest without a report first."""

    def __init__(
        self, *, max_per_subscriber: int = MAX_PER_SUBSCRIBER, max_total: int = MAX_TOTAL
    ) -> None:
        self._max_per_subscriber = max_per_subscriber
        self._max_total = max_total
        self._reports = 0
        self._held: OrderedDict[tuple[str, Key], Applied] = OrderedDict()
        self._of: defaultdict[str, OrderedDict[Key, None]] = defaultdict(OrderedDict)

    def record(
        self, subscriber: str, reports: Sequence[Report], log: UpdateLog, now_ns: int
    ) -> int:
        """Keep reports that are of the present history, all or none; return how many.

        Raises:
            UpdateNotFoundError: A report is of an update that was not released.
        """
        present = [r for r in reports if r.history_epoch in ("", log.history_epoch)]
        for report in present:
            if report.revision > log.newest_revision(report.key):
                cohort, kind = report.key
                raise UpdateNotFoundError(cohort, kind_name(kind), report.revision)
        for report in present:
            self._entry(subscriber, report.key).take(report, now_ns)
        return len(present)

    def list(self, cohort: str = "", *, after: int = 0, limit: int = 100) -> list[Applied]:
        """List what is held of a cohort, or of all, behind a number."""
        found: list[Applied] = []
        for entry in self._behind(after):
            if not cohort or entry.key[0] == cohort:
                found.append(entry)
                if len(found) == limit:
                    break
        return found

    def _behind(self, number: int) -> Iterator[Applied]:
        return (entry for entry in self._held.values() if entry.number > number)

    def _entry(self, subscriber: str, key: Key) -> Applied:
        place = (subscriber, key)
        entry = self._held.get(place)
        if entry is None:
            self._make_room(subscriber)
            entry = self._held[place] = Applied(subscriber, key)
        self._reports += 1
        entry.number = self._reports
        self._held.move_to_end(place)
        self._of[subscriber][key] = None
        self._of[subscriber].move_to_end(key)
        return entry

    def _make_room(self, subscriber: str) -> None:
        own = self._of.get(subscriber)
        if own is not None and len(own) >= self._max_per_subscriber:
            self._forget(subscriber, next(iter(own)))
        elif len(self._held) >= self._max_total:
            self._forget(*next(iter(self._held)))

    def _forget(self, subscriber: str, key: Key) -> None:
        del self._held[subscriber, key]
        own = self._of[subscriber]
        del own[key]
        if not own:
            del self._of[subscriber]
