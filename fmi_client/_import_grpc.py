"""Imports gRPC without its handlers for forks, and without its log of what is no error.

The handlers kill now and then a child whose parent uses grpc.aio; the SDK tells a child itself that it
cannot use gRPC; see `_fork`. The log goes to stderr, past Python's, and what it says of a connection stands
in the SDK's errors. gRPC reads both variables when it is imported, so that nothing is left of them for
other programs. Who sets one keeps what was set.
"""

from __future__ import annotations

import importlib
import os
from typing import Final

__all__: list[str] = []

_VARIABLES: Final = {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR"}

_ours = {name: value for name, value in _VARIABLES.items() if name not in os.environ}
os.environ.update(_ours)
try:
    importlib.import_module("grpc")
finally:
    for _name in _ours:
        del os.environ[_name]
