"""The `fmi-server` command: says what is missing, or hands over to `fmi_server.commands`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Final

__all__ = ["main"]

_SERVER_MODULES: Final = (
    "cryptography",
    "grpc_health",
    "numpy",
    "pydantic_settings",
    "structlog",
    "yaml",
)


def main() -> None:
    """Run the command."""
    missing = [name for name in _SERVER_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"fmi-server needs {', '.join(missing)}, which a base install does not have: "
            "in the checkout, pip install '.[server]'"
        )
    # gRPC's core writes a line for much that a peer gets wrong: whoever likes could fill the disk. It reads
    # this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    importlib.import_module("fmi_server.commands").cli.main(prog_name="fmi-server")
