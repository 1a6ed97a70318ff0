"""The operator's calls, for asyncio and without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from fmi import specs
from fmi.plain import PlainDataError
from fmi.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    cohort_pb2,
    error_pb2,
    update_pb2,
)
from fmi_client._calls import Caller
from fmi_client._loop_thread import LoopThread
from fmi_client._translation import reason_name
from fmi_client.errors import SpecError, Violation

__all__ = ["Admin", "AsyncAdmin", "cohort_spec_from_plain"]

_PAGE: Final = 1000


class AsyncAdmin:
    """What an operator sees and can do. Made by `AsyncFMIClient.admin`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def _stub(self) -> admin_service_pb2_grpc.AdminServiceStub:
        return self._caller.stubs().admin

    async def list_cohorts(self) -> list[admin_service_pb2.CohortStatus]:
        """List the cohorts with what they hold, in order of name."""
        response = await self._caller.call(
            self._stub().ListCohorts, admin_service_pb2.ListCohortsRequest()
        )
        return list(response.cohorts)

    async def list_sites(self, cohort: str = "") -> list[admin_service_pb2.SiteStatus]:
        """List the sites of a cohort, or of all, with what they sent."""
        response = await self._caller.call(
            self._stub().ListSites, admin_service_pb2.ListSitesRequest(cohort=cohort)
        )
        return list(response.sites)

    async def put_cohort_spec(
        self,
        spec: cohort_pb2.CohortSpec | Mapping[str, Any],
        *,
        force: bool = False,
        dry_run: bool = False,
    ) -> admin_service_pb2.PutCohortSpecResponse:
        """Declare a cohort or change its spec.

        Args:
            spec: The spec, typed or in its JSON form, as it stands in a cohort file.
            force: Whether a change that would break sites is made all the same.
            dry_run: Whether the change is only checked.

        Raises:
            SpecError: The spec is not valid.
            SpecChangeUnsafeError: The change would break sites, and `force` was not said.
        """
        if not isinstance(spec, cohort_pb2.CohortSpec):
            spec = cohort_spec_from_plain(spec)
        return await self._caller.call(
            self._stub().PutCohortSpec,
            admin_service_pb2.PutCohortSpecRequest(spec=spec, force=force, dry_run=dry_run),
        )

    async def list_quarantine(
        self, cohort: str = "", *, limit: int = 1000
    ) -> list[admin_service_pb2.QuarantinedPacket]:
        """List the packets in quarantine of a cohort, or of all, oldest first, at most `limit`."""
        found: list[admin_service_pb2.QuarantinedPacket] = []
        page_token = ""
        while len(found) < limit:
            response = await self._caller.call(
                self._stub().ListQuarantine,
                admin_service_pb2.ListQuarantineRequest(
                    cohort=cohort, page_size=min(_PAGE, limit - len(found)), page_token=page_token
                ),
            )
            found.extend(response.packets)
            page_token = response.next_page_token
            if not page_token:
                break
        return found[:limit]

    async def set_quarantine(
        self, domain_id: str, packet_id: str, *, quarantined: bool, reason: str = ""
    ) -> bool:
        """Put a packet into quarantine or take it out; say whether anything changed.

        Raises:
            NotFoundError: There is no such packet.
        """
        response = await self._caller.call(
            self._stub().SetQuarantine,
            admin_service_pb2.SetQuarantineRequest(
                domain_id=domain_id, packet_id=packet_id, quarantined=quarantined, reason=reason
            ),
        )
        return response.changed

    async def release_now(self, cohort: str) -> list[update_pb2.Update]:
        """Release a cohort's aggregates now; return what was published, nothing if nothing changed."""
        response = await self._caller.call(
            self._stub().ReleaseNow, admin_service_pb2.ReleaseNowRequest(cohort=cohort)
        )
        return list(response.updates)

    async def register_dictionary(self, data: bytes) -> int:
        """Register a compression dictionary in zstd's format; return its id."""
        response = await self._caller.call(
            self._stub().RegisterDictionary,
            admin_service_pb2.RegisterDictionaryRequest(data=data),
        )
        return response.dictionary_id

    async def list_subscribers(self, cohort: str = "") -> list[admin_service_pb2.SubscriberStatus]:
        """List the open subscriptions that match a cohort, or all, those open longest first."""
        found: list[admin_service_pb2.SubscriberStatus] = []
        request = admin_service_pb2.ListSubscribersRequest(cohort=cohort, page_size=250)
        while True:
            response = await self._caller.call(self._stub().ListSubscribers, request)
            found.extend(response.subscribers)
            request.page_token = response.next_page_token
            if not request.page_token:
                return found

    async def list_applied(self, cohort: str = "") -> list[admin_service_pb2.AppliedStatus]:
        """List which revisions subscribers reported as applied or failed, in a cohort or in all.

        The one longest without a report comes first. The server forgets them when it restarts.
        """
        # A report during the listing moves its entry to the end, where it comes a second time.
        found: dict[tuple[str, str, int], admin_service_pb2.AppliedStatus] = {}
        request = admin_service_pb2.ListAppliedRequest(cohort=cohort, page_size=_PAGE)
        while True:
            response = await self._caller.call(self._stub().ListApplied, request)
            for status in response.applied:
                found[status.subscriber, status.cohort, status.kind] = status
            request.page_token = response.next_page_token
            if not request.page_token:
                return list(found.values())

    async def plan_privacy(
        self,
        *,
        sites: int,
        signals: int | Iterable[cohort_pb2.SignalSpec],
        privacy: cohort_pb2.PrivacySpec | Mapping[str, Any],
        vote_min_sites: int | None = None,
        signals_per_site: int | None = None,
    ) -> admin_service_pb2.PlanPrivacyResponse:
        """Say what a privacy budget would mean; nothing is changed.

        Args:
            sites: Sites that are expected, each at full weight.
            signals: How many signals are released together; or the signals themselves, with both bounds: then
                the expected error of each is told in its own unit.
            privacy: The budget, typed or as it would stand in a cohort file, for example
                ``{"dp_epsilon": 1.0, "dp_delta": 1e-6, "dp_epochs": 50}``.
            vote_min_sites: Sites needed before a signal has a value; the default where it is not given.
            signals_per_site: How many of the signals each site sends; all where it is not given.

        Raises:
            SpecError: The budget contradicts itself, or signals lack bounds; the text says what to change.
        """
        counted, declared = (signals, ()) if isinstance(signals, int) else (0, signals)
        if not isinstance(privacy, cohort_pb2.PrivacySpec):
            privacy = cohort_spec_from_plain({"privacy": privacy}).privacy
        return await self._caller.call(
            self._stub().PlanPrivacy,
            admin_service_pb2.PlanPrivacyRequest(
                sites=sites,
                signals=counted,
                signal_specs=declared,
                privacy=privacy,
                vote_min_sites=vote_min_sites,
                signals_per_site=signals_per_site or 0,
            ),
        )

    async def list_privacy_budgets(self, cohort: str = "") -> list[admin_service_pb2.PrivacyBudget]:
        """List the private cohorts, or one, with what they spent and what is left."""
        response = await self._caller.call(
            self._stub().ListPrivacyBudgets,
            admin_service_pb2.ListPrivacyBudgetsRequest(cohort=cohort),
        )
        return list(response.budgets)

    async def list_privacy_spends(self, cohort: str) -> list[admin_service_pb2.PrivacySpend]:
        """List the privacy ledger of a cohort, oldest entry first."""
        found: list[admin_service_pb2.PrivacySpend] = []
        request = admin_service_pb2.ListPrivacySpendsRequest(cohort=cohort, page_size=_PAGE)
        while True:
            response = await self._caller.call(self._stub().ListPrivacySpends, request)
            found.extend(response.spends)
            request.page_token = response.next_page_token
            if not request.page_token:
                return found


