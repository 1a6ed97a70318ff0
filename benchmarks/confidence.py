"""What a stated confidence holds: simulation, tables and chart.

A confidence is the probability that an estimate lies within its tolerance of the centre that the sites vary
about. Here the centre is known, and it is counted how many estimates lie within.

* By stated confidence, with a tolerance that is declared. The spread of a cohort is unknown beforehand: its
  logarithm is uniform over four decades around the tolerance. That is what Student's t assumes, in the
  sense that a cohort of one known spread would state too much where it happens to look narrow.
* By number of sites, with the tolerance that is taken where none is declared, and a spread of one.

    make bench-confidence       or: python benchmarks/confidence.py --cohorts 20000 --chart confidence.png
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fmi_server.aggregation import EstimatorName, EstimatorSettings, estimate
from fmi_server.aggregation.certainty import natural_tolerance

SITES = (3, 4, 5, 8, 13, 30, 100)
BINS = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1.0])
SEED = 20_260_101
LEAST = 100
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]


@dataclass(frozen=True)
class Scenario:
    """A kind of cohort: how its honest sites vary, who lies, and how weights differ."""

    name: str
    draw: Draw
    estimator: EstimatorName = "trimmed_mean"
    liars: bool = False
    unequal: bool = False


SCENARIOS = (
    Scenario("normal", lambda rng, size: rng.normal(size=size)),
    Scenario("heavy tails (t, 3 df)", lambda rng, size: rng.standard_t(3, size=size)),
    Scenario("skewed (exponential)", lambda rng, size: rng.exponential(size=size)),
    Scenario("normal, unequal weights", lambda rng, size: rng.normal(size=size), unequal=True),
    Scenario("normal, liars on one side", lambda rng, size: rng.normal(size=size), liars=True),
    Scenario("normal, median", lambda rng, size: rng.normal(size=size), "median"),
)


@dataclass(frozen=True)
class Outcome:
    """Of many cohorts: the stated confidence, and the error in units of the tolerance."""

    stated: Floats
    errors: Floats

    @property
    def held(self) -> float:
        return float((self.errors <= 1.0).mean())


def simulate(
    scenario: Scenario, sites: int, cohorts: int, rng: np.random.Generator, *, declared: bool
) -> Outcome:
    """Draw cohorts of one size; with a declared tolerance of 1, or with the natural one."""
    rules = EstimatorSettings(name=scenario.estimator)
    # What the estimator gives in the mean is the centre, of a skewed distribution too.
    centre = estimate(scenario.draw(rng, (100_000, sites)), settings=rules).value.mean()
    values = scenario.draw(rng, (cohorts, sites)) - centre
    if declared:
        values *= np.exp(rng.uniform(np.log(0.01), np.log(100.0), size=(cohorts, 1)))
    if scenario.liars:
        values[:, : max(1, sites // 10)] = 1e6
    weights = rng.uniform(0.2, 1.0, size=values.shape) if scenario.unequal else None
    table = estimate(
        values, weights, rules, (lambda value, _: np.ones_like(value)) if declared else natural
    )
    return Outcome(table.confidence, np.abs(table.value) / table.tolerance)


def natural(value: Floats, deviation: Floats) -> Floats:
    """Take the spread alone for what matters; the values stand around 0 and have no size."""
    return natural_tolerance(np.zeros_like(value), deviation)


def by_confidence(outcome: Outcome) -> list[tuple[float, float, float]]:
    """Return per bin the mean stated confidence, the share held, and the error 9 of 10 stay below."""
    bins = np.digitize(outcome.stated, BINS[1:-1])
    rows = []
    for number in range(len(BINS) - 1):
        stated, errors = outcome.stated[bins == number], outcome.errors[bins == number]
        if len(stated) < LEAST:
            rows.append((np.nan, np.nan, np.nan))
        else:
            rows.append((stated.mean(), (errors <= 1.0).mean(), np.quantile(errors, 0.9)))
    return rows


def draw_chart(
    declared: dict[str, Outcome], sized: dict[str, dict[int, Outcome]], path: Path
) -> None:
    """Draw stated against held, how far off a prior is, and stated and held by number of sites."""
    figure = Figure(figsize=(14, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    held_axes, far_axes, size_axes = figure.subplots(1, 3)
    for colour, marker, name in zip(COLOURS, "osD^vP", declared, strict=True):
        stated, held, far = np.array(by_confidence(declared[name])).T
        style = {"color": colour, "marker": marker, "markersize": 5}
        held_axes.plot(stated, held, label=name, **style)
        far_axes.plot(stated, far, **style)
        shares = np.array([[o.stated.mean(), o.held] for o in sized[name].values()])
        size_axes.plot(SITES, shares[:, 1] - shares[:, 0], **style)
    held_axes.plot([0, 1], [0, 1], color="#999999", linestyle=":", label="exact")
    held_axes.set_xlabel("stated confidence")
    held_axes.set_ylabel("share of the estimates within the tolerance")
    held_axes.set_title("What a confidence holds")
    held_axes.legend(frameon=False, fontsize=8)
    far_axes.axhline(1.0, color="#999999", linestyle=":")
    far_axes.set_yscale("log")
    far_axes.set_xlabel("stated confidence")
    far_axes.set_ylabel("error that 9 of 10 stay below, in tolerances")
    far_axes.set_title("How far off the estimate is")
    size_axes.axhline(0.0, color="#999999", linestyle=":")
    size_axes.set_xscale("log")
    size_axes.set_xticks(SITES, [str(sites) for sites in SITES])
    size_axes.minorticks_off()
    size_axes.set_xlabel("sites")
    size_axes.set_ylabel("share held minus confidence stated")
    size_axes.set_title("By number of sites, tolerance not declared")
    for axes in (held_axes, far_axes, size_axes):
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Simulate, print the tables, draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cohorts", type=int, default=20_000, help="of each size and kind")
    parser.add_argument("--chart", type=Path, default=Path("build/confidence.png"))
    arguments = parser.parse_args()
    rng, cohorts = np.random.default_rng(SEED), arguments.cohorts
    pooled, declared, sized = {}, {}, {}
    for scenario in SCENARIOS:
        each = {n: simulate(scenario, n, cohorts, rng, declared=True) for n in SITES}
        pooled[scenario.name] = Outcome(
            np.concatenate([outcome.stated for outcome in each.values()]),
            np.concatenate([outcome.errors for outcome in each.values()]),
        )
        declared[scenario.name] = each
        sized[scenario.name] = {
            n: simulate(scenario, n, cohorts, rng, declared=False) for n in SITES
        }
    ranges = [f"{low:.2f}-{high:.2f}" for low, high in itertools.pairwise(BINS)]
    print("Share within a declared tolerance, by stated confidence; in brackets the error, in")
    print("tolerances, that 9 of 10 stay below.\n")
    print(f"{'':<27}" + "".join(f"{title:>15}" for title in ranges))
    for name, outcome in pooled.items():
        cells = [f"{held:.2f} ({far:.3g})" for _, held, far in by_confidence(outcome)]
        print(f"{name:<27}" + "".join(f"{cell:>15}" for cell in cells))
    print("\nShare held where 0.85 to 0.95 is stated, by number of sites.\n")
    print(f"{'':<27}" + "".join(f"{n:>9}" for n in SITES))
    for name, each in declared.items():
        cells = []
        for outcome in each.values():
            held = outcome.errors[np.abs(outcome.stated - 0.9) <= 0.05] <= 1.0
            cells.append(f"{held.mean():.2f}" if len(held) >= LEAST else "-")
        print(f"{name:<27}" + "".join(f"{cell:>9}" for cell in cells))
    print("\nStated / held where no tolerance is declared, by number of sites.\n")
    print(f"{'':<27}" + "".join(f"{n:>12}" for n in SITES))
    for name, each in sized.items():
        cells = [f"{o.stated.mean():.2f}/{o.held:.2f}" for o in each.values()]
        print(f"{name:<27}" + "".join(f"{cell:>12}" for cell in cells))
    arguments.chart.parent.mkdir(parents=True, exist_ok=True)
    draw_chart(pooled, sized, arguments.chart)
    print(f"\nchart: {arguments.chart}")


if __name__ == "__main__":
    main()
