"""Numbers of things, in words."""

from __future__ import annotations

__all__ = ["counted"]


def counted(count: int, thing: str) -> str:
    """Write how many there are of a thing whose plural ends in s: `1 site`, `2 sites`."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
