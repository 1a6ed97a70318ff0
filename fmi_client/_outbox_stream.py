"""Sending a backlog: one batch after the other over one stream, each answered before the next is sent.

With a batch more under way, one that the server cannot take now would be overtaken by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import grpc

from fmi.v1 import interchange_service_pb2
from fmi_client._calls import Caller
from fmi_client._outbox_store import Item
from fmi_client._translation import error_from_refusal, error_from_rpc
from fmi_client.encoder import FMIEncoder
from fmi_client.errors import (
    ClientClosedError,
    ConnectionFailedError,
    DeadlineError,
    ProtocolError,
)
from fmi_client.receipts import EmitStatus, Receipt

__all__ = ["OrderedStream"]

_EmitStreamCall: TypeAlias = grpc.aio.StreamStreamCall[
    interchange_service_pb2.EmitStreamRequest, interchange_service_pb2.EmitStreamResponse
]


class OrderedStream:
    """A stream that is opened when there is a batch, and dropped where anything is wrong with it."""

    def __init__(self, caller: Caller, encoder: FMIEncoder) -> None:
        self._caller = caller
        self._encoder = encoder
        self._stream: _EmitStreamCall | None = None
        self._batch_id = 0

    async def send(self, batch: Sequence[tuple[Item, bytes]]) -> list[Receipt]:
        """Send a batch; return the receipt of each packet.

        Raises:
            DeadlineError: No answer came within the caller's timeout.
            FMIError: The stream broke, or the batch was refused as a whole; nothing is known of it.
        """
        encoded = await asyncio.to_thread(
            self._encoder.encode_serialized, [data for _, data in batch]
        )
        self._batch_id += 1
        request = interchange_service_pb2.EmitStreamRequest(
            batch_id=self._batch_id, encoded=encoded
        )
        try:
            with self._translated():
                async with asyncio.timeout(self._caller.timeout_s):
                    response = await self._exchange(request)
            return self._receipts(batch, response)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """End the stream; the next batch opens another one."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()

    async def _exchange(
        self, request: interchange_service_pb2.EmitStreamRequest
    ) -> interchange_service_pb2.EmitStreamResponse:
        stream = self._stream
        if stream is None:
            call = self._caller.stubs().interchange.EmitStream
            stream = self._stream = call(metadata=self._caller.metadata)
            await stream.wait_for_connection()
        try:
            await stream.write(request)
        except asyncio.InvalidStateError:
            pass  # the stream is over: the answer says why
        except grpc.aio.AioRpcError:
            # grpc.aio hides the server's status behind an internal one; the next stream tells it.
            raise ConnectionFailedError(
                f"{self._caller.target}: the stream broke under a write"
            ) from None
        response = await stream.read()
        if isinstance(response, interchange_service_pb2.EmitStreamResponse):
            return response
        if response is grpc.aio.EOF:
            raise ConnectionFailedError(f"{self._caller.target}: the server ended the stream")
        raise ProtocolError(f"{self._caller.target}: an answer cannot be read")

    def _receipts(
        self,
        batch: Sequence[tuple[Item, bytes]],
        response: interchange_service_pb2.EmitStreamResponse,
    ) -> list[Receipt]:
        if response.HasField("refusal"):
            raise error_from_refusal(response.refusal)
        results = {result.index: result for result in response.exceptions}
        if (
            response.batch_id != self._batch_id
            or response.packets != len(batch)
            or any(index >= len(batch) for index in results)
        ):
            raise ProtocolError(
                f"the server answered {response.packets} packets of batch {response.batch_id}, which "
                f"is not what was sent: {len(batch)} packets in batch {self._batch_id}"
            )
        return [
            Receipt.from_result(results[index], item.packet_id)
            if index in results
            else Receipt(item.packet_id, EmitStatus.ACCEPTED)
            for index, (item, _) in enumerate(batch)
        ]

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        target = self._caller.target
        try:
            yield
        except TimeoutError:
            raise DeadlineError(f"{target}: no answer to a batch in time") from None
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure, target) from None
        except grpc.aio.UsageError:
            raise ClientClosedError("the client was closed under the call") from None
