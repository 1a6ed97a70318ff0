"""What an operator sees and does, apart from the flow of packets."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from fmi.plain import DEFAULT_PROFILE_CLASS
from fmi.v1 import cohort_pb2, packet_pb2
from fmi_server.access import TRUSTED, Action, Principal
from fmi_server.applied import Applied
from fmi_server.cohort_state import CohortState
from fmi_server.cohorts import CohortRules
from fmi_server.errors import CohortUnknownError, Reason, RequestInvalidError, Violation
from fmi_server.feed_requests import kind_name
from fmi_server.privacy.advice import PlanReport, report_plan
from fmi_server.privacy.budget import BudgetPlan, PrivacySettings, budget_faults, plan_budget
from fmi_server.private_releases import Account
from fmi_server.router import OpenSubscription
from fmi_server.service import FMIService
from fmi_server.storage.base import UnknownPacketError
from fmi_server.storage.records import PacketKey, SiteRecord, SpendRecord, StoredPacket

__all__ = ["CohortOverview", "Operations", "PrivacyOverview", "SiteOverview"]

_INVALID: Final = Reason.SPEC_INVALID

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class CohortOverview:
    """What a cohort holds; see `fmi.v1.CohortStatus`."""

    name: str
    declared: bool = False
    schema_hash: str = ""
    sites: int = 0
    packets: int = 0
    quarantined: int = 0
    dirty: bool = False
    revisions: dict[str, int] = field(default_factory=dict)
    released_at: float | None = None
    subscribers: int = 0


@dataclass(frozen=True, slots=True)
class SiteOverview:
    """What a site sent to a cohort; see `fmi.v1.SiteStatus`."""

    record: SiteRecord
    profile_class: str
    reputation: float

    @property
    def packets(self) -> Mapping[str, int]:
        """Packets stored, by type."""
        record = self.record
        return {"msp": record.msp_count, "pop": record.pop_count, "ccs": record.ccs_count}


@dataclass(frozen=True, slots=True)
class PrivacyOverview:
    """The privacy of a cohort: its rules, and what it spent."""

    rules: CohortRules
    account: Account


class Operations:
    """The operator's view of a service, and the levers.

    What is of one cohort is also for who may administer it. Each method refuses, with `AccessDeniedError`
    or as a cohort that does not exist, what its caller may not do.

    Args:
        service: The service.
    """

    def __init__(self, service: FMIService) -> None:
        self._service = service

    async def cohorts(self, *, caller: Principal = TRUSTED) -> list[CohortOverview]:
        """List the cohorts that the caller may administer, in order of name."""
        service = self._service
        administered = self._administered(caller)
        subscribers = await service.router.count_subscribers(rules.name for rules in administered)
        overviews = {
            rules.name: CohortOverview(
                rules.name,
                declared=rules.declared,
                schema_hash=rules.schema_hash,
                dirty=service.releaser.dirty(rules.name),
                released_at=service.releaser.released_at(rules.name),
                subscribers=subscribers.get(rules.name, 0),
            )
            for rules in administered
        }
        for (cohort, kind), update in service.releaser.publisher.log.latest.items():
            if cohort in overviews:
                overviews[cohort].revisions[kind_name(kind)] = update.revision
        for site in await service.store.sites():
            overview = overviews.get(site.cohort)
            if overview is not None:
                overview.sites += 1
                overview.packets += site.msp_count + site.pop_count + site.ccs_count
                overview.quarantined += site.quarantined_count
        return list(overviews.values())

    async def sites(self, cohort: str = "", *, caller: Principal = TRUSTED) -> list[SiteOverview]:
        """List the sites of a cohort, or of all, in order of cohort and domain id.

        Raises:
            CohortUnknownError: There is no such cohort.
        """
        service = self._service
        self._check(caller, cohort)
        by_cohort: defaultdict[str, list[SiteRecord]] = defaultdict(list)
        for record in await service.store.sites(cohort or None):
            by_cohort[record.cohort].append(record)
        overviews = []
        for name, records in by_cohort.items():
            if name not in service.cohorts:
                continue  # its packets are kept, but the cohort is not declared any more
            state, lock = await service.uninterrupted(service.releaser.reading(name))
            async with lock:
                for record in records:
                    known = state.site(record.domain_id)
                    profile_class = known.profile_class if known else DEFAULT_PROFILE_CLASS
                    reputation = state.reputation(record.domain_id)
                    overviews.append(SiteOverview(record, profile_class, reputation))
        return overviews

    async def quarantine(
        self, cohort: str = "", *, after: int = 0, limit: int = 100, caller: Principal = TRUSTED
    ) -> list[tuple[StoredPacket, packet_pb2.Packet]]:
        """List the packets in quarantine, oldest first, behind a sequence."""
        self._authorise(caller, cohort)
        stored = await self._service.store.quarantined(cohort or None, after=after, limit=limit)
        return [(item, packet_pb2.Packet.FromString(item.record.payload)) for item in stored]

    async def set_quarantine(
        self,
        domain_id: str,
        packet_id: str,
        *,
        quarantined: bool,
        reason: str = "",
        caller: Principal = TRUSTED,
    ) -> bool:
        """Put a packet into quarantine or take it out; return whether that changed anything.

        The cohort is counted anew, so that its aggregates follow with the next release.

        Raises:
            UnknownPacketError: There is no such packet in a cohort that the caller may administer.
        """
        key = PacketKey(domain_id, packet_id)
        stored = await self._service.store.packet(key)
        if stored is None:
            await self._service.settle()  # another server may have taken it
            stored = await self._service.store.packet(key)
        cohort = "" if stored is None else stored.record.cohort
        if stored is None or not self._service.gate.may(caller, Action.ADMIN, cohort):
            raise UnknownPacketError(packet=key)
        change = self._set_quarantine(key, cohort, quarantined=quarantined, reason=reason)
        return await self._service.uninterrupted(change)

    async def _set_quarantine(
        self, key: PacketKey, cohort: str, *, quarantined: bool, reason: str
    ) -> bool:
        service = self._service
        store = service.store
        domain_id, packet_id = key.domain_id, key.packet_id
        async with service.compactor.suspended(cohort, domain_id=domain_id):
            changed = await store.set_quarantine(key, quarantined=quarantined, reason=reason)
            if changed:
                done = "put into" if quarantined else "taken out of"
                _log.info("packet %s of site %s is %s quarantine", packet_id, domain_id, done)
            if changed and cohort in service.cohorts:
                await service.releaser.rebuild(cohort)
        return changed

    async def subscribers(
        self, cohort: str = "", *, after: int = 0, limit: int = 100, caller: Principal = TRUSTED
    ) -> list[OpenSubscription]:
        """List the open subscriptions that want something of a cohort, or all, behind a number.

        Raises:
            CohortUnknownError: There is no such cohort.
        """
        # A filter names cohorts that others may not know of.
        self._service.gate.require_operator(caller, "list the subscribers")
        self._check(caller, cohort)
        return await self._service.router.open_subscriptions(cohort, after=after, limit=limit)

    def applied(
        self, cohort: str = "", *, after: int = 0, limit: int = 100, caller: Principal = TRUSTED
    ) -> list[tuple[Applied, int]]:
        """List what subscribers reported of a cohort, or of all, each with the newest revision.

        Raises:
            CohortUnknownError: There is no such cohort.
        """
        self._check(caller, cohort)
        log = self._service.releaser.publisher.log
        found = self._service.applied.list(cohort, after=after, limit=limit)
        return [(applied, log.newest_revision(applied.key)) for applied in found]

    def plan_privacy(
        self,
        settings: PrivacySettings,
        *,
        signals: int,
        sites: int,
        min_sites: int = 3,
        signals_per_site: int = 0,
        caller: Principal = TRUSTED,
    ) -> tuple[BudgetPlan, PlanReport]:
        """Say what a privacy budget would mean; nothing is changed.

        Args:
            settings: The budget.
            signals: Signals that are released together.
            sites: Sites that are expected.
            min_sites: Sites needed before a signal has a value.
            signals_per_site: Signals that each of them sends; 0 means all.
            caller: Who asks; one who may administer some cohort.

        Raises:
            AccessDeniedError: The caller may administer no cohort.
            RequestInvalidError: There is no signal, or fewer than each site sends, or the settings contradict
                each other, or ask for nothing.
        """
        self._administered(caller)
        if not signals:
            raise RequestInvalidError(
                [Violation("signals", "fmi.plan.signals", "say how many, or which (signal_specs)")]
            )
        if signals_per_site > signals:
            asked = (
                f"is {signals_per_site}, of {signals} signals: give at most that, or leave it out"
            )
            raise RequestInvalidError(
                [Violation("signals_per_site", "fmi.plan.signals_per_site", asked)]
            )
        broken = [
            Violation(
                f"privacy.{fault.setting}",
                "fmi.cohort_spec.privacy_budget",
                fault.advice,
                _INVALID,
            )
            for fault in budget_faults(settings, signals)
        ]
        if broken:
            raise RequestInvalidError(broken, _INVALID)
        plan = plan_budget(settings, signals)
        return plan, report_plan(
            plan, sites, min_sites=min_sites, signals_per_site=signals_per_site or None
        )

    def noise_per_signal(
        self, signals: Sequence[cohort_pb2.SignalSpec], noise_stderr: float
    ) -> dict[str, float]:
        """Return what noise on a mean in the middle of its bounds is in the unit of each signal.

        Args:
            signals: The signals; each must have both bounds.
            noise_stderr: The noise, in units of half the width between the bounds on the scale of averaging.

        Raises:
            SpecInvalidError: The signals break rules.
        """
        if not signals:
            return {}
        spec = cohort_pb2.CohortSpec(name="plan", signals=signals)
        spec.privacy.dp_noise_sigma, spec.privacy.dp_delta, spec.privacy.dp_epochs = 1.0, 1e-6, 1
        cells = CohortState(self._service.cohorts.compile(spec)).unit_cells()
        slopes = cells.transforms.unit_slope(cells.rows, np.zeros(len(cells.rows)))
        return dict(zip(cells.names, (slopes * noise_stderr).tolist(), strict=True))

    def privacy_budgets(
        self, cohort: str = "", *, caller: Principal = TRUSTED
    ) -> list[PrivacyOverview]:
        """List the cohorts that are private, or were and have a ledger, in order of name.

        Raises:
            CohortUnknownError: There is no such cohort.
        """
        self._check(caller, cohort)
        private = self._service.releaser.private
        return [
            PrivacyOverview(rules, private.account(rules))
            for rules in self._service.cohorts
            if (not cohort or rules.name == cohort)
            and (rules.privacy is not None or rules.name in private.totals)
        ]

    async def privacy_spends(
        self, cohort: str, *, after: int = 0, limit: int = 100, caller: Principal = TRUSTED
    ) -> list[SpendRecord]:
        """List the privacy ledger of a cohort behind a number, oldest first.

        Raises:
            CohortUnknownError: There is no such cohort.
        """
        self._check(caller, cohort)
        return await self._service.store.spends(cohort, after_number=after, limit=limit)

    def _administered(self, caller: Principal) -> list[CohortRules]:
        """Return the cohorts that a caller may administer; refuse who may administer none."""
        service = self._service
        found = [rules for rules in service.cohorts if rules.access.allow(caller, Action.ADMIN)]
        if not found:
            service.gate.require_operator(caller, "administer cohorts")
        return found

    def _authorise(self, caller: Principal, cohort: str) -> None:
        if cohort:
            self._service.gate.require(caller, Action.ADMIN, cohort)
        else:
            self._service.gate.require_operator(caller, "list this of all cohorts together")

    def _check(self, caller: Principal, cohort: str) -> None:
        self._authorise(caller, cohort)
        if cohort and cohort not in self._service.cohorts:
            raise CohortUnknownError(cohort)
