"""What no input may bring about, whatever is fuzzed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from google.rpc import error_details_pb2

from fmi_server.errors import FMIError, Reason, Violation
from fmi_server.transport.status import DOMAIN, refusal_message, status_message

__all__ = ["Finding", "assert_explained", "listening"]

MAX_STATUS_BYTES = 8192 * 3 // 4
"""A status that a client takes: 8 KiB of metadata, in which binary details grow by a third."""

MAX_FIELD = 400
MAX_DESCRIPTION = 1024


class Finding(AssertionError):  # noqa: N818 - what a fuzzer finds is called so
    """Something that must not happen did."""


def assert_explained(error: FMIError) -> None:
    """A refusal has a reason, says what is wrong where, and fits, as a status and inside an answer."""
    status = status_message(error, request_id="0" * 16)
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    _demand(info.domain == DOMAIN and bool(info.reason), f"no reason: {error!r}")
    _demand(error.reason != Reason.INTERNAL, f"INTERNAL: {error!r}")
    _demand(bool(status.message.strip()), f"no message: {error!r}")
    size = status.ByteSize() + len(status.message)
    _demand(size <= MAX_STATUS_BYTES, f"a status of {size} bytes")
    for violation in error.violations:
        _assert_told(violation)
    if not error.violations:
        _demand(_printable(str(error)), f"an unprintable message: {str(error)!r}")
    told = refusal_message(error, most=10)
    _demand(
        told.ByteSize() <= 10 * (MAX_FIELD + MAX_DESCRIPTION) * 3, "a refusal that is too large"
    )


def _assert_told(violation: Violation) -> None:
    _demand(bool(violation.field and violation.rule_id), f"no field or rule: {violation}")
    _demand(bool(violation.description.strip()), f"no description: {violation}")
    _demand(len(violation.field) <= MAX_FIELD, f"a field of {len(violation.field)} characters")
    length = len(violation.description)
    _demand(length <= MAX_DESCRIPTION, f"a description of {length} characters")
    text = f"{violation.field}{violation.description}"
    _demand(_printable(text), f"an unprintable field or description: {violation!r}")


def _printable(text: str) -> bool:
    return text.isprintable()


def _demand(kept: bool, broken: str) -> None:
    if not kept:
        raise Finding(broken[:500])


@contextmanager
def listening() -> Iterator[list[logging.LogRecord]]:
    """Keep what the server logs as an error: its background tasks have no other way to say so."""
    handler = _Kept()
    logger = logging.getLogger("fmi_server")
    logger.addHandler(handler)
    try:
        yield handler.records
    finally:
        logger.removeHandler(handler)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
