"""What was seen from outside, and whether it keeps the guarantees. Knows nothing of the server's code.

`History` is what clients wrote down: every answer, and what each subscriber was given or told, in the order
in which it came. `broken` holds it against the rows of the store's file, and names the guarantee that each
finding breaks:

* DURABLE: every packet that was acknowledged is in the store.
* ONCE: a packet is in the store once, was accepted at most once, every answer to it has one sequence, and
  the counters of its site say as many as there are.
* ORDERED: a subscriber saw each cohort and kind in strictly rising revisions; the store's have no gap.
* RESUMABLE: over all its connections a subscriber of EVERY saw each revision once, with the store's content,
  but for what it was told is no longer kept and is not; one of LATEST saw or was told of each as left out.
* ONE SITE, ONE VOTE: the newest prior counts every site once, with its newest value.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import packet_pb2, update_pb2

__all__ = [
    "Answer",
    "Broken",
    "Compacted",
    "History",
    "Lagged",
    "Record",
    "Seen",
    "Store",
    "broken",
]

Key = tuple[str, str]
"""A site and a packet id."""

KINDS = frozenset(update_pb2.UpdateKind.values()) - {update_pb2.UPDATE_KIND_UNSPECIFIED}

Line = tuple[str, int]
"""A cohort and a kind of update, whose revisions count up."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to one packet; `sequence` is 0 where the answer did not carry it."""

    key: Key
    status: str
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """A subscriber was given an update."""

    line: Line
    revision: int
    digest: bytes
    history_epoch: str

    @classmethod
    def of(cls, update: update_pb2.Update) -> Seen:
        line = (update.cohort, update.kind)
        return cls(line, update.revision, digest(update), update.history_epoch)


@dataclass(frozen=True, slots=True)
class Lagged:
    """A subscriber was told what was left out; `first` is 0 where nobody can tell."""

    line: Line
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Compacted:
    """A subscriber was told that a revision is no longer kept, and which is the oldest that is."""

    line: Line
    asked: int
    oldest: int


@dataclass
class Record:
    """What one subscriber wrote down, who was there before the first release."""

    name: str
    every: bool
    cohorts: frozenset[str] = frozenset()
    """What it follows; empty means all."""
    events: list[Seen | Lagged | Compacted] = field(default_factory=list)

    def take(self, event: wire_pb2.SubscribeResponse) -> None:
        """Write down an event of the stream."""
        match event.WhichOneof("event"):
            case "update":
                self.events.append(Seen.of(event.update))
            case "lagged":
                told = event.lagged
                line = (told.cohort, told.kind)
                self.events.append(Lagged(line, told.from_revision, told.to_revision))

    @property
    def seen(self) -> list[Seen]:
        return [event for event in self.events if isinstance(event, Seen)]

    @property
    def newest(self) -> dict[Line, int]:
        """The revision of each cohort and kind that came last."""
        return {event.line: event.revision for event in self.seen}


@dataclass
class History:
    """What clients wrote down."""

    answers: list[Answer] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    @property
    def of_all_kinds(self) -> bool:
        """Whether everybody was given updates of every kind."""
        return all({kind for _, kind in record.newest} == KINDS for record in self.records)

    def record(self, name: str, *cohorts: str, every: bool = True) -> Record:
        """Begin the record of one more subscriber, of some cohorts or of all."""
        self.records.append(Record(name, every, frozenset(cohorts)))
        return self.records[-1]


@dataclass(frozen=True)
class Store:
    """Rows of the store's file: packets and updates in order of sequence, and what is counted of sites."""

    packets: Sequence[tuple[int, str, str, bytes]]
    updates: Sequence[tuple[int, str, int, int, bytes]]
    counted: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, found: Mapping[str, Sequence[tuple]]) -> Store:
        """Read what `server_harness.rows` gives of `packets`, `updates` and, where it is asked, `sites`."""
        return cls(
            packets=[(r[0], r[1], r[2], r[-1]) for r in found["packets"]],
            updates=[(r[0], r[1], r[2], r[3], r[-1]) for r in found["updates"]],
            counted={(r[0], r[1]): sum(r[4:7]) for r in found.get("sites", ())},
        )


@dataclass(frozen=True)
class Broken:
    """A guarantee that does not hold, and where."""

    guarantee: str
    detail: str


def digest(update: update_pb2.Update) -> bytes:
    """Return what tells an update's content from any other; its history is not part of what is stored."""
    content = update_pb2.Update()
    content.CopyFrom(update)
    content.ClearField("history_epoch")
    return hashlib.blake2b(content.SerializeToString(deterministic=True), digest_size=12).digest()


