"""Releases of private cohorts: at times that no packet moves, each paid for before it is drawn.

    a period begins ──► spend (durable) ──► draw noise ──► store the updates ──► tell

A private cohort has periods of equal length, which begin at whole multiples of it since 1970, and one release
in each at most. What it costs is in the privacy ledger before the noise is drawn. A server that dies in
between has spent the cost and releases nothing in that period: budget is lost, privacy never. A release that
was drawn and could not be stored is stored later as it is; noise for one period is never drawn twice.

The ledger is the truth. What is held here of it is read again whenever a write to it failed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fmi.v1 import update_pb2
from fmi_server.aggregator import AggregationResult, FMIAggregator
from fmi_server.cohort_state import CohortState
from fmi_server.cohorts import CohortRules
from fmi_server.errors import (
    FMIError,
    PrivacyBudgetExhaustedError,
    Reason,
    ReleaseScheduledError,
    Violation,
    utc,
)
from fmi_server.privacy.budget import BudgetPlan, rounded_up
from fmi_server.publication import Publisher
from fmi_server.storage import Store
from fmi_server.storage.records import LedgerTotal, LostSpan, SpendRecord
from fmi_server.threads import in_thread

__all__ = ["Account", "PrivateReleases"]

_MICROSECONDS: Final = 1_000_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Account:
    """What a cohort has spent, and what is left.

    Attributes:
        releases: Entries of its ledger that cost something.
        rho_spent: What they cost in zero-concentrated differential privacy.
        epsilon_spent: The same as epsilon, at the delta of the plan; 0 where there is no plan.
        releases_left: That the rest of the plan pays for.
        next_release_at: Unix seconds; None where none is due.
    """

    releases: int = 0
    rho_spent: float = 0.0
    epsilon_spent: float = 0.0
    releases_left: int = 0
    next_release_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A release that is paid for and drawn, and not stored yet."""

    period_us: int
    rules: CohortRules
    result: AggregationResult


