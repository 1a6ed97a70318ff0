"""`fmi privacy`: what a budget would mean, and what private cohorts spent."""

from __future__ import annotations

import click
from rich.console import RenderableType
from rich.text import Text

from fmi.v1 import admin_service_pb2, cohort_pb2
from fmi_client.client import FMIClient
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import Argument, FMIGroup, Settings, shared_options
from fmi_client.commands.output import (
    message_data,
    moment,
    number,
    print_json,
    print_text,
    safe,
    table,
    text,
)
from fmi_client.commands.session import open_client

__all__ = ["command"]


@click.group(name="privacy", cls=FMIGroup)
@shared_options
def command(_settings: Settings) -> None:
    """Plan a privacy budget; see what private cohorts spent and what is left.

    \b
      fmi privacy plan --sites 200 --signals 20 --epsilon 2 --delta 1e-6 --epochs 50
      fmi privacy plan --sites 200 --cohort healthcare
      fmi privacy ledger
      fmi privacy ledger healthcare
    """  # noqa: D301 - click wants the character


@command.command("plan")
@click.option("--sites", type=click.IntRange(1, 2**32 - 1), required=True, help="Sites expected.")
@click.option(
    "--cohort", metavar="COHORT", help="Take signals and budget from the spec of a cohort."
)
@click.option("--signals", type=click.IntRange(1, 4096), help="Signals that are released together.")
@click.option(
    "--signals-per-site",
    type=click.IntRange(1, 4096),
    help="Signals that each sends. [default: all]",
)
@click.option(
    "--min-sites",
    type=click.IntRange(1, 2**32 - 1),
    help="Sites needed for a value (vote_min_sites). [default: the cohort's, or 3]",
)
@click.option("--epsilon", "dp_epsilon", type=float, help="The budget over all epochs.")
@click.option(
    "--delta", "dp_delta", type=float, help="The same; well below 1 over the number of sites."
)
@click.option(
    "--epochs",
    "dp_epochs",
    type=click.IntRange(1, 2**32 - 1),
    help="Releases that it must last for.",
)
@click.option(
    "--noise",
    "dp_noise_sigma",
    type=float,
    help="Standard deviation of the noise by the sensitivity.",
)
@click.option(
    "--clip-norm",
    "dp_clip_norm",
    type=float,
    help="Norm to which the vector of a site is scaled down.",
)
@shared_options
def _plan(
    settings: Settings,
    /,
    sites: int,
    cohort: str | None,
    signals: int | None,
    signals_per_site: int | None,
    min_sites: int | None,
    **budget: float | None,
) -> int:
    """Say what a budget means: the noise of a release, the expected error, and what to change.

    With --cohort, options that are given take the place of what stands in its spec.
    """
    with open_client(settings) as client:
        spec = cohort_pb2.CohortSpec() if cohort is None else client.cohort_spec(cohort).spec
        if signals is None and not spec.signals:
            raise click.UsageError("Say how many --signals, or a --cohort that declares them.")
        for name, value in budget.items():
            if value is not None:
                setattr(spec.privacy, name, value)
        if min_sites is None and spec.aggregation.HasField("vote_min_sites"):
            min_sites = spec.aggregation.vote_min_sites
        found = client.admin.plan_privacy(
            sites=sites,
            signals=spec.signals if signals is None else signals,
            privacy=spec.privacy,
            vote_min_sites=min_sites,
            signals_per_site=signals_per_site,
        )
    if settings.json:
        print_json(message_data(found))
    else:
        counted = signals or len(spec.signals)
        print_text(_plan_view(found, sites * (signals_per_site or counted) / counted))
        if found.signal_stderr:
            print_text("", _errors_view(found, spec))
        print_text(*(_advice_view(line) for line in found.advice))
    return ExitCode.OK


