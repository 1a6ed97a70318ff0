"""Emit and the other unary calls, against a real server."""

from __future__ import annotations

import asyncio
import datetime as dt

import grpc
import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from scripted_server import FAST, aborts, answers, packet_of_bytes, status, update

from fmi.v1 import (
    admin_service_pb2,
    cohort_pb2,
    error_pb2,
    interchange_service_pb2,
    packet_pb2,
    registry_service_pb2,
    update_pb2,
)
from fmi_client import (
    AsyncFMIClient,
    ClientClosedError,
    ConfigurationError,
    ConnectionFailedError,
    ContractError,
    DeadlineError,
    FMIEncoder,
    InvalidFilterError,
    NotFoundError,
    OverloadedError,
    PacketPolicyError,
    PacketTooLargeError,
    ProtocolError,
    RetryPolicy,
    SpecError,
    StoreUnavailableError,
)
from fmi_client._channel import MAX_SEND_BYTES
from fmi_client.receipts import EmitStatus
from fmi_client.retry import NO_RETRY


async def test_emit_msp_sends_what_the_emitter_builds(server, connect):
    client = await connect(profile_class="icu", provenance={"regime_tag": "winter"})
    receipt = await client.emit_msp(metrics={"gain_p50": 0.15}, controller={"tau": 0.9})
    (request,) = server.seen("Emit")
    header = request.packet.header
    assert (header.domain_id, header.cohort, header.profile_class) == ("site_001", "care", "icu")
    assert header.provenance.regime_tag == "winter"
    assert dict(request.packet.msp.controller) == {"tau": 0.9}
    assert receipt.ok
    assert receipt.status is EmitStatus.ACCEPTED
    assert (receipt.packet_id, receipt.sequence) == (header.packet_id, 1)


async def test_pop_and_ccs_are_sent_too(server, connect):
    client = await connect()
    await client.emit_pop({"tau": 0.8}, {"loss": 0.4}, {"loss": 0.3}, windows=4)
    await client.emit_ccs([("dose", "outcome", 0.4, "direct")], trust=0.9)
    pop, ccs = (request.packet for request in server.seen("Emit"))
    assert pop.pop.windows == 4
    assert ccs.ccs.causal_pairs[0].weight == 0.4


async def test_plain_packet_is_completed_and_keeps_what_it_says(server, connect):
    client = await connect()
    receipt = await client.emit({"type": "msp", "domain_id": "other", "controller": {"tau": 1}})
    header = server.seen("Emit")[0].packet.header
    assert (header.domain_id, header.cohort, header.rev) == ("other", "care", 1)
    assert header.packet_id == receipt.packet_id


async def test_typed_packet_is_sent_as_it_is(server, connect):
    client = await connect()
    packet = packet_pb2.Packet(header=packet_pb2.PacketHeader(packet_id="not an id"))
    await client.emit(packet)
    assert server.seen("Emit")[0].packet == packet


async def test_retry_after_unavailable_sends_the_same_packet(server, connect):
    server.script("Emit", *[aborts(grpc.StatusCode.UNAVAILABLE)] * 2)
    client = await connect()
    receipt = await client.emit_msp(controller={"tau": 0.9})
    first, second, third = server.seen("Emit")
    assert first == second == third
    assert receipt.ok


async def test_answer_lost_after_the_packet_was_taken_is_a_duplicate_and_a_success(server, connect):
    async def takes_and_breaks(request, context):
        server.take(request.packet.header.packet_id)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "")

    server.script("Emit", takes_and_breaks)
    client = await connect()
    receipt = await client.emit_msp(controller={"tau": 0.9})
    assert receipt.status is EmitStatus.DUPLICATE
    assert receipt.ok
    assert len(server.taken) == 1


async def test_bare_cancelled_is_tried_again(server, connect):
    server.script("Emit", aborts(grpc.StatusCode.CANCELLED))
    client = await connect()
    assert (await client.emit_msp(controller={"tau": 0.9})).ok


