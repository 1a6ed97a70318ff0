"""Fixtures of the client's tests."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from scripted_server import FAST, ScriptedServer

from fmi_client import AsyncFMIClient, FMIEmitter


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer()
    await scripted.start()
    yield scripted
    await scripted.stop()


@pytest.fixture
async def connect(
    server: ScriptedServer,
) -> AsyncIterator[Callable[..., Awaitable[AsyncFMIClient]]]:
    async with AsyncExitStack() as stack:

        async def open_client(**options) -> AsyncFMIClient:
            settings = {"domain_id": "site_001", "cohort": "care", "retry": FAST, **options}
            return await stack.enter_async_context(AsyncFMIClient(server.target, **settings))

        yield open_client


@pytest.fixture
def emitter() -> FMIEmitter:
    return FMIEmitter("site_001", cohort="care")
