"""What the tests of identity share: certificates, tokens, servers that want them, calls that show them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc_channelz.v1 import channelz_pb2
from grpc_reflection.v1alpha import reflection_pb2
from server_harness import DEADLINE_S, PRIOR, Refusal, identity, msp, spec

from fmi.descriptors import CONTRACT_FILES
from fmi.v1 import admin_service_pb2 as admin_pb2
from fmi.v1 import cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import registry_service_pb2 as registry_pb2
from fmi_server.app import RunningServer
from fmi_server.authority import Authority, Issued
from fmi_server.errors import reason_name
from fmi_server.testing import running_server
from fmi_server.tokens import IssuedToken, changed_tokens, issue_token

YEAR = timedelta(days=365)

SERVICES = {
    service.full_name: service
    for file in (*CONTRACT_FILES, channelz_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
}
METHODS = {
    f"{name}/{method.name}": method
    for name, service in SERVICES.items()
    for method in service.methods
}

OPERATOR = "boss"

ACCESS = {
    "care": {
        "emit": ["emitter", "member", "gateway", "boss-site"],
        "subscribe": ["reader", "member", "gateway"],
        "admin": ["steward"],
    },
    "vault": {"emit": ["owner"], "subscribe": ["owner"], "admin": ["owner"]},
    "plaza": {"emit": ["*"], "subscribe": ["*"], "admin": []},
    "crypt": {"emit": [], "subscribe": [], "admin": []},
}
"""Who may do what. `ghost`, which is as long as `vault` and `crypt`, does not exist."""

NOWHERE = "ghost"


def specs() -> list[cohort_pb2.CohortSpec]:
    return [spec(name, access=cohort_pb2.AccessSpec(**access)) for name, access in ACCESS.items()]


class Office:
    """An authority with its files in a folder, and a file of tokens."""

    def __init__(self, folder: Path, *, name: str = "test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.now = datetime.now(UTC)
        root = Authority.create(name, now=self.now, lifetime=10 * YEAR)
        self.authority = Authority(root.certificate, root.key)
        self.ca = root.certificate
        self.ca_file = folder / "ca.crt"
        self.ca_file.write_bytes(self.ca)
        self.cert, self.key = folder / "server.crt", folder / "server.key"
        self.crl = folder / "revoked.pem"
        self.tokens = folder / "tokens.json"
        self.renew_server()
        self.crl.write_bytes(self.authority.revocations(now=self.now))

    def renew_server(self) -> Issued:
        issued = self.authority.issue_server(
            ["localhost", "127.0.0.1"], now=self.now, lifetime=YEAR
        )
        self.key.write_bytes(issued.key)
        self.cert.write_bytes(issued.certificate)
        return issued

    def client(
        self, name: str, *domain_ids: str, lifetime: timedelta = YEAR, ago: timedelta = timedelta()
    ) -> Issued:
        return self.authority.issue_client(name, domain_ids, now=self.now - ago, lifetime=lifetime)

    def revoke(self, *issued: Issued) -> None:
        new = self.authority.revocations(
            self.crl.read_bytes(), revoked=[i.certificate for i in issued], now=self.now
        )
        replaced(self.crl, new)

    def token(
        self, principal: str, *domain_ids: str, lifetime_s: float | None = 3600.0, ago_s: float = 0
    ) -> IssuedToken:
        issued = issue_token(
            principal,
            domain_ids=domain_ids,
            now=datetime.now(UTC).timestamp() - ago_s,
            lifetime_s=lifetime_s,
        )
        with changed_tokens(self.tokens) as records:
            records[issued.record.token_id] = issued.record
        return issued

    def revoke_token(self, issued: IssuedToken) -> None:
        with changed_tokens(self.tokens) as records:
            del records[issued.record.token_id]

    @property
    def tls(self) -> dict[str, Any]:
        return {"tls_cert": self.cert, "tls_key": self.key}

    @property
    def mutual(self) -> dict[str, Any]:
        return {**self.tls, "tls_client_ca": self.ca_file, "tls_crl": self.crl}


def replaced(path: Path, content: bytes) -> None:
    """Put a file in the place of another at once, as a careful operator does."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)


@contextlib.asynccontextmanager
async def secured(data_dir: Path | None = None, **settings: Any) -> AsyncIterator[RunningServer]:
    """A server with the cohorts of `ACCESS`."""
    async with running_server(data_dir, operators=(OPERATOR,), **settings) as server:
        for made in specs():
            await server.service.put_cohort_spec(made)
        yield server


