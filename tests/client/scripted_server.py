"""A real grpc.aio server that does what a test tells it, faults included."""

# ruff: noqa: N802  the contract names the methods

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from ports import lasting_port

from fmi.v1 import (
    admin_service_pb2_grpc,
    interchange_service_pb2,
    interchange_service_pb2_grpc,
    packet_pb2,
    registry_service_pb2_grpc,
    update_pb2,
)
from fmi_client import FMIEncoder, RetryPolicy
from fmi_client._channel import MAX_SEND_BYTES

__all__ = [
    "FAST",
    "ScriptedServer",
    "aborts",
    "answers",
    "packet_of_bytes",
    "snapshot_end",
    "status",
    "streams",
    "update",
    "update_event",
]

FAST = RetryPolicy(initial_s=0.001, max_s=0.01, max_attempts=5)


def status(
    code,
    reason="",
    message="refused",
    *,
    violations=(),
    retry_after_s=None,
    request_id="",
    metadata=None,
):
    """Build a status as the server's transport does."""
    details = []
    if reason:
        details.append(
            error_details_pb2.ErrorInfo(reason=reason, domain="fmi", metadata=metadata or {})
        )
    if violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=field, reason=rule, description=text
                    )
                    for field, rule, text in violations
                ]
            )
        )
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return rpc_status.to_status(
        status_pb2.Status(code=code.value[0], message=message, details=packed)
    )


def packet_of_bytes(size, packet=None):
    """Add a field of a newer contract: `size` bytes that no compression makes smaller."""
    filler = random.Random(size).randbytes(size)
    head = b"" if packet is None else packet.SerializeToString()
    length = bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return packet_pb2.Packet.FromString(head + b"\x7a" + bytes([*length, size]) + filler)


def update(revision, *, cohort="care", kind=update_pb2.UPDATE_KIND_PRIOR, epoch="e1", tau=None):
    return update_pb2.Update(
        cohort=cohort,
        kind=kind,
        revision=revision,
        history_epoch=epoch,
        prior_update=update_pb2.MetaPriorUpdate(
            rev=revision, prior={"tau": revision / 10 if tau is None else tau}
        ),
    )


def update_event(revision, **fields):
    return interchange_service_pb2.SubscribeResponse(
        resume_token=f"t{revision}", update=update(revision, **fields)
    )


def snapshot_end(*, history_changed=False):
    return interchange_service_pb2.SubscribeResponse(
        resume_token="snap",  # noqa: S106  not a secret
        snapshot_end=interchange_service_pb2.SnapshotEnd(
            updates=1, history_epoch="e1", history_changed=history_changed
        ),
    )


