"""Outages of a subscription against the project's own server, stopped and started on its port."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import asynccontextmanager

import grpc
import pytest
from ports import lasting_address
from scripted_server import FAST, snapshot_end, status, streams, update_event

from fmi_client import (
    AsyncFMIClient,
    CompactedError,
    ConfigurationError,
    ConnectionFailedError,
    FMIClient,
    RetryPolicy,
    outages,
)
from fmi_client.outages import ConnectionState
from fmi_server.testing import running_server

QUICK = RetryPolicy(initial_s=0.05, max_s=0.2)
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
SETTLED_S = 0.3


@pytest.fixture(autouse=True)
def _soon_settled(monkeypatch):
    monkeypatch.setattr(outages, "SETTLED_S", SETTLED_S)


@pytest.fixture
def told(caplog):
    """What the SDK's logger said, as (level, text)."""
    caplog.set_level(logging.INFO, logger="fmi_client")
    return lambda: [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name.startswith("fmi_client")
    ]


@pytest.fixture
async def restartable(tmp_path):
    """Give a context that runs the server, always on the same port."""
    address = lasting_address()

    @asynccontextmanager
    async def run():
        async with running_server(tmp_path, listen=address) as server:
            yield server.target

    return run


def lives(event, until):
    """A Subscribe step: a stream that fails as soon as a condition holds."""

    async def step(_request, context):
        yield event
        await eventually(until)
        await context.abort(UNAVAILABLE, "")

    return step


async def follow(subscription, kinds):
    async for event in subscription.events():
        kinds.put_nowait(event.WhichOneof("event"))


async def eventually(holds):
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_an_outage_is_told_once_when_it_begins_and_once_when_it_is_over(restartable, told):
    states: asyncio.Queue[ConnectionState] = asyncio.Queue()
    kinds: asyncio.Queue[str] = asyncio.Queue()
    async with restartable() as target:
        client = AsyncFMIClient(target, retry=QUICK)
        subscription = client.subscribe("care", on_state=states.put_nowait)
        following = asyncio.create_task(follow(subscription, kinds))
        assert await kinds.get() == "snapshot_end"
        assert (states.empty(), told()) == (True, [])  # a quiet cohort is no outage
    lost = await states.get()
    assert (lost.target, lost.connected, lost.established) == (target, False, True)
    assert isinstance(lost.error, Exception)
    while subscription.statistics.reconnects < 3:  # noqa: ASYNC110  attempts that fail are silent
        await asyncio.sleep(0.01)
    assert states.empty()
    async with restartable():
        back = await states.get()
        assert (back.connected, back.error, states.empty()) == (True, None, True)
        assert back.down_s > 0
        (lost_level, lost_text), (back_level, back_text) = told()
        assert (lost_level, back_level) == ("WARNING", "INFO")
        assert lost_text == str(lost)
        assert lost_text.startswith(f"connection to {target} lost (")
        assert lost_text.endswith("), trying again")
        assert back_text == f"{target}: connected again after {back.down_s:.1f} s"
        await client.aclose()
        await following


async def test_a_first_connection_that_fails_is_told_too(restartable, told):
    async with restartable() as target:
        pass
    states: asyncio.Queue[ConnectionState] = asyncio.Queue()
    patient = RetryPolicy(initial_s=0.05, max_s=0.2, max_attempts=1000)
    async with AsyncFMIClient(target, retry=patient) as client:
        subscription = client.subscribe("care", on_state=states.put_nowait)
        following = asyncio.create_task(follow(subscription, asyncio.Queue()))
        lost = await states.get()
        assert (lost.connected, lost.established) == (False, False)
        assert told() == [("WARNING", str(lost))]
        assert str(lost).startswith(f"no connection to {target} (Connection refused")
        async with restartable():
            back = await states.get()
            assert str(back) == f"connected after {back.down_s:.1f} s"
        await subscription.aclose()
        await following


async def test_the_blocking_client_tells_it_as_well(restartable, told):
    lost, back = threading.Event(), threading.Event()

    def note(state: ConnectionState) -> None:
        (back if state.connected else lost).set()

    async with restartable() as target:
        client = FMIClient(target, retry=QUICK)
        subscription = client.subscribe("care", on_update=lambda _update: None, on_state=note)
        while not subscription.resume_token:  # noqa: ASYNC110  until it is connected
            await asyncio.sleep(0.01)
    assert await asyncio.to_thread(lost.wait, 60)
    async with restartable():
        assert await asyncio.to_thread(back.wait, 60)
        await asyncio.to_thread(client.close)
    assert [level for level, _ in told()] == ["WARNING", "INFO"]


