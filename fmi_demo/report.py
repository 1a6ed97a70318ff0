"""The closing words: what each start was worth, what else the federation knew, what to try next."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmi_demo.result import ArmResult, DemoResult, Edge
from fmi_demo.scenario import COHORTS
from fmi_demo.view import ARM_LABELS, policy_text, prior_text

__all__ = ["print_report"]


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
    for cohort, values in result.priors.items():
        console.print(Text(f"  {cohort}: {prior_text(values)}"), soft_wrap=True)
    console.print()
    console.print(_arms_table(result))
    console.print(
        f"Medians over {result.arms[0].searches} searches of {result.late_budget} evaluations that "
        "differ in their first candidate alone. The target is the cold median at their end; sooner: "
        "than the cold search with the same random numbers.",
        style="dim",
        highlight=False,
    )
    console.print()
    _print_hints(console, result)
    console.print()
    console.print(_causes_table(result.edges))
    console.print(f"Chart    {result.chart}", soft_wrap=True, highlight=False)
    console.print(f"Results  {result.results}", soft_wrap=True, highlight=False)
    console.print(f"Took {result.seconds:.0f} s. Next:", highlight=False)
    for command in result.commands:
        console.print(Text(f"  {command}", "green"), soft_wrap=True)


def _arms_table(result: DemoResult) -> Table:
    table = Table(
        title=f"The late site: evaluations until {1.0 - result.target_accuracy:.1%} wrong answers",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("start", no_wrap=True)
    for heading in ("first", "evaluations", "reached", "sooner", "final"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in result.arms:
        table.add_row(
            ARM_LABELS[arm.arm],
            f"{1.0 - arm.first:.1%}",
            _evaluations_text(arm, result.late_budget),
            f"{arm.reached}/{arm.searches}",
            "" if arm.arm == "cold" else f"{arm.sooner}/{arm.searches}",
            f"{1.0 - arm.final:.1%}",
            style="bold" if arm.arm == "warm_trimmed_mean" else "",
        )
    return table


def _evaluations_text(arm: ArmResult, budget: int) -> str:
    return f"over {budget}" if arm.evaluations is None else str(arm.evaluations)


def _print_hints(console: Console, result: DemoResult) -> None:
    for hint in result.hints:
        if not hint.bundle:
            console.print(Text(f"Policy hint of {hint.cohort}: none. {hint.reason}"))
            continue
        policy = policy_text(hint.bundle)
        tried = f"tried by the late site: accuracy {hint.before:.3f} -> {hint.after:.3f}."
        console.print(Text(f"Policy hint of {hint.cohort}: {policy}; {tried}"))
        console.print(Text(f"  {hint.reason}", "dim"))


def _causes_table(edges: tuple[Edge, ...]) -> Table:
    table = Table(
        title=f"Causes that the sites of {COHORTS[0]} found (standardised effects)",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("relation", no_wrap=True)
    for heading in ("effect", "95 % interval", "found by"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("conflict")
    for edge in edges:
        interval = (
            f"{edge.lower:+.2g} .. {edge.upper:+.2g}"
            if edge.lower is not None and edge.upper is not None
            else ""
        )
        told = {"sign": edge.sign_conflict, "direction": edge.direction_conflict}
        table.add_row(
            f"{edge.source} -> {edge.target}",
            f"{edge.weight:+.2f}",
            interval,
            f"{edge.sites} of {edge.testing_sites}",
            ", ".join(name for name, conflict in told.items() if conflict),
        )
    return table
