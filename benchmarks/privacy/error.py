"""Simulate the error of one private release, through the mechanism itself, beside what its plan predicts.

Many releases of cohorts of known values: how far the means are from the true means of the sites, as a root
mean square over the signals that have a value, in units of half the width between the bounds; and the share
of the signals that have none. The prediction is the plan's own, which draws nothing.

    make privacy-error      or: python -m benchmarks.privacy.error --plot build/privacy-error.png

The noise comes from seeds here, so that a run can be repeated; a server takes it from the operating system.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from fmi_server.aggregation import CohortMatrix, SignalRule, UnitCells
from fmi_server.privacy.budget import BudgetPlan, PrivacySettings, plan_budget
from fmi_server.private_prior import private_prior

SITES = (10, 30, 100, 300, 1_000, 3_000, 10_000)
SIGNALS = (1, 5, 20, 100, 200)
BUDGETS = (PrivacySettings(1.0, 1e-6, dp_epochs=1), PrivacySettings(2.0, 1e-6, dp_epochs=50))
MIDDLE, HALF_WAY = 0.0, 0.5
SPREAD = 0.5
MIN_SITES = 3
DRAWS = 4_000
SEED = 20_260_101
USEFUL = 0.1
COLOURS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7")
MARKERS = "osD^v"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Error:
    """What is found for one cohort.

    Attributes:
        epsilon: the budget over all epochs.
        delta: the same.
        epochs: releases that it lasts for.
        signals: how many there are.
        sites: how many send them all.
        centre: the middle of their values, in -1..1.
        draws: estimates behind these numbers, of all signals and releases.
        without_value: share of the estimates that have no value.
        rms: root mean square error of those that have one, in half widths between the bounds; NaN where none
            has.
        planned: the same as the plan predicts it.
    """

    epsilon: float
    delta: float
    epochs: int
    signals: int
    sites: int
    centre: float
    draws: int
    without_value: float
    rms: float
    planned: float

    @property
    def ratio(self) -> float:
        """Return what is found by what is predicted."""
        return self.rms / self.planned


def cohort(values: Floats) -> UnitCells:
    """Return the cells of a cohort whose signals are bounded by -1 and 1.

    Args:
        values: signals x sites; NaN where a site does not send a signal.
    """
    names = [f"s{row}" for row in range(len(values))]
    matrix = CohortMatrix(SignalRule(name, "controller", -1.0, 1.0) for name in names)
    for site, column in enumerate(values.T):
        sent = {
            name: value
            for name, value in zip(names, column.tolist(), strict=True)
            if not math.isnan(value)
        }
        matrix.put(f"site_{site}", {"controller": sent}, now=0.0)
    return matrix.unit_cells()


def simulate(
    plan: BudgetPlan, sites: int, centre: float, rng: np.random.Generator, *, draws: int = DRAWS
) -> Error:
    """Release a cohort again and again.

    Args:
        plan: the budget of the cohort, and its mechanism.
        sites: how many send all signals.
        centre: the middle of their values; they lie within `SPREAD` of it.
        rng: of the values and of the noise.
        draws: estimates wanted at least, of all signals together.
    """
    signals = plan.sums.signals
    cells = cohort(rng.uniform(centre - SPREAD, centre + SPREAD, (signals, sites)))
    truth = dict(zip(cells.names, cells.values.mean(axis=1).tolist(), strict=True))
    squares: list[float] = []
    releases = math.ceil(draws / signals)
    for _ in range(releases):
        told = private_prior(cells, plan, estimator="mean", min_sites=MIN_SITES, entropy=rng.bytes)
        squares += [
            (found.value - truth[name]) ** 2
            for name, found in told.items()
            if found.value is not None
        ]
    drawn = releases * signals
    predicted = [plan.noise_stderr(sites, mean) ** 2 for mean in truth.values()]
    return Error(
        epsilon=plan.epsilon,
        delta=plan.delta,
        epochs=plan.epochs,
        signals=signals,
        sites=sites,
        centre=centre,
        draws=drawn,
        without_value=1.0 - len(squares) / drawn,
        rms=_root_mean(squares) if squares else math.nan,
        planned=_root_mean(predicted),
    )


def _root_mean(squares: Sequence[float]) -> float:
    return math.sqrt(math.fsum(squares) / len(squares))


def table(found: Sequence[Error]) -> str:
    """Return the errors of one budget, the two centres side by side."""
    first = found[0]
    releases = "1 release" if first.epochs == 1 else f"{first.epochs} releases"
    lines = [
        f"epsilon {first.epsilon:g}, delta {first.delta:g}, over {releases}; errors of one, in half widths",
        "",
        f"{'':>17}  {'values in the middle':^35}  {'values half way to a bound':^35}",
        f"{'signals':>7}  {'sites':>8}  "
        + "  ".join([f"{'none':>6}  {'error':>8}  {'planned':>8}  {'ratio':>7}"] * 2),
    ]
    by_place = {(e.signals, e.sites, e.centre): e for e in found}
    for signals, sites in dict.fromkeys((e.signals, e.sites) for e in found):
        cells = [_cells(by_place[signals, sites, centre]) for centre in (MIDDLE, HALF_WAY)]
        lines.append(f"{signals:>7}  {sites:>8,}  " + "  ".join(cells))
    return "\n".join(lines)


def _cells(error: Error) -> str:
    found = [f"{error.without_value:>6.1%}", "       -", f"{error.planned:>8.4f}", "      -"]
    if not math.isnan(error.rms):
        found[1], found[3] = f"{error.rms:>8.4f}", f"{error.ratio:>7.3f}"
    return "  ".join(found)


def draw_chart(found: Sequence[Error], path: Path) -> None:
    """Draw the error by number of sites, a panel for each budget: marks are simulated, lines planned."""
    budgets = list(dict.fromkeys((e.epsilon, e.delta, e.epochs) for e in found))
    figure = Figure(figsize=(6.4 * len(budgets), 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        shown = [
            e for e in found if (e.epsilon, e.delta, e.epochs) == budget and e.centre == MIDDLE
        ]
        for colour, marker, signals in zip(COLOURS, MARKERS, SIGNALS, strict=True):
            line = [e for e in shown if e.signals == signals]
            if not line:
                continue
            sites = [e.sites for e in line]
            axes.plot(sites, [e.planned for e in line], color=colour, linewidth=1.2)
            # Where most have no value the error of the rest says little.
            told = [e for e in line if e.without_value < 0.5]
            axes.plot(
                [e.sites for e in told],
                [e.rms for e in told],
                color=colour,
                marker=marker,
                markersize=5,
                linestyle="none",
                label=f"{signals} signal{'' if signals == 1 else 's'}",
            )
        axes.axhline(USEFUL, color="#999999", linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(3e-4, 2.0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("sites that send every signal")
        epsilon, delta, epochs = budget
        axes.set_title(
            f"epsilon {epsilon:g}, delta {delta:g}, "
            + ("all for one release" if epochs == 1 else f"one of {epochs} releases"),
            fontsize=11,
        )
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(
        "root mean square error, in half the\nwidth between the bounds of a signal"
    )
    panels[-1].legend(frameon=False, loc="upper right")
    note = {"fontsize": 8, "color": "#666666", "va": "top"}
    panels[-1].text(SITES[0], USEFUL * 0.92, "fmi privacy plan warns above a tenth", **note)
    panels[0].text(SITES[0], 5e-4, "marks: simulated, in the middle; lines: planned", **note)
    figure.savefig(path)


def run(
    sites: Sequence[int], signals: Sequence[int], draws: int, budgets: Sequence[PrivacySettings]
) -> list[Error]:
    """Simulate all that is to be shown; each cohort has a seed of its own."""
    return [
        simulate(
            plan_budget(budget, many),
            of,
            centre,
            np.random.default_rng([SEED, number, many, of, place]),
            draws=draws,
        )
        for number, budget in enumerate(budgets)
        for many in signals
        for of in sites
        for place, centre in enumerate((MIDDLE, HALF_WAY))
    ]


def main() -> None:
    """Simulate, print the tables, draw the chart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy.error", description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=SITES)
    parser.add_argument("--signals", type=int, nargs="+", choices=SIGNALS, default=SIGNALS)
    parser.add_argument("--draws", type=int, default=DRAWS, help="estimates behind each number")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="also draw a chart into this file")
    options = parser.parse_args()
    started = time.perf_counter()
    found = run(options.sites, options.signals, options.draws, BUDGETS)
    for budget in dict.fromkeys((e.epsilon, e.epochs) for e in found):
        print(table([e for e in found if (e.epsilon, e.epochs) == budget]), end="\n\n")
    print(
        f"of {options.draws:,} draws and more each; none: share without a value; error: root mean square of "
        f"those that have one; planned: as the plan predicts it\n{time.perf_counter() - started:.0f} s"
    )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(error) for error in found], indent=2) + "\n")
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw_chart(found, options.plot)
        print(f"chart: {options.plot}")


if __name__ == "__main__":
    main()
