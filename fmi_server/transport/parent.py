"""The connection to a parent server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import interchange_service_pb2_grpc, packet_pb2
from fmi_server.config import ServerSettings, SettingsError
from fmi_server.uplink import ParentRefusedError, ParentUnavailableError

__all__ = ["ParentCredentials", "ParentLink", "parent_credentials"]

TIMEOUT_S: Final = 10.0

_AGAIN: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
    }
)
"""Answers that say nothing of the packet. RESOURCE_EXHAUSTED is one where it comes with RetryInfo."""


@dataclass(frozen=True, slots=True)
class ParentCredentials:
    """What this server shows its parent.

    Attributes:
        channel: How the connection is secured; None for plain text.
        token: A file with a bearer token, which is read for each call: it may be rotated.
    """

    channel: grpc.ChannelCredentials | None = None
    token: Path | None = None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what goes with a call.

        Raises:
            ParentUnavailableError: The file cannot be read, or holds no token.
        """
        if self.token is None:
            return ()
        token = _read(self.token).decode("ascii", errors="replace").strip()
        if not token or not token.isprintable() or not token.isascii() or " " in token:
            raise ParentUnavailableError(f"{self.token} holds no token")
        return (("authorization", f"Bearer {token}"),)


def parent_credentials(settings: ServerSettings) -> ParentCredentials:
    """Read what this server shows its parent.

    Raises:
        SettingsError: A file cannot be read, or holds no token.
    """
    files = (settings.parent_ca, settings.parent_key, settings.parent_cert)
    try:
        roots, key, chain = (None if path is None else _read(path) for path in files)
        channel = None if roots is None else grpc.ssl_channel_credentials(roots, key, chain)
        credentials = ParentCredentials(channel, settings.parent_token)
        credentials.metadata()
    except ParentUnavailableError as error:
        raise SettingsError(f"parent: {error}") from None
    return credentials


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ParentUnavailableError(f"{path} cannot be read: {error.strerror}") from None


class ParentLink:
    """Emits packets to a parent. Use it as an asynchronous context manager.

    Args:
        target: Where the parent is, `HOST:PORT`.
        credentials: What this server shows it; plain text and nothing where it is not given.
    """

    def __init__(self, target: str, credentials: ParentCredentials | None = None) -> None:
        self._target = target
        self._credentials = credentials or ParentCredentials()
        secure = self._credentials.channel
        options = (
            ("grpc.keepalive_time_ms", 120_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            # A token in plain text is for a parent on this machine, and not for the proxy of `http_proxy`.
            ("grpc.enable_http_proxy", 0 if secure is None else 1),
        )
        self._channel = (
            grpc.aio.insecure_channel(target, options=options)
            if secure is None
            else grpc.aio.secure_channel(target, secure, options=options)
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
            await self._stub.Emit(
                wire_pb2.EmitRequest(packet=packet),
                timeout=TIMEOUT_S,
                metadata=self._credentials.metadata(),
            )
        except grpc.aio.AioRpcError as error:
            details = _details(error)
            told = f"{self._target}: {error.details() or error.code().name}"
            overloaded = (
                error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and details.retry_after_s
            )
            if error.code() in _AGAIN or overloaded:
                raise ParentUnavailableError(told, details.retry_after_s) from None
            raise ParentRefusedError(told, details.fields) from None


@dataclass(frozen=True, slots=True)
class _Details:
    retry_after_s: float | None = None
    fields: tuple[str, ...] = ()


def _details(error: grpc.aio.AioRpcError) -> _Details:
    """Read what a failed call says of itself, as far as it can be read."""
    retry_after_s: float | None = None
    fields: tuple[str, ...] = ()
    try:
        # It needs no more of a call than its code, details and trailing metadata.
        status = rpc_status.from_call(cast("grpc.Call", error))
        for detail in () if status is None else status.details:
            hint, bad = error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
            if detail.Unpack(hint):
                retry_after_s = float(hint.retry_delay.ToNanoseconds() / 1e9)
            elif detail.Unpack(bad):
                fields = tuple(violation.field for violation in bad.field_violations)
    except (ValueError, DecodeError):  # not of this status, or not readable
        return _Details()
    return _Details(retry_after_s, fields)
