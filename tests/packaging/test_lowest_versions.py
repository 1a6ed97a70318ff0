"""The lowest versions that are tested are those that pyproject.toml declares."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMED = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?(?:[^,]*?>=([0-9.]+))?")


def floors(requirements: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the lowest version of each requirement that has one; of several the highest holds."""
    found: dict[str, tuple[int, ...]] = {}
    for requirement in requirements:
        named = NAMED.match(requirement)
        assert named is not None, requirement
        if named[2]:
            found[named[1]] = max(found.get(named[1], ()), version(named[2]))
    return found


def version(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split("."))
    return numbers + (0,) * (3 - len(numbers))


def pins_of(name: str) -> dict[str, tuple[int, ...]]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {package: version(pinned) for package, pinned in pins}


@pytest.mark.parametrize(
    ("file", "extras"), [("lowest-client.txt", ()), ("lowest.txt", ("server", "nats"))]
)
def test_the_lowest_versions_that_are_tested_are_those_declared(file, extras):
    declared = [*PROJECT["dependencies"]]
    for extra in extras:
        declared += PROJECT["optional-dependencies"][extra]
    pinned = pins_of(file)
    for package, lowest in floors(declared).items():
        assert pinned[package] == lowest, f"{file}: {package}"


def test_a_server_needs_a_grpcio_that_reads_within_bounds_and_a_site_does_not():
    """Only the server is flooded; generated code sets what a site needs."""
    site = floors(PROJECT["dependencies"])
    server = floors(PROJECT["optional-dependencies"]["server"])
    assert site["grpcio"] < server["grpcio"] == (1, 84, 0)
