"""Health: whether the server and its services are well, told to everybody.

It is gRPC's own contract (`grpc.health.v1`), served within bounds: load balancers have no credentials, so
whoever reaches the port may ask. A request is small or refused, and there is a bound on watchers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Final

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from fmi_server.errors import OverloadedError, ThingNotFoundError
from fmi_server.telemetry import FMITelemetry
from fmi_server.transport.handlers import bind
from fmi_server.transport.identity import Caller

__all__ = ["HEALTH", "HealthServicer"]

# Of protobuf's two types of descriptors, or one.
HEALTH: Final[Any] = health_pb2.DESCRIPTOR.services_by_name["Health"]
"""The service."""

MAX_REQUEST_BYTES: Final = 1024
"""No name of a service comes near it; a watcher holds its request for as long as it watches."""

RETRY_S: Final = 5.0
"""Seconds after which a watcher may try again where there are too many."""

_States = health_pb2.HealthCheckResponse


class HealthServicer:
    """Says how services are. Methods have the names of the contract's.

    Args:
        services: Their names; all are NOT_SERVING until something else is said.
        max_watchers: Calls of Watch at the same time; further ones are refused.
    """

    def __init__(self, services: Iterable[str], *, max_watchers: int) -> None:
        self._states: dict[str, int] = dict.fromkeys(services, _States.NOT_SERVING)
        self._max_watchers = max_watchers
        self._watchers = 0
        self._changed = asyncio.Event()
        self._stopped = False

    def handler(self, telemetry: FMITelemetry) -> grpc.GenericRpcHandler:
        """Return what answers the calls of a server, of anybody.

        Args:
            telemetry: Counts refusals.
        """
        return bind(HEALTH, self, telemetry=telemetry, max_request_bytes=MAX_REQUEST_BYTES)

    @property
    def watchers(self) -> int:
        """Calls of Watch that are open."""
        return self._watchers

    def tell(self, *services: str, well: bool) -> None:
        """Say that services serve, or that they do not. After `stop` it changes nothing."""
        if self._stopped:
            return
        for service in services:
            self._states[service] = _States.SERVING if well else _States.NOT_SERVING
        self._wake()

    def stop(self) -> None:
        """Say for good that nothing serves."""
        self.tell(*self._states, well=False)
        self._stopped = True

    async def Check(
        self, request: health_pb2.HealthCheckRequest, caller: Caller
    ) -> health_pb2.HealthCheckResponse:
        """Say how a service is."""
        del caller
        state = self._states.get(request.service)
        if state is None:
            raise ThingNotFoundError("service", request.service)
        return _States(status=state)

    async def List(self, request: Message, caller: Caller) -> Message:
        """Say how each service is."""
        del request, caller
        # The stubs do not know it yet.
        response: Message = health_pb2.HealthListResponse(  # type: ignore[attr-defined]
            statuses={service: _States(status=state) for service, state in self._states.items()}
        )
        return response

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, caller: Caller
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Say how a service is, and again when that changes; of one that there is not, that it is unknown."""
        del caller
        told: int | None = None
        with self._watching():
            while True:
                changed = self._changed  # before it is looked at: nothing may change unseen
                state = self._states.get(request.service, _States.SERVICE_UNKNOWN)
                if state != told:
                    told = state
                    yield _States(status=state)
                await changed.wait()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        if self._watchers >= self._max_watchers:
            raise OverloadedError("watchers of health", retry_after_s=RETRY_S)
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
