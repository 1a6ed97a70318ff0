"""The values a store takes and gives: packets, updates, sites, and their limits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CONTENT_HASH_BYTES",
    "MAX_PAYLOAD_BYTES",
    "PACKET_KINDS",
    "AppendOutcome",
    "AppendStatus",
    "Change",
    "ChangeKind",
    "CohortRecord",
    "DictionaryRecord",
    "LedgerTotal",
    "LostSpan",
    "PacketKey",
    "PacketKind",
    "PacketRecord",
    "SiteRecord",
    "SpendRecord",
    "StoreStats",
    "StoredPacket",
    "UnavailableReason",
    "UpdateRecord",
    "content_hash",
    "record_problem",
]

PacketKind = Literal["msp", "pop", "ccs"]
AppendStatus = Literal["stored", "duplicate", "reused", "rejected"]
UnavailableReason = Literal[
    "busy",
    "closed",
    "denied",
    "disk_full",
    "io_error",
    "locked",
    "no_answer",
    "no_broker",
    "no_directory",
    "no_quorum",
    "no_stream",
    "read_only",
    "unsupported",
]
"""Why a store cannot do something now. `no_answer` alone leaves open whether it was done: see `base`."""

PACKET_KINDS: tuple[PacketKind, ...] = ("msp", "pop", "ccs")
"""The kinds of packet, in the order of their numbers on disk. Only ever appended to."""

CONTENT_HASH_BYTES = 16
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class PacketRecord:
    """One packet as it is handed to the store.

    Attributes:
        domain_id: The site.
        packet_id: Unique within the site; with `domain_id` the key of the packet.
        cohort: The cohort it counts in.
        kind: `msp`, `pop` or `ccs`.
        content_hash: 16 bytes; a repeat with another hash is a reused id.
        received_at_us: When the server received it, Unix microseconds.
        emitted_at_us: When the site says it emitted it, Unix microseconds.
        quarantined: Kept and shown to operators, not counted.
        quarantine_reason: Why; empty when not quarantined.
        payload: Opaque.
    """

    domain_id: str
    packet_id: str
    cohort: str
    kind: PacketKind
    content_hash: bytes
    received_at_us: int
    emitted_at_us: int
    quarantined: bool
    quarantine_reason: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class PacketKey:
    """The key under which a packet counts once."""

    domain_id: str
    packet_id: str


@dataclass(frozen=True, slots=True)
class StoredPacket:
    """A packet as it is kept: its store-wide position and the record in its present state."""

    sequence: int
    record: PacketRecord


ChangeKind = Literal[
    "packets", "updates", "spend", "cohort", "quarantine", "reputations", "dictionary", "forgotten"
]


@dataclass(frozen=True, slots=True)
class Change:
    """Something that another server wrote to a store that several share.

    Attributes:
        kind: What it is about; what it came to is to be read from the store.
        cohort: Of `cohort` and `reputations`, which.
        packet: Of `quarantine`, which.
        reputations: Of `reputations`, those that were written.
    """

    kind: ChangeKind
    cohort: str = ""
    packet: int | PacketKey | None = None
    reputations: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class AppendOutcome:
    """The answer to one record of an `append`.

    Attributes:
        status: `stored` now; `duplicate` of a kept packet with the same content; `reused` when the
            key is taken by other content; `rejected` when the record itself cannot be kept.
        sequence: Position of the kept packet (the first one, for `duplicate` and `reused`);
            0 for `rejected`.
        received_at_us: Of the kept packet; of the record for `rejected`.
        quarantined: Of the kept packet, as it stands now.
        quarantine_reason: Of the kept packet, as it stands now.
        problem: Why the record was `rejected`, naming the field; else empty.
    """

    status: AppendStatus
    sequence: int
    received_at_us: int
    quarantined: bool
    quarantine_reason: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """One released update.

    Attributes:
        sequence: Store-wide position among updates, 1, 2, 3 ...; the position in a resume token.
        cohort: Whose update it is.
        kind: Number of the kind of update; opaque to the store.
        revision: Per cohort and kind 1, 2, 3 ... without gaps.
        published_at_us: Unix microseconds.
        content_hash: Opaque bytes that identify the content.
        payload: Opaque.
    """

    sequence: int
    cohort: str
    kind: int
    revision: int
    published_at_us: int
    content_hash: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class CohortRecord:
    """One cohort spec, opaque, with the revision its owner gave it."""

    name: str
    spec: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class SpendRecord:
    """One entry of the privacy ledger: what a release of a cohort costs, whether it came to be or not.

    The first entry of a ledger costs nothing: it says when privacy was put in force.

    Attributes:
        cohort: Whose budget.
        number: 1, 2, 3 ... in each cohort, without gaps.
        period: When the period began that the release is for, Unix microseconds; rises with the number.
        spent_at_us: Unix microseconds.
        rho: The cost in zero-concentrated differential privacy; at least 0.
        history_epoch: The store's when it was spent; another one than now means that a backup was restored.
    """

    cohort: str
    number: int
    period: int
    spent_at_us: int
    rho: float
    history_epoch: str


@dataclass(frozen=True, slots=True)
class LostSpan:
    """A span of time of which a history may lack everything: from a backup until it was restored.

    Attributes:
        from_us: When the backup was taken, Unix microseconds.
        until_us: When it was restored; far in the future where nobody knows.
    """

    from_us: int
    until_us: int


@dataclass(frozen=True, slots=True)
class LedgerTotal:
    """What a cohort spent.

    Attributes:
        entries: How many entries of its ledger cost something.
        rho: The sum of what they cost.
        last_number: Of the last one.
        last_period: The same.
        last_history_epoch: The same.
    """

    entries: int
    rho: float
    last_number: int
    last_period: int
    last_history_epoch: str


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """What the store counted about one site in one cohort.

    Attributes:
        cohort: The cohort.
        domain_id: The site.
        first_seen_us: Receipt of its first packet, repeats included, Unix microseconds.
        last_seen_us: Receipt of its latest packet, repeats included, Unix microseconds.
        msp_count: MSPs taken, those that were retired and forgotten since included, and those that are in
            quarantine; one that is forgotten in quarantine never counted and is taken off.
        pop_count: POPs, in the same way.
        ccs_count: CCSs, in the same way.
        quarantined_count: Packets that are in quarantine now.
        duplicate_count: Repeats answered `duplicate`.
        reused_count: Records answered `reused`.
        reputation: The last one put; None before.
    """

    cohort: str
    domain_id: str
    first_seen_us: int
    last_seen_us: int
    msp_count: int
    pop_count: int
    ccs_count: int
    quarantined_count: int
    duplicate_count: int
    reused_count: int
    reputation: float | None


@dataclass(frozen=True, slots=True)
class DictionaryRecord:
    """One encoder dictionary; what an id means never changes."""

    dictionary_id: int
    data: bytes
    created_at_us: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store did since it was opened, and what waits.

    Attributes:
        groups: Group commits that succeeded.
        failed_groups: Group commits that failed; all their waiters got the error.
        records_stored: Packets stored.
        payload_bytes_stored: Sum of their payload sizes.
        duplicates: Records answered `duplicate`.
        reused: Records answered `reused`.
        rejected: Records answered `rejected`.
        largest_group: Records in the largest group.
        last_group: Records in the last group.
        commit_seconds: Time spent in group commits, in all.
        pending_records: Records that wait to be written now.
        pending_bytes: Their payload bytes.
        fault: Why the last group commit failed; None where it succeeded.
        damage: The first damage that a read or a write came upon; None where none did. It stays.
        stalled: Whether what other servers write does not come here now, though the brokers have it.
    """

    groups: int = 0
    failed_groups: int = 0
    records_stored: int = 0
    payload_bytes_stored: int = 0
    duplicates: int = 0
    reused: int = 0
    rejected: int = 0
    largest_group: int = 0
    last_group: int = 0
    commit_seconds: float = 0.0
    pending_records: int = 0
    pending_bytes: int = 0
    fault: UnavailableReason | None = None
    damage: str | None = None
    stalled: bool = False


