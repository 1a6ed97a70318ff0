"""Checks of what the SDK is set up with: a wrong type would else show with the first call, or never."""

from __future__ import annotations

import math
import numbers
from pathlib import Path
from typing import Final

from fmi_client.errors import ConfigurationError

__all__ = ["check_kind", "check_number", "check_path", "check_whole"]

_NAMES: Final[dict[type, str]] = {str: "a text", bool: "True or False", bytes: "bytes"}


def check_kind(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    """Refuse a value that is not of a type.

    Args:
        name: What it is given as.
        value: The value.
        kind: The type.
        optional: Whether None will do.

    Raises:
        ConfigurationError: It is of another type.
    """
    if not isinstance(value, kind) and not (optional and value is None):
        wanted = _NAMES.get(kind, f"of type {kind.__name__}")
        raise _wrong(name, wanted, value, optional=optional)


def check_path(name: str, value: object, *, optional: bool = False) -> None:
    """Refuse what is no path of a file; see `check_kind`.

    Raises:
        ConfigurationError: It is none, or an empty one.
    """
    if value is None and optional:
        return
    if not isinstance(value, str | Path):
        raise _wrong(name, "the path of a file", value, optional=optional)
    if not Path(value).name:
        raise ConfigurationError(f"{name} must be the path of a file, not {str(value)!r}")


def check_number(name: str, value: object, *, optional: bool = False) -> None:
    """Refuse what is no finite number; see `check_kind`. A bool is none.

    Raises:
        ConfigurationError: It is none.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong(name, "a number", value, optional=optional)
    if not _finite(value):
        raise ConfigurationError(f"{name} must be a finite number")


def check_whole(name: str, value: object) -> None:
    """Refuse what is no whole number. A bool is none.

    Raises:
        ConfigurationError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong(name, "a whole number", value)


def _finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _wrong(name: str, wanted: str, value: object, *, optional: bool = False) -> ConfigurationError:
    # The value itself may be a secret.
    told = "None" if value is None else f"of type {type(value).__name__}"
    or_none = " or None" if optional else ""
    return ConfigurationError(f"{name} must be {wanted}{or_none}; it is {told}")
