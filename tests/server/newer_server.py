"""A server of a version that is still to come, for tests of what today's does beside it.

    newer_server.py serve ...       writes entries of a format of its own

`newer_schema` is what the databases of such a version have.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

from fmi_server.storage import jetstream_commands, sqlite_schema

__all__ = ["newer_format", "newer_schema"]


@contextlib.contextmanager
def newer_format() -> Iterator[None]:
    """Write entries of the next format, and read those of both."""
    with mock.patch.object(jetstream_commands, "_FORMAT", jetstream_commands._FORMAT + 1):
        yield


@contextlib.contextmanager
def newer_schema() -> Iterator[None]:
    """Open databases with the next schema, which has one table more."""
    migrations = (*sqlite_schema._MIGRATIONS, ("CREATE TABLE to_come (n INTEGER) STRICT",))
    with (
        mock.patch.object(sqlite_schema, "_MIGRATIONS", migrations),
        mock.patch.object(sqlite_schema, "SCHEMA_VERSION", len(migrations)),
    ):
        yield


if __name__ == "__main__":
    from fmi_server.commands import cli

    sys.argv[0] = "fmi-server"
    with newer_format():
        cli()
