"""The audit log: what operators did and who was refused, one JSON object a line, only ever appended.

A line has a bounded length, and whatever a caller chose stands in it escaped: `json.dumps` writes control
characters and everything beyond ASCII as escapes, so no name can end a line or forge one. Refusals cost
whoever is refused nothing, so their lines are bounded in rate; how many were left out stands in the next
line. Calls of operators, and what others were let do, are never left out.

A line is written at once, without a queue: what an operator did should be there when the process is killed.
It costs about as much as a line of the server's own log, and is not synced to the disk one by one.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

__all__ = ["MAX_VALUE", "AuditLog"]

MAX_VALUE: Final = 256
"""Characters of one value; longer ones are cut."""

REFUSALS_PER_S: Final = 50.0
"""Refusals written per second for long."""

REFUSALS_AT_ONCE: Final = 500
"""Refusals written at once after a quiet time."""

LOOK_S: Final = 1.0
"""Seconds between two looks whether the file was moved away, to begin a new one."""

_log = logging.getLogger(__name__)


class AuditLog:
    """Appends to the audit log. It belongs to one thread.

    Args:
        path: The file; made with mode 0600 where there is none.
        clock: Unix time in seconds.
        monotonic: Seconds that never go back, for the rate.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._clock = clock
        self._monotonic = monotonic
        self._allowance = float(REFUSALS_AT_ONCE)
        self._counted_at = self._looked_at = monotonic()
        self._dropped = 0
        self._failing = False
        self._file = self._open()

    def close(self) -> None:
        """Write how many lines were left out, and close the file."""
        if self._dropped:
            self._write({})
        os.close(self._file)

    def operated(self, outcome: str, entry: Mapping[str, str]) -> None:
        """Note a call of the operator's service.

        Args:
            outcome: `OK`, or the reason of the refusal.
            entry: Who, from where, what: texts by name; empty ones are left out.
        """
        self._write({"outcome": outcome, **entry})

    def refused(self, outcome: str, entry: Mapping[str, str], *, count: int = 1) -> None:
        """Note a refusal, unless there were too many of late.

        Args:
            outcome: The reason.
            entry: Who, from where, what: texts by name; empty ones are left out.
            count: How many packets of a batch it is about.
        """
        now = self._monotonic()
        grown = self._allowance + (now - self._counted_at) * REFUSALS_PER_S
        self._allowance = min(grown, REFUSALS_AT_ONCE)
        self._counted_at = now
        if self._allowance < 1:
            self._dropped += 1
            return
        self._allowance -= 1
        self._write({"outcome": outcome, **entry}, count=count)

    def _write(self, entry: Mapping[str, str], *, count: int = 1) -> None:
        line: dict[str, str | int] = {
            "time": datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        }
        line |= {name: _cut(value) for name, value in entry.items() if value}
        if count > 1:
            line["count"] = count
        if self._dropped:
            line["left_out"] = self._dropped
        data = json.dumps(line).encode() + b"\n"
        try:
            self._follow()
            self._append(data)
        except OSError as error:
            self._dropped += 1
            if not self._failing:
                self._failing = True
                _log.critical("audit log %s cannot be written: %s", self._path, error)
            return
        self._dropped = 0
        if self._failing:
            self._failing = False
            _log.warning("audit log %s is written again", self._path)

    def _append(self, data: bytes) -> None:
        written = os.write(self._file, data)
        if written < len(data):  # the disk is full: what comes next must not join this line
            os.write(self._file, b"\n")
            raise OSError("a part of a line only")

    def _follow(self) -> None:
        """Begin a new file where the old one was moved away."""
        now = self._monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        try:
            there = self._path.stat()
            held = os.fstat(self._file)
            if (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino):
                return
        except FileNotFoundError:
            pass
        new = self._open()
        os.close(self._file)
        self._file = new

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _cut(value: str) -> str:
    return value if len(value) <= MAX_VALUE else f"{value[: MAX_VALUE - 3]}..."
