"""What the audit log is told of calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from google.protobuf.message import DecodeError

from fmi.v1 import packet_pb2
from fmi_server.audit import AuditLog
from fmi_server.certificates import ClientCertificate
from fmi_server.emission import Answer
from fmi_server.errors import Reason, reason_name
from fmi_server.tokens import TokenRecord
from fmi_server.transport.identity import Caller

__all__ = ["AUDITED_REASONS", "describe", "note_items"]

AUDITED_REASONS: Final = frozenset(
    {
        Reason.UNAUTHENTICATED,
        Reason.ACCESS_DENIED,
        Reason.DOMAIN_ID_MISMATCH,
        Reason.UNAUTHORIZED,
        # It may be a cohort that the caller may not see.
        Reason.COHORT_UNKNOWN,
    }
)
"""The refusals that are about who calls."""

FLAGS: Final = ("dry_run", "force", "quarantined")
"""Fields of the operator's requests that say what kind of change is asked for."""

MOST_BYTES: Final = 256 * 1024
"""The largest packet that is read for who sent it."""

MOST_ITEMS: Final = 8
"""Lines for the refused packets of one batch; alike ones share a line."""


def describe(caller: Caller, request: Any) -> dict[str, str]:
    """Say who calls, from where, and what the call is about.

    Args:
        caller: Who calls.
        request: A request of any method.
    """
    header = getattr(_packet(request), "header", None)
    spec = getattr(request, "spec", None)
    patterns = getattr(request, "cohorts", ())
    return {
        **_who(caller),
        "cohort": _text(request, "cohort")
        or _text(header, "cohort")
        or _text(spec, "name")
        or " ".join(patterns[:MOST_ITEMS]),
        "domain_id": _text(request, "domain_id")
        or _text(header, "domain_id")
        or _text(request, "subscriber"),
        "packet_id": _text(request, "packet_id") or _text(header, "packet_id"),
        "with": " ".join(name for name in FLAGS if getattr(request, name, False) is True),
    }


def note_items(audit: AuditLog, caller: Caller, answers: Sequence[Answer]) -> None:
    """Note the packets of a batch that were refused for who sent them."""
    refused = Counter(
        (answer.error.reason, str(answer.error))
        for answer in answers
        if answer.error is not None and answer.error.reason in AUDITED_REASONS
    )
    for (reason, told), count in refused.most_common(MOST_ITEMS):
        audit.refused(reason_name(reason), {**_who(caller), "told": told}, count=count)


def _packet(request: Any) -> object:
    """Return the packet of a request, which may be bytes; None where there is none that can be read."""
    packet = getattr(request, "packet", None)
    if not isinstance(packet, bytes):
        return packet
    if len(packet) > MOST_BYTES:
        return None
    try:
        return packet_pb2.Packet.FromString(packet)
    except DecodeError:
        return None


def _who(caller: Caller) -> dict[str, str]:
    return {
        "principal": caller.principal.name,
        "credential": _credential(caller.principal.credential),
        "peer": caller.peer,
        "method": caller.method,
    }


def _credential(credential: object) -> str:
    """Name what proved who calls, as an operator finds it again."""
    match credential:
        case TokenRecord(token_id=token_id):
            return f"token {token_id}"
        case ClientCertificate() as certificate:
            return f"certificate {certificate.number}"
        case _:
            return ""


def _text(message: Any, name: str) -> str:
    found = getattr(message, name, "")
    return found if isinstance(found, str) else ""