async def test_overloaded_waits_as_long_as_the_server_says(server, connect):
    refusal = status(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after_s=0.05)
    server.script("Emit", aborts(refusal))
    client = await connect()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    assert (await client.emit_msp(controller={"tau": 0.9})).ok
    assert loop.time() - begun >= 0.05


async def test_retries_end_with_the_typed_error(server, connect):
    refusal = status(
        grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", retry_after_s=0.0, request_id="r-7"
    )
    server.script("Emit", *[aborts(refusal)] * 9)
    client = await connect(retry=RetryPolicy(initial_s=0.001, max_s=0.001, max_attempts=3))
    with pytest.raises(StoreUnavailableError) as caught:
        await client.emit_msp(controller={"tau": 0.9})
    assert len(server.seen("Emit")) == 3
    assert caught.value.request_id == "r-7"
    assert caught.value.retryable


async def test_refusal_is_not_tried_again_and_names_every_rule(server, connect):
    refusal = status(
        grpc.StatusCode.INVALID_ARGUMENT,
        "PACKET_STALE",
        "too old",
        violations=[("header.emitted_at", "fmi.policy.max_age", "is 9 days old")],
    )
    server.script("Emit", aborts(refusal))
    client = await connect()
    with pytest.raises(PacketPolicyError) as caught:
        await client.emit_msp(controller={"tau": 0.9})
    assert len(server.seen("Emit")) == 1
    assert caught.value.reason == "PACKET_STALE"
    assert caught.value.violations[0].rule_id == "fmi.policy.max_age"


async def test_exhausted_without_retry_info_is_not_tried_again(server, connect):
    server.script("Emit", aborts(grpc.StatusCode.RESOURCE_EXHAUSTED))
    client = await connect()
    with pytest.raises(OverloadedError):
        await client.emit_msp(controller={"tau": 0.9})
    assert len(server.seen("Emit")) == 1


async def test_bad_packet_never_leaves(server, connect):
    client = await connect()
    with pytest.raises(ContractError):
        await client.emit_msp(controller={"tau": float("inf")})
    with pytest.raises(ContractError):
        await client.emit({"type": "msp", "wrong_field": 1})
    assert server.seen("Emit") == []


async def test_quarantined_packet_gives_a_receipt_with_the_reason(server, connect):
    result = interchange_service_pb2.EmitResult(
        status=interchange_service_pb2.EMIT_STATUS_QUARANTINED,
        sequence=9,
        received_at=timestamp_pb2.Timestamp(seconds=1_700_000_000),
        warnings=["schema hash differs"],
        refusal=error_pb2.Refusal(message="trust 0.1 is below 0.5"),
    )
    server.script("Emit", answers(interchange_service_pb2.EmitResponse(results=[result])))
    client = await connect()
    receipt = await client.emit_msp(controller={"tau": 0.9})
    assert receipt.status is EmitStatus.QUARANTINED
    assert not receipt.ok
    assert not receipt.refused
    assert receipt.error is not None
    assert receipt.received_at == dt.datetime.fromtimestamp(1_700_000_000, tz=dt.UTC)
    assert receipt.warnings == ("schema hash differs",)


async def test_answer_without_a_result_breaks_the_contract(server, connect):
    server.script("Emit", answers(interchange_service_pb2.EmitResponse()))
    client = await connect()
    with pytest.raises(ProtocolError):
        await client.emit_msp(controller={"tau": 0.9})


async def test_no_answer_in_time_is_a_deadline_error(server, connect):
    async def hangs(_request, _context):
        await asyncio.Event().wait()

    server.script("Emit", *[hangs] * 9)
    server.script("GetContract", hangs)
    client = await connect(
        timeout_s=0.5, retry=RetryPolicy(initial_s=0.001, max_s=0.001, max_attempts=3)
    )
    with pytest.raises(DeadlineError, match=server.target):
        await client.emit_msp(controller={"tau": 0.9})
    assert len(server.seen("Emit")) == 3
    with pytest.raises(DeadlineError):
        await client.contract()
    assert len(server.seen("GetContract")) == 1


