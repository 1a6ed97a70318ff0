"""Requests to every method, through the server's own handlers, to a service with a store of either kind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import samples
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from mutation import mutated
from oracle import Finding, listening
from targets import Target

from fmi.descriptors import CONTRACT_FILES
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.cohorts import CohortRegistry
from fmi_server.contracts import FMIContractRegistry
from fmi_server.envelope import EnvelopeLimits
from fmi_server.errors import FMIError
from fmi_server.service import FMIService
from fmi_server.storage import MemoryStore, SqliteStore
from fmi_server.telemetry import FMITelemetry
from fmi_server.transport.admin import AdminServicer
from fmi_server.transport.handlers import bind
from fmi_server.transport.interchange import InterchangeServicer
from fmi_server.transport.registry import RegistryServicer

__all__ = ["Calls"]

LIFE = 3_000
"""Calls to one service: what it keeps is meant to grow, so that it has to end."""

EVENTS = 5
"""Events read of a subscription."""

_REGISTRY = FMIContractRegistry()
_SERVICES = {
    service.full_name: service
    for file in CONTRACT_FILES
    for service in file.services_by_name.values()
}
_METHODS = sorted(
    (method for service in _SERVICES.values() for method in service.methods),
    key=lambda method: str(method.name),
)
_PATHS = [f"/{method.containing_service.full_name}/{method.name}" for method in _METHODS]
_INPUTS = [GetMessageClass(method.input_type) for method in _METHODS]
_PLACES = {method.name: place for place, method in enumerate(_METHODS)}


class _Aborted(Exception):  # noqa: N818 - it is how gRPC leaves a handler
    pass


class _Context:
    """The part of a call's context that the handlers use."""

    def __init__(self) -> None:
        self.status: Any = None

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def abort_with_status(self, status: Any) -> None:
        self.status = status
        raise _Aborted


