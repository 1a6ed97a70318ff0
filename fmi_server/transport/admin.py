"""AdminService: the operator's view and levers."""

from __future__ import annotations

import logging
from typing import Final

from fmi.v1 import admin_service_pb2 as wire_pb2
from fmi_server.operations import CohortOverview, Operations, SiteOverview
from fmi_server.private_specs import exposed_private, privacy_settings
from fmi_server.service import FMIService
from fmi_server.transport.identity import Caller
from fmi_server.transport.privacy import budget_message, plan_message, spend_message
from fmi_server.transport.subscribers import applied_status, subscriber_status

__all__ = ["AdminServicer"]

DEFAULT_PAGE: Final = 100
DEFAULT_MIN_SITES: Final = 3
MAX_SEQUENCE: Final = 2**63 - 1

_log = logging.getLogger(__name__)


class AdminServicer:
    """Converts, calls the service, and converts back. Methods have the names of the contract's."""

    def __init__(self, service: FMIService) -> None:
        self._service = service
        self._operations = Operations(service)

    async def ListCohorts(
        self, request: wire_pb2.ListCohortsRequest, caller: Caller
    ) -> wire_pb2.ListCohortsResponse:
        """List the cohorts with what they hold."""
        del request
        overviews = await self._operations.cohorts(caller=caller.principal)
        return wire_pb2.ListCohortsResponse(cohorts=[_cohort(overview) for overview in overviews])

    async def PutCohortSpec(
        self, request: wire_pb2.PutCohortSpecRequest, caller: Caller
    ) -> wire_pb2.PutCohortSpecResponse:
        """Declare a cohort or change its spec."""
        self._service.registry.check_request(request, skip="spec.")
        rules, changed = await self._service.put_cohort_spec(
            request.spec,
            force=request.force,
            dry_run=request.dry_run,
            caller=caller.principal,
        )
        if changed and not request.dry_run and rules.privacy is not None:
            authenticated = self._service.cohorts.authenticated
            if told := exposed_private([rules.name], authenticated=authenticated):
                _log.warning("%s", told)
        return wire_pb2.PutCohortSpecResponse(schema_hash=rules.schema_hash, changed=changed)

    async def ListSites(
        self, request: wire_pb2.ListSitesRequest, caller: Caller
    ) -> wire_pb2.ListSitesResponse:
        """List the sites of a cohort, or of all."""
        self._service.registry.check_request(request)
        overviews = await self._operations.sites(request.cohort, caller=caller.principal)
        return wire_pb2.ListSitesResponse(sites=[_site(overview) for overview in overviews])

    async def ListQuarantine(
        self, request: wire_pb2.ListQuarantineRequest, caller: Caller
    ) -> wire_pb2.ListQuarantineResponse:
        """List the packets in quarantine."""
        self._service.registry.check_request(request)
        limit = request.page_size or DEFAULT_PAGE
        found = await self._operations.quarantine(
            request.cohort,
            after=min(int(request.page_token or 0), MAX_SEQUENCE),
            limit=limit,
            caller=caller.principal,
        )
        response = wire_pb2.ListQuarantineResponse()
        for stored, packet in found:
            item = response.packets.add(
                packet=packet, reason=stored.record.quarantine_reason, sequence=stored.sequence
            )
            item.received_at.FromMicroseconds(stored.record.received_at_us)
        if len(found) == limit:
            response.next_page_token = str(found[-1][0].sequence)
        return response

    async def SetQuarantine(
        self, request: wire_pb2.SetQuarantineRequest, caller: Caller
    ) -> wire_pb2.SetQuarantineResponse:
        """Put a packet into quarantine or take it out."""
        self._service.registry.check_request(request)
        changed = await self._operations.set_quarantine(
            request.domain_id,
            request.packet_id,
            quarantined=request.quarantined,
            reason=request.reason,
            caller=caller.principal,
        )
        return wire_pb2.SetQuarantineResponse(changed=changed)

    async def ReleaseNow(
        self, request: wire_pb2.ReleaseNowRequest, caller: Caller
    ) -> wire_pb2.ReleaseNowResponse:
        """Release a cohort's aggregates now."""
        self._service.registry.check_request(request)
        updates = await self._service.release(request.cohort, caller=caller.principal)
        return wire_pb2.ReleaseNowResponse(updates=updates)

    async def RegisterDictionary(
        self, request: wire_pb2.RegisterDictionaryRequest, caller: Caller
    ) -> wire_pb2.RegisterDictionaryResponse:
        """Register a compression dictionary."""
        self._service.registry.check_request(request)
        dictionary_id = await self._service.register_dictionary(
            request.data, caller=caller.principal
        )
        return wire_pb2.RegisterDictionaryResponse(dictionary_id=dictionary_id)

    async def ListSubscribers(
        self, request: wire_pb2.ListSubscribersRequest, caller: Caller
    ) -> wire_pb2.ListSubscribersResponse:
        """List the open subscriptions."""
        self._service.registry.check_request(request)
        limit = request.page_size or DEFAULT_PAGE
        found = await self._operations.subscribers(
            request.cohort,
            after=int(request.page_token or 0),
            limit=limit,
            caller=caller.principal,
        )
        return wire_pb2.ListSubscribersResponse(
            subscribers=[subscriber_status(subscription) for subscription in found],
            next_page_token=str(found[-1].number) if len(found) == limit else "",
        )

    async def ListApplied(
        self, request: wire_pb2.ListAppliedRequest, caller: Caller
    ) -> wire_pb2.ListAppliedResponse:
        """List what subscribers reported."""
        self._service.registry.check_request(request)
        limit = request.page_size or DEFAULT_PAGE
        found = self._operations.applied(
            request.cohort,
            after=int(request.page_token or 0),
            limit=limit,
            caller=caller.principal,
        )
        return wire_pb2.ListAppliedResponse(
            applied=[applied_status(applied, newest) for applied, newest in found],
            next_page_token=str(found[-1][0].number) if len(found) == limit else "",
        )

    async def PlanPrivacy(
        self, request: wire_pb2.PlanPrivacyRequest, caller: Caller
    ) -> wire_pb2.PlanPrivacyResponse:
        """Say what a privacy budget would mean."""
        self._service.registry.check_request(request)
        given = request.HasField("vote_min_sites")
        plan, report = self._operations.plan_privacy(
            privacy_settings(request.privacy),
            signals=request.signals or len(request.signal_specs),
            sites=request.sites,
            min_sites=request.vote_min_sites if given else DEFAULT_MIN_SITES,
            signals_per_site=request.signals_per_site,
            caller=caller.principal,
        )
        of_signals = self._operations.noise_per_signal(request.signal_specs, report.noise_stderr)
        return wire_pb2.PlanPrivacyResponse(
            plan=plan_message(plan),
            noise_stderr=report.noise_stderr,
            noise_stderr_at_bound=report.noise_stderr_at_bound,
            least_weight=report.least_weight,
            advice=report.advice,
            signal_stderr=of_signals,
        )

    async def ListPrivacyBudgets(
        self, request: wire_pb2.ListPrivacyBudgetsRequest, caller: Caller
    ) -> wire_pb2.ListPrivacyBudgetsResponse:
        """List the private cohorts with what they spent."""
        self._service.registry.check_request(request)
        found = self._operations.privacy_budgets(request.cohort, caller=caller.principal)
        return wire_pb2.ListPrivacyBudgetsResponse(
            budgets=[budget_message(overview) for overview in found]
        )

    async def ListPrivacySpends(
        self, request: wire_pb2.ListPrivacySpendsRequest, caller: Caller
    ) -> wire_pb2.ListPrivacySpendsResponse:
        """List the privacy ledger of a cohort."""
        self._service.registry.check_request(request)
        limit = request.page_size or DEFAULT_PAGE
        found = await self._operations.privacy_spends(
            request.cohort,
            after=int(request.page_token or 0),
            limit=limit,
            caller=caller.principal,
        )
        return wire_pb2.ListPrivacySpendsResponse(
            spends=[spend_message(spend) for spend in found],
            next_page_token=str(found[-1].number) if len(found) == limit else "",
        )


def _cohort(overview: CohortOverview) -> wire_pb2.CohortStatus:
    status = wire_pb2.CohortStatus(
        cohort=overview.name,
        declared=overview.declared,
        sites=overview.sites,
        packets=overview.packets,
        quarantined=overview.quarantined,
        dirty=overview.dirty,
        revisions=overview.revisions,
        subscribers=overview.subscribers,
        schema_hash=overview.schema_hash,
    )
    if overview.released_at is not None:
        status.released_at.FromNanoseconds(int(overview.released_at * 1e9))
    return status


def _site(overview: SiteOverview) -> wire_pb2.SiteStatus:
    record = overview.record
    status = wire_pb2.SiteStatus(
        cohort=record.cohort,
        domain_id=record.domain_id,
        profile_class=overview.profile_class,
        packets=overview.packets,
        duplicates=record.duplicate_count,
        quarantined=record.quarantined_count,
        reputation=overview.reputation,
    )
    status.first_seen.FromMicroseconds(record.first_seen_us)
    status.last_seen.FromMicroseconds(record.last_seen_us)
    return status
