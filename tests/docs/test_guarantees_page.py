"""docs/guarantees.md names every guarantee, and tests that exist."""

from __future__ import annotations

import re

import pytest
from documents import ROOT

PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
NAMES = (
    "DURABLE",
    "ONCE",
    "ONE SITE, ONE VOTE",
    "ROBUST",
    "PRIVATE",
    "ORDERED",
    "RESUMABLE",
    "BOUNDED",
    "IDENTIFIED",
    "EXPLAINED",
)
NOT_MADE: set[str] = set()
SECTIONS = dict(
    re.findall(r"^## ([A-Z, ]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
)


def test_each_guarantee_has_a_section_and_a_row() -> None:
    assert tuple(SECTIONS) == NAMES
    rows = re.findall(r"^\| \[([A-Z, ]+)\]\(#([a-z-]+)\) \| .* \| (yes|no) \|$", PAGE, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(NAMES)
    for name, anchor, made in rows:
        assert anchor == name.lower().replace(", ", "-").replace(" ", "-")
        assert (made == "no") == (name in NOT_MADE) == ("**Not made yet.**" in SECTIONS[name])


@pytest.mark.parametrize("name", NAMES)
def test_its_limits_and_its_tests_are_named(name: str) -> None:
    section = SECTIONS[name]
    assert ("**Limits.**" in section) != (name in NOT_MADE)
    _, held, tests = section.partition("**Held by** ")
    assert held
    assert re.search(r"`tests/[a-z_]+/test_[a-z_]+\.py`", tests)


def test_the_files_named_are_there() -> None:
    for path in re.findall(r"`(tests/[^`]+\.py)", PAGE):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"`(test_[a-z_]+\.py)`", PAGE):
        assert list(ROOT.glob(f"tests/*/{name}")), name


def test_the_map_names_the_same() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    mapped = set(re.findall(r"^\| ([A-Z, ]+) \|", page, flags=re.MULTILINE))
    assert mapped == set(NAMES) - NOT_MADE
