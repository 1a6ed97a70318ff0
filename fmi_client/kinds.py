"""Kinds of update under short names: ``prior``, ``warm_start``, ``policy_hint``, ``causal_consensus``."""

from __future__ import annotations

from typing import Final, TypeAlias

from fmi.v1 import error_pb2, update_pb2
from fmi_client._translation import reason_name
from fmi_client.errors import InvalidFilterError, Violation

__all__ = ["KIND_NAMES", "KindLike", "kind_name", "update_kind"]

KindLike: TypeAlias = "str | update_pb2.UpdateKind.ValueType"
"""A short name, a name of the contract (``UPDATE_KIND_PRIOR``) or a value of the enum."""

_PREFIX: Final = "UPDATE_KIND_"

_KINDS: Final = {
    name.removeprefix(_PREFIX).lower(): value
    for name, value in update_pb2.UpdateKind.items()
    if value
}

KIND_NAMES: Final = tuple(_KINDS)
"""The short names, in the order of the contract."""

_NAMES: Final[dict[int, str]] = {value: name for name, value in _KINDS.items()}


def update_kind(kind: KindLike) -> update_pb2.UpdateKind.ValueType:
    """Return the contract's value of a kind.

    Raises:
        InvalidFilterError: There is no such kind.
    """
    if isinstance(kind, str):
        found = _KINDS.get(kind.removeprefix(_PREFIX).lower().replace("-", "_"))
        if found is not None:
            return found
    elif kind in _NAMES:
        return kind
    text = f"{kind!r} is not a kind of update; the kinds are {', '.join(KIND_NAMES)}"
    raise InvalidFilterError(
        text,
        reason=reason_name(error_pb2.ERROR_REASON_INVALID_FILTER),
        violations=[Violation("kinds", "fmi.kind", text)],
    )


def kind_name(kind: update_pb2.UpdateKind.ValueType) -> str:
    """Return the short name of a kind; its number where this SDK does not know it."""
    return _NAMES.get(kind, str(int(kind)))
