"""Fixtures of the server's tests: a real server with a real SQLite store, and a raw client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from server_harness import Client

from fmi_server.app import RunningServer
from fmi_server.testing import running_server


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def server(data_dir: Path) -> AsyncIterator[RunningServer]:
    async with running_server(data_dir) as running:
        yield running


@pytest.fixture
async def client(server: RunningServer) -> AsyncIterator[Client]:
    async with Client(server.target) as connected:
        yield connected
