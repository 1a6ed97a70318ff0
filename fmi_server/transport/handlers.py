"""Handlers: the contract's services bound to servicers, with every call guarded.

The generated registration functions are not used, for three reasons: a message that cannot be parsed must
get a typed answer, a subscription sends bytes that were serialised once, and every method must go through
one guard that asks who calls and knows what to do with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, NamedTuple, cast

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from fmi.v1 import error_pb2
from fmi_server.access import TRUSTED, Principal
from fmi_server.audit import AuditLog
from fmi_server.errors import (
    FMIError,
    QuotaExceededError,
    Reason,
    RequestInvalidError,
    Violation,
    reason_name,
)
from fmi_server.quotas import Quotas
from fmi_server.telemetry import FMITelemetry
from fmi_server.transport.auditing import AUDITED_REASONS, describe
from fmi_server.transport.identity import Authenticator, Caller, account_of_address
from fmi_server.transport.requests import reader_of
from fmi_server.transport.status import status_message

__all__ = ["REQUEST_ID_KEY", "bind", "status_of"]

OPERATORS_SERVICE: Final = "fmi.v1.AdminService"
"""The service of which the audit log has every call."""

REQUEST_ID_KEY: Final = "fmi-request-id"

FIRST_REQUEST_S: Final = 1.0
"""Seconds for which a stream that is refused at once waits for its first request."""

MAX_STALLED_BYTES: Final = 16 * 1024
"""The largest message that is kept while its refusal is held back."""

UNKNOWN: Final = Principal("")
"""Stands for who calls where that could not be found out."""

_log = logging.getLogger(__name__)

# The handlers take whatever message their method takes; the descriptor decides which, at run time.
_Request = Any
_Context = grpc.aio.ServicerContext[Any, Any]


def bind(
    service: ServiceDescriptor,
    servicer: object,
    *,
    telemetry: FMITelemetry,
    authenticator: Authenticator | None = None,
    audit: AuditLog | None = None,
    quotas: Quotas | None = None,
    require: Callable[[], None] | None = None,
    max_request_bytes: int | None = None,
) -> grpc.GenericRpcHandler:
    """Bind every method of a service to the servicer's method of the same name.

    A method takes the request (or an async iterator of requests) and who calls, and returns the response (or
    an async iterator of responses). A response may be bytes that were serialised already.

    Args:
        service: The service.
        servicer: Has a method for each of the service's.
        telemetry: Counts refusals.
        authenticator: Says who calls; without it every call is trusted.
        audit: Takes what operators do and who is refused.
        quotas: What each caller may take.
        require: Raises what every call is refused for, where there is something.
        max_request_bytes: The largest request that is parsed; else what the method can need.

    Raises:
        AttributeError: The servicer lacks a method.
    """
    handlers = {
        method.name: _handler(
            method,
            getattr(servicer, method.name),
            _Guard(method, telemetry, authenticator, audit, quotas, require, max_request_bytes),
        )
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _handler(
    method: MethodDescriptor, call: Callable[[_Request, Caller], Any], guard: _Guard
) -> grpc.RpcMethodHandler[Any, Any]:
    # Requests come as bytes: they are parsed when it is known who calls.
    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(
            guard.streams(call), response_serializer=_serialise
        )
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(
            guard.stream(call), response_serializer=_serialise
        )
    return grpc.unary_unary_rpc_method_handler(guard.unary(call), response_serializer=_serialise)


def _serialise(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


class _Requests:
    """The requests of a stream, as they are received."""

    def __init__(self, raw: AsyncIterator[bytes]) -> None:
        self._raw = raw
        self._begun = False

    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> bytes:
        self._begun = True
        return await anext(self._raw)

    async def begun(self) -> None:
        """Wait until the first one was received, but not for long.

        A grpc.aio client that is refused while it writes its first message may report an error of its own
        ("Internal error from Core") in place of the status.
        """
        if not self._begun:
            with contextlib.suppress(TimeoutError, StopAsyncIteration):
                async with asyncio.timeout(FIRST_REQUEST_S):
                    await anext(self)


class _Guard:
    """Asks who calls, and turns what a method raises into a status, with an id that finds it in the log.

    A request is read behind that: strangers, and callers who take too much, are not worth it.
    """

    def __init__(
        self,
        method: MethodDescriptor,
        telemetry: FMITelemetry,
        authenticator: Authenticator | None,
        audit: AuditLog | None,
        quotas: Quotas | None,
        require: Callable[[], None] | None,
        max_request_bytes: int | None,
    ) -> None:
        self._method = method.full_name
        self._read = reader_of(method, max_bytes=max_request_bytes)
        self._telemetry = telemetry
        self._authenticator = authenticator
        self._audit = audit
        self._quotas = quotas
        self._require = require
        self._operating = self._method.startswith(f"{OPERATORS_SERVICE}.")
        self._nobody = Caller(TRUSTED, method=self._method)

    def unary(
        self, call: Callable[[_Request, Caller], Awaitable[Message]]
    ) -> Callable[[bytes, _Context], Awaitable[bytes]]:
        async def handle(data: bytes, context: _Context) -> bytes:
            caller, request = self._nobody, None
            try:
                caller = self._caller(context)
                self._admit(caller)
                request = self._parsed(data)
                # As bytes: a peer that does not read its answer would keep the message, ten times as large.
                response = _serialise(await call(request, caller))
                self._note_operation("OK", request, caller)
                return response
            except asyncio.CancelledError:
                # What it began may go on to its end: who hangs up must not leave no trace.
                self._note_operation("CANCELLED", request, caller)
                raise
            except QuotaExceededError as error:
                request = None
                status = self._status(
                    await self._held_back(error, len(data), caller),
                    request,
                    self._from(context, caller),
                )
            except Exception as error:
                status = self._status(error, request, self._from(context, caller))
            # What ends the call keeps this frame, until the garbage collector comes by.
            del data, request
            await context.abort_with_status(status)
            raise AssertionError("abort_with_status returned")

        return handle

    def stream(
        self, call: Callable[[_Request, Caller], AsyncIterator[Message | bytes]]
    ) -> Callable[[bytes | _Requests, _Context], AsyncIterator[Message | bytes]]:
        async def handle(
            data: bytes | _Requests, context: _Context
        ) -> AsyncIterator[Message | bytes]:
            caller, request = self._nobody, None
            try:
                caller = self._caller(context)
                self._admit(caller)
                request = self._parsed(data) if isinstance(data, bytes) else data
                async for response in call(request, caller):
                    yield response
                return
            except QuotaExceededError as error:
                size = len(data) if isinstance(data, bytes) else 0
                request = None
                status = self._status(
                    await self._held_back(error, size, caller),
                    request,
                    self._from(context, caller),
                )
            except Exception as error:
                status = self._status(error, request, self._from(context, caller))
            if isinstance(data, _Requests):
                await data.begun()
            del data, request
            await context.abort_with_status(status)

        return handle

    def streams(
        self, call: Callable[[AsyncIterator[_Request], Caller], AsyncIterator[Message | bytes]]
    ) -> Callable[[AsyncIterator[bytes], _Context], AsyncIterator[Message | bytes]]:
        async def requests(raw: AsyncIterator[bytes], caller: Caller) -> AsyncIterator[_Request]:
            async for data in raw:
                # A stream may outlive the credentials that it began with.
                if self._authenticator is not None:
                    self._authenticator.check(caller.principal)
                yield self._parsed(data)

        answer = self.stream(lambda raw, caller: call(requests(raw, caller), caller))

        async def handle(
            raw: AsyncIterator[bytes], context: _Context
        ) -> AsyncIterator[Message | bytes]:  # gRPC looks for an async generator
            async for response in answer(_Requests(raw), context):
                yield response

        return handle

    def _parsed(self, data: bytes) -> _Request:
        try:
            return self._read(data)
        except DecodeError:
            malformed = Violation(
                "request",
                "fmi.request.malformed",
                "cannot be parsed; it is not the message of this method",
            )
            raise RequestInvalidError([malformed]) from None

    def _caller(self, context: _Context) -> Caller:
        if self._authenticator is not None:
            return Caller(self._authenticator(context), context.peer(), self._method)
        if self._quotas is not None:
            # Also without quotas: what is checked in turns is checked one caller's after the other's.
            peer = context.peer()
            principal = replace(TRUSTED, account=account_of_address(peer))
            return Caller(principal, peer, self._method)
        if self._audit is None:
            return self._nobody
        return Caller(TRUSTED, context.peer(), self._method)

    def _admit(self, caller: Caller) -> None:
        if self._require is not None:
            self._require()
        if self._quotas is not None:
            self._quotas.admit_call(caller.principal.account)

    async def _held_back(
        self, error: QuotaExceededError, size: int, caller: Caller
    ) -> QuotaExceededError:
        """Hold back the refusal of a caller who takes too much, where what it sent is small."""
        # Its frames have the request, which may take fifty times its size.
        error.__traceback__ = None
        if self._quotas is None or size > MAX_STALLED_BYTES:
            return error
        try:
            return await self._quotas.stall(caller.principal.account, error)
        except asyncio.CancelledError:
            # Who hangs up was refused all the same.
            self._telemetry.refusal(reason_name(error.reason))
            raise

    def _from(self, context: _Context, caller: Caller) -> Caller:
        """Return who calls and from where, also where that could not be found out before."""
        return caller if caller.peer else Caller(UNKNOWN, context.peer(), self._method)

    def _note_operation(self, outcome: str, request: _Request, caller: Caller) -> None:
        """Note a call of the operator's service.

        What was done is always written, and so is all that operators try. What others try costs them
        nothing, so it has the rate of refusals.
        """
        if self._audit is None or not self._operating:
            return
        if outcome == "OK" or _operates(caller.principal):
            self._audit.operated(outcome, describe(caller, request))
        else:
            self._audit.refused(outcome, describe(caller, request))

    def _note(
        self, reason: error_pb2.ErrorReason.ValueType, told: str, request: _Request, caller: Caller
    ) -> None:
        of_operator = self._operating and _operates(caller.principal)
        if self._audit is None or of_operator or reason not in AUDITED_REASONS:
            self._note_operation(reason_name(reason), request, caller)
            return
        entry = describe(caller, request)
        if reason == Reason.UNAUTHENTICATED:
            entry["told"] = (
                told  # there is no principal; it may name a certificate or a token that is over
            )
        self._audit.refused(reason_name(reason), entry)

    def _status(self, error: Exception, request: _Request, caller: Caller) -> grpc.Status:
        reason = error.reason if isinstance(error, FMIError) else Reason.INTERNAL
        self._note(reason, str(error), request, caller)
        return status_of(error, self._method, self._telemetry)


def status_of(error: Exception, method: str, telemetry: FMITelemetry) -> grpc.Status:
    """Write an error as the status of a call, log it and count it.

    Args:
        error: What the call was refused for.
        method: The method, for the log.
        telemetry: Counts the refusal.
    """
    # Only a call that fails gets an id: metadata on every answer would cost more than all that the
    # server does for an Emit.
    request_id = os.urandom(8).hex()
    if not isinstance(error, FMIError):
        _log.error("%s failed, request %s", method, request_id, exc_info=error)
    elif error.reason == Reason.INTERNAL:
        _log.error("%s failed, request %s: %s", method, request_id, error)
    else:
        _log.debug("%s refused, request %s: %s", method, request_id, error)
    reason = error.reason if isinstance(error, FMIError) else Reason.INTERNAL
    telemetry.refusal(reason_name(reason))
    status = rpc_status.to_status(status_message(error, request_id=request_id))
    metadata = (*(status.trailing_metadata or ()), (REQUEST_ID_KEY, request_id))
    # grpc.Status is an interface without methods: whatever has its attributes is one.
    return cast("grpc.Status", _Status(status.code, status.details, metadata))


class _Status(NamedTuple):
    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def _operates(principal: Principal) -> bool:
    return principal.operator or principal.unrestricted
