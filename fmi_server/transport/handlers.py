"""Handlers: the contract's services bound to servicers, with every call guarded.

The generated registration functions are not used, for three reasons: a message that cannot be parsed must
get a typed answer, a subscription sends bytes that were serialised once, and every method must go through
one guard that knows what to do with an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, NamedTuple, cast

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status

from fmi_server.errors import FMIError, Reason, RequestInvalidError, Violation, reason_name
from fmi_server.telemetry import FMITelemetry
from fmi_server.transport.status import status_message

__all__ = ["REQUEST_ID_KEY", "bind", "status_of"]

REQUEST_ID_KEY: Final = "fmi-request-id"

_log = logging.getLogger(__name__)

# The handlers take whatever message their method takes; the descriptor decides which, at run time.
_Request = Any
_Context = grpc.aio.ServicerContext[Any, Any]


class _Malformed:
    """Stands in the place of a request that could not be parsed."""


def bind(
    service: ServiceDescriptor, servicer: object, *, telemetry: FMITelemetry
) -> grpc.GenericRpcHandler:
    """Bind every method of a service to the servicer's method of the same name.

    A method takes the request (or an async iterator of requests) and returns the response (or an async
    iterator of responses). A response may be bytes that were serialised already.

    Args:
        service: The service.
        servicer: Has a method for each of the service's.
        telemetry: Counts refusals.

    Raises:
        AttributeError: The servicer lacks a method.
    """
    handlers = {
        method.name: _handler(method, getattr(servicer, method.name), telemetry)
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _handler(
    method: MethodDescriptor, call: Callable[[_Request], Any], telemetry: FMITelemetry
) -> grpc.RpcMethodHandler[Any, Any]:
    guard = _Guard(method.full_name, telemetry)
    parse = _parser(GetMessageClass(method.input_type))
    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(
            guard.streams(call), request_deserializer=parse, response_serializer=_serialise
        )
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(
            guard.stream(call), request_deserializer=parse, response_serializer=_serialise
        )
    return grpc.unary_unary_rpc_method_handler(
        guard.unary(call), request_deserializer=parse, response_serializer=_serialise
    )


def _parser(message_class: type[Message]) -> Callable[[bytes], Message | _Malformed]:
    def parse(data: bytes) -> Message | _Malformed:
        try:
            return message_class.FromString(data)
        except DecodeError:
            return _Malformed()

    return parse


def _serialise(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


class _Guard:
    """Turns what a method raises into a status, with an id that finds it in the log."""

    def __init__(self, method: str, telemetry: FMITelemetry) -> None:
        self._method = method
        self._telemetry = telemetry

    def unary(
        self, call: Callable[[_Request], Awaitable[Message]]
    ) -> Callable[[_Request, _Context], Awaitable[bytes]]:
        async def handle(request: _Request, context: _Context) -> bytes:
            try:
                # As bytes: a peer that does not read its answer would keep the message, ten times as large.
                return _serialise(await call(_parsed(request)))
            except Exception as error:
                status = self._status(error)
            await context.abort_with_status(status)
            raise AssertionError("abort_with_status returned")

        return handle

    def stream(
        self, call: Callable[[_Request], AsyncIterator[Message | bytes]]
    ) -> Callable[[_Request, _Context], AsyncIterator[Message | bytes]]:
        async def handle(request: _Request, context: _Context) -> AsyncIterator[Message | bytes]:
            try:
                async for response in call(_parsed(request)):
                    yield response
                return
            except Exception as error:
                status = self._status(error)
            await context.abort_with_status(status)

        return handle

    def streams(
        self, call: Callable[[AsyncIterator[_Request]], AsyncIterator[Message | bytes]]
    ) -> Callable[[AsyncIterator[_Request], _Context], AsyncIterator[Message | bytes]]:
        async def requests(raw: AsyncIterator[_Request]) -> AsyncIterator[_Request]:
            async for request in raw:
                yield _parsed(request)

        return self.stream(lambda raw: call(requests(raw)))

    def _status(self, error: Exception) -> grpc.Status:
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


def _parsed(request: _Request) -> _Request:
    if isinstance(request, _Malformed):
        malformed = Violation(
            "request",
            "fmi.request.malformed",
            "cannot be parsed; it is not the message of this method",
        )
        raise RequestInvalidError([malformed])
    return request
