"""Telling the server what became of an update."""

from __future__ import annotations

from typing import Final

from fmi.v1 import interchange_service_pb2, update_pb2
from fmi_client._calls import Caller
from fmi_client.errors import ConfigurationError

__all__ = ["UNKNOWN", "apply_failure", "send_report"]

UNKNOWN: Final = 2
"""The number of `UNKNOWN` in `google.rpc.Code`."""

MAX_MESSAGE_BYTES: Final = 512
"""What the contract allows for the text of a failure."""


async def send_report(
    caller: Caller,
    subscriber: str | None,
    update: update_pb2.Update,
    failure: interchange_service_pb2.ApplyFailure | None,
) -> bool:
    """Report an update as applied, or as failed; return whether the server keeps the report.

    Raises:
        ConfigurationError: The client was made without `domain_id`.
        UpdateNotFoundError: The server has not released such an update.
    """
    if subscriber is None:
        raise ConfigurationError(
            "give the client a domain_id, so that it can report under its name"
        )
    report = interchange_service_pb2.ApplyReport(
        cohort=update.cohort,
        kind=update.kind,
        revision=update.revision,
        history_epoch=update.history_epoch,
        failure=failure,
    )
    response = await caller.call(
        caller.stubs().interchange.ReportApplied,
        interchange_service_pb2.ReportAppliedRequest(subscriber=subscriber, reports=[report]),
        retry_late=True,  # a report counts once, however often it is sent
    )
    return response.recorded == 1


def apply_failure(reason: object, code: int) -> interchange_service_pb2.ApplyFailure:
    """Write why an update could not be put to use, as far as the contract has room for it.

    Raises:
        ConfigurationError: `code` is not the number of an error in `google.rpc.Code`.
    """
    if not 1 <= code <= 16:
        raise ConfigurationError("code must be a number of google.rpc.Code, from 1 to 16")
    line = "".join(c if c.isprintable() else " " for c in str(reason))
    message = line.encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore")
    return interchange_service_pb2.ApplyFailure(code=code, message=message)