async def test_deadlines_are_tried_again_within_the_policys(server, connect):
    async def hangs(_request, _context):
        await asyncio.Event().wait()

    server.script("Emit", *[hangs] * 9)
    client = await connect(
        timeout_s=0.5, retry=RetryPolicy(initial_s=0.001, max_s=0.001, deadline_s=0.05)
    )
    with pytest.raises(DeadlineError):
        await client.emit_msp(controller={"tau": 0.9})
    assert len(server.seen("Emit")) == 1


async def test_packet_that_was_taken_too_late_counts_once(server, connect):
    async def takes_and_hangs(request, _context):
        server.take(request.packet.header.packet_id)
        await asyncio.Event().wait()

    server.script("Emit", takes_and_hangs)
    client = await connect(timeout_s=1.0)
    receipt = await client.emit_pop({"tau": 1}, {"loss": 1}, {"loss": 0.5})
    assert receipt.status is EmitStatus.DUPLICATE
    first, second = server.seen("Emit")
    assert first == second
    assert len(server.taken) == 1


async def test_error_has_the_packet_so_that_it_can_be_sent_again(server, connect):
    async def takes_and_breaks(request, context):
        server.take(request.packet.header.packet_id)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "")

    server.script("Emit", takes_and_breaks)
    client = await connect(retry=NO_RETRY)
    with pytest.raises(ConnectionFailedError) as caught:
        await client.emit({"type": "pop", "bundle": {"tau": 1}, "before": {}, "after": {}})
    error = caught.value
    assert error.packet is not None
    assert error.packet_id == server.seen("Emit")[0].packet.header.packet_id
    receipt = await client.emit(error.packet)
    assert (receipt.packet_id, receipt.status) == (error.packet_id, EmitStatus.DUPLICATE)
    assert len(server.taken) == 1


async def test_error_of_what_is_no_packet_has_none(connect):
    client = await connect()
    with pytest.raises(ContractError) as caught:
        await client.emit({"type": "msp", "wrong_field": 1})
    assert caught.value.packet is None
    assert caught.value.packet_id == ""


async def test_packet_above_the_servers_limit_is_refused_in_the_client(server, connect):
    client = await connect()
    with pytest.raises(PacketTooLargeError, match=str(MAX_SEND_BYTES)) as caught:
        await client.emit(packet_of_bytes(MAX_SEND_BYTES))
    assert not caught.value.retryable
    assert server.seen("Emit") == []


async def test_answer_that_cannot_be_read_breaks_the_contract():
    def garbles(kind):
        async def step(_request, _context):
            return b"\xff\xff"

        async def stream(_request, _context):
            yield b"\xff\xff"

        if kind == "Emit":
            return grpc.unary_unary_rpc_method_handler(step)
        if kind == "Subscribe":
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.stream_stream_rpc_method_handler(stream)

    server = grpc.aio.server()
    methods = {name: garbles(name) for name in ("Emit", "EmitStream", "Subscribe")}
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("fmi.v1.InterchangeService", methods)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with AsyncFMIClient(f"127.0.0.1:{port}", domain_id="s", retry=FAST) as client:
            with pytest.raises(ProtocolError, match="cannot be read"):
                await client.emit_msp(controller={"tau": 0.9})
            with pytest.raises(ProtocolError, match="cannot be read"):
                await client.emit_many([client.emitter.emit_msp(controller={"tau": 0.9})])
            with pytest.raises(ProtocolError, match="cannot be read"):
                await anext(client.subscribe("care"))
    finally:
        await server.stop(None)


async def test_nobody_listens():
    async with AsyncFMIClient("127.0.0.1:9", domain_id="s", retry=FAST) as client:
        with pytest.raises(ConnectionFailedError) as caught:
            await client.emit_msp(controller={"tau": 0.9})
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert "127.0.0.1:9" in caught.value.message


