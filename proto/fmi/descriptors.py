"""The contract as data: its descriptors and its hash."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Final

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor

from fmi.v1 import (
    admin_service_pb2,
    cohort_pb2,
    error_pb2,
    interchange_service_pb2,
    packet_pb2,
    registry_service_pb2,
    update_pb2,
)

__all__ = [
    "CONTRACT_FILES",
    "DELIVERY",
    "INGEST",
    "SERVICE_NAMES",
    "contract_hash",
    "descriptor_set",
]

CONTRACT_FILES: Final[tuple[FileDescriptor, ...]] = tuple(
    sorted(
        (
            module.DESCRIPTOR
            for module in (
                admin_service_pb2,
                cohort_pb2,
                error_pb2,
                interchange_service_pb2,
                packet_pb2,
                registry_service_pb2,
                update_pb2,
            )
        ),
        key=lambda file: str(file.name),
    )
)
"""The files of `fmi.v1`, in order of name."""

SERVICE_NAMES: Final[tuple[str, ...]] = tuple(
    service.full_name for file in CONTRACT_FILES for service in file.services_by_name.values()
)

INGEST: Final = "fmi.v1.InterchangeService/Emit"
"""The name under which health tells whether packets should be sent here: not while the store refuses writes,
and not where it is damaged, since what is acknowledged may not be found again. Such a server still
serves reads and subscriptions, so it is not to be taken out of service for that."""

DELIVERY: Final = "fmi.v1.InterchangeService/Subscribe"
"""The name under which health tells whether subscribers get what is released: not where a server of several
on one store cannot take in what the others write. It keeps the packets that it is sent."""


@cache
def contract_hash() -> str:
    """Return the SHA-256 over the descriptors of `fmi.v1`, as hex.

    Two peers with the same hash mean the same by every field and every rule.
    """
    digest = hashlib.sha256()
    for file in CONTRACT_FILES:
        digest.update(len(file.serialized_pb).to_bytes(8, "big"))
        digest.update(file.serialized_pb)
    return digest.hexdigest()


@cache
def descriptor_set() -> bytes:
    """Return a serialised `FileDescriptorSet` of `fmi.v1` and all it imports, imports first."""
    files: dict[str, FileDescriptor] = {}

    def add(file: FileDescriptor) -> None:
        if file.name in files:
            return
        for dependency in file.dependencies:
            add(dependency)
        files[file.name] = file

    for file in CONTRACT_FILES:
        add(file)
    result = descriptor_pb2.FileDescriptorSet()
    for file in files.values():
        file.CopyToProto(result.file.add())
    return result.SerializeToString(deterministic=True)
