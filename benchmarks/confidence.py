"""What a stated confidence holds: simulation, table and chart.

A confidence is the probability that an estimate lies within its tolerance of the centre that the sites vary
about. Here the centre is known: many cohorts are drawn, of 3 to 100 sites, whose spread is unknown
beforehand (its logarithm is uniform over four decades around the tolerance), and for the cohorts that state
a confidence of about 0.9 it is counted how many hold it.

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

SITES = (3, 4, 5, 8, 13, 30, 100)
BINS = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1.0])
SEED = 20_260_101

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


def simulate(scenario: Scenario, cohorts: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return the stated confidence of each cohort, and its error in units of the tolerance."""
    stated: list[Floats] = []
    errors: list[Floats] = []
    for sites in SITES:
        rules = EstimatorSettings(name=scenario.estimator)
        spread = np.exp(rng.uniform(np.log(0.01), np.log(100.0), size=(cohorts, 1)))
        # What the estimator gives in the mean is the centre, of a skewed distribution too.
        long_run = scenario.draw(rng, (100_000, sites))
        centre = estimate(long_run, settings=rules).value.mean()
        values = (scenario.draw(rng, (cohorts, sites)) - centre) * spread
        if scenario.liars:
            values[:, : max(1, sites // 10)] = 1e6
        weights = rng.uniform(0.2, 1.0, size=values.shape) if scenario.unequal else None
        table = estimate(values, weights, rules, lambda value, _: np.ones_like(value))
        stated.append(table.confidence)
        errors.append(np.abs(table.value))
    return np.concatenate(stated), np.concatenate(errors)


def draw_chart(results: dict[str, tuple[Floats, Floats]], path: Path) -> None:
    """Draw stated against held, and how far off a prior is by its confidence."""
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    held_axes, far_axes = figure.subplots(1, 2)
    colours = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
    for colour, marker, (name, (stated, errors)) in zip(
        colours, "osD^vP", results.items(), strict=True
    ):
        bins = np.digitize(stated, BINS[1:-1])
        used = [b for b in range(len(BINS) - 1) if np.count_nonzero(bins == b) >= 100]
        middle = [stated[bins == b].mean() for b in used]
        held = [(errors[bins == b] <= 1.0).mean() for b in used]
        far = [np.quantile(errors[bins == b], 0.9) for b in used]
        held_axes.plot(middle, held, color=colour, marker=marker, markersize=5, label=name)
        far_axes.plot(middle, far, color=colour, marker=marker, markersize=5, label=name)
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
    for axes in (held_axes, far_axes):
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Simulate, print the table, draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cohorts", type=int, default=20_000, help="of each size and kind")
    parser.add_argument("--chart", type=Path, default=Path("build/confidence.png"))
    arguments = parser.parse_args()
    rng = np.random.default_rng(SEED)
    results = {s.name: simulate(s, arguments.cohorts, rng) for s in SCENARIOS}
    ranges = [f"{low:.2f}-{high:.2f}" for low, high in itertools.pairwise(BINS)]
    print("Share within the tolerance, by stated confidence; in brackets the error, in tolerances,")
    print("that 9 of 10 stay below.\n")
    print(f"{'':<28}" + "".join(f"{r:>16}" for r in ranges))
    for name, (stated, errors) in results.items():
        bins = np.digitize(stated, BINS[1:-1])
        cells = []
        for number in range(len(ranges)):
            found = errors[bins == number]
            share, far = (found <= 1.0).mean(), np.quantile(found, 0.9)
            cells.append(f"{share:.3f} ({far:.3g})")
        print(f"{name:<28}" + "".join(f"{cell:>16}" for cell in cells))
    arguments.chart.parent.mkdir(parents=True, exist_ok=True)
    draw_chart(results, arguments.chart)
    print(f"\nchart: {arguments.chart}")


if __name__ == "__main__":
    main()