class ScriptedServer(
    interchange_service_pb2_grpc.InterchangeServiceServicer,
    registry_service_pb2_grpc.RegistryServiceServicer,
    admin_service_pb2_grpc.AdminServiceServicer,
):
    """Each call takes the next step of its script; without one, Emit and EmitStream accept.

    What it takes is kept by packet id, so that a repeat is a duplicate as at the real server.
    """

    def __init__(self):
        self.scripts: dict[str, deque[Callable]] = {}
        self.requests: dict[str, list] = {}
        self.metadata: list[dict[str, str]] = []
        self.taken: dict[str, int] = {}
        self.encoder = FMIEncoder()
        self.target = ""
        self._server: grpc.aio.Server | None = None

    async def start(self, port=None):
        self._server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", MAX_SEND_BYTES)]
        )
        for add in (
            interchange_service_pb2_grpc.add_InterchangeServiceServicer_to_server,
            registry_service_pb2_grpc.add_RegistryServiceServicer_to_server,
            admin_service_pb2_grpc.add_AdminServiceServicer_to_server,
        ):
            add(self, self._server)
        port = self._server.add_insecure_port(f"127.0.0.1:{port or lasting_port()}")
        self.target = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self):
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def restart(self):
        await self.stop()
        await self.start(int(self.target.rpartition(":")[2]))

    def script(self, call, *steps):
        self.scripts.setdefault(call, deque()).extend(steps)

    def seen(self, call):
        return self.requests.get(call, [])

    def _next(self, call, request, context):
        self.requests.setdefault(call, []).append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        steps = self.scripts.get(call)
        return steps.popleft() if steps else None

    async def _unary(self, call, request, context):
        step = self._next(call, request, context)
        if step is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"no script for {call}")
        return await step(request, context)

    def take(self, packet_id):
        """Store a packet id once; return its status."""
        known = packet_id in self.taken
        self.taken.setdefault(packet_id, len(self.taken) + 1)
        return (
            interchange_service_pb2.EMIT_STATUS_DUPLICATE
            if known
            else interchange_service_pb2.EMIT_STATUS_ACCEPTED
        )

    def answer(self, request):
        """Answer a batch as the real server does: only what is not simply accepted is listed."""
        packets = self.encoder.decode(request.encoded)
        exceptions = []
        for index, packet in enumerate(packets):
            packet_id = packet.header.packet_id
            outcome = self.take(packet_id)
            if outcome != interchange_service_pb2.EMIT_STATUS_ACCEPTED:
                exceptions.append(
                    interchange_service_pb2.EmitResult(
                        index=index,
                        packet_id=packet_id,
                        status=outcome,
                        sequence=self.taken[packet_id],
                    )
                )
        return interchange_service_pb2.EmitStreamResponse(
            batch_id=request.batch_id,
            packets=len(packets),
            accepted=len(packets) - len(exceptions),
            exceptions=exceptions,
        )

    async def Emit(self, request, context):
        step = self._next("Emit", request, context)
        if step is not None:
            return await step(request, context)
        packet = (
            request.packet
            if request.HasField("packet")
            else self.encoder.decode(request.encoded)[0]
        )
        outcome = self.take(packet.header.packet_id)
        return interchange_service_pb2.EmitResponse(
            results=[
                interchange_service_pb2.EmitResult(
                    packet_id=packet.header.packet_id,
                    status=outcome,
                    sequence=self.taken[packet.header.packet_id],
                )
            ]
        )

    async def EmitStream(self, request_iterator, context):
        step = self._next("EmitStream", None, context)
        if step is not None:
            async for response in step(request_iterator, context):
                yield response
            return
        async for request in request_iterator:
            yield self.answer(request)

    async def Subscribe(self, request, context):
        copy = interchange_service_pb2.SubscribeRequest()
        copy.CopyFrom(request)
        step = self._next("Subscribe", copy, context)
        if step is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no script for Subscribe")
        async for response in step(request, context):
            yield response

    async def GetUpdate(self, request, context):
        return await self._unary("GetUpdate", request, context)

    async def GetWarmStart(self, request, context):
        return await self._unary("GetWarmStart", request, context)

    async def GetContract(self, request, context):
        return await self._unary("GetContract", request, context)

    async def GetCohortSpec(self, request, context):
        return await self._unary("GetCohortSpec", request, context)

    async def ListCohortSpecs(self, request, context):
        return await self._unary("ListCohortSpecs", request, context)

    async def GetDictionary(self, request, context):
        return await self._unary("GetDictionary", request, context)

    async def ValidatePacket(self, request, context):
        return await self._unary("ValidatePacket", request, context)

    async def ListCohorts(self, request, context):
        return await self._unary("ListCohorts", request, context)

    async def PutCohortSpec(self, request, context):
        return await self._unary("PutCohortSpec", request, context)

    async def ListSites(self, request, context):
        return await self._unary("ListSites", request, context)

    async def ListQuarantine(self, request, context):
        return await self._unary("ListQuarantine", request, context)

    async def SetQuarantine(self, request, context):
        return await self._unary("SetQuarantine", request, context)

    async def ReleaseNow(self, request, context):
        return await self._unary("ReleaseNow", request, context)

    async def RegisterDictionary(self, request, context):
        return await self._unary("RegisterDictionary", request, context)


def aborts(refusal):
    """A unary step that fails with a status, or with a bare code."""

    async def step(_request, context):
        if isinstance(refusal, grpc.StatusCode):
            await context.abort(refusal, "")
        await context.abort_with_status(refusal)

    return step


def answers(response):
    """A unary step that answers."""

    async def step(_request, _context):
        return response

    return step


def streams(*events, then=None, hold=False):
    """A Subscribe step: events, then a failure, an end, or silence until the client goes away."""

    async def step(_request, context):
        for event in events:
            yield event
        if isinstance(then, grpc.StatusCode):
            await context.abort(then, "")
        elif then is not None:
            await context.abort_with_status(then)
        if hold:
            await asyncio.Event().wait()

    return step
