"""Packets as they come back from the store."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import DecodeError

from fmi.v1 import packet_pb2
from fmi_server.counted_time import as_counted
from fmi_server.storage.base import StoreCorruptError
from fmi_server.storage.records import StoredPacket, content_hash

__all__ = ["parsed"]


def parsed(stored: Sequence[StoredPacket], location: str) -> list[packet_pb2.Packet]:
    """Parse stored packets as they are to be counted, and check that they are as they were stored.

    Args:
        stored: The packets.
        location: Where the store is, for the error.

    Raises:
        StoreCorruptError: One is not.
    """
    packets = []
    for item in stored:
        payload = item.record.payload
        sound = content_hash(payload) == item.record.content_hash
        try:
            packet = packet_pb2.Packet.FromString(payload)
            packets.append(as_counted(packet, item.record.received_at_us))
        except DecodeError:
            sound = False
        if not sound:
            raise StoreCorruptError(
                path=location,
                detail=f"packet {item.sequence} is not as it was stored; restore a backup",
            )
    return packets
