"""What a federation of many sites takes: unit costs, measured; plans, computed of them; levels, simulated.

* unit-costs: what a packet, a site, a release and a subscriber cost, measured at real servers.
* points: what the model says of three servers and of three levels, beside what they do.
* plan: one server, several that share a store, and a hierarchy, for as many sites as you say.
* simulate: what levels and quantile sketches do to a trimmed mean, with and without lying sites. It needs
  the `datasketches` package.
* page: write the tables and the chart of docs/scaling.md from what was measured.
* all: everything but a plan, and the page.

    make bench-scaling          or: python -m benchmarks.scaling plan --sites 250000 --signals 40
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.scaling.effort import FULL, TINY, Effort
from benchmarks.scaling.model import Limits
from benchmarks.scaling.page import generated
from benchmarks.scaling.plan import Demand, plan, text_of
from benchmarks.scaling.points import measure_points
from benchmarks.scaling.record import COMMITTED, Record, machine
from benchmarks.scaling.unit_costs import measure

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "scaling.md"
CHART: Final = ROOT / "docs" / "images" / "scaling.png"


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)


def measure_costs(record: Record, effort: Effort) -> None:
    """Measure what one of each thing costs."""
    busy = os.getloadavg()[0]
    record.costs = asyncio.run(measure(effort, say))
    record.machine = f"{machine()}, where the load was {busy:.1f} before"
    for name, value in dataclasses.asdict(record.costs).items():
        print(f"{name:30} {value:.4g}")


def check_points(record: Record, effort: Effort) -> None:
    """Hold the model against real servers."""
    if record.costs is None:
        raise SystemExit("measure the unit costs first")
    found = asyncio.run(measure_points(effort, record.costs, say))
    record.points = dataclasses.asdict(found)
    for point in found.servers:
        print(f"{point.sites:,} sites, {point.packets_per_s:g} packets/s")
        for name in ("cores", "memory_bytes", "disk_bytes", "update_bytes", "updates_per_s"):
            checked = getattr(point, name)
            print(
                f"  {name:15} {checked.predicted:14.4g} {checked.measured:14.4g} {checked.ratio:6.2f}"
            )
    for name, checked in dataclasses.asdict(found.way_up).items():
        print(f"  {name:15} {checked['predicted']:14.4g} {checked['measured']:14.4g}")


def simulate(record: Record, effort: Effort) -> None:
    """Simulate levels and sketches."""
    from benchmarks.scaling.levels import breakdowns, precisions  # noqa: PLC0415 - it takes a while
    from benchmarks.scaling.sketches import measure_sketches  # noqa: PLC0415 - not for all

    record.simulated = {
        "precisions": [dataclasses.asdict(row) for row in precisions(effort)],
        "breakdowns": [dataclasses.asdict(row) for row in breakdowns(effort, say)],
        "sketches": dataclasses.asdict(measure_sketches(effort, say)),
    }
    for row in record.simulated["precisions"]:
        print(f"{row}")
    for row in record.simulated["breakdowns"]:
        print(f"{row}")
    for row in record.simulated["sketches"]["accuracy"]:
        print(f"{row}")
    print(record.simulated["sketches"]["trust"])


def write_page(record: Record, page: Path, chart: Path) -> None:
    """Write the tables and the chart."""
    from benchmarks.scaling.chart import draw  # noqa: PLC0415 - matplotlib is not for all

    if record.costs is None:
        raise SystemExit("measure the unit costs first")
    page.write_text(generated(page.read_text(encoding="utf-8"), record), encoding="utf-8")
    draw(record.costs, record.simulated, chart)
    print(f"wrote {page} and {chart}")


def tell_plan(record: Record, options: argparse.Namespace) -> None:
    """Print a plan."""
    if record.costs is None:
        raise SystemExit("measure the unit costs first")
    fields = {field.name for field in dataclasses.fields(Demand)}
    demand = Demand(**{name: value for name, value in vars(options).items() if name in fields})
    limits = Limits(cores=options.cores, memory_bytes=options.memory_gb * 1e9)
    print(f"{demand}\nby unit costs measured on {record.machine}")
    print(text_of(plan(demand, record.costs, limits)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    what = ("unit-costs", "points", "simulate", "page", "plan", "all")
    parser.add_argument("what", choices=what, metavar="WHAT", help=", ".join(what))
    parser.add_argument("--results", type=Path, help="the file of what was measured")
    parser.add_argument("--page", type=Path, default=PAGE, help="the document")
    parser.add_argument("--chart", type=Path, default=CHART, help="its chart")
    parser.add_argument("--tiny", action="store_true", help="just enough to see that it runs")
    asked = parser.add_argument_group("plan")
    asked.add_argument("--sites", type=int, default=1_000_000)
    asked.add_argument("--packets-per-site-day", type=float, default=24.0)
    asked.add_argument("--signals", type=int, default=25, help="of each packet")
    asked.add_argument("--cohorts", type=int, default=20)
    asked.add_argument("--subscribers", type=int, help="as many as sites, unless said otherwise")
    asked.add_argument("--min-interval-s", type=float, default=60.0, help="between two releases")
    asked.add_argument("--batched", action="store_true", help="packets come in envelopes")
    asked.add_argument("--leaf-sites", type=int, default=10_000, help="most sites of a region")
    asked.add_argument("--fan-out", type=int, default=100, help="most children of a parent")
    asked.add_argument("--cores", type=float, default=0.5, help="that a server may use")
    asked.add_argument("--memory-gb", type=float, default=8.0, help="that a server has")
    options = parser.parse_args(arguments)
    effort = TINY if options.tiny else FULL
    # Only a whole run replaces what the document tells of.
    measuring = options.what in ("unit-costs", "points", "simulate")
    path = options.results or (Path("build/scaling.json") if measuring else COMMITTED)
    record, begun = Record.read(path), time.monotonic()
    if options.what == "plan":
        tell_plan(record, options)
        return
    steps = {"unit-costs": measure_costs, "points": check_points, "simulate": simulate}
    for name, step in steps.items():
        if options.what in (name, "all"):
            step(record, effort)
            record.write(path)
    if options.what in ("page", "all"):
        write_page(Record.read(path), options.page, options.chart)
    say(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
