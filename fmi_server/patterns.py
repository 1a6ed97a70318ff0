"""Patterns of cohort names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = ["matches"]

_ANY: Final = "**"


def matches(pattern: str, name: str) -> bool:
    """Say whether a cohort's name matches a pattern.

    `*` stands for any characters but `/`, `**` for any characters, `?` for one character but `/`. The
    cost is at most the product of the lengths, whatever the pattern: it is matched by stepping through
    the set of places that can be reached, never by trying and going back.

    Args:
        pattern: The pattern.
        name: The cohort's name.
    """
    if pattern == _ANY:
        return True
    if "*" not in pattern and "?" not in pattern:
        return pattern == name
    tokens: list[str] = []
    index = 0
    while index < len(pattern):
        if pattern.startswith(_ANY, index):
            tokens.append(_ANY)
            index += 2
        else:
            tokens.append(pattern[index])
            index += 1
    reached = _skip_stars(tokens, {0})
    for character in name:
        following: set[int] = set()
        for place in reached:
            if place == len(tokens):
                continue
            token = tokens[place]
            if token == _ANY or (token == "*" and character != "/"):
                following.add(place)
            elif token == character or (token == "?" and character != "/"):
                following.add(place + 1)
        reached = _skip_stars(tokens, following)
        if not reached:
            return False
    return len(tokens) in reached


def _skip_stars(tokens: Sequence[str], places: set[int]) -> set[int]:
    """Add the places that are reached because a star may stand for nothing."""
    result = set(places)
    for place in places:
        following = place
        while following < len(tokens) and tokens[following] in ("*", _ANY):
            following += 1
            if following in result:
                break  # from there on another place has gone or will go
            result.add(following)
    return result
