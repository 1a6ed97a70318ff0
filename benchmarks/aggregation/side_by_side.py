"""Time things beside each other: rounds alternate, ratios are taken round by round, medians are told."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Task:
    """One thing to time.

    Attributes:
        name: As printed.
        run: What is timed.
        prepare: What comes before each run, not timed.
        units: Runs of the thing itself in one `run`; the time told is that of one.
        target: Largest ratio to the reference that is aimed at.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    units: int = 1
    target: float | None = None

    def seconds(self) -> float:
        if self.prepare is not None:
            self.prepare()
        started = time.perf_counter()
        self.run()
        return (time.perf_counter() - started) / self.units


@dataclass(frozen=True)
class Row:
    """A task with its median time, and the median of its ratios to the reference."""

    name: str
    seconds: float
    ratio: float
    target: float | None = None


@dataclass(frozen=True)
class Section:
    """What was measured together; the first row is the reference of the others."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=tuple)


def alternate(tasks: Sequence[Task], *, rounds: int) -> list[Row]:
    """Time the tasks in turn, after two rounds to warm up; the first is the reference."""
    times = [[task.seconds() for task in tasks] for _ in range(rounds + 2)][2:]
    rows = []
    for index, task in enumerate(tasks):
        seconds = statistics.median(row[index] for row in times)
        ratio = statistics.median(row[index] / row[0] for row in times)
        rows.append(Row(task.name, seconds, ratio, task.target))
    return rows


def text_of(section: Section) -> str:
    """Return a section as lines of text."""
    width = max(len(row.name) for row in section.rows)
    lines = [section.title]
    for row in section.rows:
        target = "" if row.target is None else f"   (target: at most {row.target:g})"
        lines.append(f"  {row.name:{width}}  {_time(row.seconds)}   ratio {row.ratio:7.2f}{target}")
    lines += [f"  {note}" for note in section.notes]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    for limit, unit, scale in ((1e-3, "us", 1e6), (1.0, "ms", 1e3)):
        if seconds < limit:
            return f"{seconds * scale:7.2f} {unit}"
    return f"{seconds:7.2f} s "
