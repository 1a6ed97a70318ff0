"""Local privacy in the emitter and the clients: everything that leaves went through it, once."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3

import grpc
import pytest
from private_packets import build, plain, private, wire
from scripted_server import aborts, answers

from fmi.v1 import interchange_service_pb2, registry_service_pb2
from fmi_client import (
    ConnectionFailedError,
    ContractError,
    FMIEmitter,
    Outbox,
    PrivacyAccountError,
    PrivacyBudgetError,
    PrivacyCoverageError,
)
from fmi_client.receipts import EmitStatus


def test_what_an_emitter_builds_is_private():
    privacy = private()
    emitter = FMIEmitter("s", cohort="care", privacy=privacy)
    for packet in (
        emitter.emit_msp(metrics={"gain": 0.5}, controller={"tau": 0.9}),
        emitter.emit_plain(plain()),
    ):
        assert packet.header.provenance.HasField("applied_privacy")
        assert packet.header.domain_id == "s"
    assert privacy.emissions_left == 6


def sent(server):
    return [request.packet for request in server.seen("Emit")]


@pytest.mark.parametrize("outbox", [False, True])
async def test_a_retry_sends_the_same_bytes(server, connect, outbox):
    server.script("Emit", *[aborts(grpc.StatusCode.UNAVAILABLE) for _ in range(3)])
    privacy = private()
    client = await connect(privacy=privacy, **({"outbox": Outbox()} if outbox else {}))
    await client.emit_msp(metrics={"gain": 0.5}, controller={"tau": 0.9})
    if outbox:
        assert await client.flush(30.0)
    attempts = sent(server)
    assert len(attempts) == 4
    assert len({wire(packet) for packet in attempts}) == 1
    assert attempts[0].header.provenance.HasField("applied_privacy")
    assert privacy.emissions_left == 7


@pytest.mark.parametrize("what", ["built", "typed", "plain"])
async def test_what_is_emitted_again_is_the_same_packet(server, connect, what):
    carried = []
    answer = server.answer

    def answer_and_keep(request):
        carried.extend(server.encoder.decode(request.encoded))
        return answer(request)

    server.answer = answer_and_keep
    privacy = private()
    client = await connect(privacy=privacy)
    packet = {
        "built": lambda: client.emitter.emit_msp(metrics={"gain": 0.5}, controller={"tau": 0.9}),
        "typed": build,
        "plain": lambda: plain("01900000-0000-7000-8000-000000000001"),
    }[what]()
    assert (await client.emit(packet)).ok
    await client.emit(packet)
    await client.emit_many([packet])
    assert (len(sent(server)), len(carried)) == (2, 1)
    assert len({wire(emitted) for emitted in [*sent(server), *carried]}) == 1
    assert privacy.emissions_left == 7


async def test_the_packet_of_an_error_is_the_private_one(server, connect):
    server.script("Emit", *[aborts(grpc.StatusCode.UNAVAILABLE) for _ in range(5)])
    privacy = private()
    client = await connect(privacy=privacy)
    with pytest.raises(ConnectionFailedError) as caught:
        await client.emit(plain())
    await client.emit(caught.value.packet)
    assert len({wire(emitted) for emitted in sent(server)}) == 1
    assert privacy.emissions_left == 7


@pytest.mark.parametrize("outbox", [False, True])
async def test_of_many_each_is_private_or_told_of(connect, outbox):
    privacy = private(emissions=2)
    client = await connect(privacy=privacy, **({"outbox": Outbox()} if outbox else {}))
    uncovered = FMIEmitter("site_001").emit_msp(metrics={"loss": 1.0})
    receipts = await client.emit_many([plain(), uncovered, build(), plain(), {"type": "none"}])
    statuses = [receipt.status for receipt in receipts]
    taken = EmitStatus.SPOOLED if outbox else EmitStatus.ACCEPTED
    assert statuses == [taken, EmitStatus.REFUSED, taken, EmitStatus.REFUSED, EmitStatus.REFUSED]
    assert isinstance(receipts[1].error, PrivacyCoverageError)
    assert receipts[1].packet_id == uncovered.header.packet_id
    assert isinstance(receipts[3].error, PrivacyBudgetError)
    assert isinstance(receipts[4].error, ContractError)


@pytest.mark.parametrize("outbox", [False, True])
async def test_an_account_that_fails_ends_a_batch_and_what_was_private_before_is_told(
    connect, outbox, tmp_path
):
    path = tmp_path / "account"
    client = await connect(
        privacy=private(account=path), **({"outbox": Outbox()} if outbox else {})
    )

    def source():
        yield plain()
        yield plain()
        path.write_bytes(b"no database at all, but long enough" * 40)
        yield plain()

    with pytest.raises(PrivacyAccountError) as caught:
        await client.emit_many(source(), batch_packets=1)
    told = [receipt for receipt in caught.value.receipts if receipt is not None]
    assert len(told) + len(caught.value.unanswered) == 2
    assert not caught.value.retryable


async def test_a_dry_run_does_not_show_what_is_not_private(server, connect):
    privacy = private()
    client = await connect(privacy=privacy)
    for packet in (build(), plain()):
        with pytest.raises(PrivacyCoverageError):
            await client.validate(packet)
    assert not server.seen("ValidatePacket")
    assert privacy.spent == 0.0


async def test_a_question_does_not_tell_what_no_packet_may(server, connect):
    answer = answers(interchange_service_pb2.GetWarmStartResponse(prior_revision=3))
    server.script("GetWarmStart", *[answer] * 2)
    client = await connect(privacy=private())
    for told in ({"regime": "winter"}, {"concepts": {"drift": 0.4}}):
        with pytest.raises(PrivacyCoverageError):
            await client.get_warm_start(**told)
    assert (await client.get_warm_start()).prior_revision == 3
    public = await connect(privacy=private(regime_is_public=True))
    assert (await public.get_warm_start(regime="winter")).prior_revision == 3
    with pytest.raises(PrivacyCoverageError):
        await public.get_warm_start(regime="winter", concepts={"drift": 0.4})
    assert len(server.seen("GetWarmStart")) == 2


async def test_the_event_loop_does_not_wait_for_an_account(server, connect, tmp_path):
    path = tmp_path / "account"
    client = await connect(privacy=private(account=path))
    server.script("GetContract", answers(registry_service_pb2.GetContractResponse(revision=1)))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        emitting = asyncio.create_task(client.emit(plain()))
        assert (await client.contract()).revision == 1
        assert not emitting.done()
    assert (await emitting).ok