class Calls(Target):
    """The first byte names the method; the rest is its request, or with a stream each of its requests."""

    name = "calls"

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._now = float(samples.NOW_S)
        self._calls = self._lives = 0
        self.service: FMIService | None = None
        self._stack = contextlib.AsyncExitStack()
        self._folder = tempfile.TemporaryDirectory(dir=_memory_folder())
        self._listening = listening()
        self._errors = self._listening.__enter__()

    def seeds(self) -> Iterator[bytes]:
        for method, request in samples.requests():
            yield bytes([_PLACES[method]]) + request.SerializeToString()

    @staticmethod
    def name_of(data: bytes) -> str:
        """Return the method that an input calls."""
        return str(_METHODS[data[0] % len(_METHODS)].name)

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        place = data[0] % len(_METHODS) if data else 0
        return bytes([place]) + mutated(data[1:], _INPUTS[place], rng, self.most - 1)

    def __call__(self, data: bytes) -> None:
        if self._calls % LIFE == 0:
            self._loop.run_until_complete(self._begin())
        self._calls += 1
        place = data[0] % len(_METHODS) if data else 0
        self._loop.run_until_complete(asyncio.wait_for(self._call(place, data[1:]), 30.0))
        if self._errors:
            said = [record.getMessage() for record in self._errors]
            causes = [record.exc_info[1] for record in self._errors if record.exc_info]
            self._errors.clear()
            raise Finding(f"the server logs errors: {said}, {causes!r}")

    def close(self) -> None:
        self._loop.run_until_complete(self._stack.aclose())
        self._loop.close()
        self._listening.__exit__(None, None, None)
        self._folder.cleanup()

    async def _begin(self) -> None:
        await self._stack.aclose()
        self._lives += 1
        self._now = float(samples.NOW_S)
        telemetry = FMITelemetry()
        folder = Path(self._folder.name) / str(self._lives)
        folder.mkdir()
        store = SqliteStore(folder / "store") if self._lives % 2 else MemoryStore()
        service = FMIService(
            store=store,
            registry=_REGISTRY,
            cohorts=CohortRegistry(_REGISTRY, max_cohorts=50),
            telemetry=telemetry,
            limits=EnvelopeLimits(max_bytes=64 * 1024, max_packets=50),
            clock=lambda: self._now,
        )
        await self._stack.enter_async_context(service)
        for spec in samples.specs():
            await service.put_cohort_spec(spec)
        servicers = {
            "fmi.v1.InterchangeService": InterchangeServicer(service),
            "fmi.v1.RegistryService": RegistryServicer(service, version="0"),
            "fmi.v1.AdminService": AdminServicer(service),
        }
        handlers = [
            bind(_SERVICES[name], servicer, telemetry=telemetry)
            for name, servicer in servicers.items()
        ]
        self._handlers = []
        for path in _PATHS:
            details = SimpleNamespace(method=path, invocation_metadata=())
            (found,) = filter(None, (handler.service(details) for handler in handlers))
            self._handlers.append(found)
        self.service = service
        gc.collect()

    async def _call(self, place: int, data: bytes) -> None:
        handler, method = self._handlers[place], _METHODS[place]
        assert handler.request_deserializer is None, "what is parsed is no business of strangers"
        request = self._in_its_history(place, data)
        context = _Context()
        answers: list[bytes] = []
        try:
            if method.client_streaming:
                stream = handler.stream_stream(_each(request), context)
                await self._read(stream, answers, handler)
            elif method.server_streaming:
                stream = handler.unary_stream(request, context)
                await self._read(stream, answers, handler)
            else:
                answer = await handler.unary_unary(request, context)
                answers.append(handler.response_serializer(answer))
        except _Aborted:
            _assert_typed(context.status)
        output = GetMessageClass(method.output_type)
        for answer in answers:
            output.FromString(answer)
        await self._now_and_then()

    async def _read(self, stream: Any, answers: list[bytes], handler: Any) -> None:
        try:
            while len(answers) < EVENTS:
                # A subscription that has said all it has waits; more than a few turns need not pass.
                answer = await asyncio.wait_for(anext(stream), 0.004)
                answers.append(handler.response_serializer(answer))
        except (StopAsyncIteration, TimeoutError):
            pass
        finally:
            await stream.aclose()

    async def _now_and_then(self) -> None:
        """Let time pass, and all that was taken be released: what harms may do so only then."""
        assert self.service is not None
        await asyncio.sleep(0)
        if self._calls % 100:
            return
        self._now += 40.0
        for rules in list(self.service.cohorts):
            with contextlib.suppress(FMIError):
                await self.service.release(rules.name)
        if self._calls % 1000 == 0:
            for rules in list(self.service.cohorts):
                await self.service.compactor.compact(rules.name)

    def _in_its_history(self, place: int, data: bytes) -> bytes:
        """Put the name of the present history where a token of a seed has its place."""
        if b"fmi-epoch" not in data or self.service is None:
            return data
        try:
            message: Message = _INPUTS[place].FromString(data)
        except DecodeError:
            return data
        epoch = self.service.store.history_epoch
        if isinstance(message, wire_pb2.SubscribeRequest):
            message.resume_token = message.resume_token.replace("fmi-epoch", epoch)
            if message.HasField("handover"):
                token = message.handover.resume_token.replace("fmi-epoch", epoch)
                message.handover.resume_token = token
        return message.SerializeToString()


async def _each(request: Any) -> AsyncIterator[Any]:
    yield request
    yield request


def _assert_typed(status: Any) -> None:
    if status.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        raise Finding(f"{status.code.name}: {status.details}")
    if not status.details:
        raise Finding(f"{status.code.name} without a message")
    details = dict(status.trailing_metadata)
    size = sum(
        len(name) + len(value) * (4 / 3 if name.endswith("-bin") else 1)
        for name, value in details.items()
    )
    if size + len(status.details.encode()) * 3 > 8192 + 3 * 1024:
        raise Finding(f"metadata of {size:.0f} bytes")
    sent = status_pb2.Status.FromString(details["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    if not sent.details[0].Unpack(info) or info.domain != "fmi" or not info.reason:
        raise Finding(f"{status.code.name} without a reason: {status.details}")


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a folder within it
