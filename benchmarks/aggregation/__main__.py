"""The aggregation core beside numpy, scipy, Flower and ByzFL, in one run.

Rounds alternate, so that a machine whose speed drifts does not favour one side; ratios are taken round by
round to the first row of a section, and their median is printed.

    make bench-aggregation      or: python -m benchmarks.aggregation --rounds 31 --json build/aggregation.json
    make bench-peers            the same beside Flower, in an environment of its own

ByzFL needs torch; `.venv-bench-peers/bin/pip install byzfl` adds it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.aggregation import sections
from benchmarks.aggregation.large import large
from benchmarks.aggregation.side_by_side import Section, text_of
from benchmarks.aggregation.whole import whole

SECTIONS: dict[str, Callable[[int], Section]] = {
    "release": sections.release,
    "estimators": sections.estimators,
    "peers": sections.others,
    "packets": sections.packets,
    "dirty": sections.dirty,
    "whole": whole,
    "large": lambda _rounds: large(),
}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aggregation",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    unknown = set(options.sections) - SECTIONS.keys()
    if unknown:
        parser.error(f"unknown section {min(unknown)!r}; there are {', '.join(SECTIONS)}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"numpy {np.__version__}"
    )
    print(f"{machine}\n{options.rounds} rounds after two to warm up; medians\n")
    found = {}
    for name in options.sections or SECTIONS:
        found[name] = SECTIONS[name](options.rounds)
        print(text_of(found[name]), end="\n\n", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        numbers = {name: dataclasses.asdict(section) for name, section in found.items()}
        report = {"machine": machine, "rounds": options.rounds, "sections": numbers}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
