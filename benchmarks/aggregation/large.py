"""A cohort of 100,000 sites x 200 signals: what it holds, and what it costs.

It runs as a process of its own, because the peak of a process says nothing about one of its parts:

    python -m benchmarks.aggregation.large
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.aggregation import workload
from benchmarks.aggregation.side_by_side import Row, Section
from benchmarks.memory import held_bytes
from fmi_server.aggregation import (
    CohortMatrix,
    EstimatorSettings,
    SiteContext,
    SiteGroups,
    WarmStartRequest,
    warm_start,
)

SIGNALS, SITES = 200, 100_000
CLASSES = 20
RULES = EstimatorSettings()


def large() -> Section:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.aggregation.large"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    reference = found["seconds"]["numpy.sort of the matrix"]
    rows = [Row(name, seconds, seconds / reference) for name, seconds in found["seconds"].items()]
    held, cells = found["array_bytes"], SIGNALS * SITES * 8
    mean, slowest = found["packet_s"] * 1e6, found["slowest_packet_s"] * 1e3
    notes = [
        f"first packet of a site: {mean:,.0f} us on average, {slowest:,.0f} ms when the arrays grow",
        f"arrays: {held / 1e6:,.0f} MB, {held / cells:.2f} x the {cells / 1e6:,.0f} MB of one matrix",
        "peak memory of the process: "
        + ", ".join(f"{peak / 1e6:,.0f} MB {when}" for when, peak in found["peak_bytes"].items()),
    ]
    return Section(f"A cohort of {SITES:,} sites x {SIGNALS} signals, 60 % filled", rows, notes)


def filled_cohort() -> tuple[CohortMatrix, list[float]]:
    """Let every site send one packet; return what each took, in seconds."""
    random, held, seconds = np.random.default_rng(workload.SEED), CohortMatrix(), []
    for site in workload.sites_of(SITES):
        chosen = np.flatnonzero(random.random(SIGNALS) < workload.FILLED).tolist()
        said = workload.packet(random.normal(1.0, 0.1, SIGNALS).tolist(), chosen)
        started = time.perf_counter()
        held.put(site, said, now=0.0)
        seconds.append(time.perf_counter() - started)
    return held, seconds


def measure() -> dict[str, Any]:
    """Fill the cohort and use it; times are of one run each, the reference's the least of three."""
    peaks = {"at the start": held_bytes("VmHWM")}
    held, packets = filled_cohort()
    peaks["when filled"] = held_bytes("VmHWM")
    sites, trust = held.sites, workload.reputations(SITES)
    groups = SiteGroups(SiteContext(site, f"class_{n % CLASSES}") for n, site in enumerate(sites))
    request = WarmStartRequest(profile_class="class_0")
    everyone = WarmStartRequest(profile_class="")
    seconds = {}
    steps: dict[str, Callable[[], object]] = {
        "release, all sites alike": lambda: held.release(RULES, None, 1.0),
        "release, every site its own weight": lambda: held.release(RULES, trust, 1.0),
        "release, nothing changed": lambda: held.release(RULES, trust, 1.0),
        "reputation: 100 sites judged": lambda: held.score_sites(sites[:100]),
        "reputation: all sites judged": lambda: held.score_sites(sites),
        "warm start of all": lambda: warm_start(held, groups, everyone, RULES, reputation=trust),
        "warm start of one class in 20": lambda: warm_start(
            held, groups, request, RULES, reputation=trust
        ),
    }
    for name, step in steps.items():
        started = time.perf_counter()
        step()
        seconds[name] = time.perf_counter() - started
    peaks["after all that"] = held_bytes("VmHWM")
    reference = {"numpy.sort of the matrix": _sort_seconds()}
    return {
        "packet_s": statistics.mean(packets),
        "slowest_packet_s": max(packets),
        "array_bytes": held.nbytes,
        "peak_bytes": peaks,
        "seconds": reference | seconds,
    }


def _sort_seconds() -> float:
    values = workload.matrix(SIGNALS, SITES)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        np.sort(values, axis=1)
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    print(json.dumps(measure()))
