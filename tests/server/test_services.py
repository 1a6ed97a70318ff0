"""The services around the interchange, and how the server fails: in words, with a hint, never silently."""

from __future__ import annotations

import asyncio
import hashlib
import logging

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from server_harness import (
    DEADLINE_S,
    Client,
    Events,
    ccs,
    eventually,
    identity,
    msp,
    packet_keys,
    refusal_of,
    rows,
    spec,
    trained_dictionary,
    zstd,
)

from fmi.descriptors import DELIVERY, INGEST, SERVICE_NAMES, contract_hash
from fmi.v1 import admin_service_pb2, cohort_pb2, packet_pb2, registry_service_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.errors import OverloadedError
from fmi_server.storage import SqliteStore
from fmi_server.testing import running_server
from fmi_server.transport.health import HealthServicer

Code = grpc.StatusCode
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
MIB = 2**20


class FaultyStore(SqliteStore):
    """A real store whose writes wait at a gate, or fail with whatever the test says."""

    def __init__(self, path) -> None:
        super().__init__(path)
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0
        self.fault: Exception | None = None

    async def append(self, records):
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        if self.fault is not None:
            raise self.fault
        return await super().append(records)


@pytest.fixture
def faulty(tmp_path) -> FaultyStore:
    return FaultyStore(tmp_path / "faulty.sqlite3")


# Health, reflection, channelz


async def health_of(client: Client, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(client.channel)
    request = health_pb2.HealthCheckRequest(service=service)
    return (await stub.Check(request, timeout=DEADLINE_S)).status


async def test_health_is_serving_for_the_server_and_each_service(client):
    for service in ("", *SERVICE_NAMES):
        assert await health_of(client, service) == SERVING, service
    refusal = await refusal_of(health_of(client, "fmi.v1.Nothing"))
    assert refusal.code == Code.NOT_FOUND


async def test_a_drain_tells_health_subscribers_and_streams_and_answers_what_is_in_flight(faulty):
    """Readiness falls first; then who waits is told to connect again; then calls at work end well."""
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        stop = asyncio.Event()
        ready: asyncio.Future = asyncio.get_running_loop().create_future()

        async def serve() -> None:
            async with running_server(store=faulty, drain_s=10.0) as server:
                ready.set_result(server)
                await stop.wait()

        serving = tasks.create_task(serve())
        server = await ready
        async with Client(server.target) as client, client.subscribed("**") as events:
            await events.snapshot()
            watch = health_pb2_grpc.HealthStub(client.channel).Watch(
                health_pb2.HealthCheckRequest()
            )
            assert (await watch.read()).status == SERVING
            idle = client.interchange.EmitStream()
            await idle.write(wire_pb2.EmitStreamRequest(encoded=identity(msp("streaming"))))
            assert (await idle.read()).accepted == 1

            faulty.gate.clear()
            in_flight = tasks.create_task(client.emit(msp("in-flight")))
            await eventually(lambda: faulty.waiting == 1)
            stop.set()

            assert (await watch.read()).status == NOT_SERVING
            ended = await events.refusal()
            assert (ended.code, ended.reason) == (Code.UNAVAILABLE, "SERVER_DRAINING")
            assert 1.0 <= ended.retry_s < 2.0
            ended = await refusal_of(idle.read())
            assert (ended.code, ended.reason) == (Code.UNAVAILABLE, "SERVER_DRAINING")
            assert 1.0 <= ended.retry_s < 2.0
            late = await refusal_of(client.emit(msp("late")))
            assert (late.code, late.reason, late.retry_s) == (
                Code.UNAVAILABLE,
                "SERVER_DRAINING",
                1.0,
            )
            again = await refusal_of(
                Events(
                    client.interchange.Subscribe(wire_pb2.SubscribeRequest(cohorts=["**"]))
                ).next()
            )
            assert again.reason == "SERVER_DRAINING"
            assert not serving.done()
            faulty.gate.set()
            (result,) = await in_flight
            assert result.status == wire_pb2.EMIT_STATUS_ACCEPTED
            # The client hangs up; a call that stays open would be given its time.
            watch.cancel()
        await serving
    async with SqliteStore(faulty.path) as store:
        assert [p.record.domain_id for p in await store.load()] == ["streaming", "in-flight"]


async def test_who_watches_health_does_not_hold_a_drain(data_dir):
    async with running_server(data_dir, drain_s=200.0) as server:
        client = Client(server.target)
        watch = health_pb2_grpc.HealthStub(client.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        left = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - left < 100
    assert (await watch.read()).status == NOT_SERVING
    await client.channel.close()


@pytest.mark.parametrize("way", ["packet", "envelope"])
async def test_a_drain_ends_at_its_deadline_though_a_write_hangs(faulty, way, monkeypatch):
    monkeypatch.setattr("fmi_server.service.CLOSE_S", 0.3)
    async with running_server(store=faulty, drain_s=0.3) as server:
        client = Client(server.target)
        faulty.gate.clear()
        call = client.emit(msp()) if way == "packet" else client.emit_encoded(identity(msp()))
        hanging = asyncio.ensure_future(refusal_of(call))
        await eventually(lambda: faulty.waiting == 1)
        left = asyncio.get_running_loop().time()
    took = asyncio.get_running_loop().time() - left
    assert took < 60, "the deadline of the drain holds: the write never ends"
    refusal = await hanging
    assert refusal.code in (Code.UNAVAILABLE, Code.CANCELLED)
    await client.channel.close()


async def test_reflection_lists_and_describes_the_services(client):
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)

    async def ask(**fields):
        async def requests():
            yield reflection_pb2.ServerReflectionRequest(**fields)

        (answer,) = [answer async for answer in stub.ServerReflectionInfo(requests())]
        return answer

    listed = {s.name for s in (await ask(list_services="")).list_services_response.service}
    assert listed == {
        *SERVICE_NAMES,
        "grpc.channelz.v1.Channelz",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    found = await ask(file_containing_symbol="fmi.v1.Packet")
    data = found.file_descriptor_response.file_descriptor_proto[0]
    file = descriptor_pb2.FileDescriptorProto.FromString(data)
    assert file.name == "fmi/v1/packet.proto"


async def test_channelz_counts_calls(client):
    await client.emit(msp())
    stub = channelz_pb2_grpc.ChannelzStub(client.channel)
    servers = (await stub.GetServers(channelz_pb2.GetServersRequest())).server
    assert any(server.data.calls_succeeded >= 1 for server in servers)


async def test_a_watcher_of_health_is_told_of_each_state_there_is(client):
    stub = health_pb2_grpc.HealthStub(client.channel)
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="fmi.v1.Nothing"))
    known = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAMES[0]))
    async with asyncio.timeout(DEADLINE_S):
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        assert (await known.read()).status == SERVING
    unknown.cancel()
    known.cancel()


