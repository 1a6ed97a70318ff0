"""Fixtures of the server's tests: a real server with a real SQLite store, and a raw client."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from server_harness import Client
from server_process import Ended

from fmi_server.app import RunningServer
from fmi_server.commands import cli
from fmi_server.telemetry import FMITelemetry
from fmi_server.testing import running_server


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def server(data_dir: Path) -> AsyncIterator[RunningServer]:
    async with running_server(data_dir) as running:
        yield running
        # No call makes a time series: labels come from closed sets.
        assert running.service.telemetry.snapshot().keys() == FMITelemetry().snapshot().keys()


@pytest.fixture
async def client(server: RunningServer) -> AsyncIterator[Client]:
    async with Client(server.target) as connected:
        yield connected


@pytest.fixture
def command(tmp_path, monkeypatch) -> Iterator[Callable[..., Ended]]:
    """The command inside this process, for tables of settings: a process of its own takes a second."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("FMI_")]:
        monkeypatch.delenv(name)

    def invoke(*flags: str, env: dict[str, str] | None = None, name: str = "serve") -> Ended:
        result = CliRunner().invoke(cli, [name, *flags], env=env)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ended(result.exit_code, result.stdout, result.stderr)

    yield invoke
    root.handlers[:] = handlers
    root.setLevel(level)
