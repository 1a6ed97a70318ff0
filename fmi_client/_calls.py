"""Calls to the server: one channel, one place for retries and for the translation of failures."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from fmi.v1 import admin_service_pb2_grpc, interchange_service_pb2_grpc, registry_service_pb2_grpc
from fmi_client._arguments import check_kind, check_number
from fmi_client._channel import TLSConfig, call_metadata, open_channel
from fmi_client._fork import check_process, start_grpc
from fmi_client._target import parse_target
from fmi_client._token import TokenSource
from fmi_client._translation import error_from_rpc
from fmi_client.errors import (
    ClientClosedError,
    ConfigurationError,
    DeadlineError,
    FMIError,
    ProtocolError,
)
from fmi_client.retry import Backoff, RetryPolicy

__all__ = ["Caller", "Stubs"]

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


@dataclass(frozen=True, slots=True)
class Stubs:
    """The services of the contract over one channel."""

    interchange: interchange_service_pb2_grpc.InterchangeServiceStub
    registry: registry_service_pb2_grpc.RegistryServiceStub
    admin: admin_service_pb2_grpc.AdminServiceStub


class Caller:
    """Opens the channel on first use and makes the calls.

    Attributes:
        target: The gRPC target.
        retry: When to try again.
        timeout_s: Seconds that one attempt of a unary call, or the answer to one batch, may take.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: TLSConfig | None,
        token: str | Path | None,
        insecure: bool,
        retry: RetryPolicy,
        timeout_s: float,
    ) -> None:
        check_kind("target", target, str)
        check_kind("tls", tls, TLSConfig, optional=True)
        check_kind("insecure", insecure, bool)
        check_number("timeout_s", timeout_s)
        if timeout_s <= 0:
            raise ConfigurationError("timeout_s must be above 0")
        if not isinstance(retry, RetryPolicy):  # None is what many write who want none
            raise ConfigurationError(
                "retry must be a RetryPolicy; RetryPolicy(max_attempts=1) tries once"
            )
        parse_target(target)  # refuses what can be none
        self.target = target
        self.retry = retry
        self.timeout_s = timeout_s
        self._tls = tls
        self._given_token = token
        self._token = TokenSource(token)
        self._insecure = insecure
        self._metadata: tuple[str | None, tuple[tuple[str, str], ...]] = (None, ())
        _ = self.metadata  # a token that cannot be sent is refused here and not with the first call
        self._channel: grpc.aio.Channel | None = None
        self._stubs: Stubs | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._pid = os.getpid()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._interrupted: set[asyncio.Task[Any]] = set()

    def sibling(self, *, retry: RetryPolicy) -> Caller:
        """Make a caller with a connection of its own to the same server."""
        return Caller(
            self.target,
            tls=self._tls,
            token=self._given_token,
            insecure=self._insecure,
            retry=retry,
            timeout_s=self.timeout_s,
        )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call, by the token as it is now.

        Raises:
            ConfigurationError: The token would cross a network in plain text, or is none.
        """
        token = self._token.text
        if token != self._metadata[0]:
            pairs = call_metadata(self.target, token=token, tls=self._tls, insecure=self._insecure)
            self._metadata = (token, pairs)
        return self._metadata[1]

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def stubs(self) -> Stubs:
        """Return the services, opening the channel on first use. Needs a running event loop.

        Raises:
            ClientClosedError: It was closed.
            ForkedError: It was made in another process, or one that forked this one used gRPC.
            ConfigurationError: It is used from another event loop, or TLS files cannot be read.
        """
        self.check_open()
        loop = asyncio.get_running_loop()
        if self._stubs is None:
            start_grpc()
            channel = open_channel(self.target, tls=self._tls)
            self._channel, self._loop = channel, loop
            self._stubs = Stubs(
                interchange_service_pb2_grpc.InterchangeServiceStub(channel),
                registry_service_pb2_grpc.RegistryServiceStub(channel),
                admin_service_pb2_grpc.AdminServiceStub(channel),
            )
        elif loop is not self._loop:
            raise ConfigurationError(
                "a client belongs to the event loop in which it was first used"
            )
        return self._stubs

    @property
    def foreign(self) -> bool:
        """Whether it was made in another process, which forked this one."""
        return os.getpid() != self._pid

    def check_open(self) -> None:
        """Raise `ClientClosedError` unless calls can be made, `ForkedError` in a child."""
        if self._closed:
            raise ClientClosedError("the client is closed; make a new one")
        check_process(self._pid, "the client")

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        *,
        retry_late: bool = False,
    ) -> _Response:
        """Make a unary call, and try again where that can help. Every attempt sends the same request.

        Args:
            method: The call.
            request: What every attempt sends.
            retry_late: Whether an attempt without an answer in time is tried again as well. It may
                have had an effect, so only for what counts once however often it is sent.

        Raises:
            ProtocolError: The answer cannot be read.
            FMIError: The typed failure of the last attempt.
        """
        with self.under_way():
            return await self._call(method, request, retry_late=retry_late)

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        *,
        retry_late: bool,
    ) -> _Response:
        backoff = Backoff(self.retry)
        while True:
            try:
                response = await method(request, timeout=self.timeout_s, metadata=self.metadata)
            except grpc.aio.AioRpcError as failure:
                error: FMIError = error_from_rpc(failure, self.target)
            except grpc.aio.UsageError:
                error = ClientClosedError("the client was closed under the call")
            else:
                if response is None:  # so grpc.aio tells of bytes that are no message
                    raise ProtocolError(f"{self.target}: the answer cannot be read")
                return response
            if isinstance(error, DeadlineError) and not retry_late:
                raise error  # the caller's time is over, however often it could be tried
            await backoff.wait_or_raise(error)

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Let `aclose` end what the current task waits for.

        Closing a channel is not enough: grpc.aio can leave a stream that is just being opened waiting
        for ever. So the task itself is cancelled, and the cancellation comes out as what it is.

        Raises:
            ClientClosedError: It was `aclose` that ended the call.
        """
        task = asyncio.current_task()
        if task is None:  # a coroutine that is driven by hand
            yield
            return
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._interrupted:
                raise
            self._interrupted.discard(task)
            if task.uncancel() > 0:
                raise  # somebody else wants the task to end too
            raise ClientClosedError("the client was closed under the call") from None
        finally:
            self._tasks.discard(task)
            if task in self._interrupted:
                self._interrupted.discard(task)
                task.uncancel()

    async def reconnect(self) -> None:
        """Close the channel; the next call opens a new one. No call must be under way."""
        channel, self._channel, self._stubs = self._channel, None, None
        if channel is not None:
            await channel.close()

    async def aclose(self) -> None:
        """End all calls and close the channel. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        if self.foreign:
            return  # the channel is the parent's, and gRPC would hang
        for task in self._tasks - {asyncio.current_task()}:
            self._interrupted.add(task)
            task.cancel()
        if self._channel is not None:
            await self._channel.close()
