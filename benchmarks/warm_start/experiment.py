"""The experiment: leave each data set out in turn, and let it search cold and warm.

What is random depends on the repetition, the data set and the role alone: in a repetition all arms of a data
set have the same draws, and all cohorts the same honest reports.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.warm_start.attacks import ATTACKS, lies, scene_of
from benchmarks.warm_start.federation import LIARS, Case, warm_starts
from benchmarks.warm_start.searches import (
    best_so_far,
    draws_of,
    local_search,
    random_search,
    tpe_search,
)
from benchmarks.warm_start.sites import Report, honest_report
from benchmarks.warm_start.statistics import evaluations_to, target_of
from benchmarks.warm_start.tables import LIBRARY_DEFAULTS, Point, Table, load_tables

COLD: Final = ("cold random", "cold local", "cold TPE")
ESTIMATORS: Final[Mapping[str, str]] = {"ours": "trimmed_mean", "plain mean": "mean"}
NO_ATTACK: Final = "no attack"
CONDITIONS: Final = (NO_ATTACK, *ATTACKS)

Traces: TypeAlias = NDArray[np.float64]
"""Best error so far, shape (data sets, repetitions, evaluations)."""

_NEWCOMER, _SITE, _LIAR = range(3)  # roles, for seeds


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is computed.

    Attributes:
        repetitions: Paired searches per data set and arm.
        budget: Evaluations of each search of a newcomer.
        site_budget: Evaluations of each site that was there before.
        processes: That search at the same time.
    """

    repetitions: int
    budget: int
    site_budget: int
    processes: int = 2


FULL: Final = Effort(repetitions=30, budget=100, site_budget=100)
QUICK: Final = Effort(repetitions=3, budget=50, site_budget=50)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What was measured.

    Attributes:
        data_sets: Names, in the order of the traces.
        noise: Standard error of a table's entry, by data set.
        traces: By arm.
        effort: What was computed.
    """

    data_sets: tuple[str, ...]
    noise: Mapping[str, float]
    traces: Mapping[str, Traces]
    effort: Effort


def warm_arm(estimator: str, condition: str) -> str:
    """Return the name of a warm arm; the estimator as in `ESTIMATORS`."""
    return f"warm {estimator}, {condition}"


def tpe_arm(condition: str) -> str:
    """Return the name of the arm of TPE that begins at our warm start."""
    return f"warm TPE, {condition}"


@dataclass(frozen=True, slots=True)
class _Search:
    """One search in a worker process; `start` is None for a cold one."""

    kind: str
    data_set: str
    repetition: int
    budget: int
    start: Point | None = None


def run(effort: Effort, tell: Callable[[str], None]) -> Outcome:
    """Run all of it; `tell` hears what is being done."""
    tables = load_tables()
    names = tuple(tables)
    # Spawned, because a process that has run gRPC must not be forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(effort.processes, context) as pool:

        def search(kind: str, starts: Mapping[tuple[str, int], Point] | None = None) -> Traces:
            jobs = [
                _Search(kind, name, i, effort.budget, (starts or {}).get((name, i)))
                for name in names
                for i in range(effort.repetitions)
            ]
            found = list(pool.map(_trace, jobs, chunksize=8))
            return np.array(found).reshape(len(names), effort.repetitions, effort.budget)

        tell("searching cold: random, local, TPE")
        defaults = _everywhere(tables, effort, LIBRARY_DEFAULTS)
        traces = dict(
            zip(COLD, (search("random"), search("local", defaults), search("tpe")), strict=True)
        )
        tell("asking the federation for warm starts")
        starts = _ask(tables, effort)
        tell("searching from the warm starts")
        for estimator in ESTIMATORS:
            for condition in CONDITIONS:
                arm = warm_arm(estimator, condition)
                traces[arm] = search("local", starts[arm])
        worst = worst_attack(traces, "ours")
        tell(f"TPE from the warm starts, without an attack and under the worst one ({worst})")
        for condition in (NO_ATTACK, worst):
            traces[tpe_arm(condition)] = search("tpe", starts[warm_arm("ours", condition)])
    noise = {name: table.noise for name, table in tables.items()}
    return Outcome(names, noise, traces, effort)


def worst_attack(traces: Mapping[str, Traces], estimator: str) -> str:
    """Return the attack under which the warm start needs most evaluations to the random median at 25."""
    target = target_of(traces["cold random"])
    return max(
        ATTACKS,
        key=lambda a: float(evaluations_to(traces[warm_arm(estimator, a)], target).mean()),
    )


def cases_of(
    tables: Mapping[str, Table], honest: Mapping[tuple[str, int], Report], repetitions: int
) -> dict[tuple[str, str, int], Case]:
    """Return the cohort of each arm, data set left out and repetition."""
    cases = {}
    for left_out, table in tables.items():
        for i in range(repetitions):
            reports = {f"site-{name}": [honest[name, i]] for name in tables if name != left_out}
            claims = [report.settings for (report,) in reports.values()]
            scene = scene_of(table.space, claims, table.space.settings(table.worst()))
            for number, condition in enumerate(CONDITIONS):
                said: dict[str, Sequence[Report]] = dict(reports)
                if condition != NO_ATTACK:
                    for liar in range(LIARS):
                        rng = np.random.default_rng([_LIAR, _number(left_out), i, number, liar])
                        said[f"liar-{liar + 1}"] = lies(ATTACKS[condition], scene, rng)
                for estimator, aggregation in ESTIMATORS.items():
                    key = (warm_arm(estimator, condition), left_out, i)
                    name = f"{left_out}/{i}/{condition}/{estimator}".replace(" ", "-")
                    cases[key] = Case(name, aggregation, said)
    return cases


def _ask(tables: Mapping[str, Table], effort: Effort) -> dict[str, dict[tuple[str, int], Point]]:
    """Return where each warm arm begins, by arm, then by data set and repetition."""
    honest = {
        (name, i): honest_report(table, seed=(_SITE, _number(name), i), budget=effort.site_budget)
        for name, table in tables.items()
        for i in range(effort.repetitions)
    }
    cases = cases_of(tables, honest, effort.repetitions)
    space = next(iter(tables.values())).space
    with tempfile.TemporaryDirectory() as folder:
        given = asyncio.run(warm_starts(space, list(cases.values()), Path(folder)))
    starts: dict[str, dict[tuple[str, int], Point]] = {}
    for (arm, name, i), case in cases.items():
        starts.setdefault(arm, {})[name, i] = space.nearest(given[case.name])
    return starts


def _everywhere(
    tables: Mapping[str, Table], effort: Effort, settings: Mapping[str, float]
) -> dict[tuple[str, int], Point]:
    return {
        (name, i): table.space.nearest(settings)
        for name, table in tables.items()
        for i in range(effort.repetitions)
    }


def _trace(search: _Search) -> NDArray[np.float64]:
    table = load_tables()[search.data_set]
    seed = (_NEWCOMER, _number(search.data_set), search.repetition)
    budget = search.budget
    if search.kind == "tpe":
        number = int(np.random.SeedSequence(seed).generate_state(1)[0])
        trials = tpe_search(table, seed=number, budget=budget, start=search.start)
    else:
        draws = draws_of(table.space, seed=seed, budget=budget)
        if search.start is None:
            trials = random_search(table, draws, budget)
        else:
            trials = local_search(table, draws, budget, search.start)
    return best_so_far(trials, budget)


def _number(name: str) -> int:
    """Return a number for a name, the same in every process."""
    return int.from_bytes(name.encode(), "big")