@dataclass
class Caller:
    """Calls with credentials: any method by its name, raw."""

    channel: grpc.aio.Channel
    metadata: tuple[tuple[str, str], ...] = ()

    async def __call__(self, method: str, *requests: Any) -> Any:
        """Make a call; return its first answer."""
        call = self.open(method, *requests)
        async with asyncio.timeout(DEADLINE_S):
            if METHODS[method].server_streaming:
                try:
                    return await call.read()
                finally:
                    call.cancel()
            return await call

    def open(self, method: str, *requests: Any) -> Any:
        found = METHODS[method]
        name = "_".join(
            "stream" if streaming else "unary"
            for streaming in (found.client_streaming, found.server_streaming)
        )
        make = getattr(self.channel, name)(
            f"/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )
        if not found.client_streaming:
            (request,) = requests
            return make(request, metadata=self.metadata)

        async def each() -> AsyncIterator[Any]:
            for request in requests:
                yield request

        return make(each(), metadata=self.metadata)

    async def outcome(self, method: str, *requests: Any) -> Outcome:
        """Make a call; return how it ended."""
        try:
            response = await self(method, *requests)
        except grpc.aio.AioRpcError as error:
            return Outcome.of_error(error)
        assert response is not grpc.aio.EOF
        return Outcome.of_response(response)


@dataclass(frozen=True)
class Outcome:
    """How a call ended: `ok`, or the reason of its refusal; and all that a caller can see of that."""

    reason: str
    seen: str = field(default="", compare=False)

    @classmethod
    def of_error(cls, error: grpc.aio.AioRpcError) -> Outcome:
        refusal = Refusal.read(error)
        told = (refusal.code, refusal.reason, refusal.message, sorted(refusal.metadata.items()))
        whole = (*told, refusal.violations, refusal.descriptions, refusal.retry_s)
        return cls(refusal.reason or refusal.code.name, repr(whole))

    @classmethod
    def of_response(cls, response: Any) -> Outcome:
        """Of a response, or of the one refused item that it is about."""
        refusals = [
            item.refusal
            for name in ("results", "exceptions")
            for item in getattr(response, name, ())
            if item.HasField("refusal")
        ]
        if "refusal" in response.DESCRIPTOR.fields_by_name and response.HasField("refusal"):
            refusals.append(response.refusal)
        if not refusals:
            return cls("ok", str(response))
        return cls(reason_name(refusals[0].reason), str(refusals))


@contextlib.asynccontextmanager
async def calling(
    target: str,
    *,
    ca: bytes | None = None,
    client: Issued | None = None,
    token: str | None = None,
) -> AsyncIterator[Caller]:
    """Connect with credentials; without a `ca` in plain text."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    if ca is None:
        channel = grpc.aio.insecure_channel(target, options=options)
    else:
        credentials = grpc.ssl_channel_credentials(
            ca, client and client.key, client and client.certificate
        )
        channel = grpc.aio.secure_channel(target, credentials, options=options)
    async with channel:
        yield Caller(channel, metadata)


# Requests for every method


def requests_of(cohort: str, site: str = "emitter") -> Mapping[str, Iterable[Any]]:
    """A request of each method, about a cohort where it can be."""
    packet = msp(site, cohort)
    envelope = identity(msp(site, cohort), msp(site, cohort))
    return {
        "fmi.v1.InterchangeService/Emit": [wire_pb2.EmitRequest(packet=packet)],
        "fmi.v1.InterchangeService/EmitStream": [
            wire_pb2.EmitStreamRequest(packets=packet_pb2.PacketBatch(packets=[msp(site, cohort)]))
        ],
        "fmi.v1.InterchangeService/Subscribe": [
            wire_pb2.SubscribeRequest(cohorts=[cohort], subscriber=site)
        ],
        "fmi.v1.InterchangeService/GetUpdate": [
            wire_pb2.GetUpdateRequest(cohort=cohort, kind=PRIOR)
        ],
        "fmi.v1.InterchangeService/GetWarmStart": [wire_pb2.GetWarmStartRequest(cohort=cohort)],
        "fmi.v1.InterchangeService/ReportApplied": [
            wire_pb2.ReportAppliedRequest(
                subscriber=site,
                reports=[wire_pb2.ApplyReport(cohort=cohort, kind=PRIOR, revision=1)],
            )
        ],
        "fmi.v1.RegistryService/GetContract": [registry_pb2.GetContractRequest()],
        "fmi.v1.RegistryService/GetCohortSpec": [registry_pb2.GetCohortSpecRequest(cohort=cohort)],
        "fmi.v1.RegistryService/ListCohortSpecs": [registry_pb2.ListCohortSpecsRequest()],
        "fmi.v1.RegistryService/GetDictionary": [registry_pb2.GetDictionaryRequest()],
        "fmi.v1.RegistryService/ValidatePacket": [
            registry_pb2.ValidatePacketRequest(packet=msp(site, cohort))
        ],
        "fmi.v1.AdminService/ListCohorts": [admin_pb2.ListCohortsRequest()],
        "fmi.v1.AdminService/PutCohortSpec": [
            admin_pb2.PutCohortSpecRequest(spec=spec(cohort), dry_run=True)
        ],
        "fmi.v1.AdminService/ListSites": [admin_pb2.ListSitesRequest(cohort=cohort)],
        "fmi.v1.AdminService/ListQuarantine": [admin_pb2.ListQuarantineRequest(cohort=cohort)],
        "fmi.v1.AdminService/SetQuarantine": [
            admin_pb2.SetQuarantineRequest(
                domain_id="seed", packet_id=SEEDED.format(cohort_number(cohort)), quarantined=True
            )
        ],
        "fmi.v1.AdminService/ReleaseNow": [admin_pb2.ReleaseNowRequest(cohort=cohort)],
        "fmi.v1.AdminService/RegisterDictionary": [
            admin_pb2.RegisterDictionaryRequest(data=b"no dictionary")
        ],
        "fmi.v1.AdminService/ListSubscribers": [admin_pb2.ListSubscribersRequest(cohort=cohort)],
        "fmi.v1.AdminService/ListApplied": [admin_pb2.ListAppliedRequest(cohort=cohort)],
        "fmi.v1.AdminService/PlanPrivacy": [
            admin_pb2.PlanPrivacyRequest(
                privacy=cohort_pb2.PrivacySpec(dp_epsilon=1.0, dp_delta=1e-6, dp_epochs=10),
                signals=3,
                sites=100,
            )
        ],
        "fmi.v1.AdminService/ListPrivacyBudgets": [
            admin_pb2.ListPrivacyBudgetsRequest(cohort=cohort)
        ],
        "fmi.v1.AdminService/ListPrivacySpends": [
            admin_pb2.ListPrivacySpendsRequest(cohort=cohort)
        ],
        "grpc.channelz.v1.Channelz/GetTopChannels": [channelz_pb2.GetTopChannelsRequest()],
        "grpc.channelz.v1.Channelz/GetServers": [channelz_pb2.GetServersRequest()],
        "grpc.channelz.v1.Channelz/GetServer": [channelz_pb2.GetServerRequest(server_id=1)],
        "grpc.channelz.v1.Channelz/GetServerSockets": [
            channelz_pb2.GetServerSocketsRequest(server_id=1)
        ],
        "grpc.channelz.v1.Channelz/GetChannel": [channelz_pb2.GetChannelRequest(channel_id=1)],
        "grpc.channelz.v1.Channelz/GetSubchannel": [
            channelz_pb2.GetSubchannelRequest(subchannel_id=1)
        ],
        "grpc.channelz.v1.Channelz/GetSocket": [channelz_pb2.GetSocketRequest(socket_id=1)],
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": [
            reflection_pb2.ServerReflectionRequest(list_services="")
        ],
        "envelope": [wire_pb2.EmitRequest(encoded=envelope)],
        "stream of envelopes": [wire_pb2.EmitStreamRequest(encoded=envelope)],
    }


EXTRA = {
    "envelope": "fmi.v1.InterchangeService/Emit",
    "stream of envelopes": "fmi.v1.InterchangeService/EmitStream",
}
"""Further forms of a method's request."""

SEEDED = "00000000-0000-7000-8000-{:012d}"
"""The id of the packet that `seed` sends to a cohort."""


def cohort_number(cohort: str) -> int:
    return [*ACCESS, NOWHERE].index(cohort)


async def seed(server: RunningServer) -> None:
    """Give each cohort packets of three sites, and a prior."""
    for cohort in ACCESS:
        for site in ("seed", "seed-2", "seed-3"):
            fields = {"packet_id": SEEDED.format(cohort_number(cohort))} if site == "seed" else {}
            await server.service.emit(msp(site, cohort, **fields))
        await server.service.release(cohort)
