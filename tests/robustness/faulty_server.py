"""A server with a fault, started by a test to show that the test would notice.

    faulty_server.py FAULT serve ...

`compacts all the time` is no fault: it does in seconds what a server does in hours, so that kills find it
there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from fmi.plain import new_packet_id
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server import app, compaction, router
from fmi_server.config import ServerSettings
from fmi_server.every_feed import EveryFeed
from fmi_server.feed_requests import FeedRequest
from fmi_server.feeds import Feed
from fmi_server.latest_feed import LatestFeed
from fmi_server.storage import SqliteStore
from fmi_server.storage.records import AppendOutcome, PacketRecord
from fmi_server.update_log import UpdateLog, UpdateReader

WRITES_LATE_S = 0.2
EVERY_NTH = 3


class EarlyStore(SqliteStore):
    """Acknowledges packets as stored, and stores them a fifth of a second later."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._late: set[asyncio.Task[object]] = set()

    async def append(self, records: Sequence[PacketRecord]) -> list[AppendOutcome]:
        task = asyncio.create_task(self._write(records))
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        return [AppendOutcome("stored", 0, r.received_at_us, False, "") for r in records]

    async def _write(self, records: Sequence[PacketRecord]) -> None:
        await asyncio.sleep(WRITES_LATE_S)
        await super().append(records)

    async def close(self) -> None:
        await asyncio.gather(*self._late)
        await super().close()


class ForgetfulStore(SqliteStore):
    """Takes a repeat for a new packet."""

    async def append(self, records: Sequence[PacketRecord]) -> list[AppendOutcome]:
        outcomes = await super().append(records)
        again = [i for i, outcome in enumerate(outcomes) if outcome.status == "duplicate"]
        if again:
            renamed = [dataclasses.replace(records[i], packet_id=new_packet_id()) for i in again]
            for i, outcome in zip(again, await super().append(renamed), strict=True):
                outcomes[i] = outcome
        return outcomes


def stored_by(kind: Callable[[Path], SqliteStore]) -> Callable[[ServerSettings], SqliteStore]:
    """Make the store in the place of the one that the application makes."""

    def make(settings: ServerSettings) -> SqliteStore:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        return kind(settings.data_dir / app.STORE_FILE)

    return make


Change = Callable[[wire_pb2.SubscribeResponse, int, bool], list[wire_pb2.SubscribeResponse]]
"""What is sent in the place of an event, which is the n-th of its kind, to a subscriber of EVERY or not."""


def fed_by(change: Change) -> Callable[..., Feed]:
    """Make the feeds in the place of those that the router makes."""

    async def changed(events: AsyncIterator[bytes], *, every: bool) -> AsyncIterator[bytes]:
        counts: Counter[str] = Counter()
        async for data in events:
            event = wire_pb2.SubscribeResponse.FromString(data)
            kind = event.WhichOneof("event")
            counts[kind] += 1
            for sent in change(event, counts[kind], every):
                yield sent.SerializeToString()

    def make(
        request: FeedRequest, log: UpdateLog, reader: UpdateReader, *, page_updates: int
    ) -> Feed:
        base = EveryFeed if request.every else LatestFeed

        class Changed(base):
            def events(self, now_ns):
                return changed(super().events(now_ns), every=request.every)

        return Changed(request, log, reader, page_updates=page_updates)

    return make


def skip(
    event: wire_pb2.SubscribeResponse, number: int, _: bool
) -> list[wire_pb2.SubscribeResponse]:
    return [] if event.HasField("update") and number % EVERY_NTH == 0 else [event]


def repeat(
    event: wire_pb2.SubscribeResponse, number: int, _: bool
) -> list[wire_pb2.SubscribeResponse]:
    return [event, event] if event.HasField("update") and number % EVERY_NTH == 0 else [event]


def hide(
    event: wire_pb2.SubscribeResponse, number: int, every: bool
) -> list[wire_pb2.SubscribeResponse]:
    """Leave out updates of LATEST and tell of none."""
    return (
        []
        if event.HasField("lagged") or (not every and not skip(event, number, every))
        else [event]
    )


def alter(
    event: wire_pb2.SubscribeResponse, _number: int, _: bool
) -> list[wire_pb2.SubscribeResponse]:
    if event.update.HasField("prior_update"):
        event.update.prior_update.confidence += 1.0
    return [event]


FAULTS: dict[str, tuple[object, str, object]] = {
    "answers early": (app, "_store", stored_by(EarlyStore)),
    "counts repeats": (app, "_store", stored_by(ForgetfulStore)),
    "skips an update": (router, "open_feed", fed_by(skip)),
    "repeats an update": (router, "open_feed", fed_by(repeat)),
    "hides what was left out": (router, "open_feed", fed_by(hide)),
    "alters an update": (router, "open_feed", fed_by(alter)),
}


if __name__ == "__main__":
    from fmi_server.cli import main

    fault = sys.argv.pop(1)
    if fault == "compacts all the time":
        compaction.LOOK_S, compaction.LEAST_ARRIVALS = 0.2, 100
    else:
        setattr(*FAULTS[fault])
    sys.argv[0] = "fmi-server"
    main()
