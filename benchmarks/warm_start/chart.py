"""The chart: how fast the searches get there, what each attack leaves, and every data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from benchmarks.warm_start.experiment import CONDITIONS, ESTIMATORS, Outcome, warm_arm
from benchmarks.warm_start.statistics import TARGET_AT, share_reached, target_of
from benchmarks.warm_start.summary import GOAL, Summary, shown_arms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which people with any colour vision tell apart; dashes and markers differ too.
_COLOURS: Final = ("#000000", "#777777", "#009E73", "#56B4E9", "#0072B2", "#E69F00", "#D55E00")
_MARKERS: Final = ("o", "v", "^", "P", "s", "X", "D")
_DASHES: Final = ("-", (0, (1, 1.5)), (0, (4, 1, 1, 1)), (0, (5, 2)), "-", (0, (5, 2)), "-")
_FONT: Final = 10
_TICKS: Final = (1, 2, 5, 10, 25, 50, 100)


def draw_chart(outcome: Outcome, summary: Summary, path: Path) -> None:
    """Draw a run and write it to `path` as PNG."""
    figure = Figure(figsize=(16.5, 6.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 0.95, 1.15))
    _draw_searches(left, outcome, summary)
    _draw_attacks(middle, summary)
    _draw_data_sets(right, outcome, summary)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=_FONT - 1)
        axes.grid(axis="x", color="#eeeeee", linewidth=0.8, zorder=0)
        axes.set_axisbelow(True)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        fontsize=_FONT,
        frameon=False,
    )
    figure.suptitle(
        f"HPOBench, one data set left out: {len(outcome.data_sets) - 1} sites know the others, "
        "under an attack 2 more lie",
        fontsize=_FONT + 4,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    figure.savefig(path)


def _draw_searches(axes: Axes, outcome: Outcome, summary: Summary) -> None:
    target = target_of(outcome.traces["cold random"])
    at = np.arange(1, outcome.effort.budget + 1)
    for arm, colour, marker, dashes in zip(
        shown_arms(summary), _COLOURS, _MARKERS, _DASHES, strict=True
    ):
        axes.plot(
            at,
            share_reached(outcome.traces[arm], target),
            drawstyle="steps-post",
            color=colour,
            linestyle=dashes,
            linewidth=1.8,
            marker=marker,
            markevery=0.1,
            markersize=6,
            markeredgecolor="white",
            label=arm,
        )
    axes.axvline(TARGET_AT, color="#555555", linewidth=0.8, zorder=1)
    _evaluations(axes, outcome.effort.budget)
    axes.set_ylim(0.0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("searches that got there (% of all)", fontsize=_FONT)
    axes.set_title(
        f"Reaching random search's median error at {TARGET_AT}\n"
        f"{len(outcome.data_sets)} data sets x {outcome.effort.repetitions} searches (higher is better)",
        fontsize=_FONT + 1,
        loc="left",
    )


def _draw_attacks(axes: Axes, summary: Summary) -> None:
    for shift, (estimator, colour, marker) in zip(
        (-0.14, 0.14), zip(ESTIMATORS, ("#0072B2", "#D55E00"), ("s", "D"), strict=True), strict=True
    ):
        for row, condition in enumerate(CONDITIONS):
            fewer = summary.rows["cold random"][warm_arm(estimator, condition)].fewer
            y = row + shift
            axes.plot((fewer.lower, fewer.upper), (y, y), color=colour, linewidth=2)
            axes.plot(
                fewer.value,
                y,
                marker,
                color=colour,
                markersize=7,
                markeredgecolor="white",
                linestyle="none",
                label=f"warm {estimator}" if row == 0 else None,
            )
    axes.axvline(1.0, color="#000000", linewidth=0.8)
    axes.axvline(GOAL, color="#555555", linewidth=0.8, linestyle=(0, (5, 2)))
    axes.text(GOAL, -0.62, f" goal {GOAL:g}", fontsize=_FONT - 1, color="#555555", va="center")
    axes.set_xscale("log")
    axes.set_xlim(right=max(12.0, axes.get_xlim()[1]), left=min(0.15, axes.get_xlim()[0]))
    axes.set_xticks([0.2, 0.5, 1, 2, 5, 10])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(CONDITIONS)), CONDITIONS)
    axes.set_ylim(len(CONDITIONS) - 0.4, -0.8)
    axes.set_xlabel("times fewer evaluations than random search (log scale)", fontsize=_FONT)
    axes.set_title(
        "What each attack leaves\n95 % bootstrap over data sets (right is better)",
        fontsize=_FONT + 1,
        loc="left",
    )
    axes.legend(fontsize=_FONT - 1, frameon=False, loc="lower left")


def _draw_data_sets(axes: Axes, outcome: Outcome, summary: Summary) -> None:
    arms = shown_arms(summary)
    offsets = np.linspace(-0.36, 0.36, len(arms))
    for arm, offset, colour, marker in zip(arms, offsets, _COLOURS, _MARKERS, strict=True):
        found = summary.rows["cold random"][arm].evaluations
        axes.plot(
            [found[name] for name in outcome.data_sets],
            np.arange(len(outcome.data_sets)) + offset,
            marker,
            color=colour,
            markersize=7,
            markeredgecolor="white",
            linestyle="none",
            clip_on=False,
        )
    for row in range(1, len(outcome.data_sets)):
        axes.axhline(row - 0.5, color="#dddddd", linewidth=0.8)
    axes.set_yticks(range(len(outcome.data_sets)), outcome.data_sets)
    axes.set_ylim(len(outcome.data_sets) - 0.5, -0.5)
    _evaluations(axes, outcome.effort.budget)
    axes.set_title(
        "The same by data set\nmedian evaluations to get there (left is better)",
        fontsize=_FONT + 1,
        loc="left",
    )


def _evaluations(axes: Axes, budget: int) -> None:
    axes.set_xscale("log")
    axes.set_xlim(0.9, budget * 1.05)
    ticks = [tick for tick in _TICKS if tick <= budget]
    axes.set_xticks(ticks, [str(tick) if tick < budget else f"{tick}+" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("evaluations (number, log scale)", fontsize=_FONT)
