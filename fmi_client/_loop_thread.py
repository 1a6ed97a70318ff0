"""An event loop in a thread of its own, for programs without asyncio."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent import futures
from typing import Any, Final, TypeVar

from fmi_client.errors import ClientClosedError

__all__ = ["JOIN_S", "LoopThread"]

JOIN_S: Final = 10.0
"""Seconds to wait for a thread that was told to end."""

_T = TypeVar("_T")


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._stopped = False
        self.loop = asyncio.new_event_loop()
        # A daemon: a program that forgot to close its client must still be able to end.
        self._thread = threading.Thread(target=self._serve, name="fmi-client", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()

    def check_open(self) -> None:
        """Raise `ClientClosedError` unless work can be run."""
        if os.getpid() != self._pid:
            raise ClientClosedError(
                "the client was made in another process: neither its thread nor gRPC survives a "
                "fork; make a new client in the child"
            )
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

    def stop(self) -> None:
        """End the loop and wait for the thread. Stopping twice does nothing."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(JOIN_S)
