"""The packet that opens a cohort says so, since a mistyped name opens one too."""

from __future__ import annotations

from server_harness import Client, msp

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import packet_pb2
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
