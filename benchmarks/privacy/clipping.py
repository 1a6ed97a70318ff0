"""Simulate what a norm for the vectors of sites (dp_clip_norm) takes off the error, and what it adds.

It takes noise off, and weight off sites with long vectors: of many signals, and far from the middle of their
bounds. So where those differ from the others in what they say, means move towards the others. Both are found
here through the mechanism itself, against the true means of the sites that send a signal.

    make privacy-error      or: python -m benchmarks.privacy.clipping
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.privacy.error import Floats, cohort
from fmi_server.privacy.advice import report_plan
from fmi_server.privacy.budget import PrivacySettings, plan_budget
from fmi_server.private_prior import private_prior

EPSILON, DELTA, EPOCHS = 2.0, 1e-6, 50
MIN_SITES = 3
DRAWS = 4_000
SEED = 20_260_102


@dataclass(frozen=True)
class Case:
    """Sites and what they send.

    Attributes:
        name: as printed.
        signals: that are released together.
        sent: that each site sends.
        sites: how many.
        values: of a generator, signals and sites: signals x sites, in -1..1.
    """

    name: str
    signals: int
    sent: int
    sites: int
    values: Callable[[np.random.Generator, int, int], Floats]


@dataclass(frozen=True)
class Found:
    """What is found with one norm.

    Attributes:
        clip_norm: the norm; None for none.
        planned: error by noise in the middle, as the plan predicts it, in half widths.
        moved: root mean square of how far scaling alone moves a mean.
        rms: root mean square error of the means that there are, noise and scaling together.
        without_value: share of the means that there are not.
    """

    clip_norm: float | None
    planned: float
    moved: float
    rms: float
    without_value: float


def evenly(rng: np.random.Generator, signals: int, sites: int) -> Floats:
    """Spread values between the bounds, each by itself."""
    return rng.uniform(-1.0, 1.0, (signals, sites))


def near_the_middle(rng: np.random.Generator, signals: int, sites: int) -> Floats:
    """Spread values within half of the way to the bounds."""
    return rng.uniform(-0.5, 0.5, (signals, sites))


def some_at_a_bound(rng: np.random.Generator, signals: int, sites: int) -> Floats:
    """Let a fifth of the sites be at the upper bound in every signal, and the others near the middle."""
    values = near_the_middle(rng, signals, sites)
    values[:, : sites // 5] = 1.0
    return values


CASES = (
    Case("20 signals, evenly between the bounds", 20, 20, 1_000, evenly),
    Case("20 signals, within half of the way", 20, 20, 1_000, near_the_middle),
    Case("20 signals, a fifth of the sites at a bound", 20, 20, 1_000, some_at_a_bound),
    Case("20 of 200 signals a site, evenly", 200, 20, 10_000, evenly),
)


def norms(case: Case) -> tuple[float | None, ...]:
    """Return none, the one that `fmi privacy plan` proposes, and that of a site in the middle."""
    return None, math.sqrt(case.sent * 5.0 / 6.0), math.sqrt(case.sent / 2.0)


def simulate(case: Case, clip_norm: float | None, draws: int, seed: int = SEED) -> Found:
    """Release a cohort again and again.

    Args:
        case: the cohort.
        clip_norm: the norm; None for none.
        draws: estimates wanted at least, of all signals together.
        seed: of the values and of the noise.
    """
    rng = np.random.default_rng(seed)
    values = case.values(rng, case.signals, case.sites)
    if case.sent < case.signals:
        places = rng.random(values.shape).argsort(axis=0)
        values[places >= case.sent] = np.nan
    truth = np.nanmean(values, axis=1)
    asked = PrivacySettings(EPSILON, DELTA, dp_epochs=EPOCHS, dp_clip_norm=clip_norm)
    plan = plan_budget(asked, case.signals)
    exact = plan.sums.sums(values, np.ones(case.sites))
    scaled = (exact.values / plan.sums.value_bound) / (exact.weights / plan.sums.weight_bound)
    cells = cohort(values)
    rows = [int(name[1:]) for name in cells.names]
    squares: list[float] = []
    releases = math.ceil(draws / case.signals)
    for _ in range(releases):
        told = private_prior(cells, plan, estimator="mean", min_sites=MIN_SITES, entropy=rng.bytes)
        squares += [
            (told[name].value - truth[row]) ** 2
            for name, row in zip(cells.names, rows, strict=True)
            if told[name].value is not None
        ]
    report = report_plan(plan, case.sites, min_sites=MIN_SITES, signals_per_site=case.sent)
    return Found(
        clip_norm=clip_norm,
        planned=report.noise_stderr,
        moved=float(np.sqrt(np.mean((scaled - truth) ** 2))),
        rms=math.sqrt(math.fsum(squares) / len(squares)) if squares else math.nan,
        without_value=1.0 - len(squares) / (releases * case.signals),
    )


def lines(draws: int) -> Iterator[str]:
    """Simulate everything, and say it line by line."""
    yield (
        f"epsilon {EPSILON:g}, delta {DELTA:g}, one of {EPOCHS} releases; errors in half widths\n\n"
        f"{'':44}  {'sites':>6}  {'norm':>6}  {'planned':>8}  {'moved':>8}  {'error':>8}  {'none':>6}"
    )
    for case in CASES:
        for clip_norm in norms(case):
            found = simulate(case, clip_norm, draws)
            norm = "-" if clip_norm is None else f"{clip_norm:.2f}"
            yield (
                f"{case.name:44}  {case.sites:>6,}  {norm:>6}  {found.planned:8.4f}  {found.moved:8.4f}  "
                f"{found.rms:8.4f}  {found.without_value:6.1%}"
            )


def main() -> None:
    """Simulate, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.privacy.clipping", description=__doc__
    )
    parser.add_argument("--draws", type=int, default=DRAWS, help="estimates behind each number")
    options = parser.parse_args()
    started = time.perf_counter()
    for line in lines(options.draws):
        print(line, flush=True)
    print(
        "\nplanned: error by noise in the middle; moved: by scaling alone; error: of both, root mean square, "
        f"of {options.draws:,} draws and more; none: share without a value"
        f"\n{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
