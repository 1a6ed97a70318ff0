"""Feeds: which cohorts match, and what a subscriber gets: ORDERED, RESUMABLE, every gap told of."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence

import pytest
from histories import EPOCH, A, B, C, History, Reader, show
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server import feed_requests, patterns
from fmi_server.errors import CompactedError, InvalidFilterError, ServerDrainingError
from fmi_server.feed_requests import PAUSE_S, FeedRequest, Key, kind_name
from fmi_server.patterns import PatternSet, matches
from fmi_server.update_log import PublishedUpdate, UpdateLog

# Patterns


def slow_match(pattern: str, name: str) -> bool:
    """Say what a pattern means, in as few words as possible and whatever it costs."""
    if not pattern:
        return not name
    if pattern.startswith("**"):
        return any(slow_match(pattern[2:], name[i:]) for i in range(len(name) + 1))
    if pattern.startswith("*"):
        stop = name.find("/") if "/" in name else len(name)
        return any(slow_match(pattern[1:], name[i:]) for i in range(stop + 1))
    if not name:
        return False
    fits = pattern[0] == name[0] or (pattern[0] == "?" and name[0] != "/")
    return fits and slow_match(pattern[1:], name[1:])


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("care", ["care"], ["car", "cares", "care/x", ""]),
        ("*", ["care", "a"], ["care/eu"]),
        ("**", ["care", "care/eu", "a/b/c"], []),
        ("care/*", ["care/eu"], ["care", "care/eu/x"]),
        ("care/**", ["care/eu", "care/eu/x"], ["care", "careless"]),
        ("care**", ["care", "careless", "care/eu/x"], ["car"]),
        ("c?re", ["care", "core"], ["cre", "c/re", "caare"]),
        ("*/eu", ["care/eu"], ["eu", "a/b/eu"]),
        ("**/eu", ["care/eu", "a/b/eu"], ["eu"]),
        ("***", ["a", "a/b"], []),
        ("a.b", ["a.b"], ["axb"]),
        ("a-*-z", ["a-b-z", "a---z"], ["a-z"]),
    ],
)
def test_patterns_mean_what_the_contract_says(pattern, yes, no):
    assert [name for name in yes if not matches(pattern, name)] == []
    assert [name for name in no if matches(pattern, name)] == []


@settings(max_examples=500)
@given(st.text("ab/*?", max_size=9), st.text("ab/", max_size=9))
def test_patterns_match_as_a_slow_reference_does(pattern, name):
    assert matches(pattern, name) == slow_match(pattern, name)


def steps_of(pattern: str, name: str) -> int:
    """Count the lines that a match executes, with nothing remembered from matches before."""
    steps = 0

    def trace(frame, event, _argument):
        nonlocal steps
        if frame.f_code.co_filename != patterns.__file__:
            return None
        steps += event == "line"
        return trace

    patterns._glob_matches.cache_clear()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        matches(pattern, name)
    finally:
        sys.settrace(before)
    return steps


@pytest.mark.parametrize("pattern", ["*a" * 64, "**?" * 42, "?*" * 64, "*" * 63 + "a" * 64])
def test_no_pattern_costs_more_than_the_sum_of_the_lengths(pattern):
    name = "a" * 128
    steps = steps_of(pattern, name)
    assert 100 < steps < 20 * (len(pattern) + len(name))
    # Twice the lengths cost at most twice as much, and a little.
    assert steps_of(pattern * 2, name * 2) < 2.2 * steps


@given(st.lists(st.text("ab/*?", min_size=1, max_size=5), min_size=1), st.text("ab/", max_size=6))
def test_a_set_of_patterns_matches_what_one_of_them_does(several, name):
    assert PatternSet(tuple(several)).match(name) == any(slow_match(p, name) for p in several)


def test_answers_are_kept_for_slow_patterns_only_and_bounded():
    patterns._glob_matches.cache_clear()
    for number in range(100):
        PatternSet(("care", "care/*", "retail/**")).match(f"retai/{number}")
    assert patterns._glob_matches.cache_info().currsize == 0
    assert patterns._glob_matches.cache_info().maxsize is not None
    assert patterns._glob.cache_info().maxsize is not None


# Requests


def request(cohorts: Sequence[str] = ("**",), **fields) -> FeedRequest:
    message = wire_pb2.SubscribeRequest(cohorts=cohorts, **fields)
    return FeedRequest.from_message(message, history_epoch=EPOCH, head=10)


def start(cohort="care", kind=1, revision=3, history_epoch="") -> wire_pb2.StartRevision:
    return wire_pb2.StartRevision(
        cohort=cohort, kind=kind, revision=revision, history_epoch=history_epoch
    )


def test_a_request_is_read():
    found = request(["care", "retail/*"], kinds=[1, 3], mode=wire_pb2.DELIVERY_MODE_EVERY)
    assert found.every
    assert found.wants(("care", 1))
    assert found.wants(("retail/eu", 3))
    assert not found.wants(("care", 2))
    assert not found.wants(("retail/eu/x", 1))
    assert request().wants(("anything/at/all", 4))
    assert not request().every
    assert not request(mode=wire_pb2.DELIVERY_MODE_LATEST).every


NASTY = tuple("*a" * 7 + "*" + f"z{n}" for n in range(64))
"""As many as a request may have, each with all the stars that it may have, and none matching."""


async def worst_wait(work) -> float:
    """Return the longest for which some work kept the event loop from others, in seconds of the processor.

    Where others have the processor meanwhile, that is no doing of the work's.
    """
    worst = 0.0
    running = asyncio.ensure_future(work)
    while not running.done():
        began = time.thread_time()
        await asyncio.sleep(0)
        worst = max(worst, time.thread_time() - began)
    await running
    return worst


async def test_matching_many_cohorts_lets_others_run():
    names = ["a" * 118 + f"{n:08d}" for n in range(500)]
    patterns._glob_matches.cache_clear()
    began = time.thread_time()
    worst = await worst_wait(request(NASTY).answers(names))
    took = time.thread_time() - began
    assert took > 20 * PAUSE_S, "else there is nothing to see here"
    assert worst < max(0.1, took / 4)


async def test_answers_are_those_of_each_cohort():
    found = await request(["care", "retail/*"]).answers(
        ["care", "retail/eu", "retail/eu/x", "care"]
    )
    assert found == {"care": True, "retail/eu": True, "retail/eu/x": False}


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "7",
        ":7",
        f"{EPOCH}:",
        f"{EPOCH}:x",
        f"{EPOCH}:-1",
        f"{EPOCH}: 7",
        f"{EPOCH}:" + "9" * 40,
    ],
)
def test_a_token_that_no_server_gave_is_refused(token):
    with pytest.raises(InvalidFilterError, match="is not one that this server gave") as caught:
        request(resume_token=token)
    assert caught.value.field == "resume_token"


def test_a_token_ahead_of_the_history_is_refused():
    assert request(resume_token=f"{EPOCH}:10").resume_after == 10
    with pytest.raises(InvalidFilterError, match="ahead"):
        request(resume_token=f"{EPOCH}:11")


def test_a_token_of_another_history_gives_a_whole_snapshot():
    found = request(resume_token="other:99999")  # noqa: S106 - a place in a history
    assert (found.resume_after, found.history_changed) == (None, True)
    found = request(start_revisions=[start(history_epoch="other"), start(kind=2)])
    assert (found.start, found.history_changed) == ({("care", 2): 3}, True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"resume_token": f"{EPOCH}:1", "start_revisions": [start()]}, "with start_revisions"),
        ({"start_revisions": [start(), start(revision=4)]}, "a second time"),
        ({"cohorts": ["retail"], "start_revisions": [start()]}, "the filter leaves out"),
        ({"kinds": [2], "start_revisions": [start()]}, "the filter leaves out"),
    ],
)
def test_a_start_that_cannot_be_meant_is_refused(fields, said):
    with pytest.raises(InvalidFilterError, match=said):
        request(**fields)


LATEST, EVERY = wire_pb2.DELIVERY_MODE_LATEST, wire_pb2.DELIVERY_MODE_EVERY


@pytest.fixture
def history() -> History:
    return History()


async def test_a_snapshot_is_the_newest_of_each_in_order_of_publishing(history):
    history.publish(A, 3)
    history.publish(B, 2)
    history.publish(A)
    for mode in (LATEST, EVERY):
        reader = history.open(mode=mode)
        assert await reader.until_end() == ["care.2@2", "care.1@4"]


async def test_the_end_of_the_snapshot_says_what_it_was(history):
    history.publish(A)
    history.publish(C)
    reader = history.open(cohorts=["retail/*"])
    await reader.next()
    event = await reader.next()
    assert event.snapshot_end.updates == 1
    assert event.snapshot_end.history_epoch == EPOCH
    assert not event.snapshot_end.history_changed
    changed = history.open(resume_token="other:5")  # noqa: S106 - a place in a history
    assert await changed.next()
    assert await changed.next()
    assert (await changed.next()).snapshot_end.history_changed


async def test_latest_conflates_and_tells_exactly_what_it_left_out(history):
    history.publish(A, 2)
    reader = history.open()
    await reader.until_end()
    history.publish(A, 4)
    history.publish(B, 3)  # came into being after the snapshot
    assert await reader.until_progress() == [
        "care.1 lagged 3-5", "care.2 lagged 1-2", "care.1@6", "care.2@3",
    ]  # fmt: skip
    assert reader.feed.conflated == 5
    history.publish(A)
    assert await reader.until_progress() == ["care.1@7"]
    assert await reader.until_progress() == []


async def test_every_gives_each_revision_from_memory_and_from_the_store(history):
    history.publish(A)
    reader = history.open(mode=EVERY)
    assert await reader.until_end() == ["care.1@1"]
    history.publish(A, 10)
    history.publish(B, 2)
    expected = [f"care.1@{r}" for r in range(2, 12)] + ["care.2@1", "care.2@2"]
    assert await reader.until_progress() == expected
    assert history.reads > 0
    reads = history.reads
    history.publish(A, 2)
    assert await reader.until_progress() == ["care.1@12", "care.1@13"]
    assert history.reads == reads, "what is recent is read from memory"


@pytest.mark.parametrize("mode", [LATEST, EVERY])
@pytest.mark.parametrize("turns", range(12))
async def test_what_is_published_while_the_filter_is_matched_is_neither_lost_nor_compacted(
    history, monkeypatch, mode, turns
):
    monkeypatch.setattr(feed_requests, "PAUSE_S", -1.0)  # others run after each cohort
    history.log.recent = type(history.log.recent)(maxlen=100)
    for number in range(4):
        history.publish((f"c{number}", 1), 2)
    history.publish(A, 3)
    history.publish(B, 3)
    reader = history.open(mode=mode, start_revisions=[start(revision=3)])
    starting = asyncio.ensure_future(reader.until_end())
    for _ in range(turns):
        await asyncio.sleep(0)
    history.publish(B)
    history.publish(("late", 1))
    shown = [*await starting, *await reader.until_progress()]
    assert sorted(set(shown)) == sorted(shown), "nothing comes twice"
    assert {"care.1@3", "care.2@4", "late.1@1", *(f"c{n}.1@2" for n in range(4))} <= set(shown)
    assert not any("lagged" in text for text in shown)
    again = history.open(mode=mode, resume_token=reader.token)
    assert await again.until_end() == []


async def test_progress_says_the_time_and_comes_behind_data(history):
    reader = history.open()
    await reader.until_end()
    reader.feed.progress()
    history.publish(A)
    assert show(await reader.next()) == "care.1@1"
    event = await reader.next()
    assert event.progress.server_time.seconds == 5


@pytest.mark.parametrize(
    ("revision", "latest", "every"),
    [
        (1, ["care.1 lagged 1-4", "care.1@5"], [f"care.1@{r}" for r in range(1, 6)]),
        (4, ["care.1 lagged 4-4", "care.1@5"], ["care.1@4", "care.1@5"]),
        (5, ["care.1@5"], ["care.1@5"]),
        (6, [], []),
    ],
)
async def test_a_start_revision_is_the_first_one_wanted(history, revision, latest, every):
    history.publish(A, 5)
    history.forget_memory()
    for mode, expected in ((LATEST, latest), (EVERY, every)):
        reader = history.open(mode=mode, start_revisions=[start(revision=revision)])
        assert await reader.until_end() == expected
        history.publish(B)
        assert await reader.until_progress() == ["care.2@1"]
        history.kept.pop(B)
        del history.log.latest[B]
        await reader.close()
        history = History()
        history.publish(A, 5)
        history.forget_memory()


async def test_a_start_revision_for_one_and_a_snapshot_of_the_rest(history):
    history.publish(A, 3)
    history.publish(B, 3)
    history.publish(A, 2)
    reader = history.open(mode=EVERY, start_revisions=[start(revision=2)])
    assert await reader.until_end() == [
        "care.1@2", "care.1@3", "care.2@3", "care.1@4", "care.1@5",
    ]  # fmt: skip


@pytest.mark.parametrize("mode", [LATEST, EVERY])
async def test_a_start_ahead_of_the_history_is_refused(history, mode):
    history.publish(A, 2)
    for cohort, revision in (("care", 4), ("nowhere", 2)):
        reader = history.open(mode=mode, start_revisions=[start(cohort, revision=revision)])
        with pytest.raises(InvalidFilterError, match="ahead of the history"):
            await reader.next()
    reader = history.open(mode=mode, start_revisions=[start("nowhere", revision=1)])
    assert await reader.until_end() == ["care.1@2"]


async def test_a_start_that_is_no_longer_kept_is_compacted(history):
    history.publish(A, 9)
    history.trim(A, 3)
    history.forget_memory()
    reader = history.open(mode=EVERY, start_revisions=[start(revision=6)])
    with pytest.raises(CompactedError) as caught:
        await reader.next()
    assert caught.value.metadata == {
        "cohort": "care", "kind": "prior", "revision": "6", "oldest_revision": "7",
    }  # fmt: skip
    reader = history.open(mode=EVERY, start_revisions=[start(revision=7)])
    assert await reader.until_end() == ["care.1@7", "care.1@8", "care.1@9"]
    reader = history.open(mode=LATEST, start_revisions=[start(revision=2)])
    assert await reader.until_end() == ["care.1 lagged 2-8", "care.1@9"]


async def taken(reader: Reader, events: int) -> None:
    for _ in range(events):
        await reader.next()


async def test_what_is_lost_is_told_though_the_stream_is_cut_before_its_turn(history):
    """Tokens of others lead past what is no longer kept: behind them nobody could tell that it was missed."""
    history.publish(A, 2)
    history.publish(B)
    reader = history.open(mode=EVERY)
    await reader.until_end()
    token = reader.token
    for key in (A, B, A, B, A):
        history.publish(key)
    history.trim(A, 1)
    history.forget_memory()
    for _ in range(3):
        reader = history.open(mode=EVERY, resume_token=token)
        with pytest.raises(CompactedError) as caught:
            await taken(reader, 2)
        assert caught.value.metadata["revision"] == "4"
        assert caught.value.metadata["oldest_revision"] == "5"
        token = reader.token or token
    # Who does not want it is not troubled.
    reader = history.open(mode=EVERY, resume_token=token, kinds=[2])
    assert await reader.until_end() == ["care.2@2", "care.2@3"]


@pytest.mark.parametrize("mode", [LATEST, EVERY])
async def test_a_token_of_every_event_goes_on_behind_it(history, mode):
    history.publish(A, 2)
    reader = history.open(mode=mode)
    await reader.until_end()
    history.publish(A, 2)
    history.publish(B, 2)
    history.publish(A)
    reader.feed.progress()
    expected: list[tuple[str, str]] = []
    while not expected or expected[-1][1] != "progress":
        event = await reader.next()
        expected.append((event.resume_token, show(event)))
    shown = [text for _, text in expected[:-1]]
    for place, (token, text) in enumerate(expected):
        again = history.open(mode=mode, resume_token=token)
        # What is left out of one is told before the others are given, and told again after a cut.
        behind = 0 if "lagged" in text else place + 1
        assert await again.until_end() == shown[behind:]


@pytest.mark.parametrize("mode", [LATEST, EVERY])
async def test_tokens_without_data_do_not_go_back(history, mode):
    history.publish(A, 3)
    history.publish(C)
    first = history.open(mode=mode)
    await first.until_end()
    again = history.open(mode=mode, resume_token=first.token)
    assert await again.until_end() == []
    assert again.token == first.token
    assert await again.until_progress() == []
    history.publish(A)
    third = history.open(mode=mode, resume_token=again.token)
    assert await third.until_end() == ["care.1@4"]
    ahead = history.open(mode=mode, cohorts=["care"], start_revisions=[start(revision=5)])
    assert await ahead.until_end() == []
    last = history.open(mode=mode, cohorts=["care"], resume_token=ahead.token)
    assert await last.until_end() == []


async def test_what_others_do_does_not_hold_a_token_back(history):
    reader = history.open(cohorts=["nothing"])
    await reader.until_end()
    history.publish(A, 50)
    assert await reader.until_progress() == []
    assert reader.token == f"{EPOCH}:50"
    reads = history.reads
    again = history.open(cohorts=["nothing"], resume_token=reader.token)
    assert await again.until_end() == []
    assert history.reads == reads


async def test_a_resumed_latest_still_tells_of_gaps_in_what_had_nothing_new(history):
    history.publish(A, 5)
    first = history.open()
    await first.until_end()
    again = history.open(resume_token=first.token)
    assert await again.until_end() == []
    history.publish(A, 3)
    assert await again.until_progress() == ["care.1 lagged 6-7", "care.1@8"]


async def test_what_was_left_out_while_away_is_told_under_the_token_that_was_given(history):
    history.publish(A, 2)
    first = history.open()
    await first.until_end()
    history.publish(A, 3)
    event = await history.open(resume_token=first.token).next()
    assert (show(event), event.resume_token) == ("care.1 lagged 3-4", first.token)
    unknown = await history.open(start_revisions=[start(revision=2)]).next()
    assert (show(unknown), unknown.resume_token) == ("care.1 lagged 2-4", "")


async def over_what_is_no_longer_kept(history, mode):
    history.publish(A, 3)
    first = history.open(mode=mode)
    await first.until_end()
    history.publish(A, 6)
    history.trim(A, 2)
    history.forget_memory()
    return history.open(mode=mode, resume_token=first.token)


async def test_a_resume_of_every_over_what_is_no_longer_kept_is_compacted(history):
    again = await over_what_is_no_longer_kept(history, EVERY)
    with pytest.raises(CompactedError):
        await again.next()


async def test_a_resume_of_latest_gets_the_newest_however_long_it_was_away(history):
    again = await over_what_is_no_longer_kept(history, LATEST)
    assert await again.until_end() == ["care.1 lagged 0-8", "care.1@9"]


@pytest.mark.parametrize("mode", [LATEST, EVERY])
async def test_compaction_of_what_a_subscriber_has_had_does_not_hurt(history, mode):
    history.publish(A, 9)
    first = history.open(mode=mode)
    await first.until_end()
    history.publish(A)
    history.trim(A, 1)
    for forget in (False, True):
        if forget:
            history.forget_memory()
        again = history.open(mode=mode, resume_token=first.token)
        assert await again.until_end() == ["care.1@10"]


async def test_a_slow_reader_of_every_is_told_when_the_store_overtook_it(history):
    history.publish(A)
    reader = history.open(mode=EVERY)
    await reader.until_end()
    history.publish(A, 9)
    history.trim(A, 2)
    reader.feed.progress()
    with pytest.raises(CompactedError) as caught:
        await reader.until_progress()
    assert (caught.value.revision, caught.value.oldest) == (2, 9)


async def test_a_new_key_whose_beginning_is_gone_is_told_too(history):
    reader = history.open(mode=EVERY)
    await reader.until_end()
    history.publish(B, 9)
    history.trim(B, 2)
    with pytest.raises(CompactedError):
        await reader.until_progress()


@pytest.mark.parametrize("mode", [LATEST, EVERY])
async def test_a_stopped_feed_ends_with_its_reason(history, mode):
    history.publish(A, 3)
    history.publish(B, 3)
    reader = history.open(mode=mode)
    await reader.until_end()
    history.publish(A, 3)
    reader.feed.stop(ServerDrainingError())
    with pytest.raises(ServerDrainingError):
        await reader.until_progress()
    early = history.open(mode=mode)
    await early.next()
    early.feed.stop(ServerDrainingError())
    with pytest.raises(ServerDrainingError):
        await early.until_end()


def test_kinds_have_short_names():
    assert [kind_name(kind) for kind in (1, 2, 3, 4)] == [
        "prior", "warm_start", "policy_hint", "causal_consensus",
    ]  # fmt: skip


# The model


KEYS = (A, B, C)
publishes = st.tuples(st.just("publish"), st.sampled_from(KEYS), st.integers(1, 6))
moves = st.one_of(
    publishes,
    publishes,
    st.tuples(st.just("read"), st.integers(1, 5), st.none()),
    st.tuples(st.just("read_all"), st.none(), st.none()),
    st.tuples(st.just("cut"), st.booleans(), st.none()),
    st.tuples(st.just("trim"), st.sampled_from(KEYS), st.integers(1, 4)),
    st.tuples(st.just("restart"), st.none(), st.none()),
)


class Subscriber:
    """Checks what it is given against what it was given before."""

    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.had: dict[Key, int] = {}
        self.reconnected: set[Key] = set()

    def take(self, event: wire_pb2.SubscribeResponse) -> None:
        match event.WhichOneof("event"):
            case "update":
                key = (event.update.cohort, event.update.kind)
                revision = event.update.revision
                if key in self.had:
                    assert revision == self.had[key] + 1, "a gap that nobody told of, or a repeat"
                self.had[key] = revision
            case "lagged":
                assert self.mode == LATEST
                lagged = event.lagged
                key = (lagged.cohort, lagged.kind)
                assert lagged.from_revision <= lagged.to_revision
                # Cut within the snapshot, a key may begin with what it would have skipped there.
                had = self.had.get(key, lagged.from_revision - 1)
                if lagged.from_revision == 0:
                    assert key in self.reconnected, "the server forgot what it gave itself"
                    assert had <= lagged.to_revision
                elif key in self.reconnected:
                    # What was told before the cut may be told again.
                    assert lagged.from_revision <= had + 1 <= lagged.to_revision + 1
                else:
                    assert lagged.from_revision == had + 1
                self.reconnected.discard(key)
                self.had[key] = lagged.to_revision
            case "snapshot_end":
                # Whoever was not in the snapshot begins with its first.
                for key in KEYS:
                    self.had.setdefault(key, 0)

    def reconnect(self, *, with_token: bool) -> None:
        if not with_token:
            self.had.clear()
        self.reconnected = set(KEYS)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.sampled_from([LATEST, EVERY]), st.lists(moves, max_size=25), st.integers(1, 5))
def test_ordered_and_resumable_hold_whatever_happens(mode, script, page):
    asyncio.run(play(mode, script, page))


def check_compacted(error: CompactedError, *, trimmed: bool) -> None:
    assert trimmed, "compacted, although nothing was trimmed"
    assert error.oldest > error.revision


async def play(mode: int, script: Sequence[tuple], page: int) -> None:  # noqa: C901 - one arm per move
    history = History(recent=3)
    subscriber = Subscriber(mode)
    reader = history.open(mode=mode, page=page)
    trimmed = False

    async def read(most: int | None) -> None:
        """Read so many events, or all that there are."""
        nonlocal reader
        if most is None:
            reader.feed.progress()
        taken = 0
        while most is None or taken < most:
            if most is not None:
                reader.feed.progress()  # so that there is always something to come
            try:
                event = await reader.next()
            except CompactedError as error:
                check_compacted(error, trimmed=trimmed)
                subscriber.reconnect(with_token=False)
                await reader.close()
                reader = history.open(mode=mode, page=page)
                if most is None:
                    reader.feed.progress()
                continue
            subscriber.take(event)
            taken += 1
            if event.WhichOneof("event") == "progress":
                return

    for move, first, second in script:
        match move:
            case "publish":
                history.publish(first, second)
            case "read":
                await read(first)
            case "read_all":
                await read(None)
            case "cut":
                token = "" if first else reader.token
                await reader.close()
                reader = history.open(mode=mode, page=page, resume_token=token)
                reader.token = token
                subscriber.reconnect(with_token=bool(token))
            case "trim":
                history.trim(first, second)
                trimmed = True
            case "restart":
                history.forget_memory()
    await read(None)
    newest = {key: update.revision for key, update in history.log.latest.items()}
    assert {key: revision for key, revision in subscriber.had.items() if revision} == newest
    await reader.close()


def test_what_is_missing_between_two_updates_is_read_from_the_store():
    """Others publish too, and what they did may be trimmed before it is heard of here."""
    log = UpdateLog("epoch")
    for sequence in (1, 2, 3, 7, 8):
        log.add(PublishedUpdate(("care", 1), sequence, sequence, b"", 0))
    assert log.since(3, 10) is None
    assert log.since(1, 10) is None
    assert [update.sequence for update in log.since(6, 10)] == [7, 8]
    assert [update.sequence for update in log.since(7, 10)] == [8]
    assert log.since(8, 10) == []
