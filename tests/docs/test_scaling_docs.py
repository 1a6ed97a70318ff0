"""What docs/scaling.md shows is what was measured, and what follows from it."""

from __future__ import annotations

import dataclasses
import re

import pytest
from documents import ROOT, console_commands

from benchmarks.scaling.__main__ import main
from benchmarks.scaling.page import PARTS, generated
from benchmarks.scaling.record import COMMITTED, Record

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
RECORD = Record.read(COMMITTED)


def test_the_tables_are_those_of_what_was_measured() -> None:
    assert generated(PAGE, RECORD) == PAGE, "run `python -m benchmarks.scaling page`"


@pytest.mark.parametrize("name", PARTS)
def test_a_figure_that_was_not_measured_is_found(name: str) -> None:
    begin = f"<!-- begin {name}: generated -->\n"
    before, _, rest = PAGE.partition(begin)
    part, _, after = rest.partition(f"<!-- end {name} -->")
    changed = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), part, count=1)
    assert changed != part
    document = f"{before}{begin}{changed}<!-- end {name} -->{after}"
    assert generated(document, RECORD) == PAGE


def test_a_page_without_a_place_for_a_table_is_told_of() -> None:
    with pytest.raises(ValueError, match="there must be a place for levels"):
        generated(PAGE.replace("<!-- begin levels: generated -->", ""), RECORD)


def test_all_costs_were_measured_and_cost_something() -> None:
    assert RECORD.costs is not None
    free = {name for name, cost in dataclasses.asdict(RECORD.costs).items() if cost <= 0.0}
    # What an update costs by its size is lost in what it costs at all, and so may be others of that kind.
    assert free <= {"told_byte_cpu_s", "release_site_cpu_s", "working_bytes"}


def test_what_is_said_of_lies_was_simulated() -> None:
    rows = RECORD.simulated["breakdowns"]
    most = max(row["sites"] for row in rows)
    by_share = {row["share"]: row["broken"] for row in rows if row["sites"] == most}
    assert most == 1_000_000
    assert not any(by_share[0.005].values())
    assert by_share[0.011] == {"flat": 0.0, "spread": 0.0, "whole regions": 0.0, "aimed": 1.0}
    assert (by_share[0.09]["flat"], by_share[0.09]["spread"]) == (0.0, 0.0)
    assert all(by_share[0.11].values())
    (at_five,) = [row for row in rows if (row["sites"], row["share"]) == (most, 0.05)]
    assert at_five["moved"]["aimed"] < 1 / 3


def test_what_is_said_of_sketches_was_simulated() -> None:
    found = RECORD.simulated["sketches"]
    lost = {row["kind"]: row["broken"]["9.0%"] for row in found["accuracy"]}
    assert lost.pop("t-digest, k = 200") > 0.5
    assert set(lost.values()) == {0.0}
    by_mean = min(found["accuracy"], key=lambda row: row["trimmed_mean_error"])
    by_median = max(found["accuracy"], key=lambda row: row["median_error"])
    assert by_mean["kind"] == by_median["kind"] == "t-digest, k = 200"
    trust = found["trust"]
    assert trust["drift_inserted"] > 100 * trust["drift_replaced"]
    assert (trust["eager_inserted"], trust["eager_replaced"]) == (1.0, 0.0)
    assert (trust["claimed"], trust["claimed_capped"], trust["aimed_merged"]) == (1.0, 0.0, 0.0)


def test_the_model_is_on_the_side_that_the_page_says() -> None:
    for point in RECORD.points["servers"]:
        for name in ("cores", "memory_bytes", "disk_bytes", "update_bytes", "updates_per_s"):
            ratio = point[name]["predicted"] / point[name]["measured"]
            assert 0.5 < ratio < 2.0, (point["sites"], name, ratio)


def test_the_commands_for_a_plan_are_taken(capsys) -> None:
    commands = [command.split("#")[0].split() for command, _ in console_commands(PAGE, "python")]
    assert [command[3] for command in commands] == ["plan", "unit-costs", "points", "plan"]
    for command in commands:
        if command[3] == "plan":
            main([part if part != "here.json" else str(COMMITTED) for part in command[3:]])
            assert "each region" in capsys.readouterr().out
