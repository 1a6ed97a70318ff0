"""`fmi get`: read what a cohort knows."""

from __future__ import annotations

import click
from rich.text import Text

from fmi_client.commands.exits import ExitCode
from fmi_client.commands.options import FMICommand, Settings, shared_options
from fmi_client.commands.output import message_data, print_json, print_text, text
from fmi_client.commands.packets import numbers
from fmi_client.commands.session import open_client
from fmi_client.commands.updates import update_view, warm_start_view
from fmi_client.kinds import KIND_NAMES

__all__ = ["command"]


@click.command(name="get", cls=FMICommand)
@click.argument("cohort")
@click.option(
    "--kind",
    type=click.Choice(KIND_NAMES),
    help="What to read. [default: prior; warm_start with any of the last three options]",
)
@click.option(
    "--revision",
    type=click.IntRange(min=1),
    help="A revision of the past. [default: the newest]",
)
@click.option("--profile-class", metavar="CLASS", help="Warm start: the class of learner or site.")
@click.option("--regime", metavar="TAG", help="Warm start: the regime that the site works in.")
@click.option(
    "--concept",
    callback=numbers,
    multiple=True,
    metavar="NAME=NUMBER",
    help="Warm start: the score of a concept that the site sees; may be repeated.",
)
@shared_options
def command(
    settings: Settings,
    cohort: str,
    kind: str | None,
    revision: int | None,
    profile_class: str | None,
    regime: str | None,
    concept: dict[str, float],
) -> int:
    """Read the prior, warm start, policy hint or causal consensus of a COHORT.

    \b
      fmi get healthcare
      fmi get healthcare --kind causal_consensus --revision 4
      fmi get healthcare --profile-class icu-small --concept load=0.7

    Intervals are 95 % confidence intervals; "eff." is the effective number of sites after trimming and
    weighting, "trim" the number of sites left out by trimming. Metrics are observed, and not part of the
    prior.
    """  # noqa: D301 - click wants the character
    narrowed = profile_class is not None or regime is not None or bool(concept)
    if narrowed and (kind not in (None, "warm_start") or revision is not None):
        raise click.UsageError(
            "--profile-class, --regime and --concept are for the warm start of now: leave out "
            "--revision and other kinds."
        )
    with open_client(settings) as client:
        if narrowed or (kind == "warm_start" and revision is None):
            answer = client.get_warm_start(
                cohort,
                profile_class=profile_class or "",
                regime=regime or "",
                concepts=concept,
            )
            if settings.json:
                print_json(message_data(answer))
                return ExitCode.OK
            line = text(cohort, "bold cyan")
            line.append("  warm start", style="bold")
            line.append(f"  goes with prior revision {answer.prior_revision}", style="dim")
            print_text(line, Text(), *warm_start_view(answer.profile))
            return ExitCode.OK
        update = client.get_update(cohort, kind or "prior", revision or 0)
    if settings.json:
        print_json(message_data(update))
    else:
        print_text(*update_view(update))
    return ExitCode.OK