def _text_problem(field: str, value: object) -> str:
    if not isinstance(value, str):
        return f"{field}: must be text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{field}: is not valid Unicode"
    return ""


def _time_problem(field: str, value: object) -> str:
    if not isinstance(value, int) or not _INT64_MIN <= value <= _INT64_MAX:
        return f"{field}: must be an integer of at most 64 bits"
    return ""


def _is_bytes(value: object, least: int, most: int) -> bool:
    return isinstance(value, bytes) and least <= len(value) <= most


def content_hash(payload: bytes) -> bytes:
    """Hash a packet as it is stored, in 16 bytes: what tells a repeat from an id that is used again."""
    return hashlib.blake2b(payload, digest_size=CONTENT_HASH_BYTES).digest()


def record_problem(record: PacketRecord) -> str:
    """Say why a record cannot be kept, or return the empty string.

    The checks are those of the container (types, 64-bit range, valid Unicode, sizes), not of the
    content: contracts are checked long before.
    """
    for field in ("domain_id", "packet_id", "cohort", "quarantine_reason"):
        if problem := _text_problem(field, getattr(record, field)):
            return problem
    for field in ("received_at_us", "emitted_at_us"):
        if problem := _time_problem(field, getattr(record, field)):
            return problem
    if record.kind not in PACKET_KINDS:
        return "kind: must be one of " + ", ".join(PACKET_KINDS)
    if not _is_bytes(record.content_hash, CONTENT_HASH_BYTES, CONTENT_HASH_BYTES):
        return f"content_hash: must be {CONTENT_HASH_BYTES} bytes"
    if not _is_bytes(record.payload, 0, MAX_PAYLOAD_BYTES):
        return f"payload: must be at most {MAX_PAYLOAD_BYTES} bytes"
    return ""
