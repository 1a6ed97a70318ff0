"""IDENTIFIED, over the wire: who may do what, by certificates and by tokens, as a table says."""

from __future__ import annotations

import contextlib
from datetime import timedelta

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from identity_harness import (
    ACCESS,
    EXTRA,
    METHODS,
    NOWHERE,
    OPERATOR,
    Office,
    calling,
    requests_of,
    secured,
    seed,
)
from server_harness import Client, identity, msp, refusal_of

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import registry_service_pb2 as registry_pb2
from fmi_server.testing import running_server
from fmi_server.transport import handlers

IN, RE, AD = "fmi.v1.InterchangeService/", "fmi.v1.RegistryService/", "fmi.v1.AdminService/"
OK, DENIED, UNKNOWN = "ok", "ACCESS_DENIED", "COHORT_UNKNOWN"

EMITTING = (
    f"{IN}Emit",
    f"{IN}EmitStream",
    "envelope",
    "stream of envelopes",
    f"{RE}ValidatePacket",
)
READING = (f"{IN}GetUpdate", f"{IN}GetWarmStart", f"{IN}ReportApplied")
STEWARDING = (
    *(f"{AD}ListSites", f"{AD}ListQuarantine", f"{AD}ReleaseNow", f"{AD}ListApplied"),
    *(f"{AD}ListPrivacyBudgets", f"{AD}ListPrivacySpends"),
)
OPERATING = (f"{AD}PutCohortSpec", f"{AD}ListSubscribers")
FOR_ALL = (f"{IN}Subscribe", f"{RE}GetContract", f"{RE}ListCohortSpecs")


def table(
    emit: str, read: str, steward: str, see: str, *, operate: str, quarantine: str
) -> dict[str, str]:
    """What each method answers a caller about one cohort."""
    foreign = DENIED if operate == DENIED else OK
    return {
        **dict.fromkeys(EMITTING, emit),
        **dict.fromkeys(READING, read),
        # Of a cohort that is not there no update was released.
        f"{IN}ReportApplied": "UPDATE_NOT_FOUND" if read == UNKNOWN else read,
        **dict.fromkeys(STEWARDING, steward),
        **dict.fromkeys(OPERATING, operate),
        **dict.fromkeys(FOR_ALL, OK),
        f"{RE}GetCohortSpec": see,
        f"{RE}GetDictionary": "NOT_FOUND",  # there is none, for anybody
        f"{AD}RegisterDictionary": DENIED if operate == DENIED else "SPEC_INVALID",
        f"{AD}SetQuarantine": quarantine,
        **{
            method: foreign
            for method in METHODS
            if method.startswith(("grpc.reflection", "grpc.channelz"))
        },
    }


SITE = {"operate": DENIED, "quarantine": "NOT_FOUND"}
HIDDEN = table(UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, **SITE)

EXPECTED = {
    "emitter": {
        "care": table(OK, DENIED, DENIED, OK, **SITE),
        "vault": HIDDEN,
        "plaza": table(OK, OK, DENIED, OK, **SITE),
        "crypt": HIDDEN,
        NOWHERE: HIDDEN,
    },
    "reader": {
        "care": table(DENIED, OK, DENIED, OK, **SITE),
        "vault": HIDDEN,
        "plaza": table(OK, OK, DENIED, OK, **SITE),
        NOWHERE: HIDDEN,
    },
    "member": {"care": table(OK, OK, DENIED, OK, **SITE), "vault": HIDDEN, NOWHERE: HIDDEN},
    "steward": {
        "care": table(DENIED, DENIED, OK, OK, operate=DENIED, quarantine=OK),
        "vault": HIDDEN,
        NOWHERE: HIDDEN,
    },
    "stranger": {
        "care": HIDDEN,
        "vault": HIDDEN,
        "plaza": table(OK, OK, DENIED, OK, **SITE),
        NOWHERE: HIDDEN,
    },
    OPERATOR: {
        "care": table(DENIED, OK, OK, OK, operate=OK, quarantine=OK),
        "vault": table(DENIED, OK, OK, OK, operate=OK, quarantine=OK),
        "crypt": table(DENIED, OK, OK, OK, operate=OK, quarantine=OK),
        "plaza": table(OK, OK, OK, OK, operate=OK, quarantine=OK),
    },
}