async def test_server_that_comes_back_is_found_again(server, connect):
    client = await connect(
        retry=RetryPolicy(initial_s=0.05, max_s=0.2, max_attempts=100, deadline_s=30)
    )
    await client.emit_msp(controller={"tau": 0.9})
    await server.stop()
    late = asyncio.create_task(client.emit_msp(controller={"tau": 0.8}))
    await server.start(int(server.target.rpartition(":")[2]))
    assert (await late).ok
    assert len(server.taken) == 2


async def test_cancelling_a_call_cancels_it(server, connect):
    started = asyncio.Event()

    async def hangs(_request, _context):
        started.set()
        await asyncio.Event().wait()

    server.script("Emit", hangs)
    client = await connect()
    call = asyncio.create_task(client.emit_msp(controller={"tau": 0.9}))
    await started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_closing_under_a_call_says_so(server, connect):
    started = asyncio.Event()

    async def hangs(_request, _context):
        started.set()
        await asyncio.Event().wait()

    server.script("Emit", hangs)
    client = await connect()
    call = asyncio.create_task(client.emit_msp(controller={"tau": 0.9}))
    await started.wait()
    await client.aclose()
    with pytest.raises(ClientClosedError):
        await call
    with pytest.raises(ClientClosedError):
        await client.emit_msp(controller={"tau": 0.9})
    with pytest.raises(ClientClosedError):
        client.subscribe("care")
    await client.aclose()


async def test_building_packets_needs_a_domain_id(connect):
    client = await connect(domain_id=None)
    with pytest.raises(ConfigurationError, match="domain_id"):
        await client.emit_msp(controller={"tau": 0.9})


async def test_token_goes_with_every_call(server, connect):
    client = await connect(token="t0ken")  # noqa: S106
    await client.emit_msp(controller={"tau": 0.9})
    assert server.metadata[0]["authorization"] == "Bearer t0ken"


async def test_encoder_with_a_dictionary_packs_single_packets(server, connect, emitter):
    samples = [emitter.emit_msp(controller={"tau": i / 300, "rho": i}) for i in range(300)]
    encoder = FMIEncoder(dictionary=FMIEncoder.train(samples, dictionary_bytes=2048))
    server.encoder = encoder
    client = await connect(encoder=encoder)
    receipt = await client.emit(samples[0])
    encoded = server.seen("Emit")[0].encoded
    assert encoded.dictionary_id == encoder.dictionary_id != 0
    assert receipt.ok


async def test_validate_reports_what_emit_would_say(server, connect):
    refusal = error_pb2.Refusal(
        reason=error_pb2.ERROR_REASON_CONTRACT_VIOLATION,
        message="breaks 1 rule",
        violations=[error_pb2.Violation(field="msp", rule_id="r", description="d")],
    )
    server.script(
        "ValidatePacket",
        answers(registry_service_pb2.ValidatePacketResponse(valid=True, warnings=["w"])),
        answers(registry_service_pb2.ValidatePacketResponse(refusal=refusal)),
    )
    client = await connect()
    good = await client.validate({"type": "msp", "controller": {"tau": 0.9}})
    assert good.valid
    assert good.warnings == ("w",)
    assert good.violations == ()
    bad = await client.validate(packet_pb2.Packet())
    assert not bad.valid
    assert isinstance(bad.error, ContractError)
    assert [v.rule_id for v in bad.violations] == ["r"]


