"""The demo's chart: what a start was worth, and what two liars did to the prior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fmi_demo.events import Curve
from fmi_demo.result import DemoResult, PriorValue, best_so_far
from fmi_demo.scenario import ARMS, BOX, COHORTS
from fmi_demo.view import ARM_LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_chart"]

# Okabe and Ito's palette, which people with any colour vision tell apart; the lines differ in their
# dashes and markers too.
_COLOURS: Final = dict(zip(ARMS, ("#000000", "#999999", "#0072B2", "#D55E00"), strict=True))
_DASHES: Final = dict(zip(ARMS, ("-", (0, (1, 1.5)), "-", (0, (5, 2))), strict=True))
_MARKERS: Final = dict(zip(ARMS, ("o", "v", "s", "D"), strict=True))
_LIAR: Final = "#CC79A7"
_FONT: Final = 10
_NO_ERROR: Final = 0.5 / 260  # half a wrong answer: a log scale has no zero


def draw_chart(result: DemoResult, curves: Sequence[Curve], path: Path) -> None:
    """Draw a run and write it to `path` as PNG."""
    figure = Figure(figsize=(11.5, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
    _draw_searches(left, result, curves)
    _draw_priors(right, result)
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
    at = np.arange(1, result.late_budget + 1)
    error = max(1.0 - result.target_accuracy, _NO_ERROR)
    for arm in result.arms:
        best = np.array([best_so_far(c.accuracies) for c in curves if c.arm == arm.arm])
        # Errors on a log scale show the end of a search as well as its beginning.
        wrong = np.maximum(1.0 - best, _NO_ERROR)
        low, middle, high = np.quantile(wrong, (0.25, 0.5, 0.75), axis=0)
        colour = _COLOURS[arm.arm]
        needed = f"over {result.late_budget}" if arm.evaluations is None else arm.evaluations
        if arm.arm != "library":  # its band hides the others and says nothing more
            axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(
            at,
            middle,
            color=colour,
            linestyle=_DASHES[arm.arm],
            linewidth=2,
            label=f"{ARM_LABELS[arm.arm]}: {needed}",
        )
        if arm.evaluations is not None:
            axes.plot(
                arm.evaluations,
                error,
                _MARKERS[arm.arm],
                color=colour,
                markersize=9,
                markeredgecolor="white",
                zorder=5,
            )
    axes.axhline(error, color="#555555", linewidth=0.8, zorder=1)
    axes.annotate(
        f"target: {(1.0 - result.target_accuracy) * 100:.1f} %, the cold median after {result.late_budget}",
        (1.0, error),
        xytext=(0, -8),
        textcoords="offset points",
        ha="left",
        va="top",
        bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
        fontsize=_FONT - 1,
        color="#333333",
    )
    axes.set_xlim(0.5, result.late_budget + 0.5)
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, error / 1.4), min(top, 1.0))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:g} %"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("evaluations", fontsize=_FONT)
    axes.set_ylabel("wrong answers, best so far (cross-validation, log scale)", fontsize=_FONT)
    axes.set_title(
        f"Tuning for a writer that nobody has seen: median\n"
        f"and middle half of {result.arms[0].searches} searches, lower is better",
        fontsize=_FONT + 1,
        loc="left",
    )
    legend = axes.legend(
        loc="upper right",
        fontsize=_FONT,
        title="evaluations to the target",
        title_fontsize=_FONT,
        frameon=False,
    )
    legend.set_alignment("left")
    _clean(axes)


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
    for row, (low, high) in enumerate(BOX.values()):
        axes.plot(
            (low, high),
            (row - 0.12, row - 0.12),
            color="#e4e4e4",
            linewidth=40,
            solid_capstyle="butt",
            zorder=0,
        )
    axes.set_yticks(range(len(names)), names, fontsize=_FONT)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("value (log scale; grey: what may be searched)", fontsize=_FONT)
    axes.set_title(
        "What the sites said, and the prior\nwith its 95 % interval", fontsize=_FONT + 1, loc="left"
    )
    axes.legend(
        loc="center left",
        bbox_to_anchor=(0.0, 0.5),
        fontsize=_FONT - 1,
        handletextpad=0.2,
        frameon=False,
    )
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
        label=ARM_LABELS[arm].removeprefix("warm, ") if labelled else None,
        zorder=5,
    )


def _once(row: int, offset: float, jitter: Sequence[float], *, lies: bool) -> str | None:
    """Label the first honest site and the last liar of the first row, so that each is named once."""
    if row == 0 and lies and offset == jitter[-1]:
        return "a site that lies"
    if row == 0 and not lies and offset == jitter[0]:
        return "an honest site"
    return None


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_FONT - 1)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
