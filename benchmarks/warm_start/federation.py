"""Cohorts on a real server: sites emit over gRPC, the cohort releases, the newcomer asks where to begin.

Each case (a data set left out, a repetition, an attack, an estimator) is a cohort of its own, so that all of
them share one server. A site is one client and sends its packets of all cohorts over one stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from benchmarks.warm_start.sites import Report
from benchmarks.warm_start.tables import Settings, Space
from fmi_client import AsyncFMIClient

LIARS: Final = 2

_AT_ONCE: Final = 16
_START_S: Final = 60.0
_STOP_S: Final = 20.0
_ON_DEMAND: Final = 86_400.0  # seconds; releases are asked for, so that a run can be repeated
_READY: Final = "listening on "

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Case:
    """One cohort.

    Attributes:
        name: Of the cohort.
        estimator: Its `metrics_aggregation`.
        reports: What each site sends, by `domain_id`, in order.
    """

    name: str
    estimator: str
    reports: Mapping[str, Sequence[Report]]


async def warm_starts(space: Space, cases: Sequence[Case], folder: Path) -> dict[str, Settings]:
    """Play all cases and return the warm start that each cohort gave.

    Packets go in rounds, each followed by a release: the first packet of every site, then the second
    of those that have one, and so on, so that a record of trust can be built and abused.

    Args:
        space: The grid; the cohorts' bounds and scales are its own.
        cases: The cohorts.
        folder: Where the server keeps its data and its log.

    Raises:
        FMIError: The server refused something.
        RuntimeError: It did not start, or a warm start is not made of all sites.
    """
    async with (
        _server(folder) as target,
        AsyncFMIClient(target, domain_id="newcomer", timeout_s=60.0) as newcomer,
    ):

        async def declare(case: Case) -> None:
            await newcomer.admin.put_cohort_spec(cohort_spec(space, case.name, case.estimator))
            # From a first release on, though of nothing, the server waits for `min_interval`.
            await newcomer.admin.release_now(case.name)

        async def ask(case: Case) -> Settings:
            given = (await newcomer.get_warm_start(case.name)).profile
            counted = {origin.sites for origin in given.origins.values()}
            if counted != {len(case.reports)}:
                raise RuntimeError(
                    f"cohort {case.name}: the warm start is made of {sorted(counted) or 'no'} sites, "
                    f"not of {len(case.reports)}"
                )
            return dict(given.init)

        await _for_each(declare, cases)
        for number in range(max(len(r) for case in cases for r in case.reports.values())):
            sending = [c for c in cases if any(len(r) > number for r in c.reports.values())]
            await _emit_round(target, sending, number)
            await _for_each(newcomer.admin.release_now, [case.name for case in sending])
        given = await _for_each(ask, cases)
    return {case.name: init for case, init in zip(cases, given, strict=True)}


def cohort_spec(space: Space, name: str, estimator: str) -> dict[str, Any]:
    """Return a cohort's spec: the grid's parameters as controller signals, with bounds and scales."""
    controls = [
        {
            "name": parameter.name,
            "section": "controller",
            "lower": parameter.levels[0],
            "upper": parameter.levels[-1],
            "transform": "log" if parameter.log else "linear",
        }
        for parameter in space.parameters
    ]
    error = {"name": "error", "section": "metrics", "lower": 0.0, "upper": 1.0}
    return {
        "name": name,
        "signals": [*controls, {**error, "direction": "lower_is_better"}],
        "aggregation": {"metrics_aggregation": estimator, "max_byzantine": LIARS},
        "release": {"min_interval": _ON_DEMAND, "max_interval": _ON_DEMAND},
    }


async def _emit_round(target: str, cases: Sequence[Case], number: int) -> None:
    for site in sorted({site for case in cases for site in case.reports}):
        packets = [
            {"cohort": case.name, **case.reports[site][number].body()}
            for case in cases
            if len(case.reports.get(site, ())) > number
        ]
        async with AsyncFMIClient(target, domain_id=site, timeout_s=60.0) as client:
            for receipt in await client.emit_many(packets):
                receipt.raise_for_refused()


async def _for_each(work: Callable[[Any], Awaitable[_T]], items: Iterable[Any]) -> list[_T]:
    """Do something with each item, some at once; return the results in order."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(item: Any) -> _T:
        async with room:
            return await work(item)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(item)) for item in items]
    return [task.result() for task in tasks]


@contextlib.asynccontextmanager
async def _server(folder: Path) -> AsyncIterator[str]:
    """Run `fmi-server serve` as a process; yield where it listens."""
    log = folder / "server.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fmi_server", "serve"),
            *("--listen", "127.0.0.1:0", "--log-level", "warning"),
            *("--data-dir", str(folder / "data")),
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_START_S):
            line = (await process.stdout.readline()).decode()
        if not line.startswith(_READY):
            raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
        yield line.removeprefix(_READY).split()[0]
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(_STOP_S):
            await process.wait()
