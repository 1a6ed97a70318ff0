"""Cohort specs from plain data, as people write them in cohort files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf import json_format

from fmi.plain import PlainDataError, Problem
from fmi.v1 import cohort_pb2

__all__ = ["cohort_spec_from_plain"]


def cohort_spec_from_plain(data: Mapping[str, Any]) -> cohort_pb2.CohortSpec:
    """Translate a cohort spec from plain data: the JSON form of `CohortSpec`.

    Enum values may be written short (``section: controller``, ``direction: higher_is_better``), and
    durations as seconds (``min_interval: 1``) or as text (``"1.5s"``).

    Args:
        data: The spec.

    Returns:
        The spec; the contract's rules are not checked.

    Raises:
        PlainDataError: A field is unknown or cannot be translated.
    """
    try:
        return json_format.ParseDict(
            _expanded(data), cohort_pb2.CohortSpec(), max_recursion_depth=16
        )
    except (
        json_format.ParseError,
        TypeError,
        ValueError,
        ArithmeticError,
        RecursionError,
    ) as error:
        text = str(error).splitlines()[0][:300] if str(error) else "cannot be read"
        raise PlainDataError([Problem("spec", "fmi.plain.spec", text)]) from error


_SHORT_ENUMS: Final = {
    "section": "SIGNAL_SECTION_",
    "transform": "SIGNAL_TRANSFORM_",
    "direction": "SIGNAL_DIRECTION_",
    "schema_mismatch": "SCHEMA_MISMATCH_",
    "schemaMismatch": "SCHEMA_MISMATCH_",
}
_DURATIONS: Final = frozenset(
    name
    for snake in ("min_interval", "max_interval", "max_age", "max_clock_skew", "window", "site_ttl")
    for name in (snake, "".join(w.title() if i else w for i, w in enumerate(snake.split("_"))))
)


def _expanded(content: object, key: str = "") -> Any:
    """Write short enum names and plain seconds the long way that ProtoJSON wants."""
    if isinstance(content, Mapping):
        if key == "quantum":  # its keys are names of parameters, and mean nothing here
            return {str(name): value for name, value in content.items()}
        return {str(name): _expanded(value, str(name)) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_expanded(item) for item in content]
    if key in _SHORT_ENUMS and isinstance(content, str) and content.islower():
        return _SHORT_ENUMS[key] + content.upper()
    if key in _DURATIONS and isinstance(content, int | float) and not isinstance(content, bool):
        return f"{content}s"
    return content
