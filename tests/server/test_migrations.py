"""Stores of each released schema, larger than memory holds: whole after any kill, and served by a process.

What a migration keeps, and what it ends in, is tested with the store (`tests/storage`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_harness import CAUSES, HINT, PRIOR, WARM_START, Client, msp
from server_process import LOCAL, environment, started

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.storage import sqlite_schema
from fmi_server.storage.sqlite_schema import SCHEMA_VERSION, prepare_database

DUMPS = Path(__file__).parents[1] / "storage" / "data"

RELEASED = {
    int(re.fullmatch(r"schema-(\d+)", dump.stem)[1]): dump for dump in DUMPS.glob("schema-*.sql")
}

EPOCH = "608491d50802ebaef3a9bdcb1bb3a157"
"""The history of the dumped store."""


def dumped(folder: Path, version: int) -> Path:
    """A database as the code of that version left it."""
    folder.mkdir(exist_ok=True)
    path = folder / "fmi.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(RELEASED[version].read_text(encoding="utf-8"))
        assert connection.execute("PRAGMA user_version").fetchone() == (version,)
    return path


def contents(path: Path, version: int | None = None) -> dict[str, Any]:
    """Every row of every table, by column name. The columns are those that a version has, or all."""
    found: dict[str, Any] = {}
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        for (table,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'"):
            rows = connection.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608 - names of ours
            found[table] = sorted((dict(row) for row in rows), key=repr)
        found["version"] = connection.execute("PRAGMA user_version").fetchone()[0]
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert version is None or found["version"] == version
    return found


def inspected(path: Path) -> dict[str, Any]:
    """What `fmi-server inspect` says of a database."""
    command = [sys.executable, "-m", "fmi_server", "inspect", "--check", "--json", str(path)]
    done = subprocess.run(command, env=environment(), capture_output=True, check=True)
    return json.loads(done.stdout)


def assert_kept(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Whatever was there is there, in the columns that both have."""
    for table, rows in before.items():
        if table == "version":
            continue
        assert len(rows) == len(after[table]), table
        if not rows:
            continue
        shared = rows[0].keys() & after[table][0].keys()
        assert len(shared) >= 2

        def part(row: dict[str, Any], shared: set[str] = shared) -> str:
            return repr([row[name] for name in sorted(shared)])

        assert sorted(map(part, rows)) == sorted(map(part, after[table])), table


@pytest.mark.parametrize("version", sorted(RELEASED))
async def test_an_old_store_is_served(tmp_path, version):
    """Its history goes on: the updates are served under their revisions, and the next one follows them."""
    path = dumped(tmp_path, version)
    before = contents(path, version)
    assert inspected(path)["schema_version"] == version
    newest: dict[tuple[str, int], int] = {}
    for row in before["updates"]:
        key = row["cohort"], row["kind"]
        newest[key] = max(row["revision"], newest.get(key, 0))
    assert newest.keys() >= {("care", kind) for kind in (PRIOR, WARM_START, HINT, CAUSES)}
    async with (
        started(*LOCAL, "--data-dir", str(tmp_path)) as server,
        Client(server.target) as client,
    ):
        for row in before["updates"]:
            update = await client.update(row["cohort"], row["kind"], row["revision"])
            assert (update.sequence, update.history_epoch) == (row["sequence"], EPOCH)
            assert update.WhichOneof("body") is not None
        sites = await client.sites()
        assert sites.keys() == {f"{row['cohort']}:{row['domain_id']}" for row in before["sites"]}
        for site in before["sites"]:
            assert sites[f"{site['cohort']}:{site['domain_id']}"].packets
        assert {"care", "wild"} <= (await client.cohorts()).keys()
        mode = wire_pb2.DELIVERY_MODE_EVERY
        async with client.subscribed("**", mode=mode) as events:
            await events.until("snapshot_end")
            sent = [msp(f"site-{i}", "care", controller={"tau": 0.5 + i / 100}) for i in range(5)]
            await client.emit(*sent)
            await client.release("care")
            following = await client.update("care")
            assert following.revision > newest["care", PRIOR]
            revisions = []
            while following.revision not in revisions:
                (event,) = await events.updates(1)
                if event.kind == PRIOR:
                    revisions.append(event.revision)
            assert revisions == list(range(newest["care", PRIOR] + 1, following.revision + 1))
        again = await client.emit(sent[0])
        assert again[0].status == wire_pb2.EMIT_STATUS_DUPLICATE
        server.process.send_signal(signal.SIGTERM)
        assert await server.process.wait() == 0
    after = contents(path, SCHEMA_VERSION)
    assert inspected(path)["schema_version"] == SCHEMA_VERSION
    assert {row["packet_id"] for row in before["packets"]} <= {
        row["packet_id"] for row in after["packets"]
    }