async def test_reads(server, connect):
    warm = interchange_service_pb2.GetWarmStartResponse(prior_revision=3)
    contract = registry_service_pb2.GetContractResponse(revision=1, descriptors=b"x")
    spec = registry_service_pb2.GetCohortSpecResponse(
        spec=cohort_pb2.CohortSpec(name="care"), schema_hash="ab"
    )
    dictionary = registry_service_pb2.GetDictionaryResponse(dictionary_id=7, data=b"d")
    server.script("GetUpdate", answers(interchange_service_pb2.GetUpdateResponse(update=update(4))))
    server.script("GetWarmStart", answers(warm))
    server.script("GetContract", answers(contract))
    server.script("GetCohortSpec", answers(spec))
    server.script(
        "ListCohortSpecs", answers(registry_service_pb2.ListCohortSpecsResponse(specs=[spec.spec]))
    )
    server.script("GetDictionary", answers(dictionary))
    client = await connect(profile_class="icu")
    assert await client.get_update("care", "prior", 4) == update(4)
    assert server.seen("GetUpdate")[0].kind == update_pb2.UPDATE_KIND_PRIOR
    assert await client.get_warm_start(regime="winter", concepts={"load": 1}) == warm
    asked = server.seen("GetWarmStart")[0]
    assert (asked.cohort, asked.profile_class, asked.regime_tag) == ("care", "icu", "winter")
    assert dict(asked.concepts) == {"load": 1.0}
    assert await client.contract(include_descriptors=True) == contract
    assert server.seen("GetContract")[0].include_descriptors
    assert await client.cohort_spec() == spec
    assert server.seen("GetCohortSpec")[0].cohort == "care"
    assert await client.cohort_specs() == [spec.spec]
    assert await client.dictionary(7) == dictionary


async def test_unknown_kind_is_told_before_anything_is_sent(server, connect):
    client = await connect()
    with pytest.raises(InvalidFilterError, match="causal_consensus"):
        await client.get_update("care", "priors")
    assert server.seen("GetUpdate") == []


async def test_admin_calls(server, connect):
    cohort = admin_service_pb2.CohortStatus(cohort="care", sites=2)
    site = admin_service_pb2.SiteStatus(cohort="care", domain_id="s")
    put = admin_service_pb2.PutCohortSpecResponse(schema_hash="ab", changed=True)
    server.script("ListCohorts", answers(admin_service_pb2.ListCohortsResponse(cohorts=[cohort])))
    server.script("ListSites", answers(admin_service_pb2.ListSitesResponse(sites=[site])))
    server.script("PutCohortSpec", answers(put))
    server.script("SetQuarantine", answers(admin_service_pb2.SetQuarantineResponse(changed=True)))
    server.script("ReleaseNow", answers(admin_service_pb2.ReleaseNowResponse(updates=[update(1)])))
    server.script(
        "RegisterDictionary", answers(admin_service_pb2.RegisterDictionaryResponse(dictionary_id=5))
    )
    client = await connect()
    assert await client.admin.list_cohorts() == [cohort]
    assert await client.admin.list_sites("care") == [site]
    plain = {"name": "care", "release": {"min_interval": "2s"}}
    assert await client.admin.put_cohort_spec(plain, dry_run=True) == put
    asked = server.seen("PutCohortSpec")[0]
    assert asked.spec.release.min_interval == duration_pb2.Duration(seconds=2)
    assert asked.dry_run
    assert not asked.force
    assert await client.admin.set_quarantine("s", "p", quarantined=True, reason="odd")
    assert await client.admin.release_now("care") == [update(1)]
    assert await client.admin.register_dictionary(b"d") == 5


async def test_quarantine_is_listed_page_by_page(server, connect):
    pages = [
        admin_service_pb2.ListQuarantineResponse(
            packets=[admin_service_pb2.QuarantinedPacket(sequence=s) for s in sequences],
            next_page_token=token,
        )
        for sequences, token in (((1, 2), "2"), ((3,), ""))
    ]
    server.script("ListQuarantine", *map(answers, pages))
    client = await connect()
    assert [p.sequence for p in await client.admin.list_quarantine("care")] == [1, 2, 3]
    assert [r.page_token for r in server.seen("ListQuarantine")] == ["", "2"]


async def test_unreadable_spec_is_told_before_anything_is_sent(server, connect):
    client = await connect()
    with pytest.raises(SpecError) as caught:
        await client.admin.put_cohort_spec({"name": "care", "no_such_field": 1})
    assert caught.value.reason == "SPEC_INVALID"
    assert server.seen("PutCohortSpec") == []


async def test_not_found(server, connect):
    server.script("GetDictionary", aborts(status(grpc.StatusCode.NOT_FOUND, "NOT_FOUND")))
    client = await connect()
    with pytest.raises(NotFoundError):
        await client.dictionary(3)
