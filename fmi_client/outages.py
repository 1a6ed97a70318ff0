"""Outages of a subscription's connection: told once when one begins and once when it is over."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final, TypeAlias

from fmi_client._causes import last_cause
from fmi_client.errors import ConfigurationError, FMIError

__all__ = ["SETTLED_S", "ConnectionState", "OnState", "OutageMonitor"]

SETTLED_S: Final = 3.0
"""Seconds that a stream must live from its first event until an outage is over.

A server that ends each stream at once, such as one that crashes when it is asked, is one outage.
"""

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionState:
    """What became of a connection: it was lost and is tried again, or it is there after an outage.

    Its text is a line for people.

    Attributes:
        target: Where the server is.
        connected: Whether it is there.
        established: Whether it had been there before the outage.
        error: Why it was lost; None where it is there.
        down_s: Seconds that the outage took; 0 where it begins.
    """

    target: str
    connected: bool
    established: bool
    error: FMIError | None = None
    down_s: float = 0.0

    def __str__(self) -> str:
        if self.connected:
            return f"connected{' again' if self.established else ''} after {self.down_s:.1f} s"
        reason = last_cause(self.error.message, self.target) if self.error else "unknown"
        if self.established:
            return f"connection to {self.target} lost ({reason}), trying again"
        return f"no connection to {self.target} ({reason}), trying again"


OnState: TypeAlias = Callable[[ConnectionState], None]


class OutageMonitor:
    """Tells the log, and a callback, when an outage begins and when it is over.

    Args:
        target: Where the server is.
        on_state: Called once at each; what it raises goes to the log.
        on_settled: Called when a stream has lived for `SETTLED_S`.

    Raises:
        ConfigurationError: `on_state` is a coroutine function, which nothing would run.
    """

    def __init__(
        self, target: str, on_state: OnState | None, on_settled: Callable[[], None]
    ) -> None:
        if inspect.iscoroutinefunction(on_state) or inspect.iscoroutinefunction(
            getattr(on_state, "__call__", None)  # noqa: B004 - of an object, its method
        ):
            raise ConfigurationError(
                "on_state must be a plain function, not a coroutine function; let it put the state into "
                "a queue, or start a task"
            )
        self._target = target
        self._on_state = on_state
        self._on_settled = on_settled
        self._established = False
        self._down_since: float | None = None
        self._settling: asyncio.TimerHandle | None = None

    def failed(self, error: FMIError) -> None:
        """Note a failure after which it is tried again."""
        if self._down_since is not None:
            return
        self._down_since = monotonic()
        state = ConnectionState(self._target, False, self._established, error)
        _log.warning("%s", state)
        self._tell(state)

    def arrived(self) -> None:
        """Note that something came from the server."""
        if self._settling is None:
            established, self._established = self._established, True
            self._settling = asyncio.get_running_loop().call_later(
                SETTLED_S, self._settled, monotonic(), established
            )

    def dropped(self) -> None:
        """Note that the stream is gone, for whatever reason."""
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None

    def _settled(self, up_since: float, established: bool) -> None:
        self._on_settled()
        if self._down_since is None:
            return
        down_s = up_since - self._down_since
        self._down_since = None
        state = ConnectionState(self._target, True, established, down_s=down_s)
        _log.info("%s: %s", self._target, state)
        self._tell(state)

    def _tell(self, state: ConnectionState) -> None:
        if self._on_state is None:
            return
        try:
            self._on_state(state)
        except Exception:
            _log.exception("on_state failed")
