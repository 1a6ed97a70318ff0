"""Files that are read again when they change, and of which a bad version changes nothing."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

__all__ = ["WatchedFiles"]

AGAIN_S: Final = 1.0
"""Seconds after which a version that was not taken is tried again."""

T = TypeVar("T")

_log = logging.getLogger(__name__)

_Signature = tuple[tuple[int, int, int] | None, ...]


class WatchedFiles(Generic[T]):
    """What was read from files, kept up to date.

    A version that cannot be read, or that is not in order, is told of in the log, once for each reason, and
    what was read before stays in force. Files that belong together are replaced one after the other; until
    they agree they are such a version. It is tried again although the files stay as they are: there may have
    been no descriptor to open them with, or a certificate's time had not come. A revocation must not be
    missed for that.

    Args:
        paths: The files.
        read: Reads all of them.
        what: What they are, for the log.
        monotonic: Seconds that never go back.

    Raises:
        Exception: What `read` raises at the first reading, when there is nothing else to go by.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], T],
        *,
        what: str,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._what = what
        self._monotonic = monotonic
        self._again_at = math.inf
        self._told = ""
        # Before it is read: a change meanwhile is found at the next look.
        self._seen = self._signature()
        self.value: T = read()

    def refresh(self) -> bool:
        """Read again what changed since the last look; return whether there is something new."""
        signature = self._signature()
        if signature == self._seen and self._monotonic() < self._again_at:
            return False
        if signature != self._seen:
            self._told = ""
        self._seen = signature
        try:
            value = self._read()
        except Exception as error:
            # New connections look too, so that many of them must not read it as often.
            self._again_at = self._monotonic() + AGAIN_S
            if str(error) != self._told:
                self._told = str(error)
                _log.error(
                    "%s: the new version is not taken, the old one stays: %s", self._what, error
                )
            return False
        self._again_at = math.inf
        self.value = value
        _log.info("%s: a new version is in force", self._what)
        return True

    def _signature(self) -> _Signature:
        return tuple(_version(path) for path in self._paths)


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
