"""A real gRPC server whose answers a test writes down."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from fmi.descriptors import contract_hash
from fmi.plain import CURRENT_REVISION
from fmi.v1 import (
    admin_service_pb2_grpc,
    interchange_service_pb2_grpc,
    registry_service_pb2,
    registry_service_pb2_grpc,
)

START_S = 60.0


@dataclass
class RefusedError(Exception):
    """Raised by a script: the call fails as the server makes it fail."""

    code: grpc.StatusCode
    reason: str
    message: str
    violations: Sequence[tuple[str, str, str]] = ()
    retry_after_s: float | None = None

    def status(self) -> Any:
        details = [error_details_pb2.ErrorInfo(reason=self.reason, domain="fmi")]
        if self.violations:
            bad = error_details_pb2.BadRequest()
            for name, rule, text in self.violations:
                bad.field_violations.add(field=name, reason=rule, description=text)
            details.append(bad)
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration(nanos=int(self.retry_after_s * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        details.append(error_details_pb2.RequestInfo(request_id="request-7"))
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return rpc_status.to_status(status)


@dataclass
class Script:
    """What the server answers: by method, a message, a list of messages, or a function of the request.

    `requests` has what was asked, by method.
    """

    answers: dict[str, Any] = field(default_factory=dict)
    requests: dict[str, list[Any]] = field(default_factory=dict)
    health: Any = health_pb2.HealthCheckResponse.SERVING
    target: str = ""

    def __setitem__(self, method: str, answer: Any) -> None:
        self.answers[method] = answer

    def answer(self, method: str, request: Any) -> Any:
        self.requests.setdefault(method, []).append(request)
        answer = self.answers.get(method)
        if answer is None:
            raise RefusedError(grpc.StatusCode.UNIMPLEMENTED, "", f"no script for {method}")
        answer = answer(request) if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer


def contract_answer(_request: Any) -> Any:
    response = registry_service_pb2.GetContractResponse(
        revision=CURRENT_REVISION,
        oldest_supported_revision=1,
        contract_hash=contract_hash(),
        server_version="0.1.0",
    )
    response.server_time.GetCurrentTime()
    return response


def _unary(script: Script, name: str) -> Any:
    async def method(_self: Any, request: Any, context: Any) -> Any:
        try:
            return script.answer(name, request)
        except RefusedError as refusal:
            await context.abort_with_status(refusal.status())

    return method


def _stream(script: Script, name: str) -> Any:
    async def method(_self: Any, request: Any, context: Any) -> Any:
        try:
            for message in script.answer(name, request):
                yield message
            await asyncio.Event().wait()  # live, and nothing happens
        except RefusedError as refusal:
            await context.abort_with_status(refusal.status())

    return method


def _both(script: Script, name: str) -> Any:
    async def method(_self: Any, requests: Any, context: Any) -> Any:
        async for request in requests:
            try:
                yield script.answer(name, request)
            except RefusedError as refusal:
                await context.abort_with_status(refusal.status())

    return method


def _scripted(base: type, script: Script) -> Any:
    """Make a servicer of a generated class that answers from the script."""
    kinds = {"Subscribe": _stream, "EmitStream": _both}
    names = [name for name in vars(base) if not name.startswith("_")]
    methods = {name: kinds.get(name, _unary)(script, name) for name in names}
    return type(base.__name__, (base,), methods)()


class _Health(health_pb2_grpc.HealthServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        del request
        if isinstance(self._script.health, grpc.StatusCode):
            await context.abort(self._script.health, "scripted")
        return health_pb2.HealthCheckResponse(status=self._script.health)


def serve(
    script: Script, credentials: grpc.ServerCredentials | None = None, *, fmi: bool = True
) -> Callable[[], None]:
    """Serve a script on a port of its own, in a thread with an event loop; return what stops it."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stopping = asyncio.Event()

    async def run() -> None:
        server = grpc.aio.server()
        if fmi:
            for module, service in (
                (interchange_service_pb2_grpc, "InterchangeService"),
                (registry_service_pb2_grpc, "RegistryService"),
                (admin_service_pb2_grpc, "AdminService"),
            ):
                servicer = _scripted(getattr(module, f"{service}Servicer"), script)
                getattr(module, f"add_{service}Servicer_to_server")(servicer, server)
            health_pb2_grpc.add_HealthServicer_to_server(_Health(script), server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        script.target = f"127.0.0.1:{port}"
        ready.set()
        await stopping.wait()
        await server.stop(grace=0)

    def work() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(run())

    thread = threading.Thread(target=work, name="scripted-server")
    thread.start()
    assert ready.wait(START_S)

    def stop() -> None:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(START_S)
        assert not thread.is_alive()

    return stop
