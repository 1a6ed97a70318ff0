"""The connection to a parent server."""

from __future__ import annotations

from types import TracebackType
from typing import Final, Self, cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import interchange_service_pb2_grpc, packet_pb2
from fmi_server.uplink import ParentRefusedError, ParentUnavailableError

__all__ = ["ParentLink"]

TIMEOUT_S: Final = 10.0

_FINAL: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""Answers that another attempt with the same packet would not change."""


class ParentLink:
    """Emits packets to a parent. Use it as an asynchronous context manager.

    Args:
        target: Where the parent is, `HOST:PORT`.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._channel = grpc.aio.insecure_channel(
            target,
            options=(("grpc.keepalive_time_ms", 120_000), ("grpc.keepalive_timeout_ms", 20_000)),
        )
        self._stub = interchange_service_pb2_grpc.InterchangeServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def send(self, packet: packet_pb2.Packet) -> None:
        """Emit a packet; return when the parent has it.

        Raises:
            ParentRefusedError: The parent refuses it.
            ParentUnavailableError: There was no answer, or the parent asks to come again.
        """
        try:
            await self._stub.Emit(wire_pb2.EmitRequest(packet=packet), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            told = f"{self._target}: {error.details() or error.code().name}"
            if error.code() in _FINAL:
                raise ParentRefusedError(told) from None
            raise ParentUnavailableError(told, _retry_after_s(error)) from None


def _retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    try:
        # It needs no more of a call than its code, details and trailing metadata.
        status = rpc_status.from_call(cast("grpc.Call", error))
    except ValueError:  # the details are not those of this status
        return None
    for detail in () if status is None else status.details:
        hint = error_details_pb2.RetryInfo()
        if detail.Unpack(hint):
            return float(hint.retry_delay.ToNanoseconds() / 1e9)
    return None
