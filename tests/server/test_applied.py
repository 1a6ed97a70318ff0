"""Reports of what was applied: recorded, bounded, listed for the operator, and never trusted."""

from __future__ import annotations

import grpc
import pytest
from server_harness import DEADLINE_S, HINT, PRIOR, WARM_START, Client, msp, refusal_of, spec

from fmi.v1 import admin_service_pb2, cohort_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.testing import running_server

Code = grpc.StatusCode


async def release(client: Client, cohort: str, count: int = 1) -> None:
    """Release so many priors and warm starts."""
    aggregation = cohort_pb2.AggregationSpec(vote_min_sites=1)
    await client.put_spec(spec(cohort, aggregation=aggregation))
    for number in range(count):
        await client.emit(msp("site", cohort, controller={"tau": number + 1.0}))
        await client.release(cohort)


def report(cohort="care", revision=1, kind=PRIOR, **fields) -> wire_pb2.ApplyReport:
    return wire_pb2.ApplyReport(cohort=cohort, kind=kind, revision=revision, **fields)


def failed(message="does not converge", code=9) -> wire_pb2.ApplyFailure:
    return wire_pb2.ApplyFailure(code=code, message=message)


async def send(client: Client, *reports, subscriber="site_001") -> wire_pb2.ReportAppliedResponse:
    request = wire_pb2.ReportAppliedRequest(subscriber=subscriber, reports=reports)
    return await client.interchange.ReportApplied(request, timeout=DEADLINE_S)


async def listed(client: Client, cohort="", **fields) -> list[admin_service_pb2.AppliedStatus]:
    request = admin_service_pb2.ListAppliedRequest(cohort=cohort, **fields)
    return list((await client.admin.ListApplied(request, timeout=DEADLINE_S)).applied)


async def test_an_operator_sees_who_applied_which_revision(client):
    await release(client, "care", 3)
    assert (await send(client, report(revision=2))).recorded == 1
    await send(client, report(revision=3), report(kind=WARM_START), subscriber="site_002")
    first, second, third = await listed(client)
    assert (first.subscriber, first.cohort, first.kind) == ("site_001", "care", PRIOR)
    assert (first.applied_revision, first.newest_revision) == (2, 3)
    assert first.HasField("applied_at")
    assert not first.HasField("failed_at")
    assert not first.HasField("failure")
    assert (second.subscriber, second.applied_revision) == ("site_002", 3)
    assert (third.kind, third.applied_revision, third.newest_revision) == (WARM_START, 1, 3)


async def test_a_failure_shows_until_as_new_a_revision_is_applied(client):
    await release(client, "care", 3)
    await send(client, report(revision=1))
    await send(client, report(revision=2, failure=failed()))
    (shown,) = await listed(client)
    assert (shown.applied_revision, shown.failed_revision) == (1, 2)
    assert shown.failure == failed()
    assert shown.failed_at.ToNanoseconds() >= shown.applied_at.ToNanoseconds()
    await send(client, report(revision=1))  # it went back to what worked
    (shown,) = await listed(client)
    assert (shown.applied_revision, shown.failed_revision) == (1, 2)
    await send(client, report(revision=2))
    (shown,) = await listed(client)
    assert (shown.applied_revision, shown.failed_revision) == (2, 0)
    assert not shown.HasField("failure")


async def test_reports_are_of_updates_that_were_released_all_or_none(client):
    await release(client, "care", 2)
    for wrong in (
        report(revision=3),
        report("nowhere"),
        report(kind=HINT),
        report(revision=2**64 - 1),
    ):
        refusal = await refusal_of(send(client, report(), wrong))
        assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "UPDATE_NOT_FOUND")
    assert await listed(client) == []


async def test_a_report_of_another_history_is_not_recorded(client):
    await release(client, "care")
    epoch = (await client.update("care")).history_epoch
    response = await send(
        client, report(history_epoch=epoch), report(kind=WARM_START, history_epoch="other")
    )
    assert (response.recorded, response.other_history) == (1, 1)
    assert [status.kind for status in await listed(client)] == [PRIOR]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"subscriber": ""}, "subscriber"),
        ({"subscriber": "-x"}, "subscriber"),
        ({"subscriber": "x" * 129}, "subscriber"),
        ({"subscriber": "a\nb"}, "subscriber"),
        ({"reports": []}, "reports"),
        ({"reports": [report()] * 257}, "reports"),
        ({"reports": [report(cohort="")]}, "reports[0].cohort"),
        ({"reports": [report(kind=0)]}, "reports[0].kind"),
        ({"reports": [report(revision=0)]}, "reports[0].revision"),
        ({"reports": [report(history_epoch="e" * 65)]}, "reports[0].history_epoch"),
        ({"reports": [report(failure=failed(code=0))]}, "reports[0].failure.code"),
        ({"reports": [report(failure=failed(code=17))]}, "reports[0].failure.code"),
        ({"reports": [report(failure=failed("x" * 513))]}, "reports[0].failure.message"),
        ({"reports": [report(failure=failed("\x1b[31m"))]}, "reports[0].failure.message"),
        ({"reports": [report(failure=failed("a\u2028b"))]}, "reports[0].failure.message"),
    ],
)
async def test_hostile_reports_are_refused_by_field(client, fields, field):
    request = wire_pb2.ReportAppliedRequest(
        **{"subscriber": "site_001", "reports": [report()], **fields}
    )
    refusal = await refusal_of(client.interchange.ReportApplied(request, timeout=DEADLINE_S))
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "CONTRACT_VIOLATION")
    assert field in {violated for violated, _ in refusal.violations}


async def test_listings_choose_a_cohort_and_come_in_pages(client):
    await release(client, "care")
    await release(client, "trade")
    for number in range(5):
        await send(client, report(), report("trade"), subscriber=f"site_{number}")
    assert {status.cohort for status in await listed(client, "trade")} == {"trade"}
    request = admin_service_pb2.ListAppliedRequest(cohort="care", page_size=2)
    names, pages = [], 0
    while True:
        response = await client.admin.ListApplied(request, timeout=DEADLINE_S)
        names += [status.subscriber for status in response.applied]
        pages += 1
        request.page_token = response.next_page_token
        if not request.page_token:
            break
    assert names == [f"site_{number}" for number in range(5)]
    assert pages == 3
    for wrong in ({"cohort": "nowhere"}, {"page_size": 1001}, {"page_token": "x"}):
        request = admin_service_pb2.ListAppliedRequest(**wrong)
        refusal = await refusal_of(client.admin.ListApplied(request, timeout=DEADLINE_S))
        assert refusal.reason in ("COHORT_UNKNOWN", "CONTRACT_VIOLATION")


async def test_reports_count_in_metrics_without_a_name(server, client):
    await release(client, "care")
    await send(client, report(), subscriber="loud-name")
    await send(client, report(failure=failed("loud text")))
    counts = server.service.telemetry.snapshot()
    assert counts['fmi_apply_reports_total{outcome="applied"}'] == 1
    assert counts['fmi_apply_reports_total{outcome="failed"}'] == 1
    assert not any("loud" in name for name in counts)


async def test_a_restart_forgets_reports_and_takes_new_ones(data_dir):
    async with running_server(data_dir) as server, Client(server.target) as client:
        await release(client, "care", 2)
        await send(client, report(revision=2))
    async with running_server(data_dir) as server, Client(server.target) as client:
        assert await listed(client) == []
        await send(client, report(revision=2))
        assert [status.applied_revision for status in await listed(client)] == [2]