# Who administers nothing may not even list it.
OF_NO_COHORT = (f"{AD}ListCohorts", f"{AD}PlanPrivacy")
ADMINISTERING = {name: OK if name in ("steward", OPERATOR) else DENIED for name in EXPECTED}


@pytest.fixture
def office(tmp_path) -> Office:
    return Office(tmp_path / "office")


@contextlib.asynccontextmanager
async def door(office, way, name, *domain_ids):
    """A server and a caller who shows what the way says."""
    token = office.token(name, *domain_ids)
    if way == "certificate":
        async with (
            secured(**office.mutual) as server,
            calling(server.target, ca=office.ca, client=office.client(name, *domain_ids)) as caller,
        ):
            yield server, caller
    elif way == "token over TLS":
        async with (
            secured(**office.tls, tokens=office.tokens) as server,
            calling(server.target, ca=office.ca, token=token.text) as caller,
        ):
            yield server, caller
    else:
        async with (
            secured(tokens=office.tokens) as server,
            calling(server.target, token=token.text) as caller,
        ):
            yield server, caller


WAYS = ("certificate", "token over TLS", "token on loopback")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EXPECTED)
async def test_who_may_do_what(office, name, way):
    async with door(office, way, name) as (server, caller):
        await seed(server)
        for cohort, expected in EXPECTED[name].items():
            requests = requests_of(cohort, name)
            got = {}
            for form in expected:
                outcome = await caller.outcome(EXTRA.get(form, form), *requests[form])
                got[form] = outcome.reason
            # Channelz knows nothing of such a number; it was asked, which is what counts here.
            got = {
                form: OK if "channelz" in form and reason == "NOT_FOUND" else reason
                for form, reason in got.items()
            }
            assert got == expected, cohort
        for method in OF_NO_COHORT:
            outcome = await caller.outcome(method, *requests_of("care")[method])
            assert outcome.reason == ADMINISTERING[name], method


def test_the_table_has_every_method() -> None:
    listed = {EXTRA.get(form, form) for form in HIDDEN} | set(OF_NO_COHORT)
    assert listed == set(METHODS)
    assert {EXTRA.get(form, form) for form in requests_of("care")} == set(METHODS)


@pytest.mark.parametrize("name", ["emitter", "reader", "member", "steward", "stranger"])
async def test_a_cohort_that_may_not_be_seen_is_like_one_that_nobody_has(office, name):
    """Whatever is called, the two answers differ in the name that was asked for and in nothing else."""
    async with door(office, "token on loopback", name) as (server, caller):
        await seed(server)
        hidden, nobody = requests_of("vault", name), requests_of(NOWHERE, name)
        for form in hidden:
            method = EXTRA.get(form, form)
            if method.startswith("grpc."):
                continue
            one = await caller.outcome(method, *hidden[form])
            other = await caller.outcome(method, *nobody[form])
            assert normal(one.seen) == normal(other.seen), form
            assert one == other, form


def normal(text: str) -> str:
    """Leave out the name that was asked for, and what differs between any two calls."""
    lines = [
        line
        for line in text.replace("vault", NOWHERE).splitlines()
        if not line.strip().startswith(("seconds:", "nanos:", "resume_token:"))
    ]
    return "\n".join(lines).replace(SEED_VAULT, SEED_NOWHERE)


SEED_VAULT = "-000000000001"
SEED_NOWHERE = "-000000000004"


@pytest.mark.parametrize("way", WAYS)
async def test_a_site_speaks_as_itself_only(office, way):
    async with door(office, way, "member") as (server, caller):
        requests = requests_of("care", "emitter")
        for form in (*EMITTING, f"{IN}Subscribe", f"{IN}ReportApplied"):
            outcome = await caller.outcome(EXTRA.get(form, form), *requests[form])
            assert outcome.reason == "DOMAIN_ID_MISMATCH", form
        assert await server.service.store.sites() == []


@pytest.mark.parametrize("way", WAYS)
async def test_a_gateway_speaks_for_the_sites_that_its_credentials_name(office, way):
    async with door(office, way, "gateway", "ward-1", "ward:2") as (_, caller):
        for site, expected in (
            ("ward-1", OK),
            ("ward:2", OK),
            ("gateway", "DOMAIN_ID_MISMATCH"),
            ("ward-3", "DOMAIN_ID_MISMATCH"),
        ):
            requests = requests_of("care", site)
            for form in EMITTING:
                outcome = await caller.outcome(EXTRA.get(form, form), *requests[form])
                assert outcome.reason == expected, (form, site)


