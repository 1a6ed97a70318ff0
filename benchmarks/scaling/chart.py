"""The chart of docs/scaling.md: what a server meets first, what levels withstand, what a sketch costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.scaling.model import Limits, load_of
from benchmarks.scaling.plan import Demand
from benchmarks.scaling.unit_costs import UnitCosts

__all__ = ["draw"]

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SIZES: Final = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
PLACES: Final = {
    "flat": "all sites at once",
    "spread": "two levels, liars everywhere",
    "whole regions": "two levels, whole regions lie",
    "aimed": "two levels, liars placed to do most harm",
}


def draw(costs: UnitCosts, simulated: dict[str, Any], path: Path) -> None:
    """Draw it and write it to `path` as PNG."""
    figure = Figure(figsize=(14, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    limits, lies, sketches = figure.subplots(1, 3)
    _limits(limits, costs)
    _lies(lies, simulated["breakdowns"])
    _sketches(sketches, simulated["sketches"])
    for axes in (limits, lies, sketches):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.title.set_fontsize(10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _limits(axes: Axes, costs: UnitCosts) -> None:
    shares = [load_of(Demand(sites).duty, costs).shares(Limits()) for sites in SIZES]
    for colour, name in zip(COLOURS, shares[0], strict=False):
        axes.loglog(SIZES, [share[name] for share in shares], color=colour, marker=".", label=name)
    axes.axhline(1.0, color="#444444", linewidth=1.0)
    axes.set_ylim(bottom=1e-3)
    axes.set_xlabel("sites of one server")
    axes.set_ylabel("share of the limit")
    axes.set_title("What one server meets first (computed)")
    axes.legend(frameon=False, fontsize=8)


def _lies(axes: Axes, found: list[dict[str, Any]]) -> None:
    most = max(row["sites"] for row in found)
    rows = [row for row in found if row["sites"] == most]
    for colour, (place, label) in zip(COLOURS, PLACES.items(), strict=False):
        shares = [row["share"] * 100 for row in rows]
        moved = [max(row["moved"][place], 1e-3) for row in rows]
        # Liars everywhere do to two levels what they do to one: the lines lie on each other.
        style = "--" if place == "spread" else "-"
        axes.loglog(shares, moved, style, color=colour, marker=".", label=label)
        broken = [
            (share, value)
            for share, value, row in zip(shares, moved, rows, strict=True)
            if row["broken"][place] > 0.0
        ]
        if broken:
            axes.loglog(
                *zip(*broken, strict=True), "o", color=colour, markersize=8, fillstyle="none"
            )
    axes.set_xlabel("sites that lie, %")
    axes.set_ylabel("moved by (standard deviations)")
    axes.set_title(
        f"Lies of up to ten standard deviations, {most:,} sites\n"
        "(ringed: lost where nothing bounds a lie)"
    )
    axes.set_ylim(top=200.0)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _sketches(axes: Axes, found: dict[str, Any]) -> None:
    for colour, row in zip(COLOURS, found["accuracy"], strict=False):
        axes.loglog(
            row["merged_bytes"], row["trimmed_mean_error"], "o", color=colour, label=row["kind"]
        )
        if row["joined_error"] is not None:
            size = row["region_bytes"] * found["regions"]
            axes.loglog(size, row["joined_error"], "s", color=colour, fillstyle="none")
    chance = found["sites"] ** -0.5
    axes.axhline(chance, color="#444444", linewidth=1.0, label="chance among the sites")
    axes.set_xlabel("bytes for a signal")
    axes.set_ylabel("error (standard deviations)")
    axes.set_title("Trimmed mean by sketches\n(dots: merged; squares: kept by region)")
    axes.legend(frameon=False, fontsize=8)
