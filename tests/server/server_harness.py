"""What the server's tests share: a raw client, builders of requests, and a look into the store's file."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
import zstandard
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from fmi.plain import new_packet_id, packet_from_plain
from fmi.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    cohort_pb2,
    interchange_service_pb2,
    interchange_service_pb2_grpc,
    packet_pb2,
    registry_service_pb2_grpc,
    update_pb2,
)

DEADLINE_S = 60.0
"""Seconds within which whatever a test awaits must have happened."""

PRIOR = update_pb2.UPDATE_KIND_PRIOR
WARM_START = update_pb2.UPDATE_KIND_WARM_START
HINT = update_pb2.UPDATE_KIND_POLICY_HINT
CAUSES = update_pb2.UPDATE_KIND_CAUSAL_CONSENSUS

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

REQUEST_ID_KEY = "fmi-request-id"


class Client:
    """The three services over one channel, with raw stubs: nothing of the SDK is in between."""

    def __init__(self, target: str, options: tuple[tuple[str, Any], ...] = ()) -> None:
        # A connection of its own for each client, and not one that clients share.
        options = (("grpc.use_local_subchannel_pool", 1), *options)
        self.channel = grpc.aio.insecure_channel(target, options=options)
        self.interchange = interchange_service_pb2_grpc.InterchangeServiceStub(self.channel)
        self.registry = registry_service_pb2_grpc.RegistryServiceStub(self.channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def emit(self, *packets: packet_pb2.Packet) -> list[Any]:
        """Emit packets one by one; return their results."""
        results = []
        for packet in packets:
            request = interchange_service_pb2.EmitRequest(packet=packet)
            response = await self.interchange.Emit(request, timeout=DEADLINE_S)
            results.extend(response.results)
        return results

    async def emit_encoded(self, envelope: interchange_service_pb2.EncodedPackets) -> Any:
        request = interchange_service_pb2.EmitRequest(encoded=envelope)
        return await self.interchange.Emit(request, timeout=DEADLINE_S)

    async def raw(self, method: str, data: bytes) -> bytes:
        """Call a unary method of the interchange with bytes of the test's own."""
        call = self.channel.unary_unary(f"/fmi.v1.{method}")
        return await call(data, timeout=DEADLINE_S)

    async def batches(self, *requests: Message) -> list[Any]:
        """Send batches on one EmitStream, each after the answer to the one before."""
        call = self.interchange.EmitStream(timeout=DEADLINE_S)
        answers = []
        for request in requests:
            await call.write(request)
            answers.append(await call.read())
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        return answers

    async def put_spec(self, spec: cohort_pb2.CohortSpec, **options: bool) -> Any:
        request = admin_service_pb2.PutCohortSpecRequest(spec=spec, **options)
        return await self.admin.PutCohortSpec(request, timeout=DEADLINE_S)

    async def health(self, name: str = "") -> int:
        """Ask for the health of the server, or of a part of it."""
        request = health_pb2.HealthCheckRequest(service=name)
        return (await self._health.Check(request, timeout=DEADLINE_S)).status

    async def release(self, cohort: str) -> list[Any]:
        """Release a cohort now; return what that published."""
        request = admin_service_pb2.ReleaseNowRequest(cohort=cohort)
        return list((await self.admin.ReleaseNow(request, timeout=DEADLINE_S)).updates)

    async def update(self, cohort: str, kind: int = PRIOR, revision: int = 0) -> update_pb2.Update:
        request = interchange_service_pb2.GetUpdateRequest(
            cohort=cohort, kind=kind, revision=revision
        )
        return (await self.interchange.GetUpdate(request, timeout=DEADLINE_S)).update

    async def sites(self, cohort: str = "") -> dict[str, Any]:
        request = admin_service_pb2.ListSitesRequest(cohort=cohort)
        response = await self.admin.ListSites(request, timeout=DEADLINE_S)
        return {f"{site.cohort}:{site.domain_id}": site for site in response.sites}

    async def cohorts(self) -> dict[str, Any]:
        request = admin_service_pb2.ListCohortsRequest()
        response = await self.admin.ListCohorts(request, timeout=DEADLINE_S)
        return {cohort.cohort: cohort for cohort in response.cohorts}

    @contextlib.asynccontextmanager
    async def subscribed(self, *patterns: str, **fields: Any) -> AsyncIterator[Events]:
        """Subscribe for as long as the context lasts."""
        request = interchange_service_pb2.SubscribeRequest(cohorts=patterns, **fields)
        call = self.interchange.Subscribe(request)
        try:
            yield Events(call)
        finally:
            call.cancel()


