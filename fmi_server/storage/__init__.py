"""Stores: one contract (`base`), one embedded in SQLite, one at NATS JetStream brokers, one in memory."""

from __future__ import annotations

from fmi_server.storage.base import Store, StoreError
from fmi_server.storage.jetstream import JetStreamStore
from fmi_server.storage.jetstream_backup import backup_log, restore_log
from fmi_server.storage.memory import MemoryStore
from fmi_server.storage.sqlite import SqliteStore
from fmi_server.storage.sqlite_backup import backup_database, restore_backup

__all__ = [
    "JetStreamStore",
    "MemoryStore",
    "SqliteStore",
    "Store",
    "StoreError",
    "backup_database",
    "backup_log",
    "restore_backup",
    "restore_log",
]
