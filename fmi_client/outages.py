"""Outages of a subscription's connection: told once when one begins and once when it is over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final, TypeAlias

from fmi_client.errors import FMIError

__all__ = ["ConnectionState", "OnState", "OutageMonitor", "last_cause"]

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
    """

    def __init__(self, target: str, on_state: OnState | None) -> None:
        self._target = target
        self._on_state = on_state
        self._established = False
        self._down_since: float | None = None

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
        established, self._established = self._established, True
        if self._down_since is None:
            return
        down_s = monotonic() - self._down_since
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


def last_cause(message: str, target: str) -> str:
    """Return what gRPC says last when it tells of every address and layer that failed."""
    message = message.removeprefix(f"{target}: ")
    return message.rpartition(": ")[2] if message.startswith("failed to connect") else message