async def test_where_nothing_is_tried_again_nothing_is_told(server, connect, told):
    server.script("Subscribe", streams(then=status(grpc.StatusCode.OUT_OF_RANGE, "COMPACTED")))
    states = []
    client = await connect()
    async with client.subscribe("care", on_state=states.append) as subscription:
        with pytest.raises(CompactedError):
            await anext(subscription)
    assert (states, told()) == ([], [])


async def test_attempts_that_are_used_up_were_one_outage(server, connect, told):
    server.script("Subscribe", *[streams(then=UNAVAILABLE)] * 9)
    client = await connect()
    async with client.subscribe("care") as subscription:
        with pytest.raises(ConnectionFailedError):
            await anext(subscription)
    assert len(server.seen("Subscribe")) == FAST.max_attempts
    assert [level for level, _ in told()] == ["WARNING"]


async def test_beginning_again_with_the_newest_is_no_outage(server, connect, told):
    server.script(
        "Subscribe",
        streams(then=status(grpc.StatusCode.OUT_OF_RANGE, "COMPACTED")),
        streams(update_event(5), hold=True),
    )
    client = await connect()
    async with client.subscribe(
        "care", start={("care", "prior"): 1}, on_compacted="snapshot"
    ) as subscription:
        assert (await anext(subscription)).revision == 5
    assert told() == []


async def test_each_outage_is_told(server, connect, told):
    server.script(
        "Subscribe",
        streams(snapshot_end(), then=UNAVAILABLE),
        lives(snapshot_end(), until=lambda: len(told()) == 2),
        streams(update_event(1), hold=True),
    )
    client = await connect()
    async with client.subscribe("care") as subscription:
        await anext(subscription)
        await eventually(lambda: len(told()) >= 4)
    assert [level for level, _ in told()] == ["WARNING", "INFO"] * 2


async def test_streams_that_end_at_once_are_one_outage(server, connect, told, monkeypatch):
    """Neither a line for each of them, nor a new attempt at once after each of them."""
    monkeypatch.setattr(outages, "SETTLED_S", 2.0)
    states: list[ConnectionState] = []
    flaps = [streams(snapshot_end(), then=UNAVAILABLE)] * 20
    server.script("Subscribe", *flaps, streams(update_event(1), hold=True))
    client = await connect()
    async with client.subscribe("care", on_state=states.append) as subscription:
        await anext(subscription)
        assert [state.connected for state in states] == [False]
        assert subscription._backoff.failures == 20
        await eventually(lambda: len(states) == 2)
        assert subscription._backoff.failures == 0
    assert [state.connected for state in states] == [False, True]
    assert [level for level, _ in told()] == ["WARNING", "INFO"]


async def test_a_closed_subscription_tells_nothing_more(server, connect, told, monkeypatch):
    monkeypatch.setattr(outages, "SETTLED_S", settled_s := 1.0)
    server.script(
        "Subscribe",
        streams(update_event(1), then=UNAVAILABLE),
        streams(update_event(2), hold=True),
    )
    client = await connect()
    async with client.subscribe("care") as subscription:
        assert [(await anext(subscription)).revision for _ in range(2)] == [1, 2]
    await asyncio.sleep(1.2 * settled_s)
    assert [level for level, _ in told()] == ["WARNING"]


class Coroutine:
    async def __call__(self, state: ConnectionState) -> None:
        raise AssertionError(state)


@pytest.mark.parametrize("callback", [Coroutine(), Coroutine().__call__], ids=["object", "method"])
async def test_a_coroutine_function_is_refused_as_nothing_would_run_it(server, connect, callback):
    client = await connect()
    with pytest.raises(ConfigurationError, match="on_state must be a plain function"):
        client.subscribe("care", on_state=callback)
    with (
        FMIClient(server.target) as blocking,
        pytest.raises(ConfigurationError, match="on_state must be a plain function"),
    ):
        blocking.subscribe("care", on_state=callback)


async def test_a_callback_that_fails_is_logged_and_ends_nothing(server, connect, told):
    def fails(state: ConnectionState) -> None:
        raise LookupError(state)

    server.script(
        "Subscribe",
        streams(update_event(1), then=UNAVAILABLE),
        streams(update_event(2), hold=True),
    )
    client = await connect()
    async with client.subscribe("care", on_state=fails) as subscription:
        assert [(await anext(subscription)).revision for _ in range(2)] == [1, 2]
        await eventually(lambda: len(told()) == 4)
    assert [level for level, _ in told()] == ["WARNING", "ERROR", "INFO", "ERROR"]
