"""The store for tests and notebooks: dictionaries, and nothing survives the process."""

from __future__ import annotations

import logging
import math
import secrets
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from fmi_server.storage.base import (
    DictionaryConflictError,
    RevisionConflictError,
    Store,
    StoreUnavailableError,
    UnknownPacketError,
    check_holds,
    check_spend,
)
from fmi_server.storage.records import (
    AppendOutcome,
    CohortRecord,
    DictionaryRecord,
    LedgerTotal,
    LostSpan,
    PacketKey,
    PacketRecord,
    SiteRecord,
    SpendRecord,
    StoredPacket,
    StoreStats,
    UpdateRecord,
    record_problem,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["MemoryStore"]

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Data:
    """Everything kept. Packets stand by sequence, in its order."""

    packets: dict[int, StoredPacket]
    by_key: dict[PacketKey, int]
    sequence: int
    retired: set[int]
    forgotten: dict[str, int]
    updates: dict[tuple[str, int], list[UpdateRecord]]
    update_sequence: int
    cohorts: dict[str, CohortRecord]
    sites: dict[tuple[str, str], SiteRecord]
    dictionaries: dict[int, DictionaryRecord]
    ledger: dict[str, list[SpendRecord]]


class MemoryStore(Store):
    """Keep the contract of a store, except that nothing is durable.

    Closing forgets everything; opening again begins a new history.
    """

    def __init__(self) -> None:
        self._kept: _Data | None = None
        self._epoch = ""
        self._stats = StoreStats()

    async def open(self) -> None:
        """Begin empty, and say that nothing will last."""
        if self._kept is None:
            self._kept = _Data({}, {}, 0, set(), {}, {}, 0, {}, {}, {}, {})
            self._epoch = secrets.token_hex(16)
            self._stats = StoreStats()
            _LOG.warning("the store is in memory: nothing is durable, all is lost at the end")

    async def close(self) -> None:
        """Forget everything."""
        self._kept = None

    @property
    def _data(self) -> _Data:
        if self._kept is None:
            raise StoreUnavailableError("closed", detail="open() it before use")
        return self._kept

    @property
    def durable(self) -> bool:
        """Whether what is kept outlives the process: it does not."""
        return False

    @property
    def history_epoch(self) -> str:
        """Random name of this history."""
        _ = self._data
        return self._epoch

    def stats(self) -> StoreStats:
        """Return counters since opening."""
        return self._stats if self._kept is not None else StoreStats()

    async def probe(self) -> None:
        """Do nothing: memory takes writes."""
        _ = self._data

    async def catch_up(self) -> None:
        """Return at once: there is nobody else."""
        _ = self._data

    # Packets

    async def append(self, records: Sequence[PacketRecord]) -> list[AppendOutcome]:
        """Keep packets, ONCE."""
        data = self._data
        if not records:
            return []
        outcomes = [self._append_one(data, record) for record in records]
        stored = [outcome.status == "stored" for outcome in outcomes]
        statuses = [outcome.status for outcome in outcomes]
        old = self._stats
        self._stats = replace(
            old,
            groups=old.groups + 1,
            records_stored=old.records_stored + sum(stored),
            payload_bytes_stored=old.payload_bytes_stored
            + sum(len(r.payload) for r, kept in zip(records, stored, strict=True) if kept),
            duplicates=old.duplicates + statuses.count("duplicate"),
            reused=old.reused + statuses.count("reused"),
            rejected=old.rejected + statuses.count("rejected"),
            largest_group=max(old.largest_group, len(records)),
            last_group=len(records),
        )
        return outcomes

    def _append_one(self, data: _Data, record: PacketRecord) -> AppendOutcome:
        if problem := record_problem(record):
            return AppendOutcome("rejected", 0, record.received_at_us, False, "", problem)
        key = PacketKey(record.domain_id, record.packet_id)
        place = (record.cohort, record.domain_id)
        seen = record.received_at_us
        site = data.sites.get(place) or SiteRecord(*place, seen, seen, 0, 0, 0, 0, 0, 0, None)
        site = replace(
            site,
            first_seen_us=min(site.first_seen_us, seen),
            last_seen_us=max(site.last_seen_us, seen),
        )
        sequence = data.by_key.get(key)
        if sequence is None:
            sequence = data.sequence = data.sequence + 1
            data.packets[sequence] = StoredPacket(sequence, record)
            data.by_key[key] = sequence
            data.sites[place] = replace(
                site,
                msp_count=site.msp_count + (record.kind == "msp"),
                pop_count=site.pop_count + (record.kind == "pop"),
                ccs_count=site.ccs_count + (record.kind == "ccs"),
                quarantined_count=site.quarantined_count + record.quarantined,
            )
            return AppendOutcome(
                "stored", sequence, seen, record.quarantined, record.quarantine_reason
            )
        first = data.packets[sequence].record
        same = first.content_hash == record.content_hash
        data.sites[place] = replace(
            site,
            duplicate_count=site.duplicate_count + same,
            reused_count=site.reused_count + (not same),
        )
        return AppendOutcome(
            "duplicate" if same else "reused",
            sequence,
            first.received_at_us,
            first.quarantined,
            first.quarantine_reason,
        )

    async def load(
        self, cohort: str | None = None, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return packets in sequence order."""
        chosen = (p for p in self._behind(after) if cohort in (None, p.record.cohort))
        return list(islice(chosen, limit))

    def _behind(self, after: int) -> Iterator[StoredPacket]:
        return (packet for packet in self._data.packets.values() if packet.sequence > after)

    async def last_sequence(self) -> int:
        """Return the sequence of the last packet."""
        return max(self._data.packets, default=0)

    async def live_packets(
        self, cohort: str, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return live packets in sequence order."""
        retired = self._data.retired
        live = (
            packet
            for packet in self._behind(after)
            if packet.record.cohort == cohort
            and not packet.record.quarantined
            and packet.sequence not in retired
        )
        return list(islice(live, limit))

    async def retire(self, sequences: Sequence[int]) -> int:
        """Retire live packets."""
        data = self._data
        live = {
            sequence
            for sequence in sequences
            if sequence in data.packets and not data.packets[sequence].record.quarantined
        }
        live -= data.retired
        data.retired |= live
        return len(live)

    async def revive(self, cohort: str, *, domain_id: str | None = None) -> int:
        """Make retired packets live again."""
        data = self._data
        found = set()
        for sequence in data.retired:
            record = data.packets[sequence].record
            if record.cohort == cohort and domain_id in (None, record.domain_id):
                found.add(sequence)
        data.retired -= found
        return len(found)

    async def forget(
        self, cohort: str, *, received_before_us: int, emitted_before_us: int, limit: int = 500
    ) -> int:
        """Delete packets that are not live."""
        data = self._data
        old = (
            packet
            for packet in data.packets.values()
            if packet.record.cohort == cohort
            and (packet.sequence in data.retired or packet.record.quarantined)
            and packet.record.received_at_us < received_before_us
            and packet.record.emitted_at_us < emitted_before_us
            and packet.sequence < data.sequence
        )
        chosen = list(islice(old, limit))
        for packet in chosen:
            self._delete(data, packet)
        if chosen:
            floor = data.forgotten.get(cohort, emitted_before_us)
            data.forgotten[cohort] = max(floor, emitted_before_us)
        return len(chosen)

    @staticmethod
    def _delete(data: _Data, packet: StoredPacket) -> None:
        record = packet.record
        del data.packets[packet.sequence]
        del data.by_key[PacketKey(record.domain_id, record.packet_id)]
        data.retired.discard(packet.sequence)
        if record.quarantined:
            place = (record.cohort, record.domain_id)
            site = data.sites[place]
            data.sites[place] = replace(
                site,
                msp_count=site.msp_count - (record.kind == "msp"),
                pop_count=site.pop_count - (record.kind == "pop"),
                ccs_count=site.ccs_count - (record.kind == "ccs"),
                quarantined_count=site.quarantined_count - 1,
            )

    async def forgotten(self) -> dict[str, int]:
        """Return by cohort the highest time of `forget`."""
        return dict(self._data.forgotten)

    async def packet_counts(self, cohort: str | None = None) -> dict[str, Counter[str]]:
        """Count the packets that were taken and are not in quarantine."""
        counts: dict[str, Counter[str]] = {}
        for site in self._data.sites.values():
            if cohort in (None, site.cohort):
                count = counts.setdefault(site.cohort, Counter())
                count.update(msp=site.msp_count, pop=site.pop_count, ccs=site.ccs_count)
        for packet in self._data.packets.values():
            record = packet.record
            if record.quarantined and record.cohort in counts:
                counts[record.cohort][record.kind] -= 1
        return {name: +count for name, count in counts.items()}

    async def packet(self, packet: int | PacketKey) -> StoredPacket | None:
        """Return one packet, or None."""
        data = self._data
        sequence = data.by_key.get(packet, 0) if isinstance(packet, PacketKey) else packet
        return data.packets.get(sequence)

    async def quarantined(
        self, cohort: str | None = None, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return quarantined packets in sequence order."""
        packets = self._behind(after)
        chosen = (p for p in packets if p.record.quarantined and cohort in (None, p.record.cohort))
        return list(islice(chosen, limit))

    async def set_quarantine(
        self, packet: int | PacketKey, *, quarantined: bool, reason: str = ""
    ) -> bool:
        """Put a packet in quarantine or release it."""
        data = self._data
        found = await self.packet(packet)
        if found is None:
            raise UnknownPacketError(packet=packet)
        before = found.record
        record = replace(
            before, quarantined=quarantined, quarantine_reason=reason if quarantined else ""
        )
        data.packets[found.sequence] = StoredPacket(found.sequence, record)
        data.retired.discard(found.sequence)
        place = (before.cohort, before.domain_id)
        site = data.sites[place]
        data.sites[place] = replace(
            site,
            quarantined_count=site.quarantined_count + quarantined - before.quarantined,
        )
        return before.quarantined != quarantined

    # Updates

    async def publish(
        self, updates: Sequence[UpdateRecord], *, holds: Callable[[], bool] | None = None
    ) -> list[int]:
        """Keep updates, all or none, behind the fence."""
        if updates:
            check_holds(holds, updates[0].cohort)
        data = self._data
        last = {key: held[-1].revision for key, held in data.updates.items()}
        for sequence, update in enumerate(updates, data.update_sequence + 1):
            key = (update.cohort, update.kind)
            expected = last.get(key, 0) + 1
            if update.revision != expected or update.sequence != sequence:
                raise RevisionConflictError(
                    cohort=update.cohort,
                    kind=update.kind,
                    revision=update.revision,
                    expected_revision=expected,
                    sequence=update.sequence,
                    expected_sequence=sequence,
                )
            last[key] = expected
        for update in updates:
            data.updates.setdefault((update.cohort, update.kind), []).append(update)
        data.update_sequence += len(updates)
        return [update.sequence for update in updates]

    async def next_update_sequence(self) -> int:
        """Return the sequence that the next update must carry."""
        return self._data.update_sequence + 1

    async def latest_updates(self) -> list[UpdateRecord]:
        """Return the newest update of each cohort and kind."""
        newest = [held[-1] for held in self._data.updates.values()]
        return sorted(newest, key=lambda update: update.sequence)

    async def updates(
        self, cohort: str, kind: int, *, after_revision: int = 0, limit: int = 100
    ) -> list[UpdateRecord]:
        """Return updates of one cohort and kind, in revision order."""
        held = self._data.updates.get((cohort, kind), [])
        return [update for update in held if update.revision > after_revision][:limit]

    async def updates_since(self, sequence: int, *, limit: int = 100) -> list[UpdateRecord]:
        """Return updates of all cohorts, in sequence order."""
        later = [
            update
            for held in self._data.updates.values()
            for update in held
            if update.sequence > sequence
        ]
        return sorted(later, key=lambda update: update.sequence)[:limit]

    async def update(self, cohort: str, kind: int, revision: int) -> UpdateRecord | None:
        """Return one update, or None."""
        held = self._data.updates.get((cohort, kind), [])
        return next((update for update in held if update.revision == revision), None)

    async def oldest_revision(self, cohort: str, kind: int) -> int | None:
        """Return the oldest revision still held."""
        held = self._data.updates.get((cohort, kind))
        return held[0].revision if held else None

    async def oldest_updates(
        self, keys: Sequence[tuple[str, int]]
    ) -> dict[tuple[str, int], tuple[int, int]]:
        """Return the revision and the sequence of the oldest update still held, by cohort and kind."""
        held = {key: self._data.updates[key] for key in keys if self._data.updates.get(key)}
        return {key: (updates[0].revision, updates[0].sequence) for key, updates in held.items()}

    async def trim_updates(self, cohort: str, kind: int, *, keep: int) -> int:
        """Keep only the newest updates of a cohort and kind."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        held = self._data.updates.get((cohort, kind), [])
        dropped = max(0, len(held) - keep)
        del held[:dropped]
        return dropped

    # Privacy

    async def spend(self, spend: SpendRecord) -> None:
        """Add an entry to the privacy ledger, behind the fence."""
        held = self._data.ledger.get(spend.cohort, [])
        number, period = (held[-1].number, held[-1].period) if held else (0, None)
        check_spend(spend, last_number=number, last_period=period)
        self._data.ledger.setdefault(spend.cohort, []).append(spend)

    async def spends(
        self, cohort: str, *, after_number: int = 0, limit: int = 1000
    ) -> list[SpendRecord]:
        """Return entries of a cohort's ledger above a number."""
        return self._data.ledger.get(cohort, [])[after_number : after_number + limit]

    async def ledger_totals(self) -> dict[str, LedgerTotal]:
        """Return what each cohort with a ledger spent."""
        return {
            cohort: LedgerTotal(
                sum(spend.rho > 0.0 for spend in held),
                math.fsum(spend.rho for spend in held),
                held[-1].number,
                held[-1].period,
                held[-1].history_epoch,
            )
            for cohort, held in self._data.ledger.items()
        }

    async def lost_spans(self) -> list[LostSpan]:
        """Return nothing: no backup is restored into memory."""
        return []

    # Cohorts, sites, dictionaries

    async def put_cohort(
        self, name: str, spec: bytes, revision: int, *, holds: Callable[[], bool] | None = None
    ) -> None:
        """Keep a cohort spec in place of the one before."""
        check_holds(holds, name)
        self._data.cohorts[name] = CohortRecord(name, spec, revision)

    async def cohorts(self) -> list[CohortRecord]:
        """Return all cohort specs, by name."""
        return [record for _, record in sorted(self._data.cohorts.items())]

    async def sites(
        self,
        cohort: str | None = None,
        *,
        after: tuple[str, str] | None = None,
        limit: int | None = None,
    ) -> list[SiteRecord]:
        """Return sites ordered by (cohort, domain_id)."""
        chosen = (
            site
            for place, site in sorted(self._data.sites.items())
            if cohort in (None, site.cohort) and (after is None or place > after)
        )
        return list(islice(chosen, limit))

    async def put_reputations(self, cohort: str, reputations: Mapping[str, float]) -> None:
        """Keep the reputation of sites."""
        sites = self._data.sites
        for domain_id, value in reputations.items():
            if not math.isfinite(value):
                raise ValueError(f"the reputation of {domain_id!r} is not finite")
        for domain_id, value in reputations.items():
            place = (cohort, domain_id)
            if place in sites:
                sites[place] = replace(sites[place], reputation=float(value))

    async def put_dictionary(self, dictionary_id: int, data: bytes, created_at_us: int) -> None:
        """Keep an encoder dictionary."""
        kept = self._data.dictionaries
        if dictionary_id in kept and kept[dictionary_id].data != data:
            raise DictionaryConflictError(dictionary_id=dictionary_id)
        kept.setdefault(dictionary_id, DictionaryRecord(dictionary_id, data, created_at_us))

    async def dictionaries(self) -> list[DictionaryRecord]:
        """Return all dictionaries, by id."""
        return [record for _, record in sorted(self._data.dictionaries.items())]