async def test_health_lists_the_services(client):
    if not hasattr(health_pb2_grpc.HealthStub(client.channel), "List"):
        pytest.skip("this version of grpcio-health-checking has no List")
    answer = await health_pb2_grpc.HealthStub(client.channel).List(health_pb2.HealthListRequest())
    states = {name: state.status for name, state in answer.statuses.items()}
    assert states == dict.fromkeys(["", INGEST, DELIVERY, *SERVICE_NAMES], SERVING)


async def test_a_slow_watcher_gets_the_last_state_and_a_stop_is_for_good():
    health = HealthServicer(["a", "b"], max_watchers=1)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="a"), None)
    assert (await anext(watch)).status == NOT_SERVING
    health.tell("a", well=True)
    health.tell("a", well=False)
    health.tell("a", well=True)
    assert (await anext(watch)).status == SERVING
    health.tell("b", well=True)  # says nothing to who watches another
    health.stop()
    health.tell("a", well=True)
    assert (await anext(watch)).status == NOT_SERVING
    assert health.watchers == 1
    with pytest.raises(OverloadedError):
        await anext(health.Watch(health_pb2.HealthCheckRequest(), None))
    await watch.aclose()
    assert health.watchers == 0


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_what_is_no_request_of_health_is_refused_with_a_reason_and_not_logged(
    client, caplog, method
):
    """Whoever reaches the port may ask: it may fill neither the memory nor the log."""
    name = "unary_unary" if method == "Check" else "unary_stream"
    for request, rule in (
        (b"\xff\xff", "fmi.request.malformed"),
        (b"\x0a\x80\x80\x40" + b"a" * 2**20, "fmi.request.too_large"),
        (
            b"\x12\x80\x80\x40" + b"a" * 2**20,
            "fmi.request.too_large",
        ),  # of a field that is not known
    ):
        call = getattr(client.channel, name)(f"/grpc.health.v1.Health/{method}")(request)
        refusal = await refusal_of(call if method == "Check" else call.read())
        assert (refusal.code, refusal.violations) == (
            Code.INVALID_ARGUMENT,
            (("request", rule),),
        )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "method",
    [
        "grpc.channelz.v1.Channelz/GetServers",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_what_is_no_request_of_channelz_or_reflection_is_refused_with_a_reason(
    client, caplog, method
):
    if "Channelz" in method:
        call = client.channel.unary_unary(f"/{method}")(b"\xff\xff")
    else:
        stream = client.channel.stream_stream(f"/{method}")(iter([b"\xff\xff"]))
        call = stream.read()
    refusal = await refusal_of(call)
    assert refusal.violations == (("request", "fmi.request.malformed"),)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_watchers_of_health_take_nothing_from_the_others(data_dir):
    """They need no credentials, and may stay for as long as they like."""
    async with (
        running_server(data_dir, max_subscribers=3, max_inflight=2) as server,
        Client(server.target) as client,
    ):
        stub = health_pb2_grpc.HealthStub(client.channel)
        watchers = []
        for _ in range(3):
            watchers.append(stub.Watch(health_pb2.HealthCheckRequest()))
            assert (await watchers[-1].read()).status == SERVING
        refusal = await refusal_of(stub.Watch(health_pb2.HealthCheckRequest()).read())
        assert (refusal.reason, refusal.retry_s) == ("OVERLOADED", 5.0)
        async with client.subscribed("**"), client.subscribed("**"), client.subscribed("**"):
            await client.emit(msp())
            assert await health_of(client) == SERVING
        server.service.memory_watch.limit_bytes = 0  # the watch itself leaves it as it is
        server.service.memory_watch.pressed = True
        assert await health_of(client) == SERVING
        watchers[0].cancel()
        refusal = await refusal_of(stub.Watch(health_pb2.HealthCheckRequest()).read())
        assert refusal.reason == "OVERLOADED"
        server.service.memory_watch.pressed = False


@pytest.mark.parametrize(
    ("settings", "there"),
    [
        ({}, True),
        ({"listen": "0.0.0.0:0", "insecure": True}, False),
        ({"admin": False}, False),
    ],
)
async def test_channelz_is_for_this_machine_where_callers_are_not_authenticated(
    data_dir, settings, there
):
    """It tells who is connected from where."""
    async with running_server(data_dir, **settings) as server:
        port = server.target.rpartition(":")[2]
        async with Client(f"127.0.0.1:{port}") as client:
            stub = channelz_pb2_grpc.ChannelzStub(client.channel)
            if there:
                await stub.GetServers(channelz_pb2.GetServersRequest())
                return
            refusal = await refusal_of(stub.GetServers(channelz_pb2.GetServersRequest()))
            assert refusal.code == Code.UNIMPLEMENTED
            reflected = reflection_pb2_grpc.ServerReflectionStub(
                client.channel
            ).ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            listed = (await reflected.read()).list_services_response.service
            assert "grpc.channelz.v1.Channelz" not in {service.name for service in listed}


async def test_reflection_and_channelz_can_be_closed(data_dir):
    async with (
        running_server(data_dir, reflection=False) as server,
        Client(server.target) as client,
    ):
        stub = channelz_pb2_grpc.ChannelzStub(client.channel)
        refusal = await refusal_of(stub.GetServers(channelz_pb2.GetServersRequest()))
        assert refusal.code == Code.UNIMPLEMENTED
        assert await health_of(client) == SERVING


# The registry


async def test_the_contract_is_served_with_its_hash_and_descriptors(client):
    request = registry_service_pb2.GetContractRequest(include_descriptors=True)
    contract = await client.registry.GetContract(request, timeout=DEADLINE_S)
    assert contract.contract_hash == contract_hash()
    assert contract.revision == contract.oldest_supported_revision == 1
    assert contract.server_version

    # A peer without our code builds the same messages from it, and finds the hash again.
    files = descriptor_pb2.FileDescriptorSet.FromString(contract.descriptors).file
    pool = descriptor_pool.DescriptorPool()
    for file in files:
        pool.Add(file)
    assert {f.name for f in pool.FindMessageTypeByName("fmi.v1.Packet").fields} == {
        "header",
        "msp",
        "pop",
        "ccs",
    }
    digest = hashlib.sha256()
    for file in sorted((f for f in files if f.package == "fmi.v1"), key=lambda f: f.name):
        data = pool.FindFileByName(file.name).serialized_pb
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    assert digest.hexdigest() == contract.contract_hash

    without = await client.registry.GetContract(registry_service_pb2.GetContractRequest())
    assert not without.descriptors
    now = asyncio.get_running_loop().time()
    assert without.server_time.ToNanoseconds() > contract.server_time.ToNanoseconds() > now


async def test_the_dry_run_says_what_emit_would_and_stores_nothing(client, data_dir):
    await client.put_spec(spec("care", ingest=cohort_pb2.IngestSpec(min_trust=0.5)))
    before = rows(data_dir)

    async def dry(packet: packet_pb2.Packet):
        request = registry_service_pb2.ValidatePacketRequest(packet=packet)
        return await client.registry.ValidatePacket(request, timeout=DEADLINE_S)

    good, warned = msp("a", "care"), msp("a", "care", schema_hash="0" * 64)
    doubtful, wrong = ccs("a", "care", trust=0.1), msp("", "care")
    elsewhere = msp("a", "not-yet-open")
    for packet in (good, elsewhere):
        answer = await dry(packet)
        assert answer.valid
        assert not answer.HasField("refusal")
    opening = list(answer.warnings)
    assert not (await dry(good)).warnings
    answer = await dry(warned)
    assert answer.valid
    warning = list(answer.warnings)
    answer = await dry(doubtful)
    assert (answer.valid, answer.quarantined) == (False, True)
    reason = answer.refusal.message
    answer = await dry(wrong)
    assert (answer.valid, answer.quarantined) == (False, False)
    violations = {(v.field, v.rule_id) for v in answer.refusal.violations}
    refusal = await refusal_of(
        client.registry.ValidatePacket(registry_service_pb2.ValidatePacketRequest())
    )
    assert refusal.violations == (("packet", "required"),)
    assert rows(data_dir) == before
    assert set(await client.cohorts()) == {"care"}

    assert list((await client.emit(warned))[0].warnings) == warning != []
    assert list((await client.emit(elsewhere))[0].warnings) == opening != []
    assert (await client.emit(doubtful))[0].refusal.message == reason != ""
    assert set((await refusal_of(client.emit(wrong))).violations) == violations != set()


async def test_dictionaries_are_kept_and_served(data_dir):
    first, second = trained_dictionary("a"), trained_dictionary("b")
    assert first.dict_id() != second.dict_id()
    async with running_server(data_dir) as server, Client(server.target) as client:
        refusal = await refusal_of(
            client.registry.GetDictionary(registry_service_pb2.GetDictionaryRequest())
        )
        assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "NOT_FOUND")
        for dictionary in (first, second, first):
            request = admin_service_pb2.RegisterDictionaryRequest(data=dictionary.as_bytes())
            answer = await client.admin.RegisterDictionary(request, timeout=DEADLINE_S)
            assert answer.dictionary_id == dictionary.dict_id()
        changed = bytearray(first.as_bytes())
        changed[-1] ^= 1
        request = admin_service_pb2.RegisterDictionaryRequest(data=bytes(changed))
        refusal = await refusal_of(client.admin.RegisterDictionary(request))
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "SPEC_CHANGE_UNSAFE")

    packets = [msp(f"site-{i}") for i in range(5)]
    async with running_server(data_dir) as server, Client(server.target) as client:
        request = registry_service_pb2.GetDictionaryRequest()
        newest = await client.registry.GetDictionary(request)
        assert newest.dictionary_id == second.dict_id()
        assert newest.data == second.as_bytes()
        request = registry_service_pb2.GetDictionaryRequest(dictionary_id=first.dict_id())
        assert (await client.registry.GetDictionary(request)).data == first.as_bytes()
        response = await client.emit_encoded(zstd(*packets, dictionary=first))
        assert {r.status for r in response.results} == {wire_pb2.EMIT_STATUS_ACCEPTED}
    assert len(packet_keys(data_dir)) == 5


