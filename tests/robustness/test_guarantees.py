"""The checker of the robustness tests: each guarantee is broken by hand, and named."""

from __future__ import annotations

import dataclasses

import pytest
from guarantees import Answer, Compacted, History, Lagged, Record, Seen, Store, broken
from server_harness import PRIOR, msp

from fmi.v1 import update_pb2

COHORT = "care"
LINE = (COHORT, PRIOR)


def made(revision: int, *, confidence: float = 0.0) -> update_pb2.Update:
    update = update_pb2.Update(cohort=COHORT, kind=PRIOR, revision=revision, sequence=revision)
    update.prior_update.confidence = confidence
    estimate = update.prior_update.estimates["tau"]
    estimate.value, estimate.sites = 0.5, 3
    return update


def seen(*revisions: int) -> list[Seen]:
    return [Seen.of(made(revision)) for revision in revisions]


def sound() -> tuple[History, Store]:
    packets = [msp(f"s{i}", COHORT, controller={"tau": 0.5}) for i in range(3)]
    keys = [(p.header.domain_id, p.header.packet_id) for p in packets]
    answers = [Answer(key, "accepted", i) for i, key in enumerate(keys, 1)]
    rows = [(i, *keys[i - 1], p.SerializeToString()) for i, p in enumerate(packets, 1)]
    updates = [(i, COHORT, PRIOR, i, made(i).SerializeToString()) for i in (1, 2, 3, 4, 5)]
    counted = {(COHORT, site): 1 for site, _ in keys}
    history = History(answers, [Record("every", every=True, events=seen(1, 2, 3, 4, 5))])
    return history, Store(rows, updates, counted)


def named(history: History, store: Store) -> set[str]:
    return {found.guarantee for found in broken(history, store)}


def named_with(*events: object, every: bool = True, kept_from: int = 1) -> set[str]:
    """What a subscriber with these events breaks, where the store has kept 5 revisions or the last."""
    history, store = sound()
    history.records = [Record("one", every, events=list(events))]
    return named(history, dataclasses.replace(store, updates=store.updates[kept_from - 1 :]))


def test_a_sound_history_breaks_nothing():
    history, store = sound()
    assert named(history, store) == set()
    history.answers.append(dataclasses.replace(history.answers[1], status="duplicate"))
    assert named(history, store) == set()


def test_a_lost_packet_breaks_durable():
    history, store = sound()
    assert "DURABLE" in named(history, dataclasses.replace(store, packets=store.packets[:2]))


def test_a_packet_at_another_place_breaks_durable():
    history, store = sound()
    moved = [(row[0] + 1, *row[1:]) for row in store.packets]
    assert named(history, dataclasses.replace(store, packets=moved)) == {"DURABLE"}


def test_a_packet_accepted_twice_breaks_once():
    history, store = sound()
    history.answers.append(history.answers[0])
    assert named(history, store) == {"ONCE"}


def test_a_packet_stored_twice_breaks_once_under_whatever_id():
    history, store = sound()
    first = store.packets[0]
    twice = [*store.packets, (9, first[1], "another id", first[3])]
    assert named(history, dataclasses.replace(store, packets=twice)) == {"ONCE"}


def test_a_packet_counted_twice_breaks_once():
    history, store = sound()
    counted = {**store.counted, (COHORT, "s1"): 2}
    assert named(history, dataclasses.replace(store, counted=counted)) == {"ONCE"}


def test_an_update_out_of_order_breaks_ordered():
    assert "ORDERED" in named_with(*seen(2, 1, 3, 4, 5))


def test_a_hole_in_the_store_breaks_ordered():
    history, store = sound()
    holed = [row for row in store.updates if row[3] != 3]
    assert "ORDERED" in named(history, dataclasses.replace(store, updates=holed))


@pytest.mark.parametrize(
    "events",
    [
        seen(1, 3, 4, 5),
        seen(2, 3, 4, 5),
        seen(1, 2, 3, 4),
        seen(1, 2, 2, 3, 4, 5),
        [*seen(1, 2), Seen.of(made(3, confidence=0.25)), *seen(4, 5)],
        seen(1, 2, 3, 4, 5, 6),
        [*seen(1), Lagged(LINE, 2, 4), *seen(5)],
        [*seen(1), Compacted(LINE, 2, 4), *seen(4, 5)],
        [],
    ],
    ids=[
        "gap",
        "late",
        "not all",
        "repeat",
        "other content",
        "taken back",
        "lagged",
        "compacted though kept",
        "nothing",
    ],
)
def test_a_history_of_every_that_is_not_the_stores_breaks_resumable(events):
    assert "RESUMABLE" in named_with(*events)


def test_what_is_no_longer_kept_may_be_missed_if_it_was_told():
    told = [*seen(1), Compacted(LINE, 2, 4), *seen(4, 5)]
    assert named_with(*told, kept_from=4) == set()
    assert named_with(*seen(1, 4, 5), kept_from=4) == {"RESUMABLE"}
    assert named_with(*told, kept_from=3) == {"RESUMABLE"}, "3 is kept"


@pytest.mark.parametrize(
    "events",
    [
        [*seen(1), Lagged(LINE, 2, 4), *seen(5)],
        [Lagged(LINE, 1, 4), *seen(5)],
        [*seen(1), Lagged(LINE, 2, 3), Lagged(LINE, 2, 4), *seen(5)],
    ],
    ids=["told", "from the start", "told again"],
)
def test_latest_may_leave_out_what_it_tells_of(events):
    assert named_with(*events, every=False) == set()


@pytest.mark.parametrize(
    "events",
    [
        seen(1, 5),
        [*seen(1), Lagged(LINE, 2, 3), *seen(5)],
        [*seen(1), Lagged(LINE, 3, 4), *seen(5)],
        [*seen(1, 2), Lagged(LINE, 2, 4), *seen(5)],
        [*seen(1), Lagged(LINE, 2, 5), *seen(5)],
        [*seen(1), Lagged(LINE, 0, 4), *seen(5)],
        [*seen(1), Lagged(LINE, 2, 5)],
    ],
    ids=["untold", "too few", "too late", "had", "too many", "unknown though kept", "no newest"],
)
def test_latest_that_tells_of_it_wrongly_breaks_resumable(events):
    assert "RESUMABLE" in named_with(*events, every=False)


def test_two_subscribers_who_saw_different_things_of_what_is_gone_break_resumable():
    history, store = sound()
    store = dataclasses.replace(store, updates=store.updates[3:])
    assert named(history, store) == set()
    other = [Seen.of(made(1, confidence=0.25)), *seen(2, 3, 4, 5)]
    history.records.append(Record("other", every=True, events=other))
    assert named(history, store) == {"RESUMABLE"}


def test_an_update_of_another_history_breaks_resumable():
    history, store = sound()
    (record,) = history.records
    record.events[2] = dataclasses.replace(record.events[2], history_epoch="another")
    assert named(history, store) == {"RESUMABLE"}


def test_a_site_that_does_not_count_breaks_one_vote():
    history, store = sound()
    extra = msp("s9", COHORT, controller={"tau": 0.5})
    uncounted = [*store.packets, (4, "s9", extra.header.packet_id, extra.SerializeToString())]
    assert named(history, dataclasses.replace(store, packets=uncounted)) == {"ONE SITE, ONE VOTE"}
