"""IDENTIFIED while the server runs: new certificates, revoked and rotated credentials, changed rights."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import grpc
import pytest
import trustme
from identity_harness import (
    ACCESS,
    OPERATOR,
    YEAR,
    Office,
    calling,
    replaced,
    requests_of,
    secured,
    seed,
)
from server_harness import DEADLINE_S, PRIOR, Events, Refusal, eventually, identity, msp, spec

from fmi.v1 import admin_service_pb2 as admin_pb2
from fmi.v1 import cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import registry_service_pb2 as registry_pb2
from fmi_client import AccessDeniedError, AsyncFMIClient, TLSConfig
from fmi_server import audit
from fmi_server.authority import Authority, Issued
from fmi_server.certificates import read_client_certificate
from fmi_server.errors import SettingUnsupportedError
from fmi_server.testing import running_server
from fmi_server.tokens import changed_tokens, rotate_token
from fmi_server.transport import security

IN, RE, AD = "fmi.v1.InterchangeService/", "fmi.v1.RegistryService/", "fmi.v1.AdminService/"
CONTRACT = (f"{RE}GetContract", registry_pb2.GetContractRequest())


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch, caplog):
    monkeypatch.setattr(security, "LOOK_S", 0.02)
    caplog.set_level(logging.INFO)


@pytest.fixture
def office(tmp_path) -> Office:
    return Office(tmp_path / "office")


@contextlib.asynccontextmanager
async def subscribed(caller, *patterns, **fields):
    """A subscription that has its snapshot."""
    request = wire_pb2.SubscribeRequest(cohorts=patterns, **fields)
    call = caller.open(f"{IN}Subscribe", request)
    try:
        yield Events(call)
    finally:
        call.cancel()


async def end_of(events: Events) -> Refusal:
    return await events.refusal()


def changed_access(cohort, **lists):
    return spec(cohort, access=cohort_pb2.AccessSpec(**{**ACCESS[cohort], **lists}))


# The server's certificates


async def test_a_new_certificate_is_shown_to_new_connections_and_the_old_ones_go_on(office):
    token = office.token("member").text
    async with (
        secured(**office.tls, tokens=office.tokens) as server,
        calling(server.target, ca=office.ca, token=token) as old,
    ):
        assert (await old.outcome(*CONTRACT)).reason == "ok"
        # Another authority altogether: who trusts the old one only gets no new connection.
        root = Authority.create("new authority", now=office.now, lifetime=YEAR)
        signed = Authority(root.certificate, root.key).issue_server(
            ["127.0.0.1"], now=office.now, lifetime=YEAR
        )
        replaced(office.key, signed.key)
        replaced(office.cert, signed.certificate)
        async with calling(server.target, ca=root.certificate, token=token) as new:
            assert (await new.outcome(*CONTRACT)).reason == "ok"
        async with calling(server.target, ca=office.ca, token=token) as late:
            assert (await late.outcome(*CONTRACT)).reason == "UNAVAILABLE"
        assert (await old.outcome(*CONTRACT)).reason == "ok"


@pytest.mark.parametrize("bad", ["garbage", "another key", "expired", "gone"])
async def test_a_bad_certificate_is_told_of_once_and_the_old_one_stays(office, caplog, bad):
    token = office.token("member").text
    other = office.authority.issue_server(["127.0.0.1"], now=office.now, lifetime=YEAR)
    past = office.authority.issue_server(
        ["127.0.0.1"], now=office.now - 2 * YEAR, lifetime=timedelta(days=1)
    )
    key_before = office.key.read_bytes()
    async with secured(**office.tls, tokens=office.tokens) as server:
        match bad:
            case "garbage":
                replaced(office.cert, b"no certificate")
            case "another key":
                replaced(office.key, other.key)
            case "expired":
                replaced(office.key, past.key)
                replaced(office.cert, past.certificate)
            case "gone":
                office.cert.unlink()
        told = await eventually(
            lambda: [r.getMessage() for r in caplog.records if "not taken" in r.getMessage()]
        )
        assert str(office.cert) in told[-1] or str(office.key) in told[-1]
        for _ in range(3):
            async with calling(server.target, ca=office.ca, token=token) as caller:
                assert (await caller.outcome(*CONTRACT)).reason == "ok"
        await asyncio.sleep(0.1)
        again = [r for r in caplog.records if "not taken" in r.getMessage()]
        assert len(again) <= (2 if bad == "expired" else 1)  # two files were replaced there
        secret = key_before.decode().splitlines()[1]
        assert secret not in caplog.text
        # Both files right again: it goes on with the new pair.
        replaced(office.key, other.key)
        replaced(office.cert, other.certificate)
        await eventually(lambda: "a new version is in force" in caplog.text)
        async with calling(server.target, ca=office.ca, token=token) as caller:
            assert (await caller.outcome(*CONTRACT)).reason == "ok"


async def test_authorities_of_clients_are_changed_for_new_connections(office, tmp_path):
    other = Office(tmp_path / "other", name="other authority")
    async with secured(**office.tls, tls_client_ca=office.ca_file) as server:
        newcomer = other.client("member")
        async with calling(server.target, ca=office.ca, client=newcomer) as caller:
            assert (await caller.outcome(*CONTRACT)).reason == "UNAVAILABLE"
        replaced(office.ca_file, office.ca + other.ca)
        for client in (newcomer, office.client("member")):
            async with calling(server.target, ca=office.ca, client=client) as caller:
                assert (await caller.outcome(*CONTRACT)).reason == "ok"


# Credentials that end


async def test_a_revoked_token_ends_its_calls_and_subscriptions(office):
    doomed, kept = office.token("reader"), office.token("reader")
    async with (
        secured(tokens=office.tokens) as server,
        calling(server.target, token=doomed.text) as caller,
        calling(server.target, token=kept.text) as other,
        subscribed(caller, "**") as ending,
        subscribed(other, "**") as going_on,
    ):
        await ending.snapshot()
        await going_on.snapshot()
        office.revoke_token(doomed)
        refusal = await end_of(ending)
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "UNAUTHORIZED",
        )
        assert "revoked" in refusal.message
        assert (await caller.outcome(*CONTRACT)).reason == "UNAUTHENTICATED"
        assert (await other.outcome(*CONTRACT)).reason == "ok"
        await seed(server)
        assert {update.cohort for update in await going_on.updates(4)} <= {"care", "plaza"}


LIFETIMES_S = (3, 40)
"""Of what shall expire once it has opened something; the second is for a machine too slow for the first."""


async def test_a_token_that_expires_ends_its_subscription(office):
    for lifetime_s in LIFETIMES_S:
        token = office.token("reader", lifetime_s=lifetime_s)
        async with (
            secured(tokens=office.tokens) as server,
            calling(server.target, token=token.text) as caller,
            subscribed(caller, "**") as events,
        ):
            if not await began(events):
                continue
            refusal = await end_of(events)
            assert refusal.reason == "UNAUTHORIZED"
            assert "expired" in refusal.message
            assert (await caller.outcome(*CONTRACT)).reason == "UNAUTHENTICATED"
            return
    pytest.fail("it expired before it was used")


async def began(events) -> bool:
    try:
        await events.snapshot()
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_a_certificate_that_expires_or_is_revoked_ends_what_it_opened(office):
    for lifetime_s in LIFETIMES_S:
        if await expired_or_revoked(office, timedelta(seconds=lifetime_s)):
            return
    pytest.fail("it expired before it was used")


async def expired_or_revoked(office, lifetime) -> bool:
    brief = office.client("reader", lifetime=lifetime)
    doomed = office.client("reader")
    async with (
        secured(**office.mutual) as server,
        calling(server.target, ca=office.ca, client=brief) as one,
        calling(server.target, ca=office.ca, client=doomed) as two,
        subscribed(one, "**") as expiring,
        subscribed(two, "**") as ending,
    ):
        if not await began(expiring):
            return False
        await ending.snapshot()
        office.revoke(doomed)
        refusal = await end_of(ending)
        assert refusal.reason == "UNAUTHORIZED"
        assert "revoked" in refusal.message
        assert (await two.outcome(*CONTRACT)).reason == "UNAUTHENTICATED"
        refusal = await end_of(expiring)
        assert refusal.reason == "UNAUTHORIZED"
        assert "expired" in refusal.message
        # The connection is still there, and opens nothing any more.
        assert (await one.outcome(*CONTRACT)).reason == "UNAUTHENTICATED"
    return True


async def test_a_revoked_authority_ends_what_it_vouched_for(office):
    """One between the client and the authority that is known: the client shows it."""
    root = trustme.CA()
    child = root.create_child_ca()
    leaf = child.issue_cert(common_name="reader")
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    client = Issued(chain, leaf.private_key_pem.bytes())
    signer = Authority(root.cert_pem.bytes(), root.private_key_pem.bytes())
    office.ca_file.write_bytes(root.cert_pem.bytes())
    office.crl.write_bytes(signer.revocations(now=office.now))
    async with (
        secured(**office.mutual) as server,
        calling(server.target, ca=office.ca, client=client) as caller,
        subscribed(caller, "**") as events,
    ):
        await events.snapshot()
        replaced(office.crl, signer.revocations(revoked=[child.cert_pem.bytes()], now=office.now))
        refusal = await end_of(events)
        assert refusal.reason == "UNAUTHORIZED"
        assert "an authority on the way" in refusal.message
        assert (await caller.outcome(*CONTRACT)).reason == "UNAUTHENTICATED"


async def test_a_list_of_revoked_certificates_that_is_not_signed_is_not_taken(
    office, tmp_path, caplog
):
    other = Office(tmp_path / "other")  # of the same name, with another key
    doomed = office.client("reader")
    async with (
        secured(**office.mutual) as server,
        calling(server.target, ca=office.ca, client=doomed) as caller,
    ):
        replaced(
            office.crl, other.authority.revocations(revoked=[doomed.certificate], now=office.now)
        )
        await eventually(lambda: "signed by none" in caplog.text)
        assert (await caller.outcome(*CONTRACT)).reason == "ok"
        office.crl.write_bytes(office.authority.revocations(now=office.now))
        office.revoke(doomed)
        await eventually(lambda: caplog.text.count("a new version is in force"))
        assert (await caller.outcome(*CONTRACT)).reason == "UNAUTHENTICATED"


async def test_a_long_stream_of_packets_ends_when_its_token_does(office):
    token = office.token("member")
    async with (
        secured(tokens=office.tokens) as server,
        calling(server.target, token=token.text) as caller,
    ):
        stub = caller.channel.stream_stream(
            f"/{IN}EmitStream",
            request_serializer=wire_pb2.EmitStreamRequest.SerializeToString,
            response_deserializer=wire_pb2.EmitStreamResponse.FromString,
        )
        call = stub(metadata=caller.metadata)

        def batch():
            return wire_pb2.EmitStreamRequest(
                packets=packet_pb2.PacketBatch(packets=[msp("member", "care")])
            )

        await call.write(batch())
        assert (await call.read()).accepted == 1
        office.revoke_token(token)
        await eventually(lambda: refused(caller))
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(batch())
        refusal = Refusal.read(await failure(call))
        assert refusal.reason == "UNAUTHENTICATED"
        (site,) = await server.service.store.sites()
        assert site.msp_count == 1


async def refused(caller) -> bool:
    return (await caller.outcome(*CONTRACT)).reason == "UNAUTHENTICATED"


async def failure(call) -> grpc.aio.AioRpcError:
    async def read_to_the_end() -> None:
        async with asyncio.timeout(DEADLINE_S):
            while await call.read() is not grpc.aio.EOF:
                pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_to_the_end()
    return caught.value


async def test_a_token_for_something_else_ends_what_it_opened(office):
    token = office.token("gateway", "ward-1", "ward-2")
    async with (
        secured(tokens=office.tokens) as server,
        calling(server.target, token=token.text) as caller,
        subscribed(caller, "care", subscriber="ward-1") as events,
    ):
        await events.snapshot()
        with changed_tokens(office.tokens) as records:
            record = records[token.record.token_id]
            records[record.token_id] = replace(record, domain_ids=("ward-2",))
        assert (await end_of(events)).reason == "UNAUTHORIZED"


async def test_a_rotated_token_goes_on_through_its_grace(office):
    old = office.token("member")
    async with secured(tokens=office.tokens) as server:
        with changed_tokens(office.tokens) as records:
            aged, new = rotate_token(
                records[old.record.token_id],
                now=office.now.timestamp(),
                lifetime_s=60,
                grace_s=3600,
            )
            records |= {aged.token_id: aged, new.record.token_id: new.record}
        for token in (old, new):
            async with calling(server.target, token=token.text) as caller:
                await eventually(lambda caller=caller: admitted(caller))
        with changed_tokens(office.tokens) as records:
            del records[old.record.token_id]
        async with calling(server.target, token=old.text) as caller:
            await eventually(lambda: refused(caller))


async def admitted(caller) -> bool:
    return (await caller.outcome(*CONTRACT)).reason == "ok"


async def test_the_sdk_goes_on_with_the_new_token_in_its_file(office, tmp_path):
    old, new = office.token("reader"), office.token("reader")
    file = tmp_path / "site.token"
    file.write_text(f"{old.text}\n")
    async with (
        secured(tokens=office.tokens) as server,
        AsyncFMIClient(server.target, token=file) as client,
        client.subscribe("care") as updates,
    ):
        reading = asyncio.ensure_future(anext(updates))
        await eventually(lambda: server.service.router.subscribers)
        replaced(file, new.text.encode())
        office.revoke_token(old)
        await eventually(lambda: updates.statistics.reconnects)
        await seed(server)
        async with asyncio.timeout(DEADLINE_S):
            assert (await reading).cohort == "care"
        office.revoke_token(new)
        with pytest.raises(AccessDeniedError) as caught:
            await asyncio.wait_for(exhausted(updates), DEADLINE_S)
        assert caught.value.reason in ("UNAUTHORIZED", "UNAUTHENTICATED")


async def exhausted(updates) -> None:
    async for _ in updates:
        pass


async def test_the_sdk_shows_its_certificate(office, tmp_path):
    issued = office.client("member")
    (tmp_path / "client.crt").write_bytes(issued.certificate)
    (tmp_path / "client.key").write_bytes(issued.key)
    tls = TLSConfig(office.ca_file, tmp_path / "client.crt", tmp_path / "client.key")
    async with (
        secured(**office.mutual) as server,
        AsyncFMIClient(server.target, domain_id="member", cohort="care", tls=tls) as client,
    ):
        assert (await client.emit_msp(controller={"tau": 0.5})).status == "accepted"
        with pytest.raises(AccessDeniedError) as caught:
            await client.emit(msp("emitter", "care"))
        assert caught.value.reason == "DOMAIN_ID_MISMATCH"
        assert [v.field for v in caught.value.violations] == ["header.domain_id"]


# Rights that change


async def test_who_loses_a_cohort_is_told_and_gets_nothing_more_of_it(office):
    token = office.token("reader").text
    async with (
        secured(tokens=office.tokens) as server,
        calling(server.target, token=token) as caller,
        subscribed(caller, "**") as both,
        subscribed(caller, "plaza") as other,
    ):
        await seed(server)
        await both.until("snapshot_end")
        await other.until("snapshot_end")
        await server.service.put_cohort_spec(changed_access("care", subscribe=["member"]))
        refusal = await end_of(both)
        assert refusal.reason == "UNAUTHORIZED"
        assert "'care'" in refusal.message
        assert server.service.router.subscribers == 1, "who followed another cohort goes on"
        async with subscribed(caller, "**") as again:
            assert {u.cohort for u in await again.snapshot()} == {"plaza"}


@pytest.mark.parametrize("mode", ["latest", "every"])
@pytest.mark.parametrize("resumed", [False, True])
async def test_who_gains_a_cohort_gets_what_comes(office, mode, resumed):
    token = office.token("emitter").text
    every = wire_pb2.DELIVERY_MODE_EVERY if mode == "every" else wire_pb2.DELIVERY_MODE_LATEST
    async with (
        secured(tokens=office.tokens) as server,
        calling(server.target, token=token) as caller,
    ):
        await seed(server)
        async with subscribed(caller, "**", mode=every) as events:
            before = await events.until("snapshot_end")
            assert {e.update.cohort for e in before if e.HasField("update")} == {"plaza"}
        fields = {"resume_token": before[-1].resume_token} if resumed else {}
        async with subscribed(caller, "care", mode=every, **fields) as events:
            assert await events.snapshot() == []
            await server.service.put_cohort_spec(changed_access("care", subscribe=["emitter"]))
            if mode == "latest":  # at once, and what it was not for is told of as left out
                newest = [e for e in await events.until("update") if e.HasField("update")]
                assert [e.update.revision for e in newest] == [1]
            for round_ in (2, 3):
                for site in ("seed", "seed-2", "seed-3"):
                    await server.service.emit(msp(site, "care", controller={"tau": round_ / 10}))
                await server.service.release("care")
            kinds = {PRIOR}
            got = []
            while len(got) < 2:
                event = await events.next()
                if event.HasField("update") and event.update.kind in kinds:
                    got.append(event.update.revision)
            assert got == [2, 3]


async def test_a_start_in_a_hidden_cohort_is_a_start_in_one_that_nobody_has(office):
    token = office.token("emitter").text
    async with (
        secured(tokens=office.tokens) as server,
        calling(server.target, token=token) as caller,
    ):
        await seed(server)
        for mode in (wire_pb2.DELIVERY_MODE_LATEST, wire_pb2.DELIVERY_MODE_EVERY):
            told = {}
            for cohort in ("vault", "ghost"):
                for revision in (1, 2):
                    start = wire_pb2.StartRevision(cohort=cohort, kind=PRIOR, revision=revision)
                    request = wire_pb2.SubscribeRequest(
                        cohorts=["**"], start_revisions=[start], kinds=[PRIOR], mode=mode
                    )
                    outcome = await caller.outcome(f"{IN}Subscribe", request)
                    told[cohort, revision] = (
                        outcome.reason,
                        outcome.seen.replace("vault", "ghost") if revision == 2 else "",
                    )
            assert told["vault", 1] == told["ghost", 1] == ("ok", "")
            assert told["vault", 2] == told["ghost", 2]
            assert told["vault", 2][0] == "INVALID_FILTER"


async def test_nobody_ends_the_stream_of_another(office):
    """Who knows the name and the instance of a subscription cannot replace it under other credentials."""
    member, reader = office.token("member").text, office.token("reader").text
    instance = "instance-of-member-1"
    async with (
        secured(tokens=office.tokens) as server,
        calling(server.target, token=member) as one,
        calling(server.target, token=reader) as two,
        subscribed(one, "care", subscriber="member", instance_id=instance) as events,
    ):
        await events.snapshot()
        request = wire_pb2.SubscribeRequest(
            cohorts=["care"], subscriber="member", instance_id=instance
        )
        assert (await two.outcome(f"{IN}Subscribe", request)).reason == "DOMAIN_ID_MISMATCH"
        assert server.service.router.subscribers == 1


async def test_a_change_of_access_is_no_change_of_the_schema(office, data_dir):
    office.token("somebody")
    async with secured(data_dir, tokens=office.tokens) as server:
        before = server.service.cohorts.rules("care")
        rules, changed = await server.service.put_cohort_spec(
            changed_access("care", emit=["emitter"])
        )
        assert changed
        assert rules.schema_hash == before.schema_hash
        assert rules.access.emit == {"emitter"}
        (stored,) = [r for r in await server.service.store.cohorts() if r.name == "care"]
        assert list(cohort_pb2.CohortSpec.FromString(stored.spec).access.emit) == ["emitter"]


async def test_a_store_with_access_rules_is_not_opened_to_everybody(office, data_dir):
    """A setting that is lost does not open what was closed."""
    office.token("somebody")
    async with secured(data_dir, tokens=office.tokens):
        pass
    with pytest.raises(SettingUnsupportedError) as caught:
        async with running_server(data_dir):
            pass
    assert "authenticates nobody" in str(caught.value)


async def test_access_is_shown_to_operators_only(office):
    boss, member = office.token(OPERATOR).text, office.token("member").text
    async with secured(tokens=office.tokens) as server:
        for token, shown in ((boss, True), (member, False)):
            async with calling(server.target, token=token) as caller:
                one = await caller(
                    f"{RE}GetCohortSpec", registry_pb2.GetCohortSpecRequest(cohort="care")
                )
                many = await caller(f"{RE}ListCohortSpecs", registry_pb2.ListCohortSpecsRequest())
                specs = [one.spec, *many.specs]
                assert all(
                    found.HasField("access") == shown for found in specs if found.name != "crypt"
                )
                names = {found.name for found in many.specs}
                assert names == (set(ACCESS) if shown else {"care", "plaza"})


async def test_lists_have_what_a_steward_may_administer(office):
    token = office.token("steward").text
    async with (
        secured(tokens=office.tokens) as server,
        calling(server.target, token=token) as caller,
    ):
        await seed(server)
        listed = await caller(f"{AD}ListCohorts", admin_pb2.ListCohortsRequest())
        assert [cohort.cohort for cohort in listed.cohorts] == ["care"]
        for method, request in (
            ("ListSites", admin_pb2.ListSitesRequest()),
            ("ListQuarantine", admin_pb2.ListQuarantineRequest()),
            ("ListApplied", admin_pb2.ListAppliedRequest()),
            ("ListSubscribers", admin_pb2.ListSubscribersRequest()),
        ):
            assert (await caller.outcome(f"{AD}{method}", request)).reason == "ACCESS_DENIED"


async def test_nobody_opens_a_cohort_by_emitting(office):
    for name in ("member", OPERATOR):
        token = office.token(name).text
        async with (
            secured(tokens=office.tokens, open_cohorts=True) as server,
            calling(server.target, token=token) as caller,
        ):
            request = wire_pb2.EmitRequest(packet=msp(name, "new"))
            assert (await caller.outcome(f"{IN}Emit", request)).reason == "COHORT_UNKNOWN"
            assert "new" not in server.service.cohorts


# The audit log


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


async def test_an_envelope_of_one_that_is_refused_is_written_down_once(office, tmp_path):
    log = tmp_path / "audit.jsonl"
    member = office.token("member")
    async with (
        secured(tokens=office.tokens, audit_log=log) as server,
        calling(server.target, token=member.text) as caller,
    ):
        request = wire_pb2.EmitRequest(encoded=identity(msp("emitter", "care")))
        await caller.outcome(f"{IN}Emit", request)
    assert [line["outcome"] for line in lines_of(log)] == ["DOMAIN_ID_MISMATCH"]


async def test_what_operators_do_and_who_is_refused_is_written_down(office, tmp_path):
    log = tmp_path / "audit.jsonl"
    boss, member = office.token(OPERATOR), office.token("member")
    async with secured(tokens=office.tokens, audit_log=log) as server:
        async with calling(server.target, token=boss.text) as caller:
            await caller(f"{AD}ReleaseNow", admin_pb2.ReleaseNowRequest(cohort="care"))
            await caller.outcome(
                f"{AD}PutCohortSpec", admin_pb2.PutCohortSpecRequest(spec=spec("Bad Name"))
            )
        async with calling(server.target, token=member.text) as caller:
            requests = requests_of("vault", "member")
            await caller.outcome(f"{IN}Emit", *requests[f"{IN}Emit"])
            await caller.outcome(f"{IN}Emit", *requests_of("care", "emitter")["envelope"])
            await caller.outcome(f"{AD}ReleaseNow", *requests[f"{AD}ReleaseNow"])
            await caller.outcome(
                f"{IN}GetUpdate", *requests_of("care")[f"{IN}GetUpdate"]
            )  # allowed
        async with calling(server.target, token=f"{member.text}x") as caller:
            await caller.outcome(*CONTRACT)
    lines = lines_of(log)
    told = [
        (
            line["outcome"],
            line.get("principal", ""),
            line["method"].rpartition(".")[2],
            line.get("cohort", ""),
        )
        for line in lines
    ]
    assert told == [
        ("OK", OPERATOR, "ReleaseNow", "care"),
        ("SPEC_INVALID", OPERATOR, "PutCohortSpec", "Bad Name"),
        ("COHORT_UNKNOWN", "member", "Emit", "vault"),
        ("DOMAIN_ID_MISMATCH", "member", "Emit", ""),
        ("COHORT_UNKNOWN", "member", "ReleaseNow", "vault"),
        ("UNAUTHENTICATED", "", "GetContract", ""),
    ]
    assert lines[0]["credential"] == f"token {boss.record.token_id}"
    assert "may be mistyped" in lines[5]["told"]
    assert lines[3]["count"] == 2
    assert "'emitter'" in lines[3]["told"]
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in lines)
    assert log.stat().st_mode & 0o777 == 0o600


async def test_how_an_operator_changes_something_is_written_down(office, tmp_path):
    log = tmp_path / "audit.jsonl"
    token = office.token(OPERATOR).text
    async with secured(tokens=office.tokens, audit_log=log) as server:
        await seed(server)
        async with calling(server.target, token=token) as caller:
            (request,) = requests_of("care")[f"{AD}SetQuarantine"]
            for quarantined in (True, False):
                request.quarantined = quarantined
                await caller(f"{AD}SetQuarantine", request)
            await caller(
                f"{AD}PutCohortSpec",
                admin_pb2.PutCohortSpecRequest(spec=spec("care"), force=True, dry_run=True),
            )
    assert [line.get("with") for line in lines_of(log)] == ["quarantined", None, "dry_run force"]


async def test_who_shows_what_is_over_is_named_by_it(office, tmp_path):
    """Such a call has no principal; whose token or certificate still is in use is worth to know."""
    log = tmp_path / "audit.jsonl"
    expired, revoked = office.token("member", ago_s=7200), office.client("reader")
    office.revoke(revoked)
    async with (
        secured(**office.mutual, tokens=office.tokens, audit_log=log) as server,
        calling(server.target, ca=office.ca, client=revoked, token=expired.text) as one,
        calling(server.target, ca=office.ca, client=revoked) as other,
    ):
        for caller in (one, other):
            assert (await caller.outcome(*CONTRACT)).reason == "UNAUTHENTICATED"
    first, second = (line["told"] for line in lines_of(log))
    assert expired.record.token_id in first
    assert read_client_certificate(revoked.certificate).number in second


async def test_who_may_not_operate_cannot_fill_the_audit_log(office, tmp_path, monkeypatch):
    """Whatever it is refused for: also for what is looked at before who calls."""
    log = tmp_path / "audit.jsonl"
    monkeypatch.setattr(audit, "REFUSALS_AT_ONCE", 5)
    monkeypatch.setattr(audit, "REFUSALS_PER_S", 0.0)
    wrong = (f"{AD}ListSites", admin_pb2.ListSitesRequest(cohort="no name"))
    nowhere = (f"{AD}ListSites", admin_pb2.ListSitesRequest(cohort="ghost"))
    tokens = [office.token(name) for name in ("stranger", OPERATOR)]
    async with secured(tokens=office.tokens, audit_log=log) as server:
        for token in tokens:
            async with calling(server.target, token=token.text) as caller:
                for _ in range(20):
                    assert (await caller.outcome(*wrong)).reason == "CONTRACT_VIOLATION"
                    assert (await caller.outcome(*nowhere)).reason == "COHORT_UNKNOWN"
    by_whom = Counter(line["principal"] for line in lines_of(log))
    assert by_whom == {"stranger": 5, OPERATOR: 40}
    assert sum(line.get("left_out", 0) for line in lines_of(log)) == 35


async def test_an_operator_who_hangs_up_leaves_a_trace(office, tmp_path, monkeypatch):
    log = tmp_path / "audit.jsonl"
    token = office.token(OPERATOR).text
    async with (
        secured(tokens=office.tokens, audit_log=log) as server,
        calling(server.target, token=token) as caller,
    ):
        began, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def slow(_cohort):
            began.set()
            await go_on.wait()
            ended.set()
            return []

        monkeypatch.setattr(server.service.releaser, "release", slow)
        call = caller.open(f"{AD}ReleaseNow", admin_pb2.ReleaseNowRequest(cohort="care"))
        async with asyncio.timeout(DEADLINE_S):
            asking = asyncio.ensure_future(anyhow(call))
            await began.wait()
            call.cancel()
            await eventually(lambda: lines_of(log))
            go_on.set()
            await ended.wait()
            await asking
    (line,) = lines_of(log)
    assert (line["outcome"], line["principal"], line["cohort"]) == ("CANCELLED", OPERATOR, "care")


async def anyhow(call) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        await call


async def test_nothing_secret_is_written_anywhere(office, tmp_path, caplog, capfd):
    """Logs at their most talkative, answers, the audit log: no token, no key, no hash of either."""
    log = tmp_path / "audit.jsonl"
    good, expired = office.token("member"), office.token("member", ago_s=7200)
    boss = office.token(OPERATOR)
    client = office.client("member")
    seen = ""
    with caplog.at_level(logging.DEBUG):
        async with secured(**office.mutual, tokens=office.tokens, audit_log=log) as server:
            for token in (good.text, expired.text, boss.text, good.text[:-1], None):
                async with calling(
                    server.target, ca=office.ca, client=client, token=token
                ) as caller:
                    for form, requests in requests_of("care", "member").items():
                        if not form.startswith(("fmi.", "grpc.")):
                            continue
                        seen += (await caller.outcome(form, *requests)).seen
            replaced(office.tokens, b'{"version": 1, "tokens": ["' + good.text.encode() + b'"]}')
            await eventually(lambda: "no file of tokens" in caplog.text)
    out, err = capfd.readouterr()
    everything = seen + caplog.text + out + err + log.read_text()
    for issued in (good, expired, boss):
        assert issued.text.split("_", 2)[2] not in everything
        assert issued.record.sha256 not in everything
    for key in (client.key, office.key.read_bytes()):
        assert key.decode().splitlines()[1] not in everything
