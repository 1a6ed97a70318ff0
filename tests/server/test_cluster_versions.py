"""Servers of two versions on one log: the older one stops where it must, the newer one goes on."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from broker import Broker
from cluster_harness import care, member, prior_of, taus, two
from newer_server import newer_schema
from server_harness import NOT_SERVING, SERVING, Client, eventually, msp, refusal_of
from server_process import START_S, assert_refused, run, started

from fmi.descriptors import DELIVERY, INGEST
from fmi.v1 import cohort_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server import app
from fmi_server.commands import cli
from fmi_server.config import ServerSettings
from fmi_server.storage import JetStreamStore
from fmi_server.storage.base import StoreBehindError
from fmi_server.storage.sqlite_schema import SCHEMA_VERSION

NEWER = (sys.executable, str(Path(__file__).with_name("newer_server.py")), "serve")

FROM_THE_FUTURE = b"\xfa\x7f\x01x"
"""A field that no message has yet."""


@pytest.fixture
async def broker(tmp_path) -> AsyncIterator[Broker]:
    async with Broker(tmp_path / "broker", sync="2m") as started_:
        yield started_


def flags_of(broker: Broker, folder: Path) -> tuple[str, ...]:
    return (
        *("--listen", "127.0.0.1:0", "--store", broker.url(), "--data-dir", str(folder)),
        *("--lease-s", "2", "--drain-s", "1"),
    )


async def publish(broker: Broker, data: bytes) -> None:
    """Write into the log what no server of this version would."""
    client = await nats.connect(f"nats://{broker.address}", allow_reconnect=False)
    await client.jetstream().publish("fmi.fmi.log.state", data)
    await client.close()


async def test_an_older_server_stops_at_an_entry_of_a_newer_one_which_goes_on(broker, tmp_path):
    older, newer = (flags_of(broker, tmp_path / name) for name in ("older", "newer"))
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(started(*older))
        a = await stack.enter_async_context(Client(first.target))
        events = await stack.enter_async_context(a.subscribed("care"))
        await a.put_spec(care())
        await a.emit(*taus(0.1, 0.2, 0.3))
        await events.until("update")
        # Only now: the newer one writes too as soon as the cohort is in its share, which is by chance.
        second = await stack.enter_async_context(started(*newer, command=NEWER))
        b = await stack.enter_async_context(Client(second.target))
        # What a newer server writes first, the older one cannot read.
        await b.emit(*taus(0.7, 0.8, 0.9))
        async with asyncio.timeout(START_S):
            assert await first.ended() == 2
        # Who subscribed there is told to go elsewhere, and not left with what was.
        assert (await events.refusal()).reason == "SERVER_DRAINING"
        said = "".join(first.err)
        (line,) = [text for text in first.err if text.startswith("fmi-server: ")]
        assert "is of format 2, and it knows formats up to 1" in line
        assert "upgrade the server" in line
        assert "Traceback" not in said
        assert "damaged" not in said
        # It kept nothing: the other one releases everything, with what both were sent.
        await eventually(lambda: "this server releases 64 of 64 partitions" in "".join(second.err))

        async def counted_newest():
            return dict((await b.update("care")).prior_update.prior)["tau"] == pytest.approx(0.8)

        await eventually(counted_newest)
        # Nor does it start as it is; as the newer version it goes on from its own view.
        assert_refused(await run(*older), "is of format 2", "upgrade the server")
        view = tmp_path / "older" / "view.sqlite3"
        file = view.stat().st_ino
        again = msp("s7", "care", controller={"tau": 0.8})
        await b.emit(again)
        async with started(*older, command=NEWER) as upgraded, Client(upgraded.target) as c:
            assert view.stat().st_ino == file
            (receipt,) = await c.emit(again)
            assert receipt.status == wire_pb2.EMIT_STATUS_DUPLICATE

            async def the_same():
                return await b.update("care") == await c.update("care")

            await eventually(the_same)


async def test_a_view_that_a_newer_version_opened_is_refused_and_can_be_made_anew(broker, tmp_path):
    older, view = tmp_path / "older", tmp_path / "older" / "view.sqlite3"
    older.mkdir()
    with newer_schema():
        async with JetStreamStore(broker.url(), view) as store:
            await store.put_cohort("care", care().SerializeToString(), 1)
    before = view.read_bytes()
    ended = await run(*flags_of(broker, older))
    assert_refused(
        ended, "view.sqlite3", f"schema version {SCHEMA_VERSION + 1}", "upgrade the server"
    )
    assert view.read_bytes() == before
    view.unlink()
    async with member(broker, older) as server:
        assert "care" in server.service.cohorts


async def test_a_spec_with_rules_that_are_not_known_yet_is_not_kept_in_part(broker, tmp_path):
    spec = care().SerializeToString() + FROM_THE_FUTURE
    async with two(broker, tmp_path) as servers, Client(servers[1].target) as client:
        await client.put_spec(care())
        refused = await refusal_of(client.put_spec(cohort_pb2.CohortSpec.FromString(spec)))
        assert refused.reason == "SETTING_UNSUPPORTED"
        # A server that knows them puts it in force: all that do not stop, whoever releases it.
        async with JetStreamStore(broker.url(), tmp_path / "newer.db") as store:
            await store.put_cohort("care", spec, 1)
        async with asyncio.timeout(START_S):
            await asyncio.gather(*(server.stop.wait() for server in servers))
        for server in servers:
            assert "does not know" in str(server.service.specs.unkept)
    ended = await run(*flags_of(broker, tmp_path / "a"))
    assert_refused(ended, "care", "does not know", "newer version")


async def test_who_lacks_entries_that_are_gone_ends_to_be_started_again(broker, tmp_path):
    async with two(broker, tmp_path) as servers, Client(servers[1].target) as client:
        await client.put_spec(care())
        store = servers[0].service.store
        assert isinstance(store, JetStreamStore)
        assert store._replica is not None
        error = StoreBehindError(detail="the test's", path="here")
        store._replica._break(error)
        async with asyncio.timeout(START_S):
            await servers[0].stop.wait()
        assert servers[0].service.store_watch.end is error
        await eventually(lambda: servers[1].service.cluster.partitions.owns("care"))


def test_that_a_start_is_all_it_wants_is_an_exit_code_of_its_own(monkeypatch):
    async def ends(_settings: ServerSettings) -> None:
        raise StoreBehindError(detail="the test's", path="here")

    monkeypatch.setattr(app, "serve", ends)
    ended = CliRunner().invoke(cli, ["serve"])
    assert ended.exit_code == 1
    assert ended.stderr.startswith("fmi-server: store here unavailable (no_stream)")


async def test_who_comes_to_what_is_no_entry_releases_nothing_and_is_still_read(
    broker, tmp_path, caplog
):
    """All servers come to it, so that nobody would be left to read at if they ended."""
    async with two(broker, tmp_path) as servers, Client(servers[0].target) as client:
        await client.put_spec(care())
        await client.emit(*taus(0.1, 0.2, 0.3))
        told = await prior_of(client)
        await publish(broker, b"\x01\x00\x00\x00\x02{}")
        for server in servers:
            await eventually(lambda server=server: not server.service.cluster.partitions.owned)
            async with Client(server.target) as at:

                async def says_so(at=at):
                    found = [await at.health(name) for name in ("", INGEST, DELIVERY)]
                    return found == [SERVING, NOT_SERVING, NOT_SERVING]

                await eventually(says_so)
                assert (await refusal_of(at.emit(*taus(0.4)))).reason == "STORE_CORRUPT"
                assert dict((await at.update("care")).prior_update.prior) == told
            shown = server.service.telemetry.snapshot()
            assert (shown["fmi_store_damaged"], shown["fmi_follows"]) == (1.0, 0.0)
            assert not server.stop.is_set()
    # To restore a backup would be no help: the log is what is wrong, or one view.
    assert "this server stands still" in caplog.text
    assert "is damaged" not in caplog.text
