"""The log of a server process: lines on standard error that nobody can forge, fill or read secrets from.

What a peer chose may stand in a line, escaped. A traceback has no values of variables, which may be tokens
and packets, and none of its lines can be taken for a line of the log.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, Final, TextIO, TypeAlias

import structlog

from fmi_server.config import ServerSettings

__all__ = ["configure_log"]

_TRACE: Final = "  | "
"""Stands before each line of a traceback."""

_GRPC: Final = "grpc._cython.cygrpc"

_NOT_TEXT: Final = "Invalid encoding on "
"""How the line begins with which gRPC tells of a header that is no UTF-8, twice and with all of it: it may be
a token, and whoever likes could fill the disk."""

_ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None]


def configure_log(settings: ServerSettings) -> None:
    """Write what is logged in this process to standard error."""
    ending: tuple[Any, ...] = (
        (structlog.processors.format_exc_info, structlog.processors.JSONRenderer())
        if settings.log_format == "json"
        else (
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=_write_traceback
            ),
        )
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _one_line,
                *ending,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    # At debug they tell of each event loop and each connection, and drown what the server says.
    for noisy in ("grpc", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.INFO, root.level))
    logging.getLogger(_GRPC).addFilter(_no_fault_of_ours)


def _no_fault_of_ours(record: logging.LogRecord) -> bool:
    """Leave out what is the peer's doing: else whoever likes could fill the disk with it.

    That is a header that is no text, and that a peer went away while it was answered, which takes a dozen
    lines for each call.
    """
    if str(record.msg).startswith(_NOT_TEXT):
        return False
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ != "ExecuteBatchError"


def _one_line(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    event["event"] = _escaped(str(event.get("event", "")))
    return event


def _write_traceback(out: TextIO, exc_info: _ExcInfo) -> None:
    told = "".join(traceback.format_exception(*exc_info)).rstrip("\n")
    out.writelines(f"\n{_TRACE}{_escaped(line)}" for line in told.split("\n"))


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
