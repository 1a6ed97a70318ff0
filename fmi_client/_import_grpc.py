"""Imports gRPC without its handlers for forks, which kill now and then a child whose parent uses grpc.aio.

The SDK tells a child itself that it cannot use gRPC; see `_fork`. gRPC reads the variable when it is
imported, so that nothing is left of it for other programs. Who sets it keeps what was set.
"""

from __future__ import annotations

import importlib
import os
from typing import Final

__all__: list[str] = []

_VARIABLE: Final = "GRPC_ENABLE_FORK_SUPPORT"

_told = _VARIABLE in os.environ
os.environ.setdefault(_VARIABLE, "0")
try:
    importlib.import_module("grpc")
finally:
    if not _told:
        del os.environ[_VARIABLE]
