"""What local privacy has spent, and what it let out for it.

A packet is paid for before anybody gets it, so that a crash in between costs budget and not privacy. Paid is
once per packet id: asked again, the account gives the packet that it gave before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from fmi_client._fork import check_process
from fmi_client.errors import PacketIdReusedError, PrivacyAccountError

__all__ = ["KEEP_PACKETS", "Account", "FileAccount", "MemoryAccount", "PacketKey"]

KEEP_PACKETS: Final = 256
"""The newest packets that can be had again. Of others the ids are kept, as many as the budget pays for."""

PacketKey: TypeAlias = tuple[str, str]
"""What a packet is known by: its `domain_id` and its `packet_id`."""

_APPLICATION_ID: Final = 0x464D494C  # "FMIL"
_VERSION: Final = 1
_SCHEMA: Final = (
    "CREATE TABLE spent (rho TEXT PRIMARY KEY, packets INTEGER NOT NULL) WITHOUT ROWID",
    """CREATE TABLE packets (
        place INTEGER PRIMARY KEY,
        site TEXT NOT NULL,
        packet_id TEXT NOT NULL,
        data BLOB,
        UNIQUE (site, packet_id)
    )""",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_VERSION}",
)


class _Book(Protocol):
    """What an account writes down. Whoever has one is alone with it."""

    def spent(self) -> Fraction:
        """Return the rho of all packets."""
        ...

    def find(self, key: PacketKey) -> bytes | None:
        """Return a packet; empty where it is no longer kept, None where there was none."""
        ...

    def add(self, key: PacketKey, data: bytes, rho: Fraction) -> None:
        """Write down a packet and what it cost."""
        ...


class Account(ABC):
    """Pays for packets. May be shared by threads.

    Args:
        pid: The only process that may use it; None for any.
    """

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._turn = threading.Lock()
        # Of what packets said before noise; in memory only, so that no file tells of it.
        self._digests: OrderedDict[PacketKey, bytes] = OrderedDict()

    @abstractmethod
    def _open(self) -> AbstractContextManager[_Book]:
        """Open the book; what was added stays if the context ends well."""

    def spent(self) -> Fraction:
        """Return the rho spent so far.

        Raises:
            PrivacyAccountError: The file cannot be read.
        """
        self._check_process()
        with self._turn, self._open() as book:
            return book.spent()

    def once(
        self,
        key: PacketKey,
        content: bytes,
        rho: Fraction,
        check: Callable[[Fraction], None],
        make: Callable[[], bytes],
    ) -> bytes:
        """Return the packet of an id: the one that was made before, or a new one that is paid for.

        Args:
            key: The packet's site and id.
            content: What the packet says before noise.
            rho: What a new one costs.
            check: Raises where a new one would spend too much in all.
            make: Makes a new one.

        Raises:
            PacketIdReusedError: The id was used for other content, or so long ago that the packet is no
                longer kept.
            PrivacyAccountError: The file cannot be read or written; nothing was spent.
        """
        self._check_process()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        with self._turn:
            with self._open() as book:
                found = book.find(key)
                if found is not None:
                    return self._known(key, digest, found)
                check(book.spent() + rho)
                data = make()
                book.add(key, data, rho)
            self._digests[key] = digest
            if len(self._digests) > KEEP_PACKETS:
                self._digests.popitem(last=False)
        return data

    def _check_process(self) -> None:
        if self._pid is not None:
            check_process(self._pid, "local privacy without an account file")

    def _known(self, key: PacketKey, digest: bytes, data: bytes) -> bytes:
        if self._digests.get(key, digest) != digest:
            problem = (
                "was made private before with other content; give each packet an id of its own"
            )
        elif not data:
            problem = (
                f"was made private more than {KEEP_PACKETS} packets ago and is no longer kept; to send a "
                "packet again, keep what came back"
            )
        else:
            return data
        raise PacketIdReusedError(f"packet {key[1]} {problem}", reason="PACKET_ID_REUSED")


class MemoryAccount(Account):
    """An account that ends with the process, and does not begin again in a forked one."""

    def __init__(self) -> None:
        # A copy of it in a child could be spent once more.
        super().__init__(os.getpid())
        self._book = _MemoryBook()

    @contextlib.contextmanager
    def _open(self) -> Iterator[_Book]:
        yield self._book


class _MemoryBook:
    def __init__(self) -> None:
        self._spent = Fraction(0)
        self._packets: dict[PacketKey, bytes] = {}
        self._kept: OrderedDict[PacketKey, None] = OrderedDict()

    def spent(self) -> Fraction:
        return self._spent

    def find(self, key: PacketKey) -> bytes | None:
        return self._packets.get(key)

    def add(self, key: PacketKey, data: bytes, rho: Fraction) -> None:
        self._spent += rho
        self._packets[key] = data
        self._kept[key] = None
        if len(self._kept) > KEEP_PACKETS:
            oldest, _ = self._kept.popitem(last=False)
            self._packets[oldest] = b""


class FileAccount(Account):
    """An account in a file, which processes share; synced before a packet is given.

    The file has the packets as they were let out, and nothing of what they said before.

    Args:
        path: An SQLite database; made where there is none.

    Raises:
        PrivacyAccountError: It cannot be opened, or is something else.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(None)
        self._path = path
        with self._open():
            pass

    @contextlib.contextmanager
    def _open(self) -> Iterator[_Book]:
        try:
            # One for each step: a connection does not survive a fork, and a step has a sync to wait for.
            with contextlib.closing(
                sqlite3.connect(self._path, isolation_level=None)
            ) as connection:
                connection.execute("PRAGMA synchronous = EXTRA")
                connection.execute("BEGIN IMMEDIATE")
                self._prepare(connection)
                yield _FileBook(connection)
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise PrivacyAccountError(
                f"the account of local privacy in {self._path} cannot be used: {error}; nothing was sent",
                retryable=isinstance(error, sqlite3.OperationalError),
            ) from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (kind,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if not tables and not kind:
            for statement in _SCHEMA:
                connection.execute(statement)
        elif kind != _APPLICATION_ID or version != _VERSION:
            raise PrivacyAccountError(
                f"{self._path} is no account of local privacy that this version knows; name another file"
            )


class _FileBook:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def spent(self) -> Fraction:
        rows = self._connection.execute("SELECT rho, packets FROM spent").fetchall()
        try:
            return sum((Fraction(rho) * packets for rho, packets in rows), Fraction(0))
        except (TypeError, ValueError) as error:
            raise sqlite3.DatabaseError(f"what was spent is no number: {error}") from error

    def find(self, key: PacketKey) -> bytes | None:
        row = self._connection.execute(
            "SELECT data FROM packets WHERE site = ? AND packet_id = ?", key
        ).fetchone()
        return None if row is None else bytes(row[0] or b"")

    def add(self, key: PacketKey, data: bytes, rho: Fraction) -> None:
        self._connection.execute(
            "INSERT INTO spent VALUES (?, 1) ON CONFLICT (rho) DO UPDATE SET packets = packets + 1",
            (str(rho),),
        )
        self._connection.execute(
            "INSERT INTO packets (site, packet_id, data) VALUES (?, ?, ?)", (*key, data)
        )
        self._connection.execute(
            "UPDATE packets SET data = NULL WHERE place = last_insert_rowid() - ?", (KEEP_PACKETS,)
        )
