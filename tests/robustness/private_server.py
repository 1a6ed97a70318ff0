"""A server that kills itself at a place in a private release, and leaves word of every draw.

    private_server.py PLACE WITNESS [--fault] serve ...

A byte is added to the file WITNESS, which outlives the process, before each draw of noise. With `--fault` the
ledger is written half a second late, which a test must notice.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from fmi_server.privacy.noisy_means import PrivateSums
from fmi_server.publication import Publisher
from fmi_server.storage import SqliteStore, Store
from fmi_server.storage.jetstream import JetStreamStore
from fmi_server.storage.records import SpendRecord

LATE_S = 0.5


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_word(witness: str) -> None:
    noisy = PrivateSums.noisy

    def witnessed(self: PrivateSums, *args: Any) -> object:
        descriptor = os.open(witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b".")
        os.close(descriptor)
        return noisy(self, *args)

    PrivateSums.noisy = witnessed  # type: ignore[method-assign, assignment]


def die_around(owner: type, name: str, *, before: bool) -> None:
    work = getattr(owner, name)

    async def deadly(self: object, argument: Any, *more: Any, **named: Any) -> object:
        if isinstance(argument, SpendRecord) and not argument.rho:
            return await work(self, argument, *more, **named)  # the opening entry pays for nothing
        if before:
            die()
        result = await work(self, argument, *more, **named)
        die()
        return result

    setattr(owner, name, deadly)


def spend_late(store: type[Store]) -> None:
    spend = store.spend
    late = set()

    async def pretended(self: Store, entry: SpendRecord) -> None:
        async def write() -> None:
            await asyncio.sleep(LATE_S)
            await spend(self, entry)

        late.add(asyncio.create_task(write()))

    store.spend = pretended  # type: ignore[method-assign]


def places(store: type[Store]) -> dict[str, tuple[type, str, bool]]:
    """Return where a server can die: in which method, and whether before it."""
    return {
        "before the spend": (store, "spend", True),
        "after the spend": (store, "spend", False),
        "before the publication": (Publisher, "publish", True),
        "after the publication": (Publisher, "publish", False),
    }


if __name__ == "__main__":
    from fmi_server.cli import main

    place, witness = sys.argv.pop(1), sys.argv.pop(1)
    leave_word(witness)
    of_brokers = any(argument.startswith("nats://") for argument in sys.argv)
    store: type[Store] = JetStreamStore if of_brokers else SqliteStore
    if sys.argv[1] == "--fault":
        sys.argv.pop(1)
        spend_late(store)
    if place != "anywhere":
        owner, name, before = places(store)[place]
        die_around(owner, name, before=before)
    sys.argv[0] = "fmi-server"
    main()