MIGRATE_AND_DIE = """
import os, signal, sqlite3, sys
from pathlib import Path
from fmi_server.storage import sqlite_schema

at, executed = int(sys.argv[1]), 0

class Mortal(sqlite3.Connection):
    def execute(self, statement, *parameters):
        global executed
        if statement.startswith("PRAGMA cache_size"):
            statement = "PRAGMA cache_size = 2"  # what is not committed goes to disk before it is
        elif self.isolation_level is None and statement.startswith(
            ("BEGIN", "ALTER", "DROP", "CREATE", "INSERT", "COMMIT", "PRAGMA user_version =")
        ):
            executed += 1
            if executed == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(statement, *parameters)

plain = sqlite3.connect
sqlite_schema.sqlite3.connect = lambda *a, **k: plain(*a, factory=Mortal, **k)
sqlite_schema.prepare_database(Path(sys.argv[2]), max_bytes=None)[0].close()
"""


@pytest.mark.parametrize("version", sorted(RELEASED))
async def test_a_migration_killed_at_each_statement_can_be_done_again(tmp_path, version):
    """`kill -9` in the middle leaves the store as it was, or brought up to date; never in between."""
    source = dumped(tmp_path / "old", version)
    multiply_packets(source, 400)
    before = contents(source, version)
    versions, half_written = [], 0
    for at in range(1, 100):
        folder = tmp_path / str(at)
        folder.mkdir()
        path = folder / "fmi.sqlite3"
        shutil.copyfile(source, path)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", MIGRATE_AND_DIE, str(at), str(path), env=environment()
        )
        code = await process.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        log = path.with_name("fmi.sqlite3-wal")
        half_written = max(half_written, log.stat().st_size if log.exists() else 0)
        # As SQLite itself finds it, in a copy: looking changes the log.
        look = folder / "look"
        shutil.copytree(folder, look, ignore=lambda *_: ["look"])
        found = contents(look / "fmi.sqlite3")
        assert version <= found["version"] <= SCHEMA_VERSION
        if found["version"] == version:
            assert found == before
        versions.append(found["version"])
        connection, epoch = prepare_database(path, max_bytes=None)
        connection.close()
        assert epoch == EPOCH
        assert_kept(before, contents(path, SCHEMA_VERSION))
        shutil.rmtree(folder)
    steps = sqlite_schema._MIGRATIONS[version:]
    # Beside its own statements each has a beginning, its number and an end.
    assert len(versions) == sum(len(step) + 3 for step in steps), "it was killed at each statement"
    if version == 1:  # the one that changes every packet
        assert half_written > 100_000, "pages of an unfinished migration were on disk"
    assert versions[0] == version


def multiply_packets(path: Path, times: int) -> None:
    """Give a store that many times its packets, under new ids."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        names = [row[1] for row in connection.execute("PRAGMA table_info(packets)")]
        values = ", ".join(
            {"sequence": "sequence + n.i * 1000", "packet_id": "packet_id || '-' || n.i"}.get(
                name, name
            )
            for name in names
        )
        numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
        copies = f"INSERT INTO packets ({', '.join(names)}) SELECT {values} FROM packets, n"  # noqa: S608 - names of ours
        connection.execute(f"{numbers} {copies}", (times,))
        connection.commit()
