"""Work that takes long, beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["in_thread"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def in_thread(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Work in a thread. A caller that is cancelled waits for it all the same: it holds the lock for it."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    cancelled: asyncio.CancelledError | None = None
    try:
        while not working.done():
            try:
                await asyncio.wait([working])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is None:
            return working.result()
        working.exception()  # nobody is told of it; unread it would be logged
        raise cancelled
    finally:
        del cancelled
        # Its error has this frame: what was worked on would stay until garbage is collected.
        del working
