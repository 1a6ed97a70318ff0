"""The report, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.warm_start.experiment import COLD, FULL, NO_ATTACK, Outcome, warm_arm
from benchmarks.warm_start.federation import LIARS
from benchmarks.warm_start.statistics import CHECKPOINTS, TARGET_AT, Interval, Loss
from benchmarks.warm_start.summary import GOAL, Summary, shown_arms


def text_of(outcome: Outcome, summary: Summary) -> str:
    """Return the report."""
    parts = (
        _opening(outcome),
        _arms(outcome, summary),
        _by_data_set(outcome, summary),
        _losses(outcome, summary),
        _verdict(outcome, summary),
    )
    return "\n".join(line for part in parts for line in (*part, ""))


def _opening(outcome: Outcome) -> Iterator[str]:
    effort = outcome.effort
    sets = len(outcome.data_sets)
    yield f"HPOBench MLP, {sets} data sets, each left out in turn, then searched cold and warm."
    yield (
        f"{sets - 1} sites tuned the others, with {effort.site_budget} evaluations each; under an attack "
        f"{LIARS} more lie."
    )
    yield f"{effort.repetitions} paired searches of {effort.budget} evaluations per data set and arm."
    if effort.repetitions < FULL.repetitions:
        yield f"These are too few to conclude from; a full run has {FULL.repetitions}."


def _arms(outcome: Outcome, summary: Summary) -> Iterator[str]:
    yield (
        f"Evaluations to a cold search's median error at {TARGET_AT} (mean over data sets of the medians), "
        "how many times fewer"
    )
    yield "than that cold search, with the 95 % bootstrap interval over data sets:"
    yield ""
    yield _line("", 31, (f"{cold}'s median" for cold in COLD), 23)
    for arm in outcome.traces:
        if arm.endswith(NO_ATTACK) or arm == COLD[0]:
            yield ""
        rows = [summary.rows[cold][arm] for cold in COLD]
        cells = (f"{row.mean:5.1f} {_times(row.fewer)}" for row in rows)
        mark = "  <- worst" if arm in _worst_arms(summary) else ""
        yield _line(arm, 31, cells, 23) + mark
    yield ""
    yield (
        f"A search that does not get there counts as {outcome.effort.budget}, less than it would need."
    )


def _by_data_set(outcome: Outcome, summary: Summary) -> Iterator[str]:
    arms = shown_arms(summary)
    yield f"Median evaluations to the median of random search at {TARGET_AT}, by data set:"
    yield ""
    yield _line("", 18, (arm.split(", ")[0] for arm in arms), 16)
    yield _line("", 18, (arm.partition(", ")[2] for arm in arms), 16)
    for name in outcome.data_sets:
        found = (summary.rows["cold random"][arm].evaluations[name] for arm in arms)
        yield _line(name, 18, (_count(value, outcome) for value in found), 16)


def _losses(outcome: Outcome, summary: Summary) -> Iterator[str]:
    budgets = [n for n in CHECKPOINTS if n <= outcome.effort.budget]
    compared = len(budgets) * len(outcome.data_sets)
    yield (
        f"Losses of our warm start: larger error after {', '.join(map(str, budgets))} evaluations, the whole "
        f"95 % interval above 0"
    )
    yield f"({compared} comparisons a line; of equals, {compared / 40:.1f} come out so by chance):"
    yield ""
    for arm, by_cold in summary.losses.items():
        if arm.endswith((NO_ATTACK, summary.worst["ours"])):
            for cold, found in by_cold.items():
                yield f"{arm}, against {cold}: {len(found)} of {compared}"
                yield from (f"    {_loss(loss)}" for loss in found)


def _verdict(outcome: Outcome, summary: Summary) -> Iterator[str]:
    row, worst = summary.headline(), summary.worst["ours"]
    reached = "reached" if row.fewer.value >= GOAL else "NOT reached"
    yield (
        f"Goal: {GOAL} times fewer evaluations than random search under the worst attack ({worst}): "
        f"{reached},"
    )
    yield (
        f"{_times(row.fewer, 2)}; geometric mean over data sets {_times(row.fewer_geometric, 2)}."
    )
    arm = warm_arm("ours", worst)
    for cold in COLD[1:]:
        yield f"The same to the median of {cold} at {TARGET_AT}: {_times(summary.rows[cold][arm].fewer, 2)}."
    lost = sorted(
        {
            loss.data_set
            for by_cold in summary.losses.values()
            for loss in by_cold.get("cold random", ())
        }
    )
    yield (
        "Never worse than random search by more than chance, under any attack: "
        + ("yes." if not lost else f"no; see {', '.join(lost)}.")
    )
    slower = [
        name
        for name in outcome.data_sets
        if row.evaluations[name] > summary.rows["cold random"]["cold random"].evaluations[name]
    ]
    if slower:
        yield f"Slower than random search to its median at {TARGET_AT}: {', '.join(slower)}."


def _worst_arms(summary: Summary) -> set[str]:
    return {warm_arm(estimator, worst) for estimator, worst in summary.worst.items()}


def _times(interval: Interval, digits: int = 1) -> str:
    value, lower, upper = (
        f"{number:.{digits}f}" for number in (interval.value, interval.lower, interval.upper)
    )
    return f"{value}x [{lower}, {upper}]"


def _count(evaluations: float, outcome: Outcome) -> str:
    budget = outcome.effort.budget
    return f"{budget} or more" if evaluations >= budget else f"{evaluations:g}"


def _loss(loss: Loss) -> str:
    gap = loss.difference
    return (
        f"{loss.data_set} after {loss.evaluations}: {gap.value:+.4f} [{gap.lower:.4f}, {gap.upper:.4f}]; "
        f"an entry of the table is known to {loss.noise:.4f}"
    )


def _line(name: str, width: int, cells: Iterator[str] | Sequence[str], cell: int) -> str:
    return (f"{name:<{width}}" + "".join(f"{text:>{cell}}" for text in cells)).rstrip()
