"""Services that are not of our contract, reflection and channelz, behind the same guard as ours.

Both are for operators: reflection tells what the contract is, which anybody may know, and channelz who is
connected from where, which nobody else may.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import grpc

from fmi_server.access import Gate
from fmi_server.errors import FMIError, ThingNotFoundError
from fmi_server.transport.identity import Caller

__all__ = ["for_operators"]


def for_operators(service: Any, servicer: object, gate: Gate) -> object:
    """Return a servicer for `bind` that lets only operators call another one.

    Args:
        service: The descriptor of the service; protobuf has two types of them.
        servicer: Has a method for each of the service's, which takes the request and a context, of which
            it uses no more than `set_code` and `set_details`.
        gate: Decides who is an operator.
    """
    return SimpleNamespace(
        **{
            method.name: _checked(method, getattr(servicer, method.name), gate)
            for method in service.methods
        }
    )


class _Context:
    """Takes what a method says of a failure."""

    def __init__(self) -> None:
        self._code: grpc.StatusCode | None = None
        self._details = ""

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def check(self, request: Any) -> None:
        """Raise what the method said."""
        if self._code is grpc.StatusCode.NOT_FOUND:
            raise ThingNotFoundError("entity of channelz", str(request).strip())
        if self._code is not None:
            raise FMIError(f"{self._code.name}: {self._details}")


def _checked(
    method: Any, call: Callable[[Any, _Context], Any], gate: Gate
) -> Callable[[Any, Caller], Any]:
    # Requests and answers are of whatever type the method has; the descriptor decides, at run time.
    doing = f"call {method.full_name}"

    async def unary(request: Any, caller: Caller) -> Any:
        gate.require_operator(caller.principal, doing)
        context = _Context()
        response = await call(request, context)
        context.check(request)
        return response

    async def streams(requests: Any, caller: Caller) -> AsyncIterator[Any]:
        gate.require_operator(caller.principal, doing)
        async for response in call(requests, _Context()):
            yield response

    return streams if method.server_streaming else unary
