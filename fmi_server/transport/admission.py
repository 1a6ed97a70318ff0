"""Admission: how many calls may be open, and how long a call may take to say what it wants.

gRPC hands a unary call to its method when the message is here, and waits for that without end. A peer that
sends the headers of a call and nothing more would keep it, and what it sent of its message, for as long as it
likes. This interceptor sees calls before their messages. It

* refuses calls past a number, over all connections,
* refuses all but health checks and the operator's calls while memory is short,
* ends calls whose message does not arrive in time, or, while memory is short, at once.

grpc.aio has no way to end a unary call from outside. So a call whose message is awaited is served as a stream
of one message, which can be ended, but costs a tenth more of the processor. As long as few calls wait for
their message, which is how it is without an attack, they are served the quick way.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc

from fmi_server.errors import FMIError, OverloadedError, RequestInvalidError, Violation
from fmi_server.telemetry import FMITelemetry
from fmi_server.transport.handlers import status_of

__all__ = ["Admission"]

MESSAGE_S: Final = 30.0
"""Seconds that the message of a call has to arrive whole: 4 MiB at 1.2 Mbit/s."""

QUICK: Final = 16
"""Calls that may wait for their message the quick way, without an end: with the largest messages, 64 MiB."""

AWAITED_S: Final = 0.2
"""Seconds for which a message is awaited before its call may be ended for memory."""

SPARED: Final = (
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/List",
    "/fmi.v1.AdminService/",
)
"""Calls that are taken while memory is short, so that one can see what goes on. None of them stays open."""

# The messages and contexts of every method there is.
_Message = Any
_Context = grpc.aio.ServicerContext[Any, Any]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True)
class _Ways:
    """How a method may be served: so that it can be ended, and the quick way where there is one."""

    method: _Handler  # kept, so that no other has its id
    patient: _Handler
    quick: _Handler | None


class Admission(grpc.aio.ServerInterceptor):
    """Takes calls or refuses them, before their messages are read.

    Args:
        max_calls: Calls that may be open at once, over all connections.
        pressed: Says whether memory is short.
        telemetry: Counts refusals.
        message_s: Seconds that a message has to arrive.
        quick: Calls that may wait for their message the quick way.
    """

    def __init__(
        self,
        *,
        max_calls: int,
        pressed: Callable[[], bool],
        telemetry: FMITelemetry,
        message_s: float = MESSAGE_S,
        quick: int = QUICK,
    ) -> None:
        self._max_calls = max_calls
        self._pressed = pressed
        self._telemetry = telemetry
        self._message_s = message_s
        self._quick = quick
        self._open = 0
        self._unsaid: set[asyncio.Task[Any]] = set()
        self._awaited: dict[asyncio.Timeout, float] = {}
        self._ways: dict[int, _Ways] = {}
        self._too_many = self._refusing("calls")
        self._too_large = self._refusing("memory")

    @property
    def open(self) -> int:
        """Calls that are open."""
        return self._open

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Choose how a call is served."""
        handler = await continuation(handler_call_details)
        if handler is None:  # there is no such method, which gRPC says itself
            return handler
        if self._pressed() and not handler_call_details.method.startswith(SPARED):
            return self._too_large
        if self._open >= self._max_calls:
            return self._too_many
        # Each call is a task of its own, which also chooses its handler.
        task = asyncio.current_task()
        if task is None:
            return handler
        self._open += 1
        task.add_done_callback(self._ended)
        ways = self._ways.get(id(handler))
        if ways is None:
            ways = self._ways[id(handler)] = self._ways_of(handler, handler_call_details.method)
        if ways.quick is not None and len(self._unsaid) < self._quick:
            self._unsaid.add(task)
            return ways.quick
        return ways.patient

    def relieve(self) -> int:
        """End the calls whose message has been awaited for a while; return how many."""
        now = asyncio.get_running_loop().time()
        late = [wait for wait, since in self._awaited.items() if now - since >= AWAITED_S]
        for wait in late:
            del self._awaited[wait]  # by which its call knows why
            wait.reschedule(now)
        return len(late)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._open -= 1
        self._unsaid.discard(task)

    def _refusing(self, resource: str) -> _Handler:
        async def refuse(_requests: object, context: _Context) -> None:
            await context.abort_with_status(
                status_of(OverloadedError(resource), "a call", self._telemetry)
            )

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _ways_of(self, handler: _Handler, method: str) -> _Ways:
        quick: _Handler | None = None
        unary, streaming, conversing = (
            call if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call) else None
            for call in (handler.unary_unary, handler.unary_stream, handler.stream_stream)
        )
        if unary is not None:
            serve = self._answering(unary, method)
            quick = grpc.unary_unary_rpc_method_handler(
                self._telling(unary), handler.request_deserializer, handler.response_serializer
            )
        elif streaming is not None:
            serve = self._streaming(streaming, method)
        elif conversing is not None and inspect.isasyncgenfunction(conversing):
            serve = self._conversing(conversing, method)
        else:
            return _Ways(handler, handler, None)
        patient = grpc.stream_stream_rpc_method_handler(
            serve, handler.request_deserializer, handler.response_serializer
        )
        return _Ways(handler, patient, quick)

    def _telling(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Serve the quick way: note that the message is here."""

        async def serve(request: _Message, context: _Context) -> _Message:
            task = asyncio.current_task()
            if task is not None:
                self._unsaid.discard(task)
            held = [request]
            del request  # a call that is refused keeps its frames for a while, and not its message
            return await call(held.pop(), context)

        return serve

    def _answering(self, call: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def serve(_requests: object, context: _Context) -> None:
            async with self._refused(context, method):
                held = [await self._message(context)]
            await context.write(await call(held.pop(), context))

        return serve

    def _streaming(self, call: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def serve(_requests: object, context: _Context) -> None:
            async with self._refused(context, method):
                held = [await self._message(context)]
            answers = call(held.pop(), context)
            if inspect.isawaitable(answers):  # it writes its answers itself
                await answers
                return
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    await context.write(answer)

        return serve

    def _conversing(self, call: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def serve(requests: AsyncIterator[_Message], context: _Context) -> None:
            async with (
                self._refused(context, method),
                contextlib.aclosing(call(self._messages(requests), context)) as answers,
            ):
                async for answer in answers:
                    await context.write(answer)

        return serve

    async def _messages(self, requests: AsyncIterator[_Message]) -> AsyncIterator[_Message]:
        while True:
            # A stream may be silent for as long as it likes, but not while memory is short.
            request = await self._awaiting(anext(requests, grpc.aio.EOF), None)
            if request is grpc.aio.EOF:
                return
            yield request

    async def _message(self, context: _Context) -> _Message:
        request = await self._awaiting(context.read(), self._message_s)
        if request is grpc.aio.EOF:
            missing = Violation(
                "request", "fmi.request.missing", "the call has no message; send one"
            )
            raise RequestInvalidError([missing])
        return request

    async def _awaiting(self, message: Awaitable[_Message], within_s: float | None) -> _Message:
        """Wait for a message.

        Raises:
            RequestInvalidError: It did not arrive in time.
            OverloadedError: Memory is short.
        """
        wait = asyncio.timeout(within_s)
        self._awaited[wait] = asyncio.get_running_loop().time()
        try:
            async with wait:
                return await message
        except TimeoutError:
            if wait not in self._awaited:
                raise OverloadedError("memory") from None
            late = Violation(
                "request",
                "fmi.request.incomplete",
                f"did not arrive whole within {within_s:g} s; send less at once",
            )
            raise RequestInvalidError([late]) from None
        finally:
            self._awaited.pop(wait, None)

    @contextlib.asynccontextmanager
    async def _refused(self, context: _Context, method: str) -> AsyncIterator[None]:
        """Answer a call that is refused in here. What its method refuses was answered there."""
        try:
            yield
        except FMIError as error:
            await context.abort_with_status(status_of(error, method, self._telemetry))
