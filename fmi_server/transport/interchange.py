"""InterchangeService: packets in, updates out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from google.protobuf import timestamp_pb2

from fmi.v1 import error_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.audit import AuditLog
from fmi_server.emission import Answer, kept
from fmi_server.errors import (
    DictionaryUnknownError,
    EnvelopeMalformedError,
    EnvelopeTooLargeError,
    QuotaExceededError,
    Reason,
    RequestInvalidError,
    ServerDrainingError,
    UpdateNotFoundError,
    reason_name,
)
from fmi_server.service import FMIService
from fmi_server.transport.auditing import note_items
from fmi_server.transport.identity import Caller
from fmi_server.transport.requests import RawEmitRequest, RawEmitStreamRequest
from fmi_server.transport.status import refusal_message
from fmi_server.transport.subscribers import report_from_message

__all__ = ["InterchangeServicer"]

MAX_TOLD = 10
"""Violations told of one packet of a batch, so that the answer is not many times the question; Emit of the
packet alone tells more, ValidatePacket all."""

MAX_UNREAD_S = 3.0
"""Seconds for which a stream is not read because its caller owes. A client that waits for an answer gives up
sooner or later, and would not know why: the SDK does after 10 s."""

_STATUSES = {
    "accepted": wire_pb2.EMIT_STATUS_ACCEPTED,
    "duplicate": wire_pb2.EMIT_STATUS_DUPLICATE,
    "quarantined": wire_pb2.EMIT_STATUS_QUARANTINED,
    "refused": wire_pb2.EMIT_STATUS_REFUSED,
}


class InterchangeServicer:
    """Converts, calls the service, and converts back. Methods have the names of the contract's.

    Args:
        service: What it serves.
        audit: Takes who was refused an item of a batch.
    """

    def __init__(self, service: FMIService, *, audit: AuditLog | None = None) -> None:
        self._service = service
        self._audit = audit

    async def Emit(self, request: RawEmitRequest, caller: Caller) -> wire_pb2.EmitResponse:
        """Take a packet, or an envelope of packets."""
        if request.HasField("packet"):
            answer = await self._service.emit(request.packet, caller=caller.principal)
            return wire_pb2.EmitResponse(results=[_result(0, answer)])
        self._service.registry.check_request(wire_pb2.EmitRequest(encoded=_checkable(request)))
        answers = await self._service.emit_envelope(request.encoded, caller=caller.principal)
        if len(answers) == 1 and answers[0].error is not None:
            kept([answers.pop()])  # it is the call that is refused, and that is noted as one
        self._note(answers, caller)
        return wire_pb2.EmitResponse(
            results=[_result(index, answer) for index, answer in enumerate(answers)]
        )

    async def EmitStream(
        self, requests: AsyncIterator[RawEmitStreamRequest], caller: Caller
    ) -> AsyncIterator[wire_pb2.EmitStreamResponse]:
        """Take batches, and answer each when it is durable.

        Where the caller owes for what it sent, nothing is read until that is paid: it feels that its writes
        wait, and nothing of it is held here. Where it owes for longer than a client waits for an answer, the
        batch that comes next ends the stream, and it is told for how long to wait.
        """
        with self._service.quotas.stream(caller.principal.account):
            async for response in self._answers(requests, caller):
                yield response

    async def _answers(
        self, requests: AsyncIterator[RawEmitStreamRequest], caller: Caller
    ) -> AsyncIterator[wire_pb2.EmitStreamResponse]:
        async for request in self._until_closing(requests, caller):
            response = wire_pb2.EmitStreamResponse(batch_id=request.batch_id)
            try:
                answers = await self._take(request, caller)
            except (
                RequestInvalidError,
                EnvelopeMalformedError,
                EnvelopeTooLargeError,
                DictionaryUnknownError,
                QuotaExceededError,
            ) as error:
                # This batch is bad, or comes too early; the next one may be good.
                self._service.telemetry.refusal(reason_name(error.reason))
                response.refusal.CopyFrom(refusal_message(error))
            else:
                self._note(answers, caller)
                response.packets = len(answers)
                exceptions = [
                    _result(index, answer)
                    for index, answer in enumerate(answers)
                    if not answer.plain
                ]
                response.accepted = len(answers) - len(exceptions)
                response.exceptions.extend(exceptions)
            yield response

    async def Subscribe(
        self, request: wire_pb2.SubscribeRequest, caller: Caller
    ) -> AsyncIterator[bytes]:
        """Stream updates, as events that were serialised once."""
        self._service.registry.check_request(request, reason=Reason.INVALID_FILTER)
        with self._service.quotas.stream(caller.principal.account):
            async for event in self._service.subscribe(request, caller=caller.principal):
                yield event

    async def GetUpdate(
        self, request: wire_pb2.GetUpdateRequest, caller: Caller
    ) -> wire_pb2.GetUpdateResponse:
        """Read one update."""
        self._service.registry.check_request(request)
        update = await self._service.update(
            request.cohort, request.kind, request.revision, caller=caller.principal
        )
        return wire_pb2.GetUpdateResponse(update=update)

    async def GetWarmStart(
        self, request: wire_pb2.GetWarmStartRequest, caller: Caller
    ) -> wire_pb2.GetWarmStartResponse:
        """Read the warm start for a site."""
        self._service.registry.check_request(request)
        profile, revision = await self._service.warm_start(
            request.cohort,
            profile_class=request.profile_class,
            regime_tag=request.regime_tag,
            concepts=dict(request.concepts),
            caller=caller.principal,
        )
        return wire_pb2.GetWarmStartResponse(profile=profile, prior_revision=revision)

    async def ReportApplied(
        self, request: wire_pb2.ReportAppliedRequest, caller: Caller
    ) -> wire_pb2.ReportAppliedResponse:
        """Take reports of what became of updates."""
        self._service.registry.check_request(request)
        reports = [report_from_message(report) for report in request.reports]
        try:
            recorded = self._service.report_applied(
                request.subscriber, reports, caller=caller.principal
            )
        except UpdateNotFoundError:
            await self._service.settle()  # another server may have told of it
            recorded = self._service.report_applied(
                request.subscriber, reports, caller=caller.principal
            )
        return wire_pb2.ReportAppliedResponse(
            recorded=recorded, other_history=len(reports) - recorded
        )

    async def _until_closing(
        self, requests: AsyncIterator[RawEmitStreamRequest], caller: Caller
    ) -> AsyncIterator[RawEmitStreamRequest]:
        """Give the requests of a stream; end it when the server goes down, also while it is idle."""
        closing = asyncio.ensure_future(self._service.closing.wait())
        try:
            while True:
                account = caller.principal.account
                owed_s = self._service.quotas.owed_s(account)
                if owed_s > 0.0:
                    await asyncio.wait({closing}, timeout=min(owed_s, MAX_UNREAD_S))
                upcoming = asyncio.ensure_future(anext(requests, None))
                await asyncio.wait({upcoming, closing}, return_when=asyncio.FIRST_COMPLETED)
                if not upcoming.done():
                    upcoming.cancel()
                    raise ServerDrainingError
                request = upcoming.result()
                if request is None:
                    return
                if owed_s > MAX_UNREAD_S:
                    self._service.quotas.admit_packets(account, 0, 0)
                yield request
        finally:
            closing.cancel()

    def _note(self, answers: Sequence[Answer], caller: Caller) -> None:
        """Count the packets of a batch that were refused, and audit them."""
        for answer in answers:
            if answer.error is not None:
                self._service.telemetry.refusal(reason_name(answer.error.reason))
        if self._audit is not None:
            note_items(self._audit, caller, answers)

    async def _take(self, request: RawEmitStreamRequest, caller: Caller) -> list[Answer]:
        principal = caller.principal
        if request.HasField("packets"):
            return await self._service.emit_batch(request.packets, caller=principal)
        try:
            self._service.registry.check_request(
                wire_pb2.EmitStreamRequest(encoded=_checkable(request))
            )
        except RequestInvalidError:
            # It is no call of its own: nothing else of a stream would count what has no packets.
            self._service.quotas.charge(principal.account, 1, len(request.encoded.data))
            raise
        return await self._service.emit_envelope(request.encoded, caller=principal)


def _checkable(request: RawEmitRequest | RawEmitStreamRequest) -> wire_pb2.EncodedPackets | None:
    """Return the envelope of a request without its data: of that the rules ask only whether there is any."""
    if not request.HasField("encoded"):
        return None
    encoded = request.encoded
    return wire_pb2.EncodedPackets(
        encoding=encoded.encoding,
        dictionary_id=encoded.dictionary_id,
        uncompressed_size=encoded.uncompressed_size,
        data=b"." if encoded.data else b"",
    )


def _result(index: int, answer: Answer) -> wire_pb2.EmitResult:
    result = wire_pb2.EmitResult(
        index=index,
        packet_id=answer.packet_id,
        status=_STATUSES[answer.status],
        sequence=answer.sequence,
        warnings=answer.warnings,
    )
    if answer.received_at_us:
        seconds, micros = divmod(answer.received_at_us, 1_000_000)
        result.received_at.CopyFrom(timestamp_pb2.Timestamp(seconds=seconds, nanos=micros * 1000))
    if answer.error is not None:
        result.refusal.CopyFrom(refusal_message(answer.error, most=MAX_TOLD))
    elif answer.quarantine_reason:
        result.refusal.CopyFrom(error_pb2.Refusal(message=answer.quarantine_reason))
    return result