async def test_what_is_no_dictionary_is_called_one_that_is_refused(client):
    request = admin_service_pb2.RegisterDictionaryRequest(data=b"no dictionary")
    refusal = await refusal_of(client.admin.RegisterDictionary(request))
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "SPEC_INVALID")
    assert refusal.message.startswith("dictionary refused: data: is no trained zstd dictionary")


# How it fails


async def test_every_refusal_has_an_id_of_its_own(client):
    refusal = await refusal_of(client.emit(msp("")))
    assert refusal.request_id
    assert refusal.trailing_request_id == refusal.request_id
    stream = client.interchange.Subscribe(wire_pb2.SubscribeRequest())
    ended = await Events(stream).refusal()
    assert ended.trailing_request_id == ended.request_id
    assert refusal.request_id != ended.request_id
    assert all(len(i) == 16 for i in (refusal.request_id, ended.request_id))


@pytest.mark.parametrize("way", ["packet", "envelope", "stream"])
async def test_an_unknown_exception_tells_an_id_and_keeps_its_secret(faulty, caplog, way):
    faulty.fault = RuntimeError("the password is hunter2")
    async with running_server(store=faulty) as server, Client(server.target) as client:
        call = {
            "packet": lambda: client.emit(msp()),
            "envelope": lambda: client.emit_encoded(identity(msp())),
            "stream": lambda: client.batches(
                wire_pb2.EmitStreamRequest(encoded=identity(msp(), msp("b")))
            ),
        }[way]
        with caplog.at_level(logging.ERROR):
            refusal = await refusal_of(call())
        assert (refusal.code, refusal.reason) == (Code.INTERNAL, "INTERNAL")
        assert refusal.request_id in refusal.message
        assert "hunter2" not in repr(refusal)
        assert refusal.retry_s is None
        (record,) = (r for r in caplog.records if r.levelno == logging.ERROR)
        assert refusal.request_id in record.getMessage()
        assert "hunter2" in str(record.exc_info[1])
        faulty.fault = None
        assert (await client.emit(msp()))[0].status == wire_pb2.EMIT_STATUS_ACCEPTED
        assert server.service._inflight == 0


