"""What was seen from outside, and whether it keeps the guarantees. Knows nothing of the server's code.

`History` is what clients wrote down: every answer and every event, in the order in which they came.
`broken` holds it against the rows of the store's file, and names the guarantee that each finding breaks:

* DURABLE: every packet that was acknowledged is in the store.
* ONCE: a packet is in the store once, was accepted at most once, and every answer to it has one sequence.
* ORDERED: a subscriber saw each cohort and kind in strictly rising revisions.
* RESUMABLE: over all its connections a subscriber saw exactly what the store holds: no gap, no repeat,
  nothing that is not there, the same bytes.
* ONE SITE, ONE VOTE: the newest prior counts every site once, with its newest value.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fmi.v1 import packet_pb2, update_pb2

__all__ = ["Answer", "Broken", "History", "Store", "broken"]

Key = tuple[str, str]
"""A site and a packet id."""


@dataclass(frozen=True)
class Answer:
    """One answer to one packet; `sequence` is 0 where the answer did not carry it."""

    key: Key
    status: str
    sequence: int = 0


@dataclass
class History:
    """What clients wrote down."""

    answers: list[Answer] = field(default_factory=list)
    updates: list[update_pb2.Update] = field(default_factory=list)


@dataclass(frozen=True)
class Store:
    """Rows of the store's file: packets in order of sequence, updates in order of sequence."""

    packets: Sequence[tuple[int, str, str, bytes]]
    updates: Sequence[tuple[int, str, int, int, bytes]]


@dataclass(frozen=True)
class Broken:
    """A guarantee that does not hold, and where."""

    guarantee: str
    detail: str


def broken(history: History, store: Store) -> list[Broken]:
    """Return every way in which a history breaks a guarantee."""
    checks = {
        "DURABLE": _durable(history, store),
        "ONCE": _once(history, store),
        "ORDERED": _ordered(history),
        "RESUMABLE": _resumable(history, store),
        "ONE SITE, ONE VOTE": _one_vote(store),
    }
    return [Broken(name, detail) for name, details in checks.items() for detail in details]


def _durable(history: History, store: Store) -> Iterator[str]:
    stored = {(site, packet_id): sequence for sequence, site, packet_id, _ in store.packets}
    acknowledged = {a.key: a for a in history.answers if a.status in ("accepted", "duplicate")}
    lost = [key for key in acknowledged if key not in stored]
    if lost:
        yield f"{len(lost)} of {len(acknowledged)} acknowledged packets are gone, first {lost[0]}"
    for answer in history.answers:
        if answer.sequence and stored.get(answer.key, answer.sequence) != answer.sequence:
            yield f"{answer.key} was answered {answer.sequence} and is {stored[answer.key]}"


def _once(history: History, store: Store) -> Iterator[str]:
    rows = Counter((site, packet_id) for _, site, packet_id, _ in store.packets)
    yield from (f"{key} is stored {count} times" for key, count in rows.items() if count > 1)
    accepted = Counter(a.key for a in history.answers if a.status == "accepted")
    yield from (f"{key} was accepted {count} times" for key, count in accepted.items() if count > 1)
    sequences: defaultdict[Key, set[int]] = defaultdict(set)
    for answer in history.answers:
        if answer.sequence:
            sequences[answer.key].add(answer.sequence)
    yield from (f"{key} was answered as {s}" for key, s in sequences.items() if len(s) > 1)


def _ordered(history: History) -> Iterator[str]:
    last: dict[tuple[str, int], int] = {}
    for update in history.updates:
        key = (update.cohort, update.kind)
        if update.revision <= last.get(key, 0):
            yield f"revision {update.revision} of {key} came after {last[key]}"
        last[key] = update.revision


def _resumable(history: History, store: Store) -> Iterator[str]:
    held = {
        (cohort, kind, revision): update_pb2.Update.FromString(payload)
        for _, cohort, kind, revision, payload in store.updates
    }
    seen: defaultdict[tuple[str, int, int], list[update_pb2.Update]] = defaultdict(list)
    for update in history.updates:
        seen[update.cohort, update.kind, update.revision].append(update)
    yield from _some("was never seen", (key for key in held if key not in seen))
    yield from _some("was seen and is not in the store", (key for key in seen if key not in held))
    yield from _some("was seen again", (key for key, found in seen.items() if len(found) > 1))
    differing = (k for k, found in seen.items() if k in held and any(u != held[k] for u in found))
    yield from _some("was seen with other content", differing)


def _one_vote(store: Store) -> Iterator[str]:
    priors = [
        update_pb2.Update.FromString(payload).prior_update
        for _, _, kind, _, payload in store.updates
        if kind == update_pb2.UPDATE_KIND_PRIOR
    ]
    newest: dict[str, tuple[int, float]] = {}
    for _, site, _, payload in store.packets:
        packet = packet_pb2.Packet.FromString(payload)
        if packet.HasField("msp"):
            at = packet.header.emitted_at.ToNanoseconds()
            newest[site] = max(newest.get(site, (0, 0.0)), (at, packet.msp.controller["tau"]))
    if not newest:
        return
    if not priors:
        yield f"there are values of {len(newest)} sites and no prior"
        return
    estimate = priors[-1].estimates["tau"]
    values = [value for _, value in newest.values()]
    if estimate.sites != len(newest):
        yield f"the last prior counts {estimate.sites} sites of {len(newest)}"
    elif not min(values) <= estimate.value <= max(values):
        yield f"the last prior is {estimate.value}, the newest values are {sorted(values)}"


def _some(what: str, keys: Iterable[tuple[str, int, int]]) -> Iterator[str]:
    found = sorted(keys)
    if found:
        yield f"{len(found)} updates: {found[0]} {what}"
