"""The closing words: what each start was worth, what else the federation knew, what to try next."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Final

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fmi_demo.events import HintTried
from fmi_demo.result import ArmResult, DemoResult, Edge
from fmi_demo.scenario import BOX, COHORTS
from fmi_demo.view import ARM_LABELS, percent, policy_text, value_text

__all__ = ["print_report"]

_SOURCES: Final[Mapping[str, str]] = {
    "profile_and_regime": "sites of the same profile class in the nearest regime",
    "regime": "sites of any profile class in the nearest regime",
    "profile_class": "sites of the same profile class in any regime",
    "cohort": "the whole cohort",
}
"""What the contract says of each `WarmStartSource`."""

_HUGE: Final = 100.0  # a liar can make an interval of few sites wider than a table


def print_report(console: Console, result: DemoResult) -> None:
    """Print the closing tables of a run."""
    liars = [site.site_id for site in result.sites if site.lies]
    console.print()
    console.print(
        Text(
            f"{len(result.sites)} sites sent {result.packets} packets; "
            f"{' and '.join(liars)} lied in each of theirs.",
            "bold",
        )
    )
    console.print()
    _print_priors(console, result)
    _print_arms(console, result)
    _print_hints(console, result)
    _print_causes(console, result)
    _print_next(console, result)


def _print_priors(console: Console, result: DemoResult) -> None:
    table = _table("Where to begin, by each cohort's prior [95 % interval]")
    table.add_column("setting", no_wrap=True)
    table.add_column("honest\nmedian", no_wrap=True)
    for cohort, estimator in zip(COHORTS, ("trimmed mean", "plain mean"), strict=True):
        table.add_column(f"{estimator}\n({cohort})", no_wrap=True)
    for name in BOX:
        values = [result.priors.get(cohort, {}).get(name) for cohort in COHORTS]
        table.add_row(
            name,
            f"{_honest_median(result, name):.2g}",
            *("no value" if value is None else value_text(value) for value in values),
        )
    console.print(table)
    _note(
        console,
        "gamma: scale of the kernel; eta0: learning rate; alpha: regularisation. Both cohorts got every "
        f"packet, those of the {_liars(result)} included; the trimmed mean leaves out the extremes at both "
        "ends. honest median: of what the honest sites sent, whom the demo knows and the server does not.",
    )


def _honest_median(result: DemoResult, name: str) -> float:
    """Return the median of what honest sites sent, on the log scale that settings are searched on."""
    return math.exp(
        statistics.median(math.log(site.claimed[name]) for site in result.sites if not site.lies)
    )


def _print_arms(console: Console, result: DemoResult) -> None:
    target = percent(1.0 - result.target_accuracy)
    table = _table(f"The late site: evaluations until {target} wrong answers")
    table.add_column("start", no_wrap=True)
    for heading in ("first", "evaluations", "reached", "sooner", "final"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in result.arms:
        table.add_row(
            ARM_LABELS[arm.arm],
            percent(1.0 - arm.first),
            _evaluations_text(arm, result.late_budget),
            f"{arm.reached} of {arm.searches}",
            "-" if arm.arm == "cold" else f"{arm.sooner} of {arm.searches}",
            percent(1.0 - arm.final),
            style="bold" if arm.arm == "warm_trimmed_mean" else "",
        )
    console.print(table)
    _note(
        console,
        f"{result.arms[0].searches} searches of {result.late_budget} evaluations from each start; only "
        "the first candidate differs. first, final: median wrong answers of the first and of the best "
        "candidate. evaluations: median until the target, which is the final of the random start. "
        "reached: searches that got there; sooner: in fewer evaluations than the random start with the "
        f"same random numbers.\n{_warm_starts_text(result)}",
    )


def _warm_starts_text(result: DemoResult) -> str:
    cohorts: dict[str, list[str]] = {}
    for warm in result.warm_starts:
        cohorts.setdefault(warm.source, []).append(warm.cohort)
    return " ".join(
        f"Warm start of {' and '.join(named)}: from {source}, {_SOURCES[source]}."
        for source, named in cohorts.items()
    )


def _evaluations_text(arm: ArmResult, budget: int) -> str:
    return f"over {budget}" if arm.evaluations is None else str(arm.evaluations)


def _print_hints(console: Console, result: DemoResult) -> None:
    console.print(Text("Which policy to try, by each cohort's hint", "bold"))
    for hint in result.hints:
        said = policy_text(hint.bundle) if hint.bundle else hint.reason or "no hint"
        console.print(Text(f"{hint.cohort}: {said}"))
        if hint.bundle:
            console.print(Padding(Text(_hint_text(result, hint)), (0, 0, 0, 2)))
    _note(console, f"Both cohorts heard the {_liars(result)}, who turn each effect around.")


def _hint_text(result: DemoResult, hint: HintTried) -> str:
    policy = policy_text(hint.bundle)
    gains = [s.gains[policy] for s in result.sites if not s.lies and policy in s.gains]
    return (
        f'The server: "{hint.reason}"\n'
        f"{_count_liars(result)} of these {hint.sites} sites lie. "
        f"In truth it helped {sum(gain > 0.0 for gain in gains)} of {len(gains)} honest sites.\n"
        f"The late site tried it: wrong answers {percent(1.0 - hint.before)} -> "
        f"{percent(1.0 - hint.after)}, on splits that no tuning saw."
    )


def _print_causes(console: Console, result: DemoResult) -> None:
    table = _table(f"What causes what, by the consensus of {COHORTS[0]}")
    table.add_column("relation", no_wrap=True)
    for heading in ("effect", "95 % interval", "found by", "opposite\nsign"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("conflict")
    if not result.edges:
        table.add_row("none has a quorum")
    for edge in result.edges:
        table.add_row(
            f"{edge.source} -> {edge.target}",
            f"{edge.weight:+.2f}",
            _interval_text(edge),
            f"{edge.sites} of {edge.testing_sites}",
            f"{edge.opposite_sites} of {edge.sites}",
            _conflict_text(edge),
        )
    console.print(table)
    _note(
        console,
        f"All of it is from the reports of all sites, those of the {_liars(result)} included, who turn each "
        "sign around and claim the reverse as well. effect: standard deviations per standard deviation"
        f"{_estimators_text(result)}. found by: of those who tested it; opposite sign: of those who found "
        "it. conflict: more than a third have the opposite sign, or the reverse is here too. Relations "
        f"left out because too few sites found them: {result.below_quorum}.",
    )


def _interval_text(edge: Edge) -> str:
    if edge.lower is None or edge.upper is None:
        return ""
    digits = ".2f" if max(-edge.lower, edge.upper) < _HUGE else ".2g"
    return f"{edge.lower:+{digits}} .. {edge.upper:+{digits}}"


def _estimators_text(result: DemoResult) -> str:
    names = sorted({edge.estimator for edge in result.edges})
    return f", without the extremes ({' or '.join(names)})" if names else ""


def _conflict_text(edge: Edge) -> str:
    told = {"sign": edge.sign_conflict, "direction": edge.direction_conflict}
    return ", ".join(name for name, conflict in told.items() if conflict) or "none"


def _print_next(console: Console, result: DemoResult) -> None:
    console.print(f"Chart    {result.chart}", soft_wrap=True, highlight=False)
    console.print(f"Results  {result.results}", soft_wrap=True, highlight=False)
    console.print(f"Took {result.seconds:.0f} s.", highlight=False)
    console.print()
    if not result.commands:
        return
    stopped = result.commands[0].endswith("&")
    console.print(
        "Next: serve this run's data and look around; kill %1 stops the server."
        if stopped
        else "Next: look around.",
        highlight=False,
    )
    for command in result.commands:
        console.print(Text(f"  {command}", "green"), soft_wrap=True)


def _count_liars(result: DemoResult) -> int:
    return sum(site.lies for site in result.sites)


def _liars(result: DemoResult) -> str:
    return f"{_count_liars(result)} liars"


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="",
    )


def _note(console: Console, words: str) -> None:
    """Print small print, and end the section."""
    console.print(words, style="dim", highlight=False, markup=False)
    console.print()