class Events:
    """The events of a subscription, each awaited with a deadline."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def next(self) -> interchange_service_pb2.SubscribeResponse:
        async with asyncio.timeout(DEADLINE_S):
            event = await self._call.read()
        assert event is not grpc.aio.EOF, "the subscription ended"
        return event

    async def until(self, kind: str) -> list[interchange_service_pb2.SubscribeResponse]:
        """Return the events up to the first of a kind, which is the last of the list."""
        events = [await self.next()]
        while events[-1].WhichOneof("event") != kind:
            events.append(await self.next())
        return events

    async def snapshot(self) -> list[update_pb2.Update]:
        """Return the updates up to `snapshot_end`, which must be all there is before it."""
        *updates, end = await self.until("snapshot_end")
        assert [event.WhichOneof("event") for event in updates] == ["update"] * len(updates)
        assert end.snapshot_end.updates == len(updates)
        return [event.update for event in updates]

    async def updates(self, count: int) -> list[update_pb2.Update]:
        """Return the next updates, which must be all that comes but signs of life."""
        found: list[update_pb2.Update] = []
        while len(found) < count:
            event = await self.next()
            if event.WhichOneof("event") != "progress":
                assert event.WhichOneof("event") == "update", event
                found.append(event.update)
        return found

    async def refusal(self) -> Refusal:
        """Return what the subscription ends with, whatever comes before that."""

        async def read_to_the_end() -> None:
            while await self._call.read() is not grpc.aio.EOF:
                pass

        return await refusal_of(read_to_the_end())


@dataclass(frozen=True)
class Refusal:
    """A refused call, with its details unpacked."""

    code: grpc.StatusCode
    reason: str
    message: str
    domain: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[tuple[str, str], ...] = ()
    descriptions: tuple[str, ...] = ()
    retry_s: float | None = None
    request_id: str = ""
    trailing_request_id: str = ""

    @classmethod
    def read(cls, error: grpc.aio.AioRpcError) -> Refusal:
        details: dict[str, Any] = {}
        status = rpc_status.from_call(error)
        for packed in status.details if status else ():
            name = packed.TypeName().removeprefix("google.rpc.")
            details[name] = getattr(error_details_pb2, name)()
            assert packed.Unpack(details[name])
        info = details.get("ErrorInfo", error_details_pb2.ErrorInfo())
        bad = details.get("BadRequest", error_details_pb2.BadRequest())
        retry = details.get("RetryInfo")
        return cls(
            code=error.code(),
            reason=info.reason,
            message=error.details() or "",
            domain=info.domain,
            metadata=dict(info.metadata),
            violations=tuple((v.field, v.reason) for v in bad.field_violations),
            descriptions=tuple(v.description for v in bad.field_violations),
            retry_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
            request_id=details["RequestInfo"].request_id if "RequestInfo" in details else "",
            trailing_request_id=str(error.trailing_metadata().get(REQUEST_ID_KEY, "")),
        )


async def refusal_of(call: Awaitable[Any]) -> Refusal:
    """Return how a call was refused; the test fails where it was not."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(DEADLINE_S):
            await call
    return Refusal.read(caught.value)


