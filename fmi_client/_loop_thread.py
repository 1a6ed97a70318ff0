"""An event loop in a thread of its own, for programs without asyncio."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine
from concurrent import futures
from contextlib import suppress
from typing import Any, Final, TypeAlias, TypeVar

from fmi_client._fork import check_process
from fmi_client.errors import ClientClosedError

__all__ = ["JOIN_S", "LoopThread"]

JOIN_S: Final = 10.0
"""Seconds to wait for a thread that was told to end."""

_T = TypeVar("_T")
_Closing: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


class LoopThread:
    """An event loop in a thread of its own.

    The thread does not keep it alive: dropped without `close`, it ends with a `ResourceWarning`.

    Args:
        name: Whose loop it is, for the warning.
        aclose: Closes what lives on the loop. It must not refer to this object.
    """

    def __init__(self, name: str, aclose: _Closing) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._stopped = False
        self._aclose = aclose
        self.loop = asyncio.new_event_loop()
        # A daemon: a program that forgot to close its client must still be able to end.
        self._thread = threading.Thread(
            target=_serve, args=(self.loop,), name="fmi-client", daemon=True
        )
        self._thread.start()
        self._dropped = weakref.finalize(self, _end_dropped, name, self.loop, aclose, self._pid)
        self._dropped.atexit = False
        _open.add(self)

    def check_open(self) -> None:
        """Raise `ClientClosedError` unless work can be run, `ForkedError` in a child."""
        check_process(self._pid, "the client")
        if self._stopped:
            raise ClientClosedError("the client is closed; make a new one")
        if threading.current_thread() is self._thread:
            raise ClientClosedError("the client cannot be used from inside its own event loop")

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run `work` on the loop and wait for it; an interrupt of the wait cancels the work."""
        try:
            self.check_open()  # before the lock, which a fork may have copied locked
            with self._lock:
                self.check_open()
                future = asyncio.run_coroutine_threadsafe(work, self.loop)
        except ClientClosedError:
            work.close()
            raise
        try:
            return future.result()
        except futures.CancelledError:
            raise ClientClosedError("the client was closed under the call") from None
        except BaseException:
            future.cancel()  # of no effect where the work itself raised
            raise

    def close(self) -> None:
        """Close what lives on the loop, end it and wait for the thread. Twice does nothing."""
        try:
            with suppress(ClientClosedError):
                self.run(self._aclose())
        finally:
            self._stop()

    def _stop(self) -> None:
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        self._dropped.detach()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(JOIN_S)


_open: weakref.WeakSet[LoopThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # gRPC's threads must not outlive the interpreter.
    for thread in list(_open):
        with suppress(Exception):
            thread.close()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def _end_dropped(name: str, loop: asyncio.AbstractEventLoop, aclose: _Closing, pid: int) -> None:
    if os.getpid() != pid:  # a child of a fork has neither the thread nor the connection
        return

    async def end() -> None:
        try:
            await aclose()
        finally:
            loop.stop()

    # Not waited for: the collector may run this in any thread, the loop's own among them.
    asyncio.run_coroutine_threadsafe(end(), loop)
    warnings.warn(f"unclosed {name}", ResourceWarning, stacklevel=2)