async def test_an_item_of_a_batch_is_refused_alone(office):
    async with door(office, "certificate", "member") as (server, caller):
        envelope = identity(
            msp("member", "care"), msp("emitter", "care"), msp("member", "vault"), b"\xff"
        )
        answer = await caller(f"{IN}Emit", wire_pb2.EmitRequest(encoded=envelope))
        assert [result.status for result in answer.results] == [
            wire_pb2.EMIT_STATUS_ACCEPTED,
            *[wire_pb2.EMIT_STATUS_REFUSED] * 3,
        ]
        assert [s.domain_id for s in await server.service.store.sites()] == ["member"]


# Credentials that are none


def bad_tokens(office):
    good = office.token("member")
    revoked = office.token("member")
    office.revoke_token(revoked)
    _, token_id, secret = good.text.split("_", 2)
    return {
        "no credentials": None,
        "another secret": f"fmi_{token_id}_{secret[:-1]}{'A' if secret[-1] != 'A' else 'B'}",
        "another id": f"fmi_{'0' * len(token_id)}_{secret}",
        "no secret": f"fmi_{token_id}_",
        "no prefix": f"{token_id}_{secret}",
        "nothing": "x",
        "long": "fmi_" + "a" * 5000,
        "expired": office.token("member", ago_s=7200).text,
        "revoked": revoked.text,
    }


async def test_a_token_that_is_not_valid_lets_nobody_in(office):
    tokens = bad_tokens(office)
    async with secured(**office.tls, tokens=office.tokens) as server:
        for name, token in tokens.items():
            async with calling(server.target, ca=office.ca, token=token) as caller:
                for method, requests in requests_of("plaza", "member").items():
                    outcome = await caller.outcome(EXTRA.get(method, method), *requests)
                    assert outcome.reason == "UNAUTHENTICATED", (name, method)
                    # A secret may have an underscore in it: what is behind the last one may be a letter.
                    text = (token or "").removeprefix("fmi_")
                    secret = text.partition("_")[2] or text
                    assert not secret or secret == "x" or secret not in outcome.seen
        assert await server.service.store.sites() == []


async def test_what_is_wrong_with_a_token_is_not_told(office):
    tokens = bad_tokens(office)
    told = set()
    async with secured(**office.tls, tokens=office.tokens) as server:
        for name in ("another secret", "another id", "no secret", "no prefix", "long", "revoked"):
            async with calling(server.target, ca=office.ca, token=tokens[name]) as caller:
                outcome = await caller.outcome(
                    f"{RE}GetContract", registry_pb2.GetContractRequest()
                )
                told.add(outcome.seen)
    assert len(told) == 1


@pytest.mark.parametrize("values", [["Basic abc"], ["Bearer"], ["Bearer "], [""], "two"])
async def test_an_authorization_that_is_no_token_is_refused(office, values):
    token = office.token("member").text
    if values == "two":
        values = [f"Bearer {token}", f"Bearer {token}"]
    async with (
        secured(tokens=office.tokens) as server,
        calling(server.target) as caller,
    ):
        caller.metadata = tuple(("authorization", value) for value in values)
        outcome = await caller.outcome(f"{RE}GetContract", registry_pb2.GetContractRequest())
        assert outcome.reason == "UNAUTHENTICATED"


async def test_a_certificate_that_is_not_valid_gets_no_connection(office, tmp_path):
    stranger = Office(tmp_path / "elsewhere", name="another authority")
    impostor = Office(tmp_path / "impostor")  # of the same name
    bad = {
        "none": None,
        "another authority's": stranger.client("member"),
        "an impostor's": impostor.client("member"),
        "expired": office.client("member", ago=timedelta(days=2), lifetime=timedelta(days=1)),
        "not valid yet": office.client("member", ago=-timedelta(days=1)),
        "a server's": office.renew_server(),
    }
    async with secured(**office.mutual) as server:
        for name, client in bad.items():
            async with calling(server.target, ca=office.ca, client=client) as caller:
                outcome = await caller.outcome(
                    f"{RE}GetContract", registry_pb2.GetContractRequest()
                )
                assert outcome.reason == "UNAVAILABLE", name