class PrivateReleases:
    """Pays for, draws and publishes the releases of private cohorts.

    Who calls `release` holds the lock of the cohort.

    Args:
        store: Keeps the ledger.
        aggregator: Draws the noise.
        publisher: Stores and tells of updates.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        store: Store,
        aggregator: FMIAggregator,
        publisher: Publisher,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._aggregator = aggregator
        self._publisher = publisher
        self._clock = clock
        self._totals: dict[str, LedgerTotal] = {}
        self._lost: list[LostSpan] = []
        self._unsure: set[str] = set()
        self._drawn: dict[str, _Drawn] = {}
        self._said_exhausted: set[str] = set()
        self._said_ahead: set[str] = set()

    async def load(self) -> None:
        """Read what was spent.

        Raises:
            StoreError: The ledger cannot be read.
        """
        self._totals = await self._store.ledger_totals()
        self._lost = await self._store.lost_spans()

    async def refresh(self) -> None:
        """Read again what was spent, by other servers too."""
        for name, total in (await self._store.ledger_totals()).items():
            known = self._totals.get(name)
            if known is None or known.last_number < total.last_number:
                self._totals[name] = total

    def doubt(self, cohort: str) -> None:
        """Read again what a cohort spent before it is released next."""
        self._unsure.add(cohort)

    @property
    def totals(self) -> Mapping[str, LedgerTotal]:
        """What each cohort with a ledger spent, private now or not."""
        return self._totals

    def due(self, rules: CohortRules) -> float | None:
        """Return when there is something to do for a private cohort, Unix seconds; None for never."""
        total = self._totals.get(rules.name)
        waiting = rules.name in self._unsure or rules.name in self._drawn
        if total is None or waiting or self._restored(total):
            return -math.inf
        plan = _plan_of(rules)
        if _left(plan, total) < 1:
            if rules.name not in self._said_exhausted:
                self._said_exhausted.add(rules.name)
                _log.warning("%s", _exhausted(rules))
            return None
        self._said_exhausted.discard(rules.name)
        due = _next_period_s(rules, total.last_period)
        self._warn_of_clock(rules, total, due)
        return due

    def _warn_of_clock(self, rules: CohortRules, total: LedgerTotal, due: float) -> None:
        """Say once where the ledger is ahead of the clock: one of them is wrong, and nothing is released."""
        if total.last_period / _MICROSECONDS - self._clock() <= rules.max_interval_s:
            self._said_ahead.discard(rules.name)
        elif rules.name not in self._said_ahead:
            self._said_ahead.add(rules.name)
            _log.warning(
                "cohort %s releases nothing before %s: its ledger has a release at a time that the clock has "
                "yet to reach; is the clock set back, or was it ahead?",
                rules.name,
                utc(due),
            )

    def account(self, rules: CohortRules) -> Account:
        """Return what a cohort spent and what is left."""
        total = self._totals.get(rules.name)
        spent = total.rho if total else 0.0
        releases = total.entries if total else 0
        plan = rules.privacy
        if plan is None:
            return Account(releases, spent)
        left = _left(plan, total)
        due: float | None = None
        if left:
            opened_us = total.last_period if total else _period_us(rules, self._clock())
            due = _next_period_s(rules, opened_us)
        return Account(releases, spent, plan.epsilon_of(spent), left, due)

    def ends_at(self, rules: CohortRules) -> float | None:
        """Return when the last release is due that the budget pays for, Unix seconds; None for never."""
        total = self._totals.get(rules.name)
        left = _left(_plan_of(rules), total)
        if not left:
            return None
        opened_us = total.last_period if total else _period_us(rules, self._clock())
        later_us = (left - 1) * _period_length_us(rules)
        return _next_period_s(rules, opened_us) + later_us / _MICROSECONDS

    def overspent(self, rules: CohortRules) -> Violation | None:
        """Tell where rules would promise a budget that is spent already, and more than it."""
        total, plan = self._totals.get(rules.name), rules.privacy
        if total is None or plan is None:
            return None
        spent = plan.epsilon_of(total.rho)
        if spent <= plan.epsilon:
            return None
        return Violation(
            "privacy",
            "fmi.cohort_change.privacy_overspent",
            f"promises epsilon {plan.epsilon:g} at delta {plan.delta:g} for the whole life of the cohort, "
            f"which has spent {rounded_up(spent)} already",
            Reason.SPEC_CHANGE_UNSAFE,
        )

    def refusal(self, rules: CohortRules) -> FMIError:
        """Return why a private cohort is not released when somebody asks for it."""
        account = self.account(rules)
        if account.next_release_at is None:
            return _exhausted(rules)
        return ReleaseScheduledError(rules.name, next_release_at=account.next_release_at)

    async def release(
        self, rules: CohortRules, state: CohortState, holds: Callable[[], bool] | None = None
    ) -> list[update_pb2.Update]:
        """Do what is due for a private cohort; return what was published.

        Args:
            rules: Its rules.
            state: Its state, all that waited counted.
            holds: Says whether the rules are those that are known; see `Store.publish`.

        Raises:
            SpecChangedError: `holds` says no. What was paid for stays paid, and is not told.
            StoreError: The ledger or the updates could not be written. Nothing was published; what was paid
                for stays paid.
        """
        name, now = rules.name, self._clock()
        await self._make_sure(name)
        period_us = _period_us(rules, now)
        total = self._totals.get(name)
        if total is None or self._restored(total):
            await self._open_ledger(rules, total, period_us)
            return []
        drawn = self._drawn.get(name)
        if drawn is None or drawn.period_us != period_us or drawn.rules is not rules:
            self._drawn.pop(name, None)
            plan = _plan_of(rules)
            early = period_us <= total.last_period or now < rules.first_release_at
            if early or _left(plan, total) < 1:
                return []
            await self._spend(rules, period_us, plan.rho_per_release)
            drawn = _Drawn(period_us, rules, await self._draw(plan, state, now))
            self._drawn[name] = drawn
        # The time it took to compute would tell how many sites there are.
        at = max(period_us / _MICROSECONDS, rules.first_release_at)
        updates = await self._publisher.publish(rules, drawn.result, at=at, holds=holds)
        del self._drawn[name]
        return updates

    async def _draw(self, plan: BudgetPlan, state: CohortState, now: float) -> AggregationResult:
        if state.rules.privacy is not plan:
            raise AssertionError("what is drawn is not what was paid for")
        spent = plan.epsilon_of(self._totals[state.rules.name].rho)
        return await in_thread(self._aggregator.result, state, now=now, epsilon_spent=spent)

    async def _spend(self, rules: CohortRules, period_us: int, rho: float) -> None:
        total = self._totals.get(rules.name)
        spend = SpendRecord(
            cohort=rules.name,
            number=total.last_number + 1 if total else 1,
            period=period_us,
            spent_at_us=int(self._clock() * _MICROSECONDS),
            rho=rho,
            history_epoch=self._store.history_epoch,
        )
        # Until the store says so, nobody knows whether a write that fails got in.
        self._unsure.add(rules.name)
        await self._store.spend(spend)
        self._unsure.discard(rules.name)
        self._totals[rules.name] = LedgerTotal(
            entries=(total.entries if total else 0) + (rho > 0.0),
            rho=(total.rho if total else 0.0) + rho,
            last_number=spend.number,
            last_period=period_us,
            last_history_epoch=spend.history_epoch,
        )

    async def _make_sure(self, name: str) -> None:
        """Read again what a cohort spent, where a write failed and may have got in."""
        if name not in self._unsure:
            return
        total = (await self._store.ledger_totals()).get(name)
        if total is not None:
            self._totals[name] = total
        self._unsure.discard(name)

    def _restored(self, total: LedgerTotal) -> bool:
        """Say whether the ledger comes from a backup and may lack what was spent after it."""
        return total.last_history_epoch != self._store.history_epoch

    async def _open_ledger(
        self, rules: CohortRules, total: LedgerTotal | None, period_us: int
    ) -> None:
        """Begin a ledger, or go on with a restored one.

        The entry costs nothing but where a backup was restored: then it charges every period that may have
        had a release of which the backup knows nothing.
        """
        plan = _plan_of(rules)
        if not self._store.durable:
            _log.warning(
                "cohort %s is private and its ledger is in memory: the next start begins with a whole budget",
                rules.name,
            )
        charged = min(_lost_periods(rules, total, self._lost), _left(plan, total))
        if charged:
            _log.warning(
                "the ledger of cohort %s comes from a backup: %d releases are charged, which the cohort may "
                "have made since it was taken",
                rules.name,
                charged,
            )
        if total is not None:
            period_us = max(period_us, total.last_period + 1)
        await self._spend(rules, period_us, charged * plan.rho_per_release)


def _period_length_us(rules: CohortRules) -> int:
    """Return how long the periods of a private cohort are, in microseconds."""
    return round(rules.max_interval_s * _MICROSECONDS)


def _period_us(rules: CohortRules, now: float) -> int:
    """Return when the period began that a moment is in."""
    length_us = _period_length_us(rules)
    return int(now * _MICROSECONDS) // length_us * length_us


def _next_period_s(rules: CohortRules, after_us: int) -> float:
    """Return when the first period begins after a moment, or a later first release is due."""
    length_us = _period_length_us(rules)
    starts_s = (after_us // length_us + 1) * length_us / _MICROSECONDS
    return max(starts_s, rules.first_release_at)


def _lost_periods(rules: CohortRules, total: LedgerTotal | None, lost: Iterable[LostSpan]) -> int:
    """Count the periods in which there may have been releases that the ledger does not have.

    A span begins within a period whose release the backup may have just missed, and ends within one that may
    have had its release already. Of the periods the ledger has, none counts.
    """
    length_us = _period_length_us(rules)
    known = -1 if total is None else total.last_period // length_us
    return sum(
        max(0, span.until_us // length_us - max(known + 1, span.from_us // length_us) + 1)
        for span in lost
    )


def _plan_of(rules: CohortRules) -> BudgetPlan:
    if rules.privacy is None:
        raise ValueError(f"cohort {rules.name!r} is not private")
    return rules.privacy


def _left(plan: BudgetPlan, total: LedgerTotal | None) -> int:
    """Return how many releases the rest of a budget pays for."""
    left = math.floor((plan.rho - (total.rho if total else 0.0)) / plan.rho_per_release)
    return min(max(0, left), plan.epochs)  # of billions of them the division gives some more


def _exhausted(rules: CohortRules) -> PrivacyBudgetExhaustedError:
    plan = _plan_of(rules)
    return PrivacyBudgetExhaustedError(rules.name, epsilon=plan.epsilon, delta=plan.delta)
