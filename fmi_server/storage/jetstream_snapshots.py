"""Snapshots: the view as a file at the brokers, so that the log can be short and a new replica is quick.

A snapshot is the messages with the pieces of the file, and one message that lists them: the manifest. The
newest manifest counts, and it stands at the highest entry of the log: who comes with an older one gives up.
Pieces whose manifest never came, or is no longer the newest, are deleted by who writes the next.

Each history has manifests of its own. Of two that are restored at the same time one becomes the log, and the
other must not have taken the place of its snapshot, which is all that it begins with.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmi_server.storage.base import StoreCorruptError
from fmi_server.storage.jetstream_broker import FenceError, uncancelled
from fmi_server.storage.jetstream_errors import broker_error, import_nats

if TYPE_CHECKING:
    from pathlib import Path

    from fmi_server.storage.jetstream_log import BrokerLog

__all__ = ["Manifest", "SnapshotReplacedError", "SnapshotStream"]

_PIECE_BYTES = 512 * 1024


@dataclass(frozen=True, slots=True)
class Manifest:
    """One snapshot.

    Attributes:
        epoch: Of the log.
        position: The last entry of the log that is in it.
        pieces: Where they are in the stream, in order.
        size: Bytes of the file.
        digest: Its SHA-256, in hexadecimal.
        subject: Under which the pieces stand.
    """

    epoch: str
    position: int
    pieces: tuple[int, ...]
    size: int
    digest: str
    subject: str

    def encode(self) -> bytes:
        """Return it as it stands at the brokers."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Read it from there.

        Raises:
            ValueError: It is none.
        """
        try:
            found = json.loads(data)
            return cls(
                str(found["epoch"]),
                int(found["position"]),
                tuple(int(place) for place in found["pieces"]),
                int(found["size"]),
                str(found["digest"]),
                str(found["subject"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no manifest: {error}") from error


class SnapshotReplacedError(Exception):
    """A newer snapshot has taken the place of the one that was read; it is to be read in its stead."""


class SnapshotStream:
    """Keep the newest snapshot of a log, and give it back.

    Args:
        log: Whose epoch is known.
    """

    def __init__(self, log: BrokerLog) -> None:
        self._log = log
        self._broker = log.broker
        self._stream = log.names.snapshots
        self._manifests = log.names.snapshot(f"manifest-{log.epoch}")

    async def open(self) -> None:
        """Make the stream if there is none."""
        api, options = import_nats().js.api, self._broker.options
        await self._broker.ensure_stream(
            api.StreamConfig(
                name=self._stream,
                description="Snapshots of the log of an FMI federation.",
                subjects=[self._log.names.snapshot(">")],
                storage=api.StorageType.FILE,
                num_replicas=options.replicas,
                duplicate_window=options.duplicate_window_s,
                discard=api.DiscardPolicy.NEW,
                compression=api.StoreCompression.S2,
                allow_direct=False,
            )
        )

    async def newest(self) -> Manifest | None:
        """Return the newest snapshot of this log, as the leader knows it; None where there is none."""
        manifest, _ = await self._newest()
        return manifest

    async def _newest(self) -> tuple[Manifest | None, int]:
        found = await self._broker.last_message(self._stream, self._manifests)
        if found is None:
            return None, 0
        try:
            manifest = Manifest.decode(found.data or b"")
        except ValueError as error:
            raise self._damaged(str(error)) from error
        return manifest, int(found.seq or 0)

    async def save(self, file: Path, position: int) -> bool:
        """Keep a file as the snapshot at an entry; return False where there is one at it or above.

        The file does not change meanwhile.
        """
        newest, place = await self._newest()
        if newest is not None and newest.position >= position:
            return False
        name = f"{position}-{self._log.epoch}-{secrets.token_hex(4)}"
        subject = self._log.names.snapshot(name)
        manifest = await self._send_pieces(file, position, subject)
        while True:
            try:
                await self._broker.send(
                    self._stream,
                    self._manifests,
                    manifest.encode(),
                    message_id=subject,
                    expected_last=place,
                )
                break
            except FenceError:
                newest, place = await self._newest()
                if newest is not None and newest.position >= position:
                    await self._delete_pieces(subject)
                    return False
        await self._delete_older(position)
        return True

    async def _send_pieces(self, file: Path, position: int, subject: str) -> Manifest:
        size = min(_PIECE_BYTES, self._broker.largest_message)
        digest = hashlib.sha256()
        places: list[int] = []
        total = 0
        with file.open("rb") as source:
            while piece := await asyncio.to_thread(source.read, size):
                digest.update(piece)
                total += len(piece)
                message_id = f"{subject}-{len(places)}"
                places.append(
                    await self._broker.send(self._stream, subject, piece, message_id=message_id)
                )
        return Manifest(
            self._log.epoch, position, tuple(places), total, digest.hexdigest(), subject
        )

    async def fetch(self, manifest: Manifest, target: Path) -> None:
        """Write a snapshot into a new file, durably.

        Raises:
            SnapshotReplacedError: A newer one has taken its place meanwhile.
            StoreCorruptError: It is not what was saved.
        """
        digest = hashlib.sha256()
        total = 0
        with target.open("xb") as file:
            for place in manifest.pieces:
                found = await self._broker.message(self._stream, place)
                if found is None or found.subject != manifest.subject:
                    raise SnapshotReplacedError(
                        f"the snapshot at entry {manifest.position} has been replaced"
                    )
                piece = found.data or b""
                digest.update(piece)
                total += len(piece)
                await asyncio.to_thread(file.write, piece)
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        if (total, digest.hexdigest()) != (manifest.size, manifest.digest):
            raise self._damaged(f"the snapshot at entry {manifest.position} is not what was saved")

    async def _delete_older(self, position: int) -> None:
        """Delete the pieces of snapshots below an entry: nobody begins with them any more."""
        for subject in await self._subjects():
            entry, epoch = self._parts(subject)
            if epoch == self._log.epoch and entry.isdigit() and int(entry) < position:
                await self._delete_pieces(subject)

    async def delete_others(self) -> None:
        """Delete what there is of other histories: of restores that were cut off, and logs that are gone.

        The log must be there, and of this history.
        """
        for subject in await self._subjects():
            if self._parts(subject)[1] != self._log.epoch:
                await self._delete_pieces(subject)

    async def _subjects(self) -> list[str]:
        every = self._log.names.snapshot(">")
        info = await self._broker.stream_info(self._stream, subjects=every)
        return list(info.state.subjects or {})

    @staticmethod
    def _parts(subject: str) -> tuple[str, str]:
        """Return what a subject stands for, which is an entry or the manifest, and of which history."""
        kind, _, rest = subject.rpartition(".")[2].partition("-")
        return kind, rest.partition("-")[0]

    async def _delete_pieces(self, subject: str) -> None:
        jetstream = self._broker.jetstream
        try:
            await uncancelled(jetstream.purge_stream(self._stream, subject=subject))
        except Exception as error:
            raise broker_error(error, self._log.location) from error

    def _damaged(self, detail: str) -> StoreCorruptError:
        return StoreCorruptError(path=f"{self._log.location} stream {self._stream}", detail=detail)
