"""The packet that opens a cohort says so, since a mistyped name opens one too."""

from __future__ import annotations

import os

import pytest
from server_harness import Client, msp, refusal_of

from fmi.v1 import admin_service_pb2, cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.testing import running_server

WARNING = "header.cohort: opens cohort 'helathcare' with its first packet; is the name mistyped?"


async def test_the_first_packet_of_a_cohort_carries_a_warning_and_the_second_none(client):
    first, second = msp("a", "helathcare"), msp("b", "helathcare")
    (told,) = await client.emit(first)
    assert (told.status, list(told.warnings)) == (wire_pb2.EMIT_STATUS_ACCEPTED, [WARNING])
    assert not (await client.emit(second))[0].warnings
    assert not (await client.emit(first))[0].warnings  # a duplicate opens nothing


async def test_of_a_batch_one_packet_carries_it(client):
    packets = [msp(f"site-{i}", "helathcare") for i in range(40)]
    request = wire_pb2.EmitStreamRequest(packets=packet_pb2.PacketBatch(packets=packets))
    (answer,) = await client.batches(request)
    assert (answer.packets, answer.accepted) == (40, 39)  # those with nothing else to say
    (told,) = answer.exceptions
    assert (told.index, list(told.warnings)) == (0, [WARNING])


async def test_other_warnings_stand_beside_it(client):
    (told,) = await client.emit(msp("a", "helathcare", schema_hash="0" * 64))
    assert "schema_hash" in told.warnings[0]
    assert told.warnings[1:] == [WARNING]


async def test_the_default_cohort_has_no_name_to_mistype(client):
    assert not (await client.emit(msp("a")))[0].warnings


async def test_a_cohort_is_known_after_a_restart(data_dir):
    for warnings in ([WARNING], []):
        async with running_server(data_dir) as server, Client(server.target) as client:
            (told,) = await client.emit(msp("a", "helathcare"))
            assert list(told.warnings) == warnings


def closed(**signals):
    spec = cohort_pb2.CohortSpec(name="care")
    for name, section in signals.items():
        spec.signals.add(name=name, section=section)
    return spec


CONTROLLER, METRICS = cohort_pb2.SIGNAL_SECTION_CONTROLLER, cohort_pb2.SIGNAL_SECTION_METRICS


@pytest.mark.parametrize("sites", [1, 4])  # below the quorum the packets wait to be counted
async def test_a_first_spec_may_not_shut_out_what_sites_send(client, sites):
    await client.emit(*(msp(f"s{i}", "care", controller={"tau": 0.5}) for i in range(sites)))
    refusal = await refusal_of(client.put_spec(closed(other=METRICS)))
    assert refusal.reason == "SPEC_CHANGE_UNSAFE"
    assert 'signals["tau"]: is not among the signals' in refusal.message
    refusal = await refusal_of(client.put_spec(closed(tau=METRICS)))
    assert "is declared in metrics, but sites send it in controller" in refusal.message
    await client.put_spec(closed(tau=CONTROLLER, other=METRICS))


@pytest.mark.parametrize(("bound", "value"), [("upper", 0.6), ("lower", 0.95)])
async def test_a_first_spec_may_not_shut_out_the_values_that_sites_send(client, bound, value):
    taus = [0.9, 0.9, 0.9, 0.9, 0.5 if bound == "upper" else 0.97]
    await client.emit(*(msp(f"s{i}", "care", controller={"tau": x}) for i, x in enumerate(taus)))
    spec = closed(tau=CONTROLLER)
    setattr(spec.signals[0], bound, value)
    refusal = await refusal_of(client.put_spec(spec))
    assert refusal.reason == "SPEC_CHANGE_UNSAFE"
    limits = "[-inf, 0.6]" if bound == "upper" else "[0.95, inf]"
    told = f"is declared in {limits}, but 4 of the 5 sites that send it have values outside"
    assert f'signals["tau"]: {told}' in refusal.message
    await client.put_spec(spec, force=True)
    for site, edge in (("at", value), ("in", 0.55 if bound == "upper" else 0.96)):
        await client.emit(msp(site, "care", controller={"tau": edge}))


async def test_a_first_spec_that_shuts_out_is_taken_by_force(client, caplog):
    await client.emit(msp("s", "care", controller={"tau": 0.5}))
    with caplog.at_level("INFO"):
        await client.put_spec(closed(other=METRICS), force=True)
    assert "cohort care was changed by force: signals[" in caplog.text
    assert "cohort care is declared, schema hash" in caplog.text


async def test_an_open_cohort_may_be_declared_open(client):
    await client.emit(msp("s", "care", controller={"tau": 0.5}))
    spec = closed(other=METRICS)
    spec.free_signals = True
    await client.put_spec(spec)


async def test_the_operators_log_tells_what_became_of_cohorts_and_packets(data_dir, caplog):
    with caplog.at_level("INFO"):
        async with running_server(data_dir) as server, Client(server.target) as client:
            packet = msp("site-1", "care")
            await client.emit(packet)
            request = admin_service_pb2.SetQuarantineRequest(
                domain_id="site-1", packet_id=packet.header.packet_id, quarantined=True
            )
            await client.admin.SetQuarantine(request)
    assert (
        f"listens on {server.target}: process {os.getpid()}, packets in {data_dir}" in caplog.text
    )
    assert "cohort care is opened by the first packet, from site-1" in caplog.text
    told = f"packet {packet.header.packet_id} of site site-1 is put into quarantine"
    assert told in caplog.text


async def test_the_log_warns_of_private_cohorts_where_nobody_is_authenticated(data_dir, caplog):
    async with running_server(data_dir) as server, Client(server.target) as client:
        spec = closed(tau=CONTROLLER)
        spec.signals[0].lower, spec.signals[0].upper = 0.0, 1.0
        spec.privacy.dp_epsilon, spec.privacy.dp_delta, spec.privacy.dp_epochs = 1.0, 1e-6, 2
        assert "is private, but" not in caplog.text
        await client.put_spec(spec)
        assert "cohort care is private, but callers are not authenticated" in caplog.text
    caplog.clear()
    async with running_server(data_dir):
        pass
    assert "cohort care is private, but callers are not authenticated" in caplog.text
