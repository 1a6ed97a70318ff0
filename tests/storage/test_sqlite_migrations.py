"""Databases of each released schema, as the code of their time wrote them, come up to date, and keep all."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from fmi.plain import new_packet_id
from fmi.v1 import packet_pb2, update_pb2
from fmi_client import AsyncFMIClient
from fmi_server.app import STORE_FILE
from fmi_server.service import FMIService
from fmi_server.storage import SqliteStore, backup_database, restore_backup
from fmi_server.storage.records import PACKET_KINDS
from fmi_server.storage.sqlite_schema import SCHEMA_VERSION
from fmi_server.testing import running_server

DATA = Path(__file__).parent / "data"
RELEASED = sorted(int(path.stem.removeprefix("schema-")) for path in DATA.glob("schema-*.sql"))

KEPT = {
    "packets": "sequence, domain_id, packet_id, cohort, kind, content_hash, received_at_us, "
    "emitted_at_us, quarantined, quarantine_reason, payload",
    "updates": "sequence, cohort, kind, revision, published_at_us, content_hash, payload",
    "sites": "cohort, domain_id, first_seen_us, last_seen_us, msp_count, pop_count, ccs_count, "
    "quarantined_count, duplicate_count, reused_count, reputation",
    "cohorts": "name, spec, revision",
    "dictionaries": "dictionary_id, data, created_at_us",
    "meta": "name, value",
}
"""What schema 1 kept, and every later one must."""

Contents = dict[str, list[tuple[object, ...]]]


def contents(path: Path) -> Contents:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return {
            table: connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2").fetchall()  # noqa: S608 - constants only
            for table, columns in KEPT.items()
        }


def version(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def schema(path: Path) -> dict[str, str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL")
        return {name: " ".join(sql.split()) for name, sql in found}


def retired(path: Path) -> set[int]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return {row[0] for row in connection.execute("SELECT sequence FROM packets WHERE retired")}


@pytest.fixture(params=RELEASED, ids=lambda number: f"schema-{number}")
def released(request, tmp_path) -> Path:
    """A database of a released schema, made of its dump by SQLite alone."""
    path = tmp_path / "data" / STORE_FILE
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((DATA / f"schema-{request.param}.sql").read_text())
    assert version(path) == request.param
    return path


def test_each_schema_before_this_one_has_a_dump() -> None:
    assert list(range(1, SCHEMA_VERSION)) == RELEASED


async def test_everything_is_kept(released):
    before = contents(released)
    assert all(before.values()), "the dump has something of everything"
    async with SqliteStore(released) as store:
        packets = await store.load()
        live = await store.live_packets("care")
    assert version(released) == SCHEMA_VERSION
    assert contents(released) == before
    assert [
        (p.sequence, p.record.packet_id, PACKET_KINDS.index(p.record.kind)) for p in packets
    ] == [(row[0], row[2], row[4]) for row in before["packets"]]
    not_live = {row[0] for row in before["packets"] if row[8]} | retired(released)
    of_care = {row[0] for row in before["packets"] if row[3] == "care"}
    assert {p.sequence for p in live} == of_care - not_live


async def test_it_ends_in_the_schema_that_a_new_database_has(released, tmp_path):
    for path in (released, tmp_path / "new"):
        async with SqliteStore(path):
            pass
    migrated, new = schema(released), schema(tmp_path / "new")
    assert migrated.keys() == new.keys()
    assert migrated == new


async def test_a_server_goes_on_with_it(released):
    """It serves what was released, knows what was sent, and goes on with the next revision."""
    before = contents(released)
    sent = [packet_pb2.Packet.FromString(row[10]) for row in before["packets"]]
    newest = {(row[1], row[2]): update_pb2.Update.FromString(row[6]) for row in before["updates"]}
    # At the time of the dump: today its packets are too old to be sent again, and count no more.
    last_s = max(row[6] for row in before["packets"]) / 1e6
    async with FMIService(store=SqliteStore(released), clock=lambda: last_s + 60) as service:
        # The newest: the oldest may be forgotten.
        known = max(
            (p for p in sent if p.header.cohort == "care" and p.HasField("msp")),
            key=lambda p: p.header.emitted_at.ToNanoseconds(),
        )
        assert (await service.emit(known)).status == "duplicate"
        packet = packet_pb2.Packet()
        packet.CopyFrom(known)
        packet.header.packet_id = new_packet_id()
        packet.header.emitted_at.FromSeconds(int(last_s) + 30)
        packet.msp.controller["tau"] = 0.123
        assert (await service.emit(packet)).status == "accepted"
        assert await service.release("care")
    after = contents(released)["updates"]
    assert after[: len(before["updates"])] == before["updates"]
    priors = [row[3] for row in after if row[1:3] == ("care", update_pb2.UPDATE_KIND_PRIOR)]
    assert priors == list(range(1, len(priors) + 1))
    assert len(after) > len(before["updates"])
    async with (
        running_server(released.parent) as server,
        AsyncFMIClient(server.target) as client,
    ):
        for (cohort, kind), update in newest.items():
            assert await client.get_update(cohort, kind, update.revision) == update


async def test_it_can_be_backed_up_before_and_restored_by_a_newer_server(released, tmp_path):
    before = contents(released)
    backup_database(released, tmp_path / "copy")
    assert version(tmp_path / "copy") == version(released) < SCHEMA_VERSION
    restore_backup(tmp_path / "copy", tmp_path / "restored")
    after = contents(tmp_path / "restored")
    assert version(tmp_path / "restored") == SCHEMA_VERSION
    assert after.pop("meta") != before.pop("meta"), "a history of its own"
    assert after == before
