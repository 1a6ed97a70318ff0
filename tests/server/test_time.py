"""Time: sites whose clocks are wrong, packets out of order; the policies of docs/time.md on a real server."""

from __future__ import annotations

import time

import pytest
from server_harness import Client, identity, msp, pop, refusal_of, spec

from fmi.v1 import cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.testing import running_server

HOUR = 3600.0


def at(seconds: float, packet: packet_pb2.Packet) -> packet_pb2.Packet:
    """Emit a packet so many seconds from now, by its site's clock."""
    packet.header.emitted_at.FromNanoseconds(int((time.time() + seconds) * 1e9))
    return packet


def signal(value: float, seconds: float = 0.0, site: str = "site", **fields) -> packet_pb2.Packet:
    return at(seconds, msp(site, "care", controller={"tau": value}, **fields))


async def declare(client: Client, **ingest) -> None:
    settings = cohort_pb2.IngestSpec()
    for name, seconds in ingest.items():
        getattr(settings, name).FromNanoseconds(int(seconds * 1e9))
    aggregation = cohort_pb2.AggregationSpec(vote_min_sites=1)
    await client.put_spec(spec("care", aggregation=aggregation, ingest=settings))


async def tau(client: Client) -> float:
    await client.release("care")
    return (await client.update("care")).prior_update.prior["tau"]


def clock_warnings(result) -> list[str]:
    return [text for text in result.warnings if text.startswith("header.emitted_at")]


# A clock that is behind


async def test_a_packet_older_than_the_cohort_takes_is_stale(client):
    await declare(client, max_age=HOUR)
    await client.emit(signal(1.0, -HOUR + 60))
    refusal = await refusal_of(client.emit(signal(2.0, -HOUR - 60)))
    assert (refusal.reason, refusal.retry_s) == ("PACKET_STALE", None)
    assert refusal.violations == (("header.emitted_at", "fmi.policy.max_age"),)
    assert await tau(client) == 1.0


async def test_a_clock_that_fell_back_is_told_that_its_signals_are_overtaken(client):
    await declare(client, max_age=2 * HOUR)
    (first,) = await client.emit(signal(1.0))
    assert not clock_warnings(first)
    (late,) = await client.emit(signal(2.0, -HOUR))
    assert late.status == wire_pb2.EMIT_STATUS_ACCEPTED
    (warning,) = clock_warnings(late)
    assert "3600 s before" in warning
    assert "was the clock set back?" in warning
    assert await tau(client) == 1.0, "as it says, the newer one holds"
    (other,) = await client.emit(signal(3.0, -HOUR, site="another"))
    assert not clock_warnings(other), "what is old is a matter of each site's own"


async def test_what_is_overtaken_is_told_in_batches_and_after_a_restart_too(data_dir):
    async with running_server(data_dir) as server, Client(server.target) as client:
        await declare(client)
        await client.emit(signal(1.0))
    async with running_server(data_dir) as server, Client(server.target) as client:
        response = await client.emit_encoded(identity(signal(2.0, -60), signal(3.0, 0.5)))
        late, timely = response.results
        assert len(clock_warnings(late)) == 1
        assert not clock_warnings(timely)
        batch = packet_pb2.PacketBatch(packets=[signal(4.0, -60), signal(5.0)])
        (answer,) = await client.batches(wire_pb2.EmitStreamRequest(packets=batch))
        assert (answer.accepted, [result.index for result in answer.exceptions]) == (1, [0])
        assert await tau(client) == 5.0


async def test_outcomes_are_never_overtaken_and_packets_side_by_side_may_pass_each_other(client):
    await declare(client)
    await client.emit(signal(1.0))
    (outcome,) = await client.emit(at(-60, pop("site", "care")))
    (neighbour,) = await client.emit(signal(1.0, -0.5))
    assert not clock_warnings(outcome)
    assert not clock_warnings(neighbour)


# A clock that is ahead


async def test_a_packet_further_ahead_than_the_cohort_takes_is_refused(client):
    await declare(client, max_clock_skew=60)
    refusal = await refusal_of(client.emit(signal(1.0, 120)))
    assert refusal.reason == "PACKET_FROM_FUTURE"
    assert refusal.violations == (("header.emitted_at", "fmi.policy.max_clock_skew"),)


@pytest.mark.parametrize("restart", [False, True], ids=["same server", "restarted"])
@pytest.mark.parametrize("released", [False, True], ids=["in one release", "in two"])
async def test_a_clock_that_was_ahead_does_not_shadow_the_site(data_dir, restart, released):
    """A packet from the future counts as of its receipt, so the next one replaces it."""
    async with running_server(data_dir) as server, Client(server.target) as client:
        await declare(client, max_clock_skew=24 * HOUR)
        (ahead,) = await client.emit(signal(1.0, 23 * HOUR))
        (warning,) = clock_warnings(ahead)
        assert "82800 s ahead" in warning
        if released:
            assert await tau(client) == 1.0
        (set_right,) = await client.emit(signal(2.0))
        assert not clock_warnings(set_right)
        if not restart:
            assert await tau(client) == 2.0
            lineage = (await client.update("care")).prior_update.lineage
            assert lineage.window.ToNanoseconds() < HOUR * 1e9
    if restart:
        async with running_server(data_dir) as server, Client(server.target) as client:
            assert await tau(client) == 2.0


async def test_what_a_site_sent_is_kept_as_it_sent_it(server, client):
    await declare(client, max_clock_skew=24 * HOUR)
    packet = signal(1.0, 20 * HOUR)
    given = packet_pb2.Packet()
    given.CopyFrom(packet)
    await server.service.emit(given)
    assert given == packet
    (stored,) = await server.service.store.load("care")
    assert packet_pb2.Packet.FromString(stored.record.payload) == packet


# Packets and windows out of order


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in a batch"])
async def test_the_newest_emission_holds_in_whatever_order_packets_arrive(client, together):
    await declare(client)
    packets = [signal(2.0, -20), signal(3.0, -10), signal(1.0, -30)]
    if together:
        await client.emit_encoded(identity(*packets))
    else:
        await client.emit(*packets)
    assert await tau(client) == 3.0


async def test_windows_that_end_before_they_begin_are_refused(client):
    await declare(client)
    packet = signal(1.0)
    packet.msp.window_span.start, packet.msp.window_span.end = 7, 6
    refusal = await refusal_of(client.emit(packet))
    assert refusal.violations == (("msp.window_span", "fmi.window_span.order"),)


async def test_windows_out_of_order_count_by_the_time_of_emission(client):
    """The server does not know a site's windows: a later emission holds, whichever window it is of."""
    await declare(client)
    await client.emit(signal(1.0, -10, window_span=(10, 19)))
    (again,) = await client.emit(signal(2.0, 0, window_span=(0, 9)))
    assert not again.warnings
    assert await tau(client) == 2.0