def broken(history: History, store: Store) -> list[Broken]:
    """Return every way in which a history breaks a guarantee."""
    packets = [packet_pb2.Packet.FromString(row[-1]) for row in store.packets]
    checks = {
        "DURABLE": _durable(history, store),
        "ONCE": _once(history, store, packets),
        "ORDERED": _ordered(history, store),
        "RESUMABLE": _resumable(history, store),
        "ONE SITE, ONE VOTE": _one_vote(store, packets),
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


def _once(history: History, store: Store, packets: Sequence[packet_pb2.Packet]) -> Iterator[str]:
    rows = Counter((p.header.domain_id, p.header.packet_id) for p in packets)
    yield from (f"{key} is stored {count} times" for key, count in rows.items() if count > 1)
    accepted = Counter(a.key for a in history.answers if a.status == "accepted")
    yield from (f"{key} was accepted {count} times" for key, count in accepted.items() if count > 1)
    sequences: defaultdict[Key, set[int]] = defaultdict(set)
    for answer in history.answers:
        if answer.sequence:
            sequences[answer.key].add(answer.sequence)
    yield from (f"{key} was answered as {s}" for key, s in sequences.items() if len(s) > 1)
    held = Counter((p.header.cohort, p.header.domain_id) for p in packets)
    for site, count in store.counted.items():
        if count != held[site]:
            yield f"{site} is counted with {count} packets and has {held[site]}"


def _ordered(history: History, store: Store) -> Iterator[str]:
    for record in history.records:
        last: dict[Line, int] = {}
        for seen in record.seen:
            if seen.revision <= last.get(seen.line, 0):
                came = f"revision {seen.revision} of {seen.line} came after {last[seen.line]}"
                yield f"{record.name}: {came}"
            last[seen.line] = seen.revision
    for line, held in _held(store).items():
        revisions = list(held)
        if revisions != list(range(revisions[0], revisions[0] + len(revisions))):
            yield f"the store's revisions of {line} are not one after the other"


def _held(store: Store) -> dict[Line, dict[int, bytes]]:
    """Return the digests of the updates in the store by revision, in order of sequence."""
    held: defaultdict[Line, dict[int, bytes]] = defaultdict(dict)
    for _, cohort, kind, revision, payload in store.updates:
        held[cohort, kind][revision] = digest(update_pb2.Update.FromString(payload))
    return held


def _resumable(history: History, store: Store) -> Iterator[str]:
    epochs = {seen.history_epoch for record in history.records for seen in record.seen}
    if len(epochs) > 1:
        yield f"updates of {len(epochs)} histories were seen"
    held = _held(store)
    # What the store has trimmed is held against what others saw of it.
    known = {line: dict(digests) for line, digests in held.items()}
    for record in history.records:
        found = _unaccounted(record, held)
        yield from (f"{record.name}: {detail}" for detail in found)
        for seen in record.seen:
            revisions = held.get(seen.line)
            if revisions is None or seen.revision > max(revisions):
                yield f"{record.name}: {_name(seen)} was seen and is not in the store"
                continue
            if known[seen.line].setdefault(seen.revision, seen.digest) != seen.digest:
                yield f"{record.name}: {_name(seen)} was seen with other content"


def _unaccounted(record: Record, held: Mapping[Line, Mapping[int, bytes]]) -> Iterator[str]:
    """Tell of revisions that a subscriber neither saw nor was told of, and of what it was told wrongly."""
    covered: defaultdict[Line, int] = defaultdict(int)
    last: defaultdict[Line, int] = defaultdict(int)
    for event in record.events:
        line = event.line
        done = covered[line]
        match event:
            case Seen(revision=revision):
                if revision <= done:
                    yield f"{_name(event)} was seen again, or was told of as left out"
                elif revision != done + 1:
                    yield f"{line} went from revision {done} to {revision}"
                last[line] = revision
                covered[line] = max(done, revision)
            case Lagged(last=end):
                if record.every:
                    yield f"{event} is no event of EVERY"
                yield from _misled(event, last[line], done, held.get(line, {}))
                covered[line] = max(done, end)
            case Compacted(oldest=oldest):
                if any(done < revision < oldest for revision in held.get(line, ())):
                    yield f"{event} came after revision {done}, and what is between is kept"
                covered[line] = max(done, oldest - 1)
    for line, revisions in held.items():
        followed = not record.cohorts or line[0] in record.cohorts
        if followed and last[line] != max(revisions):
            yield f"the last of {line} was revision {last[line]}, the store has {max(revisions)}"


def _misled(told: Lagged, last: int, done: int, held: Mapping[int, bytes]) -> Iterator[str]:
    """Tell where what was said to be left out was not: it may be told again, with more, after a cut."""
    if told.first and not last < told.first <= done + 1:
        yield f"{told} came after revision {last}, with all up to {done} told"
    if not told.first and last + 1 < told.last and last + 1 in held:
        yield f"{told} hides revisions that are still kept"


def _name(seen: Seen) -> str:
    return f"revision {seen.revision} of {seen.line}"


def _one_vote(store: Store, packets: Iterable[packet_pb2.Packet]) -> Iterator[str]:
    priors: dict[str, update_pb2.MetaPriorUpdate] = {}
    for _, cohort, kind, _, payload in store.updates:
        if kind == update_pb2.UPDATE_KIND_PRIOR:
            priors[cohort] = update_pb2.Update.FromString(payload).prior_update
    newest: defaultdict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    for packet in packets:
        if packet.HasField("msp"):
            header, of_cohort = packet.header, newest[packet.header.cohort]
            said = (header.emitted_at.ToNanoseconds(), packet.msp.controller["tau"])
            of_cohort[header.domain_id] = max(of_cohort.get(header.domain_id, said), said)
    for cohort, sites in newest.items():
        if cohort not in priors:
            yield f"{cohort}: there are values of {len(sites)} sites and no prior"
            continue
        estimate = priors[cohort].estimates["tau"]
        values = [value for _, value in sites.values()]
        if estimate.sites != len(sites):
            yield f"{cohort}: the last prior counts {estimate.sites} sites of {len(sites)}"
        elif not min(values) <= estimate.value <= max(values):
            yield f"{cohort}: the last prior is {estimate.value}, the newest are {sorted(values)}"