@command.command("ledger")
@click.argument("cohort", cls=Argument, required=False, help="The cohort. [default: all]")
@shared_options
def _ledger(settings: Settings, cohort: str | None) -> int:
    """Show what private cohorts spent and what is left; of one COHORT, every entry of its ledger."""
    with open_client(settings) as client:
        budgets = client.admin.list_privacy_budgets(cohort or "")
        spends = _spends(client, cohort)
    if settings.json:
        data: dict[str, object] = {"budgets": [message_data(budget) for budget in budgets]}
        if cohort is not None:
            data["spends"] = [message_data(spend) for spend in spends]
        print_json(data)
        return ExitCode.OK
    if not budgets:
        print_text("no cohort is private" if cohort is None else "the cohort is not private")
        return ExitCode.OK
    print_text(_budgets_view(budgets))
    if spends:
        print_text("", _spends_view(spends))
    return ExitCode.OK


def _spends(client: FMIClient, cohort: str | None) -> list[admin_service_pb2.PrivacySpend]:
    return [] if cohort is None else client.admin.list_privacy_spends(cohort)


def _plan_view(found: admin_service_pb2.PlanPrivacyResponse, sites: float) -> RenderableType:
    plan = found.plan
    listed = table("what", "value", "", right=("value",))
    for what, value, unit in (
        ("epsilon", f"{plan.epsilon:.4g}", "of all releases together"),
        ("delta", f"{plan.delta:.3g}", ""),
        ("releases", str(plan.epochs), "that it lasts for"),
        ("sensitivity", f"{plan.sensitivity:.4g}", "half widths between bounds (L2)"),
        ("noise", f"{plan.noise_multiplier:.4g}", "times the sensitivity, in each release"),
        (
            "error by noise",
            f"{found.noise_stderr:.3g}",
            f"half widths, {sites:.0f} sites, mid-range",
        ),
        ("", f"{found.noise_stderr_at_bound:.3g}", "half widths, at a bound"),
        ("least weight", f"{found.least_weight:.3g}", "sites; below it a signal has no value"),
    ):
        listed.add_row(what, value, Text(unit, "dim"))
    return listed


def _errors_view(
    found: admin_service_pb2.PlanPrivacyResponse, spec: cohort_pb2.CohortSpec
) -> RenderableType:
    listed = table("signal", "bounds", "error by noise", "unit", right=("error by noise",))
    for signal in spec.signals:
        listed.add_row(
            text(signal.name),
            f"{number(signal.lower)} .. {number(signal.upper)}",
            number(found.signal_stderr[signal.name]),
            text(signal.unit, "dim"),
        )
    return listed


def _advice_view(line: str) -> Text:
    return text(f"! {safe(line)}", "yellow")


def _budgets_view(budgets: list[admin_service_pb2.PrivacyBudget]) -> RenderableType:
    numbers = ("spent", "of epsilon", "delta", "releases", "left")
    listed = table("cohort", *numbers, "next release", right=numbers)
    for budget in budgets:
        private = budget.HasField("plan")
        listed.add_row(
            text(budget.cohort, "cyan"),
            f"{budget.epsilon_spent:.4g}" if private else "",
            f"{budget.plan.epsilon:.4g}" if private else Text("not private now", "dim"),
            f"{budget.plan.delta:.3g}" if private else "",
            str(budget.releases),
            str(budget.releases_left) if private else "",
            _next_view(budget),
        )
    return listed


def _next_view(budget: admin_service_pb2.PrivacyBudget) -> Text:
    if budget.HasField("next_release_at"):
        return text(moment(budget.next_release_at))
    return Text("exhausted", "red") if budget.HasField("plan") else Text()


def _spends_view(spends: list[admin_service_pb2.PrivacySpend]) -> RenderableType:
    # A restore charges many releases in one entry, which would look like a single dear one.
    epochs = [spend.history_epoch for spend in spends]
    restored = [old != new for old, new in zip(epochs[:1] + epochs, epochs, strict=False)]
    titles = ("entry", "for the period from", "written", "rho", *([""] if any(restored) else []))
    listed = table(*titles, right=("entry", "rho"))
    for spend, by_restore in zip(spends, restored, strict=True):
        cost = f"{spend.rho:.4g}" if spend.rho else "0" if by_restore else "opened"
        note = [Text("by a restore" if by_restore else "", "dim")] if any(restored) else []
        listed.add_row(
            str(spend.number), moment(spend.period_start), moment(spend.spent_at), cost, *note
        )
    return listed
