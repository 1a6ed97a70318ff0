"""The table and the chart of a soak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.soak.readings import MEASURES, Reading, middle, slope_per_hour

__all__ = ["WARM_UP", "draw_chart", "table"]

WARM_UP: Final = 0.2
"""The share of a run that is not looked at for growth: caches and the memory of recent updates fill up."""

_PANELS: Final = (
    ("resident memory", "MB", (("rss_mb", "server", "#0072B2"),)),
    (
        "open",
        "",
        (("descriptors", "file descriptors", "#0072B2"), ("threads", "threads", "#D55E00")),
    ),
    ("durable Emit", "ms", (("p50_ms", "median", "#0072B2"), ("p99_ms", "99 %", "#D55E00"))),
    ("CPU", "cores", (("cpu", "server", "#0072B2"),)),
)


def warm(readings: Sequence[Reading]) -> list[Reading]:
    """Return the readings behind the warm-up."""
    end = readings[-1].at_s * WARM_UP
    return [reading for reading in readings if reading.at_s >= end]


def table(readings: Sequence[Reading]) -> str:
    """Say of each measure how it began after the warm-up, how it ended, and how fast it grew."""
    kept = warm(readings)
    few = max(1, len(kept) // 10)
    at_s = [reading.at_s for reading in kept]
    lines = [f"{'':24}{'after warm-up':>16}{'at the end':>16}{'most':>12}{'per hour':>14}"]
    lines.append("─" * len(lines[0]))
    for measure in MEASURES:
        values = [float(getattr(reading, measure.field)) for reading in kept]
        begun, ended, digits = middle(values[:few]), middle(values[-few:]), measure.digits
        grown = slope_per_hour(at_s, values)
        lines.append(
            f"{measure.title:24}{begun:>10.{digits}f} {measure.unit:5}{ended:>10.{digits}f} "
            f"{measure.unit:5}{max(values):>12.{digits}f}{grown:>+14.{digits + 1}f}"
        )
    return "\n".join(lines)


def draw_chart(readings: Sequence[Reading], title: str, path: Path) -> None:
    """Draw the readings over time and write them to `path` as PNG."""
    figure = Figure(figsize=(10, 9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    minutes = [reading.at_s / 60 for reading in readings]
    panels = figure.subplots(len(_PANELS), 1, sharex=True)
    for axes, (name, unit, lines) in zip(panels, _PANELS, strict=True):
        for field, label, colour in lines:
            values = [getattr(reading, field) for reading in readings]
            axes.plot(minutes, values, color=colour, linewidth=1.2, label=label)
        axes.margins(y=0.25)  # room for the legend
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{name}, {unit}" if unit else name)
        axes.axvspan(0, minutes[-1] * WARM_UP, color="#f2f2f2", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
        axes.set_axisbelow(True)
        if len(lines) > 1:
            axes.legend(frameon=False, loc="upper right", ncols=len(lines))
    panels[-1].set_xlabel("minutes (grey: warm-up)")
    panels[-1].set_xlim(0, minutes[-1])
    figure.suptitle(title, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path)
