"""What counts now: the newest MSP of each site, and how quarantine moves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

    from fmi_server.storage.records import StoredPacket

__all__ = ["live_sequences", "set_packet_quarantine"]


def live_sequences(connection: sqlite3.Connection, window_since_us: int) -> list[int]:
    """Return the sequences of what a restart needs, as `Store.live_packets` defines it."""
    connection.execute("BEGIN")  # one snapshot for all three questions
    try:
        found = {
            sequence
            for (sequence,) in connection.execute(
                "SELECT newest_msp FROM sites WHERE newest_msp IS NOT NULL UNION ALL "
                "SELECT sequence FROM packets "
                "WHERE kind > 0 AND quarantined = 0 AND received_at_us >= ?",
                (window_since_us,),
            )
        }
        lost = connection.execute(
            "SELECT cohort, domain_id FROM sites "
            "WHERE newest_msp IS NULL AND newest_emitted_us IS NOT NULL"
        ).fetchall()
        if lost:
            found |= _search_newest(connection, set(lost))
    finally:
        connection.execute("COMMIT")
    return sorted(found)


def _search_newest(connection: sqlite3.Connection, sites: set[tuple[str, str]]) -> set[int]:
    """Find the newest MSP of sites whose pointer quarantine emptied, in one pass over all."""
    # CROSS JOIN fixes the order of the loops: packets once, not once for each such site.
    newest: dict[tuple[str, str], tuple[int, int]] = {}
    for cohort, domain_id, emitted_at_us, sequence in connection.execute(
        "SELECT p.cohort, p.domain_id, p.emitted_at_us, p.sequence FROM packets AS p "
        "CROSS JOIN sites AS s ON s.cohort = p.cohort AND s.domain_id = p.domain_id "
        "WHERE s.newest_msp IS NULL AND p.kind = 0 AND p.quarantined = 0"
    ):
        site = (cohort, domain_id)
        position = (emitted_at_us, sequence)
        if site in sites and position > newest.get(site, (-(2**63), 0)):
            newest[site] = position
    return {sequence for _, sequence in newest.values()}


def set_packet_quarantine(
    connection: sqlite3.Connection, found: StoredPacket, *, quarantined: bool, reason: str
) -> bool:
    """Change a packet's quarantine and its site's counters inside the open transaction.

    The newest MSP of a site is known by a pointer. Putting that very MSP in quarantine leaves the
    pointer empty, and `live_packets` looks for the one before; the time of emission stays, so that
    any later MSP takes over.
    """
    record = found.record
    connection.execute(
        "UPDATE packets SET quarantined = ?, quarantine_reason = ? WHERE sequence = ?",
        (quarantined, reason if quarantined else "", found.sequence),
    )
    if record.quarantined == quarantined:
        return False
    site = (record.cohort, record.domain_id)
    connection.execute(
        "UPDATE sites SET quarantined_count = quarantined_count + ? "
        "WHERE cohort = ? AND domain_id = ?",
        (1 if quarantined else -1, *site),
    )
    if record.kind != "msp":
        return True
    if quarantined:
        connection.execute(
            "UPDATE sites SET newest_msp = NULL "
            "WHERE cohort = ? AND domain_id = ? AND newest_msp = ?",
            (*site, found.sequence),
        )
    else:
        # On a tie with an empty pointer the search decides.
        connection.execute(
            "UPDATE sites SET newest_msp = ?, newest_emitted_us = ? "
            "WHERE cohort = ? AND domain_id = ? AND (newest_emitted_us IS NULL "
            "OR newest_emitted_us < ? OR (newest_emitted_us = ? AND newest_msp < ?))",
            (
                found.sequence,
                record.emitted_at_us,
                *site,
                record.emitted_at_us,
                record.emitted_at_us,
                found.sequence,
            ),
        )
    return True