async def test_a_full_disk_is_unavailable_with_a_time_to_try_again(tmp_path):
    """A real SQLITE_FULL: what was acknowledged stays, what was not leaves no trace."""
    store = SqliteStore(tmp_path / "full.sqlite3")
    async with running_server(store=store) as server, Client(server.target) as client:
        kept = [msp("before")]
        await client.emit(*kept)
        await store.set_max_bytes(256 * 1024)
        filler = {f"m{i}": 1.0 for i in range(1000)}
        refusal = None
        for number in range(100):
            packet = msp(f"filler-{number}", metrics=filler)
            try:
                await client.emit(packet)
            except grpc.aio.AioRpcError:
                refusal = await refusal_of(client.emit(packet))
                break
            kept.append(packet)
        assert refusal is not None
        assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "STORE_UNAVAILABLE")
        assert refusal.metadata == {"cause": "disk_full"}
        assert refusal.retry_s == 2.0
        assert str(tmp_path) not in repr(refusal), "where the store lies is the operator's business"
        stream = await refusal_of(
            client.batches(wire_pb2.EmitStreamRequest(encoded=identity(packet, packet)))
        )
        assert (stream.code, stream.reason) == (Code.UNAVAILABLE, "STORE_UNAVAILABLE")

        # Reading goes on, and with room again the same packet is taken.
        assert (await client.sites())["default:before"].packets["msp"] == 1
        await store.set_max_bytes(None)
        (result,) = await client.emit(packet)
        assert result.status == wire_pb2.EMIT_STATUS_ACCEPTED
        kept.append(packet)
        stored = [p.record.packet_id for p in await store.load()]
        assert stored == [p.header.packet_id for p in kept]