async def test_a_certificate_that_was_revoked_lets_nobody_in(office):
    good, revoked = office.client("member"), office.client("member")
    office.revoke(revoked)
    async with secured(**office.mutual) as server:
        for client, expected in ((good, OK), (revoked, "UNAUTHENTICATED")):
            async with calling(server.target, ca=office.ca, client=client) as caller:
                for method, requests in requests_of("plaza", "member").items():
                    outcome = await caller.outcome(EXTRA.get(method, method), *requests)
                    if expected == OK:
                        assert outcome.reason != "UNAUTHENTICATED", method
                    else:
                        assert outcome.reason == "UNAUTHENTICATED", method


async def test_with_a_certificate_and_a_token_the_token_counts(office):
    client = office.client("stranger")
    member = office.token("member").text
    async with secured(**office.mutual, tokens=office.tokens) as server:
        for token, expected in ((None, UNKNOWN), (member, OK), ("bad", "UNAUTHENTICATED")):
            async with calling(server.target, ca=office.ca, client=client, token=token) as caller:
                outcome = await caller.outcome(
                    f"{RE}GetCohortSpec", registry_pb2.GetCohortSpecRequest(cohort="care")
                )
                assert outcome.reason == expected


async def test_a_server_without_tokens_takes_none(office):
    token = office.token("member").text
    async with (
        secured(**office.mutual) as server,
        calling(server.target, ca=office.ca, client=office.client("member"), token=token) as caller,
    ):
        outcome = await caller.outcome(f"{RE}GetContract", registry_pb2.GetContractRequest())
        assert outcome.reason == "UNAUTHENTICATED"


async def test_plain_text_gets_no_answer_from_a_server_with_tls(office):
    token = office.token("member").text
    async with (
        secured(**office.tls, tokens=office.tokens) as server,
        calling(server.target, token=token) as caller,
    ):
        outcome = await caller.outcome(f"{RE}GetContract", registry_pb2.GetContractRequest())
        assert outcome.reason == "UNAVAILABLE"


async def test_what_a_stranger_sends_is_not_parsed(office, monkeypatch):
    """Parsed a message may take fifty times its size."""
    parsed = []
    parse = handlers._Guard._parsed

    def noting(self, data):
        parsed.append(self._method)
        return parse(self, data)

    monkeypatch.setattr(handlers._Guard, "_parsed", noting)
    token = office.token("member").text
    forms = requests_of("care", "member")
    async with secured(tokens=office.tokens) as server:
        for shown in ("fmi_0000_x", token):
            async with calling(server.target, token=shown) as caller:
                for form, requests in forms.items():
                    await caller.outcome(EXTRA.get(form, form), *requests)
            if shown != token:
                assert parsed == []
    # Who may reflect is asked before anything is read of such a stream.
    unread = {"grpc.reflection.v1alpha.ServerReflection.ServerReflectionInfo"}
    assert set(parsed) == {method.replace("/", ".") for method in METHODS} - unread


# What is closed


@pytest.mark.parametrize("closed", ["admin", "reflection"])
async def test_a_service_that_is_closed_is_not_there(office, closed):
    prefixes = {"admin": (AD,), "reflection": ("grpc.reflection", "grpc.channelz")}
    token = office.token(OPERATOR).text
    async with (
        secured(tokens=office.tokens, **{closed: False}) as server,
        calling(server.target, token=token) as caller,
    ):
        for form, requests in requests_of("care").items():
            method = EXTRA.get(form, form)
            outcome = await caller.outcome(method, *requests)
            there = not method.startswith(prefixes[closed])
            assert (outcome.reason != "UNIMPLEMENTED") == there, method


async def test_health_is_for_everybody(office):
    office.token("member")
    async with (
        secured(**office.tls, tokens=office.tokens) as server,
        calling(server.target, ca=office.ca) as caller,
    ):
        stub = health_pb2_grpc.HealthStub(caller.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_without_security_everyone_may_do_everything():
    async with running_server() as server, Client(server.target) as client:
        await client.emit(msp("a", "anything"), msp("b", "anything"))
        assert set(await client.cohorts()) == {"anything"}
        refusal = await refusal_of(client.update("nowhere"))
        assert refusal.code is grpc.StatusCode.NOT_FOUND


def test_the_cohorts_of_the_table_are_those_of_the_server() -> None:
    assert {cohort for rows in EXPECTED.values() for cohort in rows} == {*ACCESS, NOWHERE}