class Admin:
    """What an operator sees and can do; see `AsyncAdmin`. Made by `FMIClient`."""

    def __init__(self, admin: AsyncAdmin, thread: LoopThread) -> None:
        self._admin = admin
        self._thread = thread

    def list_cohorts(self) -> list[admin_service_pb2.CohortStatus]:
        """List the cohorts with what they hold, in order of name."""
        return self._thread.run(self._admin.list_cohorts())

    def list_sites(self, cohort: str = "") -> list[admin_service_pb2.SiteStatus]:
        """List the sites of a cohort, or of all, with what they sent."""
        return self._thread.run(self._admin.list_sites(cohort))

    def put_cohort_spec(
        self,
        spec: cohort_pb2.CohortSpec | Mapping[str, Any],
        *,
        force: bool = False,
        dry_run: bool = False,
    ) -> admin_service_pb2.PutCohortSpecResponse:
        """Declare a cohort or change its spec. See `AsyncAdmin.put_cohort_spec`."""
        return self._thread.run(self._admin.put_cohort_spec(spec, force=force, dry_run=dry_run))

    def list_quarantine(
        self, cohort: str = "", *, limit: int = 1000
    ) -> list[admin_service_pb2.QuarantinedPacket]:
        """List the packets in quarantine of a cohort, or of all, oldest first, at most `limit`."""
        return self._thread.run(self._admin.list_quarantine(cohort, limit=limit))

    def set_quarantine(
        self, domain_id: str, packet_id: str, *, quarantined: bool, reason: str = ""
    ) -> bool:
        """Put a packet into quarantine or take it out; say whether anything changed."""
        return self._thread.run(
            self._admin.set_quarantine(domain_id, packet_id, quarantined=quarantined, reason=reason)
        )

    def release_now(self, cohort: str) -> list[update_pb2.Update]:
        """Release a cohort's aggregates now; return what was published, nothing if nothing changed."""
        return self._thread.run(self._admin.release_now(cohort))

    def register_dictionary(self, data: bytes) -> int:
        """Register a compression dictionary in zstd's format; return its id."""
        return self._thread.run(self._admin.register_dictionary(data))

    def list_subscribers(self, cohort: str = "") -> list[admin_service_pb2.SubscriberStatus]:
        """List the open subscriptions, those open longest first. See `AsyncAdmin.list_subscribers`."""
        return self._thread.run(self._admin.list_subscribers(cohort))

    def list_applied(self, cohort: str = "") -> list[admin_service_pb2.AppliedStatus]:
        """List which revisions subscribers applied or failed. See `AsyncAdmin.list_applied`."""
        return self._thread.run(self._admin.list_applied(cohort))

    def plan_privacy(
        self,
        *,
        sites: int,
        signals: int | Iterable[cohort_pb2.SignalSpec],
        privacy: cohort_pb2.PrivacySpec | Mapping[str, Any],
        vote_min_sites: int | None = None,
        signals_per_site: int | None = None,
    ) -> admin_service_pb2.PlanPrivacyResponse:
        """Say what a privacy budget would mean. See `AsyncAdmin.plan_privacy`."""
        return self._thread.run(
            self._admin.plan_privacy(
                sites=sites,
                signals=signals,
                privacy=privacy,
                vote_min_sites=vote_min_sites,
                signals_per_site=signals_per_site,
            )
        )

    def list_privacy_budgets(self, cohort: str = "") -> list[admin_service_pb2.PrivacyBudget]:
        """List the private cohorts, or one, with what they spent and what is left."""
        return self._thread.run(self._admin.list_privacy_budgets(cohort))

    def list_privacy_spends(self, cohort: str) -> list[admin_service_pb2.PrivacySpend]:
        """List the privacy ledger of a cohort, oldest entry first."""
        return self._thread.run(self._admin.list_privacy_spends(cohort))


def cohort_spec_from_plain(data: Mapping[str, Any]) -> cohort_pb2.CohortSpec:
    """Translate a cohort spec from its JSON form, with the short forms of cohort files.

    Raises:
        SpecError: A field is unknown or of the wrong kind.
    """
    try:
        return specs.cohort_spec_from_plain(data)
    except PlainDataError as error:
        violations = [Violation(p.field, p.rule_id, p.description) for p in error.problems]
        raise SpecError(
            f"cohort spec cannot be read: {'; '.join(map(str, violations))}",
            reason=reason_name(error_pb2.ERROR_REASON_SPEC_INVALID),
            violations=violations,
        ) from error
