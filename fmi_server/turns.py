"""Turns: one works at a time, and of many who wait each caller has one in turn.

Who has a hundred pieces of work waiting waits for them; another caller's first one comes after one of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

__all__ = ["Turns"]


class Turns:
    """Lets one work at a time. Belongs to one event loop.

    The callers that wait have turns one after the other, round and round; of one caller whoever came first.
    """

    def __init__(self) -> None:
        self._taken = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @contextlib.asynccontextmanager
    async def taken(self, caller: str) -> AsyncIterator[None]:
        """Hold the turn for as long as the context lasts.

        Args:
            caller: Who works; all that have the same name share one place in the round.
        """
        if self._taken:
            await self._wait(caller)
        self._taken = True
        try:
            yield
        finally:
            self._hand_on()

    async def _wait(self, caller: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._hand_on()  # it was given the turn and cancelled at the same time
            raise

    def _hand_on(self) -> None:
        while self._waiting:
            caller = next(iter(self._waiting))
            line = self._waiting.pop(caller)
            turn = line.popleft()
            while line and turn.done():  # it was cancelled
                turn = line.popleft()
            if line:
                self._waiting[caller] = line  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False
