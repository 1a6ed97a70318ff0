"""What the broker's errors mean for a store, in one table.

The client is imported here alone, when a store is opened: who does not use this store does not need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmi_server.storage.base import StoreUnavailableError

if TYPE_CHECKING:
    from types import ModuleType

    from fmi_server.storage.records import UnavailableReason

__all__ = ["STREAM_EXISTS", "WRONG_LAST_SEQUENCE", "broker_error", "import_nats", "is_refusal"]

WRONG_LAST_SEQUENCE = frozenset({10071, 10164})
STREAM_EXISTS = 10058
IN_PROCESS = 10158
"""A message of the same id was sent before, and what becomes of it is not known yet."""

_BY_CODE: dict[int, UnavailableReason] = {
    10005: "unsupported",  # no suitable peers for so many replicas
    10023: "disk_full",  # insufficient resources
    10028: "disk_full",  # memory resources exceeded
    10039: "unsupported",  # JetStream not enabled for the account
    10047: "disk_full",  # storage resources exceeded
    10052: "unsupported",  # a configuration that the broker does not know
    10059: "no_stream",
    10074: "unsupported",  # replicas without a cluster
    10076: "unsupported",  # JetStream not enabled
    10077: "disk_full",  # the store failed: maximum bytes, or its disk
}


def import_nats() -> ModuleType:
    """Return the client's package.

    Raises:
        StoreUnavailableError: It is not installed.
    """
    try:
        import nats  # noqa: PLC0415 - optional, see above
        import nats.errors  # noqa: PLC0415
        import nats.js.api  # noqa: PLC0415
        import nats.js.errors  # noqa: PLC0415
    except ImportError as error:
        raise StoreUnavailableError(
            "unsupported",
            detail="the package nats-py is missing; install fmi-federation[nats]",
        ) from error
    package: ModuleType = nats
    return package


def is_refusal(error: BaseException) -> bool:
    """Tell whether the broker answered and will answer the same again, so that trying again is no use."""
    errors = import_nats().js.errors
    return (
        isinstance(error, errors.APIError)
        and not isinstance(error, errors.ServiceUnavailableError)
        and error.err_code != IN_PROCESS
    )


def broker_error(error: BaseException, where: str) -> StoreUnavailableError:
    """Return the typed error for one of the client's or the operating system's."""
    found = StoreUnavailableError(_cause(error), detail=_detail(error), path=where)
    found.__cause__ = error
    return found


def _cause(error: BaseException) -> UnavailableReason:
    nats = import_nats()
    js, core = nats.js.errors, nats.errors
    if isinstance(error, js.APIError):
        quorum = isinstance(error, js.ServiceUnavailableError)
        return _BY_CODE.get(error.err_code or 0, "no_quorum" if quorum else "io_error")
    if "authorization" in str(error).lower():
        return "denied"
    causes: tuple[tuple[type[BaseException], UnavailableReason], ...] = (
        # Nobody listens on the subject: no leader, no quorum, or no stream.
        (js.NoStreamResponseError, "no_quorum"),
        (core.NoRespondersError, "no_quorum"),
        (core.AuthorizationError, "denied"),
        (TimeoutError, "no_answer"),  # the client's is one, too
        (core.Error, "no_broker"),
        (OSError, "no_broker"),
    )
    for kind, cause in causes:
        if isinstance(error, kind):
            return cause
    return "io_error"


def _detail(error: BaseException) -> str:
    return str(error).removeprefix("nats: ") or type(error).__name__