async def eventually(condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Wait until a condition is true; return what it gave."""
    async with asyncio.timeout(deadline_s):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.01)


# Builders


def msp(site: str = "site-1", cohort: str = "default", **fields: Any) -> packet_pb2.Packet:
    """A signal pack; one signal, `tau`, where the test gives none."""
    if not {"metrics", "controller", "evaluator", "operators"} & fields.keys():
        fields["controller"] = {"tau": 0.9}
    return packet("msp", site, cohort, **fields)


def pop(site: str = "site-1", cohort: str = "default", **fields: Any) -> packet_pb2.Packet:
    """A policy outcome; `gain` rises from 1 to 2 where the test says nothing else."""
    body = {"bundle": {"lr": 0.1}, "before": {"gain": 1.0}, "after": {"gain": 2.0}, "windows": 8}
    return packet("pop", site, cohort, **{**body, **fields})


def ccs(site: str = "site-1", cohort: str = "default", **fields: Any) -> packet_pb2.Packet:
    """A causal summary; one pair where the test gives none."""
    body = {"causal_pairs": [("load", "latency", 0.5, "direct")], "trust": 1.0}
    return packet("ccs", site, cohort, **{**body, **fields})


def packet(kind: str, site: str, cohort: str, **fields: Any) -> packet_pb2.Packet:
    header = {"packet_id": new_packet_id(), "domain_id": site, "cohort": cohort, "rev": 1}
    made = packet_from_plain({"type": kind, **header, **fields})
    if "emitted_at" not in fields:
        made.header.emitted_at.GetCurrentTime()
    return made


def changed(
    packet_: packet_pb2.Packet, change: Callable[[packet_pb2.Packet], object]
) -> packet_pb2.Packet:
    """A copy of a packet, changed by a function, under the same id."""
    copy = packet_pb2.Packet()
    copy.CopyFrom(packet_)
    change(copy)
    return copy


def serialised(*packets: packet_pb2.Packet | bytes) -> bytes:
    """A serialised `PacketBatch`; an item may be bytes that are no packet."""
    return packet_pb2.RawPacketBatch(
        packets=[p if isinstance(p, bytes) else p.SerializeToString() for p in packets]
    ).SerializeToString()


def identity(*packets: packet_pb2.Packet | bytes) -> interchange_service_pb2.EncodedPackets:
    """An envelope that is not compressed."""
    data = serialised(*packets)
    return interchange_service_pb2.EncodedPackets(
        encoding=interchange_service_pb2.ENCODING_IDENTITY, uncompressed_size=len(data), data=data
    )


def zstd(
    *packets: packet_pb2.Packet | bytes, dictionary: zstandard.ZstdCompressionDict | None = None
) -> interchange_service_pb2.EncodedPackets:
    """An envelope in zstd."""
    data = serialised(*packets)
    return interchange_service_pb2.EncodedPackets(
        encoding=interchange_service_pb2.ENCODING_ZSTD,
        dictionary_id=dictionary.dict_id() if dictionary else 0,
        uncompressed_size=len(data),
        data=zstandard.ZstdCompressor(dict_data=dictionary).compress(data),
    )


def trained_dictionary(salt: str = "") -> zstandard.ZstdCompressionDict:
    """A dictionary trained on packets."""
    samples = [
        msp(f"site-{i}", f"c{salt}", metrics={f"m{j}": i / (j + 1) for j in range(20)})
        for i in range(200)
    ]
    return zstandard.train_dictionary(4096, [sample.SerializeToString() for sample in samples])


def spec(name: str, **fields: Any) -> cohort_pb2.CohortSpec:
    """A cohort spec in which a release happens only when the test asks for one.

    The first is the exception: a cohort that never released does so as soon as it has a quorum.
    """
    made = cohort_pb2.CohortSpec(name=name, **fields)
    if not made.HasField("release"):
        made.release.min_interval.FromSeconds(3600)
        made.release.max_interval.FromSeconds(7200)
    return made


# The store's file


def rows(data_dir: Path, *tables: str) -> dict[str, list[tuple[Any, ...]]]:
    """Read tables of the store, in a folder or a file, with SQLite itself, past the server's code."""
    tables = tables or ("packets", "sites", "updates", "cohorts", "dictionaries")
    file = data_dir / "fmi.sqlite3" if data_dir.is_dir() else data_dir
    address = f"{file.as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
        return {table: _rows(connection, table) for table in tables}


def _rows(connection: sqlite3.Connection, table: str) -> list[tuple[Any, ...]]:
    """All rows of a table, the payload last wherever a migration put other columns."""
    names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    names.sort(key="payload".__eq__)
    columns = ", ".join(names)
    return connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2").fetchall()  # noqa: S608 - constants only


def packet_keys(data_dir: Path) -> list[tuple[str, str]]:
    """The keys of the stored packets, in the order of their sequences."""
    return [(row[1], row[2]) for row in rows(data_dir, "packets")["packets"]]
