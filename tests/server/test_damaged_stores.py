"""Stores that are damaged, before the start and after it: told plainly, and never written over."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sqlite3
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_harness import PRIOR, Client, eventually, identity, msp, packet_keys, refusal_of, spec
from server_process import LOCAL, assert_refused, run, started

from fmi.descriptors import INGEST
from fmi.v1 import cohort_pb2
from fmi_server.storage import restore_backup

PAGE = 8192
SITES = 60
METRICS = {f"m{i}": float(i) for i in range(20)}


async def filled(data_dir: Path, *, killed: bool = False) -> Path:
    """A store with packets of many sites and three priors; killed, it leaves its log behind."""
    async with (
        started(*LOCAL, "--data-dir", str(data_dir)) as server,
        Client(server.target) as client,
    ):
        aggregation = cohort_pb2.AggregationSpec(vote_min_sites=1)
        await client.put_spec(spec("care", aggregation=aggregation))
        for turn in range(3):
            controller = {"tau": 0.5 + turn / 10}
            sites = [f"s{number}" for number in range(SITES)]
            packets = [msp(s, "care", controller=controller, metrics=METRICS) for s in sites]
            await client.emit_encoded(identity(*packets))
            await client.release("care")
        server.process.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
        await server.process.wait()
    return data_dir / "fmi.sqlite3"


def root_page(path: Path, name: str) -> int:
    """The page, counted from 0, where a table or an index begins."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        query = "SELECT rootpage FROM sqlite_schema WHERE name = ?"
        return connection.execute(query, (name,)).fetchone()[0] - 1


def spoil_page(path: Path, page: int) -> bytes:
    """Fill a page with noise, in place; return the noise."""
    noise = os.urandom(PAGE)
    with path.open("r+b") as file:
        file.seek(page * PAGE)
        file.write(noise)
    return noise


def files(folder: Path) -> dict[str, str]:
    """What lies in a folder, by hash, but for what every look into a database makes anew."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file() and path.suffix not in (".lock", ".sqlite3-shm")
    }


# Before the start


@pytest.mark.parametrize(
    "name", ["meta", "packets", "packets_live", "sites", "updates", "cohorts", "dictionaries"]
)
async def test_damage_in_what_a_start_reads_stops_it_and_is_left_as_it_is(tmp_path, name):
    path = await filled(tmp_path)
    spoil_page(path, root_page(path, name))
    before = files(tmp_path)
    assert_refused(await run(*LOCAL, "--data-dir", str(tmp_path)), str(path), "malformed")
    assert files(tmp_path) == before


async def test_a_folder_in_place_of_the_database_is_told(tmp_path):
    path = tmp_path / "fmi.sqlite3"
    path.mkdir()
    (path / "theirs").write_text("kept")
    assert_refused(await run(*LOCAL, "--data-dir", str(tmp_path)), str(path), "not a regular file")
    assert (path / "theirs").read_text() == "kept"


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        pytest.param(lambda path: os.truncate(path, 0), "empty", id="emptied"),
        pytest.param(Path.unlink, "missing", id="deleted"),
    ],
)
async def test_a_log_without_its_database_is_kept(tmp_path, harm, word):
    """DURABLE: after a crash the log may hold all that was acknowledged, and SQLite would delete it."""
    data_dir, backup = tmp_path / "data", tmp_path / "backup"
    path = await filled(data_dir, killed=True)
    log = path.with_name("fmi.sqlite3-wal")
    with contextlib.closing(sqlite3.connect(path)) as source:
        source.execute("VACUUM INTO ?", (str(backup),))
        content = log.read_bytes()
        whole = path.read_bytes()
    path.write_bytes(whole)
    log.write_bytes(content)
    harm(path)
    before = files(data_dir)
    assert_refused(await run(*LOCAL, "--data-dir", str(data_dir)), str(path), word, log.name)
    assert files(data_dir) == before
    restore_backup(backup, path, replace=True)
    (aside,) = data_dir.glob("fmi.sqlite3.replaced-*-wal")
    assert aside.read_bytes() == content
    assert len(packet_keys(data_dir)) == 3 * SITES


@pytest.mark.parametrize("name", ["meta", "packets"])  # found as it is opened, and as it is read
async def test_the_log_beside_a_refused_database_is_not_folded_in(tmp_path, name):
    path = await filled(tmp_path)
    log = path.with_name("fmi.sqlite3-wal")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE sites SET duplicate_count = 1")
        connection.commit()
        content, page = log.read_bytes(), root_page(path, name)
        whole = path.read_bytes()
    path.write_bytes(whole)
    log.write_bytes(content)
    spoil_page(path, page)
    before = files(tmp_path)
    assert before.keys() == {path.name, log.name}
    assert_refused(await run(*LOCAL, "--data-dir", str(tmp_path)), str(path), "malformed")
    assert files(tmp_path) == before


# After the start


async def ingest_health(target: str) -> tuple[int, int]:
    """Health of the server as a whole, and of taking packets."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        names = ("", INGEST)
        answers = [await stub.Check(health_pb2.HealthCheckRequest(service=n)) for n in names]
    return answers[0].status, answers[1].status


@pytest.mark.parametrize("found_by", ["a write", "a read"])
async def test_damage_found_later_is_told_plainly_and_not_written_over(tmp_path, found_by):
    path = await filled(tmp_path)
    if found_by == "a write":
        page = root_page(path, "packets_by_key")
    else:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            query = "SELECT payload FROM updates WHERE kind = ? AND revision = 1"
            (payload,) = connection.execute(query, (PRIOR,)).fetchone()
        page = path.read_bytes().index(payload[:200]) // PAGE
    noise = spoil_page(path, page)
    flags = (*LOCAL, "--data-dir", str(tmp_path))
    serving, not_serving = (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    async with started(*flags) as server, Client(server.target) as client:
        assert await ingest_health(server.target) == (serving, serving)
        for _ in range(3):
            by_write = found_by == "a write"
            refusal = await refusal_of(
                client.emit(msp("s1", "care")) if by_write else client.update("care", PRIOR, 1)
            )
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "STORE_CORRUPT")
            assert refusal.retry_s is None
            assert str(tmp_path) not in refusal.message

        async def told() -> bool:
            return await ingest_health(server.target) == (serving, not_serving)

        await eventually(told)
        lines = await eventually(lambda: [line for line in server.err if "is damaged" in line])
        assert len(lines) == 1, server.err
        assert str(path) in lines[0]
        assert "restore a backup" in lines[0]
        # What lies elsewhere goes on.
        newest = (await client.update("care")).revision
        assert newest >= 3
        assert len(await client.sites("care")) == SITES
        async with client.subscribed("care", kinds=[PRIOR]) as events:
            assert len(await events.snapshot()) == 1
        if found_by == "a read":
            changed = [msp(f"s{n}", "care", controller={"tau": n / 77}) for n in range(SITES)]
            await client.emit(*changed)
            await client.release("care")
            assert (await client.update("care")).revision == newest + 1
        server.process.send_signal(signal.SIGTERM)
        assert await server.process.wait() == 0
    assert path.read_bytes()[page * PAGE : (page + 1) * PAGE] == noise
