"""Patterns of cohort names."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

__all__ = ["PatternSet", "matches"]

_WILD: Final = frozenset("*?")

_ANSWERS: Final = 2**16
"""Answers kept of patterns that are slow to match, over all subscribers."""


class PatternSet:
    """Several patterns, of which one must match. Made once for a subscriber.

    `*` stands for any characters but `/`, `**` for any characters, `?` for one character but `/`.

    Args:
        patterns: The patterns.
    """

    __slots__ = ("_all", "_globs", "_literals", "_prefixes")

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._all = "**" in patterns
        self._literals = frozenset(p for p in patterns if _WILD.isdisjoint(p))
        prefixes = []
        globs = []
        for pattern in dict.fromkeys(patterns):
            if _WILD.isdisjoint(pattern):
                continue
            body = pattern.rstrip("*")
            if _WILD.isdisjoint(body):
                prefixes.append((body, len(pattern) - len(body) > 1))
            else:
                globs.append(pattern)
        self._prefixes = tuple(prefixes)
        self._globs = tuple(globs)

    def match(self, name: str) -> bool:
        """Say whether a cohort's name matches one of the patterns."""
        if self._all or name in self._literals:
            return True
        for prefix, deep in self._prefixes:
            if name.startswith(prefix) and (deep or "/" not in name[len(prefix) :]):
                return True
        return any(_glob_matches(pattern, name) for pattern in self._globs)


def matches(pattern: str, name: str) -> bool:
    """Say whether a cohort's name matches a pattern; see `PatternSet`."""
    return PatternSet((pattern,)).match(name)


class _Glob:
    """A pattern made ready for matching.

    All places of the pattern that can be reached are bits of one number, which each character of the
    name moves on (the Shift-And method of Baeza-Yates and Gonnet, 1992). So the cost is that of a few
    operations a character, whatever the pattern; nothing is tried and taken back.
    """

    __slots__ = ("_any", "_end", "_one", "_segment", "_steps")

    def __init__(self, pattern: str) -> None:
        steps: dict[str, int] = {}
        one = segment = any_ = place = index = 0
        while index < len(pattern):
            character = pattern[index]
            index += 1
            bit = 1 << place
            if character == "*":
                segment |= bit
                if pattern.startswith("*", index):
                    any_ |= bit
                    index += 1
            elif character == "?":
                one |= bit
                place += 1
            else:
                steps[character] = steps.get(character, 0) | bit
                place += 1
        self._steps = steps
        self._one = one
        self._segment = segment
        self._any = any_
        self._end = 1 << place

    def match(self, name: str) -> bool:
        steps, one, stay, deep = self._steps, self._one, self._segment | self._any, self._any
        reached = 1
        for character in name:
            step = steps.get(character, 0)
            if character == "/":
                reached = (reached & step) << 1 | reached & deep
            else:
                reached = (reached & (step | one)) << 1 | reached & stay
            if not reached:
                return False
        return bool(reached & self._end)


@lru_cache(maxsize=4096)
def _glob(pattern: str) -> _Glob:
    return _Glob(pattern)


@lru_cache(maxsize=_ANSWERS)
def _glob_matches(pattern: str, name: str) -> bool:
    return _glob(pattern).match(name)
