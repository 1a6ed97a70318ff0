"""The demo's chart: what a start was worth, and what two liars did to the prior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fmi_demo.events import Curve
from fmi_demo.result import ArmResult, DemoResult, PriorValue, best_so_far
from fmi_demo.scenario import ARMS, BOX, COHORTS
from fmi_demo.view import ARM_LABELS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_chart"]

# Okabe and Ito's palette, which people with any colour vision tell apart; the lines differ in their
# dashes and markers too.
_COLOURS: Final = dict(zip(ARMS, ("#000000", "#777777", "#0072B2", "#D55E00"), strict=True))
_DASHES: Final = dict(zip(ARMS, ("-", (0, (1, 1.5)), "-", (0, (5, 2))), strict=True))
_MARKERS: Final = dict(zip(ARMS, ("o", "v", "s", "D"), strict=True))
_SIZES: Final = dict(zip(ARMS, (12, 10, 8, 6.5), strict=True))  # markers at one point stay visible
_LIAR: Final = "#CC79A7"
_SETTINGS: Final = {"gamma": "kernel scale", "eta0": "learning rate", "alpha": "regularisation"}
_FONT: Final = 10
_NO_ERROR: Final = 0.5 / 260  # half a wrong answer: a log scale has no zero
_TICK_EVERY: Final = 5


def draw_chart(result: DemoResult, curves: Sequence[Curve], path: Path) -> None:
    """Draw a run and write it to `path` as PNG."""
    figure = Figure(figsize=(11.5, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.2, 1.0))[0]
    _draw_searches(left.subplots(), result, curves)
    _draw_priors(right.subplots(), result)
    liars = sum(site.lies for site in result.sites)
    figure.suptitle(
        f"A late site asks {len(result.sites)} others where to begin; {liars} of them lie",
        fontsize=_FONT + 4,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    figure.savefig(path)


def _draw_searches(axes: Axes, result: DemoResult, curves: Sequence[Curve]) -> None:
    target = max(1.0 - result.target_accuracy, _NO_ERROR)
    for arm in result.arms:
        _draw_arm(axes, arm, [c for c in curves if c.arm == arm.arm])
    axes.axhline(
        target,
        color="#555555",
        linewidth=0.8,
        zorder=1,
        label=f"target: {percent(1.0 - result.target_accuracy)}, the random start's median "
        f"after {result.late_budget}",
    )
    axes.set_xlim(0.5, result.late_budget + 0.5)
    axes.set_xticks([1, *range(_TICK_EVERY, result.late_budget + 1, _TICK_EVERY)])
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, target / 1.4), min(top, 1.0))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("candidates evaluated by the late site (number)", fontsize=_FONT)
    axes.set_ylabel("wrong answers of the best so far (%, log scale)", fontsize=_FONT)
    axes.set_title(
        "Tuning for a writer that nobody has seen (lower is better)\n"
        f"line: median, band: middle half of {result.arms[0].searches} searches, cross-validated",
        fontsize=_FONT + 1,
        loc="left",
    )
    _legend_below(axes, title="start: median evaluations to the target (marker)")
    _clean(axes)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8, zorder=0)


def _draw_arm(axes: Axes, arm: ArmResult, curves: Sequence[Curve]) -> None:
    """Draw the searches from one start: as steps, for the best so far changes at evaluations alone."""
    best = np.array([best_so_far(curve.accuracies) for curve in curves])
    # Errors on a log scale show the end of a search as well as its beginning.
    wrong = np.maximum(1.0 - best, _NO_ERROR)
    low, middle, high = np.quantile(wrong, (0.25, 0.5, 0.75), axis=0)
    at = np.arange(1, best.shape[1] + 1)
    colour = _COLOURS[arm.arm]
    if arm.arm != "library":  # its band hides the others and says nothing more
        axes.fill_between(at, low, high, step="post", color=colour, alpha=0.12, linewidth=0)
    axes.plot(
        at,
        middle,
        drawstyle="steps-post",
        color=colour,
        linestyle=_DASHES[arm.arm],
        linewidth=2,
        marker="" if arm.evaluations is None else _MARKERS[arm.arm],
        markevery=[(arm.evaluations or 1) - 1],
        markersize=_SIZES[arm.arm],
        markeredgecolor="white",
        zorder=3,
        label=_arm_label(arm, budget=best.shape[1]),
    )


def _arm_label(arm: ArmResult, *, budget: int) -> str:
    needed = f"over {budget}" if arm.evaluations is None else arm.evaluations
    without = " (band not drawn)" if arm.arm == "library" else ""
    return f"{ARM_LABELS[arm.arm]}: {needed}{without}"


def _draw_priors(axes: Axes, result: DemoResult) -> None:
    names = list(BOX)
    jitter = [float(x) for x in np.linspace(-0.16, 0.16, len(result.sites))]
    for row, name in enumerate(names):
        for offset, site in zip(jitter, result.sites, strict=True):
            axes.plot(
                site.claimed[name],
                row - 0.12 + offset,
                "X" if site.lies else "o",
                color=_LIAR if site.lies else "#777777",
                markersize=7 if site.lies else 4.5,
                markeredgewidth=0,
                clip_on=False,
                zorder=4 if site.lies else 2,
                label=_once(row, offset, jitter, lies=site.lies),
            )
        for arm, cohort, shift in zip(ARMS[2:], COHORTS, (0.24, 0.36), strict=True):
            value = result.priors.get(cohort, {}).get(name)
            if value is not None:
                _draw_value(axes, value, row + shift, arm, labelled=row == 0)
    axes.set_xscale("log")
    axes.set_xlim(
        min(low for low, _ in BOX.values()) / 2, max(high for _, high in BOX.values()) * 2
    )
    for row, bounds in enumerate(BOX.values()):
        axes.fill_between(
            bounds,
            row - 0.32,
            row + 0.08,
            color="#e8e8e8",
            linewidth=0,
            zorder=0,
            label="what may be searched" if row == 0 else None,
        )
    axes.set_yticks(range(len(names)), [f"{n}\n({_SETTINGS[n]})" for n in names], fontsize=_FONT)
    axes.set_ylim(len(names) - 0.45, -0.45)
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("value of the setting (no unit, log scale)", fontsize=_FONT)
    axes.set_title(
        "What the sites said, liars included,\nand each cohort's prior with its 95 % interval",
        fontsize=_FONT + 1,
        loc="left",
    )
    _legend_below(axes, title="reports (above) and priors (below)")
    _clean(axes)


def _draw_value(axes: Axes, value: PriorValue, y: float, arm: str, *, labelled: bool) -> None:
    if value.lower is not None and value.upper is not None:
        axes.plot((value.lower, value.upper), (y, y), color=_COLOURS[arm], linewidth=2.5)
    axes.plot(
        value.value,
        y,
        _MARKERS[arm],
        color=_COLOURS[arm],
        markersize=8,
        markeredgecolor="white",
        linestyle="none",
        label=f"prior, {ARM_LABELS[arm].removeprefix('warm, ')}" if labelled else None,
        zorder=5,
    )


def _once(row: int, offset: float, jitter: Sequence[float], *, lies: bool) -> str | None:
    """Label the first honest site and the last liar of the first row, so that each is named once."""
    if row == 0 and lies and offset == jitter[-1]:
        return "a site that lies"
    if row == 0 and not lies and offset == jitter[0]:
        return "an honest site"
    return None


def _legend_below(axes: Axes, *, title: str) -> None:
    """Put the legend where no run's lines can be."""
    legend = axes.legend(
        loc="upper left",
        bbox_to_anchor=(0.0, -0.13),
        borderaxespad=0.0,
        fontsize=_FONT,
        title=title,
        title_fontsize=_FONT,
        frameon=False,
    )
    legend.set_alignment("left")


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_FONT - 1)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
