"""The version of the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

__all__ = ["VERSION"]


def _installed_version() -> str:
    try:
        return version("fmi-federation")
    except PackageNotFoundError:
        return "unknown"


VERSION: Final = _installed_version()
