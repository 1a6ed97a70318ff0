"""The whole subscription against a simple specification, in random histories.

Publishing, slow reading, broken streams, retention, restarts, restored backups and changes of the filter,
in any order and in both modes. The specification keeps one number per cohort and kind: the revision up to
which the subscriber has had everything or was told that it was left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from histories import A, B, C, History, Reader
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.errors import CompactedError
from fmi_server.feed_requests import Key

LATEST, EVERY = wire_pb2.DELIVERY_MODE_LATEST, wire_pb2.DELIVERY_MODE_EVERY
KEYS = (A, B, C)

Filter = tuple[tuple[str, ...], tuple[int, ...]]
FILTERS: tuple[Filter, ...] = (
    (("**",), ()),
    (("care",), ()),
    (("care",), (1,)),
    (("care",), (2,)),
    (("retail/*",), ()),
    (("**",), (1,)),
)
WANTED: dict[Filter, set[Key]] = {
    FILTERS[0]: {A, B, C},
    FILTERS[1]: {A, B},
    FILTERS[2]: {A},
    FILTERS[3]: {B},
    FILTERS[4]: {C},
    FILTERS[5]: {A, C},
}
"""What each filter means, written down by hand."""


class Specification:
    """What a subscriber must see: ORDERED, RESUMABLE, every gap told of."""

    def __init__(self, mode: int) -> None:
        self._mode = mode
        self.had: dict[Key, int] = {}
        self._wanted: set[Key] = set()
        self._newest: dict[Key, int] = {}  # when the stream opened
        self._in_snapshot = True
        self._free: set[Key] = set()

    def opens(self, wanted: set[Key], newest: dict[Key, int], *, afresh: bool) -> None:
        """Note that a stream opens; whether afresh, or from where the one before it was.

        Cut within a snapshot, a key may begin with what it would have skipped there.
        """
        self._free = self._wanted & wanted if self._in_snapshot and not afresh else set()
        self._in_snapshot = True
        self._wanted, self._newest = wanted, newest
        self._resumed = set() if afresh else set(self.had)
        self.had = {key: r for key, r in self.had.items() if not afresh and key in wanted}

    def takes(self, event: wire_pb2.SubscribeResponse, *, trimmed: bool) -> None:
        match event.WhichOneof("event"):
            case "update":
                self._update((event.update.cohort, event.update.kind), event.update.revision)
            case "lagged":
                told = event.lagged
                key = (told.cohort, told.kind)
                self._lagged(key, told.from_revision, told.to_revision, trimmed=trimmed)
            case "snapshot_end":
                self._in_snapshot = False
                for key in self._wanted - self.had.keys():
                    assert self._newest[key] == 0 or trimmed, f"{key} is not in the snapshot"
                    self.had[key] = 0
            case other:
                assert other == "progress"

    def _update(self, key: Key, revision: int) -> None:
        assert key in self._wanted, "nobody asked for it"
        if key in self.had:
            assert revision == self.had[key] + 1, "a gap that nobody told of, or a repeat"
        elif key not in self._free:
            assert revision >= self._newest[key], "a snapshot begins with the newest"
        self.had[key] = revision
        self._resumed.discard(key)

    def _lagged(self, key: Key, first: int, last: int, *, trimmed: bool) -> None:
        assert self._mode == LATEST, "EVERY leaves nothing out"
        assert key in self._wanted
        assert first <= last
        had = self.had.get(key)
        if first == 0:
            assert trimmed, "the server forgot what it gave itself"
            assert had is None or had <= last
        elif had is not None and key in self._resumed:
            assert first <= had + 1 <= last + 1, "what was told before a cut may be told again"
        elif had is not None:
            assert first == had + 1
        elif key not in self._free:
            assert first >= self._newest[key], "overtaken before its turn in the snapshot"
        self.had[key] = last
        self._resumed.discard(key)


class Subscriber:
    """Does what the contract asks of a subscriber, and holds every event against the specification."""

    def __init__(self, mode: int, page: int, history: History) -> None:
        self._mode, self._page, self._history = mode, page, history
        self._filter: Filter = FILTERS[0]
        self._next: Filter | None = None
        self._token = ""
        self._handover: wire_pb2.Handover | None = None
        self.seen = Specification(mode)
        self.trimmed = False
        self._reader = self._open(afresh=True)

    def _open(self, *, afresh: bool) -> Reader:
        cohorts, kinds = self._filter
        newest = {key: self._history.log.newest_revision(key) for key in KEYS}
        self.seen.opens(WANTED[self._filter], newest, afresh=afresh)
        return self._history.open(
            cohorts=list(cohorts), kinds=kinds, mode=self._mode, page=self._page,
            resume_token=self._token, handover=self._handover,
        )  # fmt: skip

    async def read(self, most: int | None = None) -> None:
        """Read so many events, or all that there are."""
        taken = 0
        while most is None or taken < most:
            self._reader.feed.progress()
            try:
                event = await self._reader.next()
            except CompactedError as error:
                self._check_compacted(error)
                await self._start_anew()
                continue
            self.seen.takes(event, trimmed=self.trimmed)
            self._token = event.resume_token or self._token
            taken += 1
            if event.WhichOneof("event") == "snapshot_end":
                self._handover = None
                if self._next is not None:
                    await self.change(self._next)
            if event.WhichOneof("event") == "progress":
                return

    async def cut(self) -> None:
        """Lose the stream, and open it again from where it was."""
        await self._reader.close()
        self._reader = self._open(afresh=not self._token and self._handover is None)

    async def lose_history(self, backup) -> None:
        """Come back to a server that was restored from a backup."""
        await self._reader.close()
        self._history.restore(backup)
        changed = bool(self._token or self._handover)
        self._reader = self._open(afresh=True)
        assert self._reader.feed.request.history_changed == changed

    async def change(self, wanted: Filter) -> None:
        """Change the filter; while a change is under way the new one waits."""
        if self._handover is not None:
            self._next = wanted
            return
        self._next = None
        if not self._token:
            self._filter = wanted
            await self.cut()
            return
        cohorts, kinds = self._filter
        self._handover = wire_pb2.Handover(cohorts=cohorts, kinds=kinds, resume_token=self._token)
        self._token = ""
        self._filter = wanted
        await self.cut()

    def _check_compacted(self, error: CompactedError) -> None:
        assert self._mode == EVERY
        assert self.trimmed, "compacted, although nothing was trimmed"
        assert error.oldest > error.revision

    async def _start_anew(self) -> None:
        self._token, self._handover = "", None
        await self.cut()

    async def close(self) -> None:
        await self._reader.close()

    def check_complete(self) -> None:
        newest = {key: self._history.log.newest_revision(key) for key in WANTED[self._filter]}
        assert self.seen.had == newest


publishes = st.tuples(st.just("publish"), st.sampled_from(KEYS), st.integers(1, 3))
reads = st.tuples(st.just("read"), st.integers(1, 3), st.none())
moves = st.one_of(
    publishes,
    publishes,
    publishes,
    reads,
    reads,
    st.tuples(st.just("read_all"), st.none(), st.none()),
    st.tuples(st.just("cut"), st.none(), st.none()),
    st.tuples(st.just("change"), st.sampled_from(FILTERS), st.none()),
    st.tuples(st.just("trim"), st.sampled_from(KEYS), st.integers(1, 4)),
    st.tuples(st.just("restart"), st.none(), st.none()),
    st.tuples(st.just("backup"), st.none(), st.none()),
    st.tuples(st.just("restore"), st.none(), st.none()),
)


CUT_IN_A_HANDOVER = [
    ("change", FILTERS[4], None),
    ("read_all", None, None),
    ("change", FILTERS[0], None),
    ("read", 1, None),
    ("cut", None, None),
    ("read", 1, None),
    ("publish", B, 2),
    ("cut", None, None),
]

CUT_IN_A_SNAPSHOT_THAT_WAS_OVERTAKEN = [
    ("read", 1, None),
    ("publish", C, 1),
    ("read", 1, None),
    ("cut", None, None),
]


@example(LATEST, CUT_IN_A_HANDOVER, 1)
@example(EVERY, CUT_IN_A_HANDOVER, 1)
@example(LATEST, CUT_IN_A_SNAPSHOT_THAT_WAS_OVERTAKEN, 1)
@example(EVERY, CUT_IN_A_SNAPSHOT_THAT_WAS_OVERTAKEN, 1)
@settings(max_examples=600, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    st.sampled_from([LATEST, EVERY]),
    st.lists(moves, min_size=15, max_size=40),
    st.integers(1, 5),
)
def test_whatever_happens_a_subscriber_has_everything_in_order_or_is_told(mode, script, page):
    asyncio.run(play(mode, script, page))


async def play(mode: int, script: Sequence[tuple], page: int) -> None:
    history = History(recent=3)
    for key in (B, A, C, A):
        history.publish(key)
    subscriber = Subscriber(mode, page, history)
    backup = history.backup()
    for move, first, second in script:
        match move:
            case "publish":
                history.publish(first, second)
            case "read":
                await subscriber.read(first)
            case "read_all":
                await subscriber.read()
            case "cut":
                await subscriber.cut()
            case "change":
                await subscriber.change(first)
            case "trim":
                history.trim(first, second)
                subscriber.trimmed = True
            case "restart":
                history.forget_memory()
                await subscriber.cut()
            case "backup":
                backup = history.backup()
            case "restore":
                await subscriber.lose_history(backup)
    await subscriber.read()
    await subscriber.read()  # what waited for the first change to be done
    subscriber.check_complete()
    await subscriber.close()
