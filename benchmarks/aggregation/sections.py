"""What is measured side by side, section by section."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks.aggregation import peers, workload
from benchmarks.aggregation.side_by_side import Section, Task, alternate
from fmi_server.aggregation import CohortMatrix, EstimatorName, EstimatorSettings, estimate

SIGNALS, SITES = 200, 1_000
PACKET_SIGNALS = 25
PACKETS_TIMED = 500
COHORT_SIZES = (100, 10_000, 100_000)
DIRTY_SHARES = (100, 0, 1, 5, 10, 25, 50)
RULES = EstimatorSettings()


def release(rounds: int) -> Section:
    """A release in which everything changed, beside one sort of the matrix."""
    values = workload.matrix(SIGNALS, SITES)
    declared = np.random.default_rng(1).uniform(0.3, 1.0, SITES).tolist()
    trust = workload.reputations(SITES)
    alike, unlike = workload.cohort(values), workload.cohort(values, declared)
    return Section(
        f"Release of {SITES:,} sites x {SIGNALS} signals, 60 % filled, all changed",
        alternate(
            [
                Task("numpy.sort of the matrix", lambda: np.sort(values, axis=1)),
                Task(
                    "release, all sites alike",
                    lambda: alike.release(RULES, None, 1.0),
                    _changes(alike)(SIGNALS),
                    target=1.5,
                ),
                Task(
                    "release, every site its own weight",
                    lambda: unlike.release(RULES, trust, 1.0),
                    _changes(unlike)(SIGNALS),
                ),
                Task(
                    "reputation: 10 sites judged",
                    lambda: alike.score_sites(alike.sites[:10]),
                ),
                Task("reputation: all sites judged", lambda: alike.score_sites(alike.sites)),
            ],
            rounds=rounds,
        ),
    )


def estimators(rounds: int) -> Section:
    """Each estimator on the same matrix, sites alike and not."""
    values = workload.matrix(SIGNALS, SITES)
    weights = np.random.default_rng(1).uniform(0.3, 1.0, values.shape)
    tasks = [Task("numpy.sort of the matrix", lambda: np.sort(values, axis=1))]
    for name in get_args(EstimatorName):
        tasks.append(Task(name, _estimation(values, None, name)))
        if name not in ("mean", "median"):  # those count all sites alike
            tasks.append(Task(f"{name}, weighted", _estimation(values, weights, name)))
    title = f"Estimators on {SITES:,} sites x {SIGNALS} signals, without the cohort around them"
    return Section(title, alternate(tasks, rounds=rounds))


def others(rounds: int) -> Section:
    """The trimmed means of others beside ours."""
    values = workload.matrix(SIGNALS, SITES)
    held = workload.cohort(values)
    ours = Task(
        "release, all sites alike",
        lambda: held.release(RULES, None, 1.0),
        _changes(held)(SIGNALS),
    )
    return Section(
        "Trimmed means of others, which give a value and nothing else (target for Flower's: at least 15)",
        alternate([ours, *peers.tasks(values)], rounds=rounds),
        [peers.absent()],
    )


def packets(rounds: int) -> Section:
    """What one packet costs as the cohort grows."""
    tasks = []
    for sites in COHORT_SIZES:
        held = _sparse_cohort(sites)
        run = _packets_of(held, sites)
        name = f"one packet of {PACKET_SIGNALS} signals, {sites:7,} sites"
        tasks.append(Task(name, run, units=PACKETS_TIMED))
    title = f"One packet, in cohorts of {SIGNALS} signals; the sites send in random order"
    return Section(title, alternate(tasks, rounds=rounds))


def dirty(rounds: int) -> Section:
    """What a release costs as more signals changed."""
    held = workload.cohort(workload.matrix(SIGNALS, SITES))
    change = _changes(held)
    tasks = [
        Task(
            f"{share:3} % of the signals changed",
            lambda: held.release(RULES, None, 1.0),
            change(SIGNALS * share // 100),
        )
        for share in DIRTY_SHARES
    ]
    title = f"Release of {SITES:,} sites x {SIGNALS} signals as the share of changed signals grows"
    return Section(title, alternate(tasks, rounds=rounds))


def _changes(held: CohortMatrix) -> Callable[[int], Callable[[], object]]:
    """Return what makes, for a number of signals, the packet of one site that changes so many."""
    fresh = itertools.count(1)

    def change(signals: int) -> None:
        values = [1.0 + next(fresh) * 1e-9] * SIGNALS
        held.put("site_000000", workload.packet(values, range(signals)), now=1.0)

    return lambda signals: lambda: change(signals)


def _estimation(
    values: NDArray[np.float64], weights: NDArray[np.float64] | None, name: EstimatorName
) -> Callable[[], object]:
    settings = EstimatorSettings(name=name)
    return lambda: estimate(values, weights, settings)


def _sparse_cohort(sites: int) -> CohortMatrix:
    random, held = np.random.default_rng(workload.SEED), CohortMatrix()
    for site in workload.sites_of(sites):
        chosen = random.choice(SIGNALS, PACKET_SIGNALS, replace=False).tolist()
        held.put(site, workload.packet(random.normal(1.0, 0.1, SIGNALS).tolist(), chosen), now=0.0)
    return held


def _packets_of(held: CohortMatrix, sites: int) -> Callable[[], object]:
    random = np.random.default_rng(2)
    senders = [workload.sites_of(sites)[i] for i in random.integers(sites, size=PACKETS_TIMED)]
    said = [
        workload.packet(random.normal(1.0, 0.1, SIGNALS).tolist(), chosen.tolist())
        for chosen in (random.choice(SIGNALS, PACKET_SIGNALS, replace=False) for _ in senders)
    ]

    def run() -> None:
        for site, values in zip(senders, said, strict=True):
            held.put(site, values, now=1.0)

    return run