async def test_a_release_waits_for_a_full_disk(tmp_path):
    """A failed release is tried again, under the revision that it would have had."""
    store = SqliteStore(tmp_path / "full.sqlite3")
    async with running_server(store=store) as server, Client(server.target) as client:
        await client.put_spec(
            spec("care", aggregation=cohort_pb2.AggregationSpec(vote_min_sites=1))
        )
        names = {f"signal_{i:03}": 1.0 for i in range(500)}
        await client.emit(msp("a", "care", controller=names))
        await client.release("care")
        await client.emit(msp("a", "care", controller=dict.fromkeys(names, 2.0)))
        await store.set_max_bytes(1)
        request = admin_service_pb2.ReleaseNowRequest(cohort="care")
        refusal = await refusal_of(client.admin.ReleaseNow(request, timeout=DEADLINE_S))
        assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "STORE_UNAVAILABLE")
        assert (await client.update("care")).revision == 1
        assert (await client.cohorts())["care"].dirty
        await store.set_max_bytes(None)
        await client.release("care")
        latest = await client.update("care")
        assert latest.revision == 2
        assert dict(latest.prior_update.prior) == dict.fromkeys(names, 2.0)


async def test_past_the_bound_of_calls_there_is_a_time_to_try_again(faulty):
    async with (
        running_server(store=faulty, max_inflight=1) as server,
        Client(server.target) as client,
    ):
        faulty.gate.clear()
        first = asyncio.ensure_future(client.emit(msp("first")))
        await eventually(lambda: faulty.waiting == 1)
        for call in (
            client.emit(msp("second")),
            client.emit_encoded(identity(msp("second"))),
            client.batches(wire_pb2.EmitStreamRequest(encoded=identity(msp("second")))),
        ):
            refusal = await refusal_of(call)
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert 1.0 <= refusal.retry_s < 2.0
            assert refusal.metadata == {"resource": "calls at work"}
        faulty.gate.set()
        assert (await first)[0].status == wire_pb2.EMIT_STATUS_ACCEPTED
        assert (await client.emit(msp("third")))[0].status == wire_pb2.EMIT_STATUS_ACCEPTED
        assert [p.record.domain_id for p in await faulty.load()] == ["first", "third"]


