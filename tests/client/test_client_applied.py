"""Reports of what was applied, through both clients, to the operator's view."""

from __future__ import annotations

import asyncio

import pytest

from fmi.v1 import interchange_service_pb2, update_pb2
from fmi_client import (
    AsyncFMIClient,
    ConfigurationError,
    FMIClient,
    FMIEmitter,
    UpdateNotFoundError,
)
from fmi_server.testing import running_server


@pytest.fixture
async def client():
    async with (
        running_server() as server,
        AsyncFMIClient(server.target, domain_id="site_001", cohort="care") as opened,
    ):
        yield opened


async def released(client) -> update_pb2.Update:
    for site in range(3):
        packet = FMIEmitter(f"s{site}", cohort="care").emit_msp(controller={"tau": 0.9})
        await client.emit(packet)
    await client.admin.release_now("care")
    return await client.get_update("care", "prior")


async def test_what_was_applied_and_what_failed_reaches_the_operator(client):
    update = await released(client)
    assert await client.report_applied(update)
    (shown,) = await client.admin.list_applied("care")
    assert (shown.subscriber, shown.applied_revision) == ("site_001", update.revision)
    assert await client.report_failed(update, ValueError("tau\n is\x00 out of range"), code=3)
    (shown,) = await client.admin.list_applied()
    assert shown.failed_revision == update.revision
    assert shown.failure == interchange_service_pb2.ApplyFailure(
        code=3, message="tau  is  out of range"
    )


async def test_a_long_reason_is_cut_to_what_the_contract_has_room_for(client):
    update = await released(client)
    for reason in ("é" * 400, "x" * 511 + "é", "\ud800"):
        assert await client.report_failed(update, reason)
        (shown,) = await client.admin.list_applied()
        assert len(shown.failure.message.encode()) <= 512
    assert shown.failure.code == 2


async def test_what_the_server_does_not_keep_is_said(client):
    update = await released(client)
    other = update_pb2.Update()
    other.CopyFrom(update)
    other.history_epoch = "another"
    assert not await client.report_applied(other)
    other.CopyFrom(update)
    other.revision += 1
    with pytest.raises(UpdateNotFoundError):
        await client.report_applied(other)
    for code in (0, 17):
        with pytest.raises(ConfigurationError, match="code"):
            await client.report_failed(update, "x", code=code)
    async with AsyncFMIClient(client.target) as nameless:
        with pytest.raises(ConfigurationError, match="domain_id"):
            await nameless.report_applied(update)


async def test_the_blocking_client_reports_lists_and_changes_its_filter(client):
    update = await released(client)

    def work() -> None:
        with FMIClient(client.target, domain_id="site_002") as blocking:
            assert blocking.report_applied(update)
            assert blocking.report_failed(update, "no")
            (shown,) = blocking.admin.list_applied("care")
            assert (shown.subscriber, shown.failure.message) == ("site_002", "no")
            with blocking.subscribe("nothing", "prior") as subscription:
                assert next(subscription.events()).HasField("snapshot_end")
                (status,) = blocking.admin.list_subscribers()
                assert (status.subscriber, list(status.cohorts)) == ("site_002", ["nothing"])
                subscription.change("care", "prior")
                assert subscription.changing
                assert next(subscription) == update

    await asyncio.to_thread(work)


async def test_long_listings_are_read_to_the_end(client):
    update = await released(client)
    request = interchange_service_pb2.ReportAppliedRequest(
        reports=[
            interchange_service_pb2.ApplyReport(
                cohort="care", kind=update.kind, revision=update.revision
            )
        ]
    )
    for number in range(1203):
        request.subscriber = f"s{number}"
        await client._caller.stubs().interchange.ReportApplied(request)
    listed = await client.admin.list_applied()
    assert [status.subscriber for status in listed] == [f"s{number}" for number in range(1203)]
