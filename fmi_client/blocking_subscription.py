"""BlockingSubscription: the updates of cohorts for programs without asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from fmi.v1 import interchange_service_pb2, update_pb2
from fmi_client._loop_thread import JOIN_S, LoopThread
from fmi_client.errors import ClientClosedError
from fmi_client.kinds import KindLike
from fmi_client.subscription import Subscription, SubscriptionStatistics

__all__ = ["BlockingSubscription"]

_T = TypeVar("_T")


class BlockingSubscription:
    """A blocking iterator of updates that survives broken connections; see `Subscription`.

    One update at a time is handed over: a slow consumer holds back the stream, and the server conflates
    what it is too slow for. It may be closed from another thread. Made by `FMIClient.subscribe`.
    """

    def __init__(
        self,
        thread: LoopThread,
        subscription: Subscription,
        on_update: Callable[[update_pb2.Update], None] | None,
    ) -> None:
        self._thread = thread
        self._subscription = subscription
        self._error: BaseException | None = None
        self._driver: threading.Thread | None = None
        if on_update is not None:
            self._driver = threading.Thread(
                target=self._drive, args=(on_update,), name="fmi-subscription", daemon=True
            )
            self._driver.start()

    @property
    def resume_token(self) -> str:
        """Give it to `subscribe` to go on behind the last event given; empty before the first."""
        return self._subscription.resume_token

    @property
    def changing(self) -> bool:
        """Whether a change of the filter is under way."""
        return self._subscription.changing

    def change(
        self, cohorts: str | Iterable[str], kinds: KindLike | Iterable[KindLike] = ()
    ) -> None:
        """Follow other cohorts or kinds from here on, without loss. See `Subscription.change`."""
        self._thread.run(self._subscription.change(cohorts, kinds))

    @property
    def statistics(self) -> SubscriptionStatistics:
        """What it has seen up to now."""
        return self._subscription.statistics

    @property
    def closed(self) -> bool:
        """Whether it was closed, or ended with an error."""
        return self._subscription.closed

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> update_pb2.Update:
        """Wait for the next update. Raises as `Subscription.__anext__`."""
        update = self.next()
        if update is None:
            raise StopIteration
        return update

    def next(self, timeout_s: float | None = None) -> update_pb2.Update | None:
        """Wait for the next update; None where the subscription was closed.

        Raises:
            TimeoutError: None came within `timeout_s` seconds; the subscription goes on.
            FMIError: As `Subscription.__anext__`.
        """
        return self._wait(_next_update(self._subscription, timeout_s))

    def events(self) -> Iterator[interchange_service_pb2.SubscribeResponse]:
        """Iterate over all events: updates, `snapshot_end`, `progress` and `lagged`."""
        events = self._subscription.events()
        while (event := self._wait(_next_event(events))) is not None:
            yield event

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the callback form ends, and raise what ended it.

        Raises:
            TimeoutError: It has not ended within `timeout_s` seconds; it goes on.
        """
        if self._driver is not None:
            self._driver.join(timeout_s)
            if self._driver.is_alive():
                raise TimeoutError(f"the subscription has not ended within {timeout_s} s")
        self._raise_error()

    def close(self) -> None:
        """End the subscription. Raises what its callback raised. Closing twice does nothing."""
        with suppress(ClientClosedError):
            self._thread.run(self._subscription.aclose())
        if self._driver is not None and self._driver is not threading.current_thread():
            self._driver.join(JOIN_S)
        self._raise_error()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T | None:
        if self._subscription.closed:
            work.close()
            return None
        return self._thread.run(work)

    def _drive(self, on_update: Callable[[update_pb2.Update], None]) -> None:
        try:
            for update in self:
                on_update(update)
        except BaseException as error:
            self._error = error
            with suppress(ClientClosedError):
                self._thread.run(self._subscription.aclose())

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


async def _next_update(
    subscription: Subscription, timeout_s: float | None
) -> update_pb2.Update | None:
    async with asyncio.timeout(timeout_s):
        return await anext(subscription, None)


async def _next_event(
    events: AsyncIterator[interchange_service_pb2.SubscribeResponse],
) -> interchange_service_pb2.SubscribeResponse | None:
    return await anext(events, None)