async def test_past_the_bound_of_subscriptions_there_is_a_time_to_try_again(data_dir):
    async with (
        running_server(data_dir, max_subscribers=2) as server,
        Client(server.target) as client,
        client.subscribed("**") as first,
    ):
        await first.snapshot()
        async with client.subscribed("**") as second:
            await second.snapshot()
            third = client.interchange.Subscribe(wire_pb2.SubscribeRequest(cohorts=["**"]))
            refusal = await Events(third).refusal()
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert refusal.retry_s == 5.0
        await eventually(lambda: server.service.router.subscribers == 1)
        async with client.subscribed("**") as again:
            await again.snapshot()


async def test_a_damaged_page_is_data_loss_and_the_rest_is_served(data_dir):
    """Damage inside the file is told as such when it is met."""
    async with running_server(data_dir) as server, Client(server.target) as client:
        names = {f"m{i}": 1.0 for i in range(500)}
        await client.put_spec(spec("care", ingest=cohort_pb2.IngestSpec(min_trust=0.5)))
        await client.emit(*(msp(f"s{i}", "care", metrics=names) for i in range(20)))
        await client.emit(ccs("doubt", "care", trust=0.1))
        path = server.service.store.path
    content = path.read_bytes()
    at = content.rindex(b"below the cohort's")
    page = at // 8192 * 8192
    path.write_bytes(content[:page] + b"\xa5" * 8192 + content[page + 8192 :])
    try:
        async with running_server(data_dir) as server, Client(server.target) as client:
            request = admin_service_pb2.ListQuarantineRequest()
            refusal = await refusal_of(client.admin.ListQuarantine(request))
    except Exception as error:
        from fmi_server.storage.base import StoreCorruptError  # noqa: PLC0415 - only here

        assert isinstance(error, StoreCorruptError), error  # noqa: PT017 - it may come at the start
    else:
        assert (refusal.code, refusal.reason) == (Code.DATA_LOSS, "STORE_CORRUPT")
        assert str(data_dir) not in repr(refusal)
